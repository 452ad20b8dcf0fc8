"""The two language models: sizes, pairing, causality, state, generation, training and bad input."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ember_ext.models import Ember, EmberConfig, LiquidEmber, LiquidEmberConfig, MembraneGate
from ember_ext.models._base import LanguageModel
from ember_ext.models.ember import EmberCondition

EMBER_CONDITIONS = get_args(EmberCondition)
LIQUID_CONDITIONS = ("standard", "lif")
VOCAB, BLOCK = 11, 12


def ember(condition: str = "lif", **changes: Any) -> Ember:
    sizes: dict[str, Any] = {"block_size": BLOCK, "vocab_size": VOCAB, "n_layer": 3, "n_head": 2}
    sizes |= {"n_embd": 16, "dropout": 0.0, "condition": condition} | changes
    return Ember(EmberConfig(**sizes))


def liquid(condition: str = "lif", **changes: Any) -> LiquidEmber:
    sizes: dict[str, Any] = {"block_size": BLOCK, "vocab_size": VOCAB, "n_layer": 2, "n_embd": 8}
    sizes |= {"cfc_units": 20, "dropout": 0.0, "condition": condition} | changes
    return LiquidEmber(LiquidEmberConfig(**sizes))


def liquid_ltc(condition: str = "lif", **changes: Any) -> LiquidEmber:
    return liquid(condition, cell="ltc", **changes)


MODELS = [pytest.param(ember, c, id=f"ember-{c}") for c in EMBER_CONDITIONS] + [
    pytest.param(build, c, id=f"{build.__name__}-{c}")
    for build in (liquid, liquid_ltc)
    for c in LIQUID_CONDITIONS
]
every_model = pytest.mark.parametrize(("build", "condition"), MODELS)


def scramble(model: LanguageModel[Any]) -> LanguageModel[Any]:
    """Move every parameter well away from its initial value, so that gates differ and matter."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.5)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Waking a second thread costs more than these tiny models' work, above all on a busy box."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Sizes: the counts that the paper and its released code report.


@pytest.mark.parametrize(
    ("condition", "extra", "lif"),
    [
        ("standard", 0, 0),
        ("lif", 108, 108),
        ("lif-fixed", 0, 0),
        ("lif-refractory", 180, 180),
        ("qwen-gate", 884_736, 0),
        ("lif-temporal", 126, 126),
        ("lif-persistent", 180, 180),
        ("sigmoid", 108, 108),
    ],
)
def test_transformer_parameter_counts(condition: str, extra: int, lif: int) -> None:
    model = Ember(EmberConfig(condition=condition))
    assert model.num_parameters() == 10_745_088 + extra
    assert model.num_lif_parameters() == lif


def test_xs_transformer_parameter_count() -> None:
    config = EmberConfig(block_size=128, n_layer=2, n_head=4, n_embd=128, condition="standard")
    assert Ember(config).num_parameters() == 418_560


@pytest.mark.parametrize(
    ("n_layer", "n_embd", "cfc_units", "base", "lif"),
    [
        (2, 128, 192, 551_530, 768),
        (4, 128, 192, None, 1_536),
        (4, 256, 384, 4_344_884, 3_072),
    ],
)
def test_cfc_parameter_counts(
    n_layer: int, n_embd: int, cfc_units: int, base: int | None, lif: int
) -> None:
    standard, gated = (
        LiquidEmber(
            LiquidEmberConfig(n_layer=n_layer, n_embd=n_embd, cfc_units=cfc_units, condition=c)
        )
        for c in LIQUID_CONDITIONS
    )
    if base is not None:
        assert standard.num_parameters() == base
    assert gated.num_parameters() - standard.num_parameters() == lif
    assert gated.num_lif_parameters() == lif


def test_frozen_masks_count_as_the_paper_counts_them() -> None:
    model = LiquidEmber(LiquidEmberConfig())
    assert model.num_parameters(trainable_only=True) == 3_904_912
    assert model.num_parameters() - model.num_parameters(trainable_only=True) == 443_044


@pytest.mark.parametrize("condition", EMBER_CONDITIONS)
def test_an_ember_builds_without_memory(condition: str) -> None:
    with torch.device("meta"):
        model = ember(condition)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


# Pairing of conditions.


@pytest.mark.parametrize(
    ("build", "conditions"), [(ember, EMBER_CONDITIONS), (liquid, LIQUID_CONDITIONS)]
)
def test_conditions_start_from_the_same_weights(build: Any, conditions: tuple[str, ...]) -> None:
    weights, next_draws = [], []
    for condition in conditions:
        torch.manual_seed(42)
        weights.append(dict(build(condition).named_parameters()))
        next_draws.append(torch.rand(()).item())
    shared = weights[0]
    assert all(torch.equal(w[name], shared[name]) for w in weights for name in shared)
    assert len(set(next_draws)) == 1


@pytest.mark.parametrize(
    ("build", "conditions"), [(ember, EMBER_CONDITIONS), (liquid, LIQUID_CONDITIONS)]
)
def test_conditions_drop_the_same_elements(build: Any, conditions: tuple[str, ...]) -> None:
    """With a leak of 1 a gate passes everything, so that only dropout could tell them apart."""
    idx = tokens(2, BLOCK)
    logits, next_draws = {}, []
    for condition in conditions:
        torch.manual_seed(42)
        model = build(condition, dropout=0.3)
        for gate in model.gates().values():
            gate.raw_leak.data.fill_(100.0)
        for module in model.modules():
            if isinstance(module, MembraneGate):  # no parameters open it where attention gives 0
                module.forward = lambda z, y, potential: (z, potential)
        logits[condition] = model(idx)[0]
        next_draws.append(torch.rand(()).item())
    assert len(set(next_draws)) == 1
    # Qwen's gate cannot be opened fully, so that its logits are its own.
    logits.pop("qwen-gate", None)
    for other in logits.values():
        torch.testing.assert_close(other, logits["standard"])


def test_initial_weights_have_the_paper_s_scales() -> None:
    model = Ember(EmberConfig(n_layer=2, bias=True))
    block = model.blocks[1]
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert block.mlp.c_proj.bias.abs().max() == 0
    liquid_block = LiquidEmber(LiquidEmberConfig(n_layer=1)).blocks[0]
    assert liquid_block.mlp.c_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    internals = dict(liquid_block.cfc.named_parameters())
    for layer in range(3):
        for head in ("ff1", "ff2", "time_a", "time_b"):
            name = f"rnn_cell.layer_{layer}.{head}"
            assert internals[f"{name}.weight"].std().item() == pytest.approx(0.02, rel=0.05)
            assert internals[f"{name}.bias"].abs().max() == 0


# State.


@every_model
@pytest.mark.parametrize("splits", [[12], [1] * 12, [5, 1, 1, 2, 3]])
def test_any_split_gives_the_whole_s_logits(build: Any, condition: str, splits: list[int]) -> None:
    model = scramble(build(condition)).double().eval()
    idx = tokens(3, BLOCK)
    whole, _, _ = model(idx)
    state, pieces = model.initial_state(3), []
    for piece in idx.split(splits, 1):
        logits, _, state = model(piece, state=state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)


@every_model
def test_a_state_can_be_continued_in_several_ways(build: Any, condition: str) -> None:
    model = scramble(build(condition)).eval()
    _, _, state = model(tokens(2, 4), state=model.initial_state(2))
    a, b = tokens(2, 3), tokens(2, 3)
    first, _, _ = model(a, state=state)
    model(b, state=state)
    again, _, _ = model(a, state=state)
    assert torch.equal(first, again)


@every_model
def test_a_saved_state_goes_on(build: Any, condition: str) -> None:
    model = scramble(build(condition)).eval()
    idx = tokens(2, 9)
    _, _, state = model(idx[:, :5], state=model.initial_state(2))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    rest = idx[:, 5:]
    assert torch.equal(model(rest, state=loaded)[0], model(rest, state=state)[0])


@every_model
def test_no_state_is_made_unless_asked_for(build: Any, condition: str) -> None:
    assert build(condition)(tokens(2, 4))[2] is None


def test_gradients_flow_through_a_liquid_state_until_detached() -> None:
    model = liquid()
    state = model.initial_state(2)
    _, _, state = model(tokens(2, 4), state=state)
    assert all(h.requires_grad for h in state.hidden)
    assert not any(h.requires_grad for h in state.detach().hidden)


def test_liquid_ember_reads_beyond_block_size() -> None:
    model = liquid()
    assert model(tokens(1, 2 * BLOCK))[0].shape == (1, 2 * BLOCK, VOCAB)


# Causality.


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_later_tokens_do_not_change_earlier_logits(
    build: Any, condition: str, dtype: torch.dtype
) -> None:
    model = scramble(build(condition)).to(dtype).eval()
    idx = tokens(2, BLOCK)
    changed = idx.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


LOOKING_BACK = [("lif-refractory", "refractory_mode"), ("lif-persistent", "persistence_mode")]


@pytest.mark.parametrize(("condition", "field"), LOOKING_BACK)
def test_a_looking_ahead_mode_leaks_and_says_so(condition: str, field: str) -> None:
    model = scramble(ember(condition, **{field: "look_ahead"})).double().eval()
    idx = tokens(2, BLOCK)
    changed = idx.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB
    assert not torch.equal(model(idx)[0][:, :7], model(changed)[0][:, :7])
    assert not model.incremental
    with pytest.raises(ValueError, match=f"{field} must be 'causal'"):
        model.initial_state(1)
    with pytest.raises(ValueError, match=f"state must be None with {field} 'look_ahead'"):
        model(idx, state=ember().initial_state(2))


# Attention weights.


@pytest.mark.parametrize("mode", ["causal", "look_ahead"])
@pytest.mark.parametrize("condition", EMBER_CONDITIONS)
def test_attention_weights_are_those_that_forward_applies(condition: str, mode: str) -> None:
    modes = {field: mode for _, field in LOOKING_BACK}
    model = scramble(ember(condition, **modes)).double().eval()
    idx = tokens(2, 7)
    values, outputs = [], []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda m, args: values.append(m.qkv(args[0])[2]))
        block.attn.c_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.no_grad():
        model(idx)
    weights = list(model.attention_weights(idx))
    for w, value, output in zip(weights, values[:3], outputs[:3], strict=True):
        assert w.shape == (2, 2, 7, 7)
        torch.testing.assert_close(w.sum(-1), torch.ones_like(w.sum(-1)))
        if condition != "qwen-gate":
            torch.testing.assert_close((w @ value).transpose(1, 2).flatten(2), output)
    gated, plain = (torch.stack(list(model.attention_weights(idx, gated=g))) for g in (True, False))
    assert torch.equal(gated, plain) == (condition in ("standard", "qwen-gate"))


# Generation.


def naive_continuation(model: LanguageModel[Any], idx: Tensor, new: int, limit: int) -> Tensor:
    for _ in range(new):
        logits = model(idx[:, -limit:])[0][:, -1]
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], 1)
    return idx


@pytest.mark.parametrize(
    ("build", "condition", "fields"),
    [(ember, c, {}) for c in EMBER_CONDITIONS]
    + [(ember, c, {field: "look_ahead"}) for c, field in LOOKING_BACK]
    + [(liquid, "standard", {}), (liquid, "lif", {})],
)
def test_generation_equals_full_forwards(
    build: Any, condition: str, fields: dict[str, str]
) -> None:
    """Through the point where the Transformer's window starts to slide."""
    model = scramble(build(condition, **fields)).double()
    prompt = tokens(2, 5)
    out = model.generate(prompt, 2 * BLOCK, temperature=0)
    assert model.training
    model.eval()
    limit = BLOCK if build is ember else 10**9
    assert torch.equal(out, naive_continuation(model, prompt, 2 * BLOCK, limit))


def test_generation_from_a_prompt_longer_than_the_window() -> None:
    model = scramble(ember()).double().eval()
    prompt = tokens(1, 2 * BLOCK)
    expected = naive_continuation(model, prompt, 3, BLOCK)
    assert torch.equal(model.generate(prompt, 3, temperature=0), expected)


def test_generation_leaves_each_part_in_its_mode() -> None:
    model = ember().train()
    frozen = model.get_submodule("blocks.0.mlp").eval()
    model.generate(tokens(1, 3), 2)
    assert model.training
    assert not any(module.training for module in frozen.modules())
    assert model.get_submodule("blocks.1.mlp.dropout").training


def test_sampling_follows_its_generator_temperature_and_top_k() -> None:
    model = scramble(liquid()).eval()
    prompt = tokens(2, 3)

    def sample(seed: int, **options: Any) -> Tensor:
        return model.generate(prompt, 20, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    greedy = model.generate(prompt, 20, temperature=0)
    assert torch.equal(sample(1, top_k=1), greedy)
    assert torch.equal(sample(1, temperature=1e-6), greedy)
    assert torch.equal(sample(1, top_k=10 * VOCAB), sample(1))
    assert torch.equal(model.generate(prompt, 0), prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be ≥ 0, got -1"),
        ({"temperature": -0.5}, "temperature must be finite and ≥ 0, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be finite and ≥ 0, got nan"),
        ({"top_k": 0}, "top_k must be ≥ 1 or None, got 0"),
    ],
)
def test_generation_rejects(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"ember_ext.models.Ember.generate: {message}")):
        ember().generate(tokens(1, 2), **({"max_new_tokens": 1} | options))


# Training.


@every_model
@pytest.mark.parametrize("gate_preset", ["text", "released"])
def test_every_parameter_gets_a_gradient(build: Any, condition: str, gate_preset: str) -> None:
    model = build(condition, gate_preset=gate_preset).double()
    _, loss, _ = model(tokens(4, BLOCK), tokens(4, BLOCK))
    loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Distributed training and an optimiser's checkpoint want one of each, if only of 0.
    assert all(p.grad is not None for p in trainable.values())
    without = {name for name, p in trainable.items() if not p.grad.any()}
    # Nothing precedes the first layer, so what acts on what is carried has nothing to act on there.
    # Nothing follows the last one, so that what persists of it has no effect.
    dead = {
        "lif-refractory": {"blocks.0.attn.gate.raw_across"},
        "lif-temporal": {"blocks.0.membrane.raw_leak"},
        "lif-persistent": {
            "blocks.0.attn.gate.raw_coupling",
            "blocks.0.attn.gate.raw_persistence",
            "blocks.2.attn.gate.raw_persistence",
        },
    }
    assert without == dead.get(condition, set())


@every_model
def test_overfits_one_batch(build: Any, condition: str) -> None:
    model = build(
        condition, n_layer=1, n_embd=32, **({"cfc_units": 48} if build is not ember else {})
    )
    optimizer = torch.optim.AdamW(model.parameter_groups(0.0), lr=1e-2)
    idx = tokens(2, BLOCK)
    for _ in range(50):
        optimizer.zero_grad()
        _, loss, _ = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@every_model
def test_compiles_without_a_graph_break(build: Any, condition: str) -> None:
    model = build(condition, n_layer=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    idx = tokens(2, 5)
    torch.testing.assert_close(compiled(idx, idx)[1], model(idx, idx)[1])


@every_model
def test_loss_is_the_mean_cross_entropy_of_counted_targets(build: Any, condition: str) -> None:
    model = build(condition)
    idx, targets = tokens(2, BLOCK), tokens(2, BLOCK)
    targets[0, 3:] = -1
    logits, loss, _ = model(idx, targets)
    kept = targets >= 0
    torch.testing.assert_close(loss, F.cross_entropy(logits[kept], targets[kept]))


@every_model
def test_parameter_groups_decay_matrices_only(build: Any, condition: str) -> None:
    model = build(condition, bias=True)
    decayed, kept = model.parameter_groups(0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() >= 2 and p.requires_grad for p in decayed["params"])
    lif = {id(p) for gate in model.gates().values() for p in gate.parameters()}
    assert lif <= {id(p) for p in kept["params"]}
    count = sum(p.numel() for group in (decayed, kept) for p in group["params"])
    assert count == model.num_parameters(trainable_only=True)


@every_model
def test_gates_are_named_after_their_modules(build: Any, condition: str) -> None:
    model = build(condition)
    gates = model.gates()
    n_layer = model.config.n_layer
    if condition in ("standard", "qwen-gate"):
        assert gates == {}
        return
    place, units = ("attn.gate", 2) if build is ember else ("gate", 8)
    assert list(gates) == [f"blocks.{i}.{place}" for i in range(n_layer)]
    for gate in gates.values():
        threshold, leak, steepness = gate.threshold, gate.leak, gate.steepness
        assert threshold.shape == leak.shape == steepness.shape == (units,)


@every_model
def test_a_state_dict_round_trips(build: Any, condition: str) -> None:
    model, other = scramble(build(condition)).eval(), build(condition).eval()
    other.load_state_dict(model.state_dict())
    idx = tokens(2, 5)
    assert torch.equal(model(idx)[0], other(idx)[0])
    config = model.config
    assert type(config)(**dataclasses.asdict(config)) == config


# Bad input.


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (EmberConfig, {"condition": "liff"}, "condition must be one of 'standard', 'lif', "),
        (LiquidEmberConfig, {"condition": "qwen-gate"}, "condition must be one of 'standard', "),
        (EmberConfig, {"gate_preset": "x"}, "gate_preset must be one of 'text', 'released', got"),
        (
            EmberConfig,
            {"refractory_mode": "x"},
            "refractory_mode must be one of 'causal', 'look_ahead'",
        ),
        (
            EmberConfig,
            {"persistence_mode": "x"},
            "persistence_mode must be one of 'causal', 'look_ahead'",
        ),
        (EmberConfig, {"n_head": 5}, "n_head must be a divisor of n_embd = 384, got 5"),
        (EmberConfig, {"n_layer": 0}, "n_layer must be a positive integer, got 0"),
        (EmberConfig, {"block_size": 1.5}, "block_size must be a positive integer, got 1.5"),
        (EmberConfig, {"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
        (EmberConfig, {"dropout": "0.1"}, "dropout must be in [0, 1), got '0.1'"),
        (LiquidEmberConfig, {"cfc_units": 258}, "cfc_units must be at least n_embd + 3 = 259"),
    ],
)
def test_config_rejects(config: Any, changes: dict[str, Any], message: str) -> None:
    prefix = f"ember_ext.models.{config.__name__}: "
    with pytest.raises(ValueError, match=re.escape(prefix + message)):
        config(**changes)


def test_smallest_liquid_ember() -> None:
    model = liquid(n_embd=1, cfc_units=4)
    assert model(tokens(2, 3))[0].shape == (2, 3, VOCAB)


@pytest.mark.parametrize("build", [ember, liquid])
@pytest.mark.parametrize(
    ("idx", "targets", "error", "message"),
    [
        (torch.full((1, 2), VOCAB), None, ValueError, "idx must be within [0, 11), got [11, 11]"),
        (torch.tensor([[0, -1]]), None, ValueError, "idx must be within [0, 11), got [-1, 0]"),
        (torch.zeros(1, 2), None, TypeError, "idx must be an int64 tensor, got torch.float32"),
        ([[0]], None, TypeError, "idx must be an int64 tensor, got list"),
        (torch.zeros(3, dtype=torch.int64), None, ValueError, "idx must be [B, T] with B, T ≥ 1"),
        (torch.zeros(0, 3, dtype=torch.int64), None, ValueError, "B, T ≥ 1, got [0, 3]"),
        (torch.zeros(3, 0, dtype=torch.int64), None, ValueError, "B, T ≥ 1, got [3, 0]"),
        (tokens(2, 3), tokens(2, 2), ValueError, "targets must be of idx's shape [2, 3], got"),
        (tokens(1, 2), torch.full((1, 2), VOCAB), ValueError, "targets must be within [-1, 11)"),
        (tokens(1, 2), torch.zeros(1, 2), TypeError, "targets must be an int64 tensor, got"),
    ],
)
def test_forward_rejects(
    build: Any, idx: Any, targets: Any, error: type[Exception], message: str
) -> None:
    model = build()
    with pytest.raises(error, match=re.escape(message)) as caught:
        model(idx, targets)
    assert str(caught.value).startswith(f"ember_ext.models.{type(model).__name__}: ")


def test_ember_rejects_more_than_block_size_tokens() -> None:
    model = ember()
    with pytest.raises(ValueError, match="idx must be at most block_size = 12 tokens long"):
        model(tokens(1, BLOCK + 1))
    _, _, state = model(tokens(1, BLOCK), state=model.initial_state(1))
    with pytest.raises(ValueError, match="state included, got 13"):
        model(tokens(1, 1), state=state)


@pytest.mark.parametrize("build", [ember, liquid])
def test_a_state_of_another_batch_size_is_rejected(build: Any) -> None:
    model = build()
    with pytest.raises(ValueError, match=r"state\."):
        model(tokens(2, 3), state=model.initial_state(3))


@pytest.mark.parametrize("build", [ember, liquid])
def test_a_state_of_another_model_is_rejected(build: Any) -> None:
    model = build()
    other = liquid() if build is ember else ember()
    with pytest.raises(TypeError, match=r"state must be an? \w*EmberState, got"):
        model(tokens(2, 3), state=other.initial_state(2))
    with pytest.raises(ValueError, match="state must be of n_layer = "):
        model(tokens(2, 3), state=build(n_layer=1).initial_state(2))


@pytest.mark.parametrize("condition", ["lif-refractory", "lif-persistent"])
def test_a_state_of_another_condition_is_rejected(condition: str) -> None:
    others = {"lif", "lif-refractory", "lif-persistent"} - {condition}
    for other in others:
        with pytest.raises(ValueError, match=f"state must be a state of condition '{condition}'"):
            ember(condition)(tokens(1, 2), state=ember(other).initial_state(1))
        with pytest.raises(ValueError, match="state must be a state of condition 'lif"):
            ember(other)(tokens(1, 2), state=ember(condition).initial_state(1))
