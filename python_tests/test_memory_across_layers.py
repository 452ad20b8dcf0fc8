"""The gates of `Ember` that no operator has, against their definitions by loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ember_ext import reference
from ember_ext.models import Ember, EmberConfig, MembraneGate, PersistenceParameters
from ember_ext.models._attention import _dropped
from ember_ext.reference.lif_attention import dropout_keep
from ember_ext.reference.persistent_lif_attention import PersistenceState, persistent_weights

GATES = ("threshold", "leak", "steepness", "persistence", "coupling")


def inputs(batch: int = 2, heads: int = 3, tokens: int = 7, size: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    gates = torch.rand(5, heads, dtype=torch.float64, generator=generator)
    return {
        "query": draw(batch, heads, tokens, size),
        "key": draw(batch, heads, tokens, size),
        **dict(zip(GATES, gates.unbind(), strict=True)),
        "steepness": 9 * gates[2] + 1,
        "trace": draw(batch, heads, tokens, 1).abs(),
    }


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_loops(
    query: Tensor, key: Tensor, trace: Tensor, **gates: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights, and the next trace in both modes, pair by pair."""
    batch, heads, tokens, size = query.shape
    w = query.new_zeros(batch, heads, tokens, tokens)
    traces = {mode: torch.zeros_like(trace) for mode in ("causal", "look_ahead")}
    for b in range(batch):
        for h in range(heads):
            theta, leak, k, persistence, coupling = (gates[name][h].item() for name in GATES)
            f = [[0.0] * tokens for _ in range(tokens)]
            for i in range(tokens):
                threshold = theta + coupling * trace[b, h, i, 0].item()
                scores = [(query[b, h, i] @ key[b, h, j]).item() for j in range(i + 1)]
                e = [math.exp(s / math.sqrt(size)) for s in scores]
                p = [x / sum(e) for x in e] + [0.0] * (tokens - i - 1)
                f[i] = [sigmoid(k * (x - threshold)) for x in p]
                row = [x * (y + leak * (1 - y)) for x, y in zip(p, f[i], strict=True)]
                w[b, h, i] = torch.tensor(row) / (sum(row) + 1e-8)
            for i in range(tokens):
                for mode, n in (("causal", i + 1), ("look_ahead", tokens)):
                    mean = sum(sum(r[:n]) for r in f[:n]) / n**2
                    traces[mode][b, h, i] = persistence * trace[b, h, i, 0] + mean
    return w, traces


@pytest.mark.parametrize("mode", ["causal", "look_ahead"])
def test_persistent_weights_are_their_definition(mode: Any) -> None:
    tensors = inputs()
    expected, traces = by_loops(**tensors)
    w, trace, _ = persistent_weights(**tensors, mode=mode)
    torch.testing.assert_close(w, expected)
    torch.testing.assert_close(trace.expand_as(traces[mode]), traces[mode])


def test_the_causal_trace_is_that_of_a_text_which_ends_there() -> None:
    """The paper's statistic, which looks at all of a text, on each beginning of one."""
    tensors = inputs()
    tensors.pop("trace")
    query, key = tensors.pop("query"), tensors.pop("key")
    _, causal, _ = persistent_weights(query, key, **tensors)
    for n in range(1, query.shape[2] + 1):
        beginning = persistent_weights(query[:, :, :n], key[:, :, :n], **tensors, mode="look_ahead")
        torch.testing.assert_close(beginning[1][:, :, 0], causal[:, :, n - 1])


@pytest.mark.parametrize("splits", [[1] * 7, [3, 4], [1, 5, 1]])
def test_a_state_carries_persistent_weights_on(splits: list[int]) -> None:
    tensors = inputs()
    w, trace, state = persistent_weights(**tensors)
    query, key, before = (tensors.pop(name) for name in ("query", "key", "trace"))
    past, end, traces = None, 0, []
    for n in splits:
        start, end = end, end + n
        part, next_trace, past = persistent_weights(
            query[:, :, start:end],
            key[:, :, :end],
            **tensors,
            trace=before[:, :, start:end],
            past=past,
        )
        torch.testing.assert_close(part, w[:, :, start:end, :end])
        traces.append(next_trace)
    torch.testing.assert_close(torch.cat(traces, 2), trace)
    torch.testing.assert_close(past, state)


@pytest.mark.parametrize("mode", ["causal", "look_ahead"])
def test_persistent_weights_are_differentiable_in_everything(mode: Any) -> None:
    tensors = {name: t.requires_grad_() for name, t in inputs(1, 2, 3, 2).items()}
    past = torch.rand(2, 1, 2, dtype=torch.float64, requires_grad=True)
    key = torch.randn(1, 2, 2, 2, dtype=torch.float64)

    def weights(past: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(tensors, values, strict=True))
        named["key"] = torch.cat([key, named["key"]], 2)
        state = PersistenceState(*past) if mode == "causal" else None
        w, trace, state = persistent_weights(**named, mode=mode, past=state)
        return (w, trace, *state) if mode == "causal" else (w, trace)

    assert torch.autograd.gradcheck(weights, (past, *tensors.values()))


def test_without_a_trace_the_weights_are_those_of_lif_attention() -> None:
    tensors = inputs()
    tensors.pop("trace")
    w, _, _ = persistent_weights(**tensors)
    expected = reference.lif_attention(
        tensors["query"],
        tensors["key"],
        tensors["key"],
        *(tensors[name] for name in GATES[:3]),
        is_causal=True,
        return_weights=True,
    )[1]
    torch.testing.assert_close(w, expected)


def test_persistence_starts_where_the_released_code_does() -> None:
    gates = PersistenceParameters(2, preset="released")
    torch.testing.assert_close(gates.persistence, torch.full((2,), 1.0).sigmoid())
    torch.testing.assert_close(gates.coupling, torch.full((2,), 0.126928))
    with torch.no_grad():
        for p in gates.parameters():
            p.add_(1)
    gates.reset_parameters()
    for name, p in PersistenceParameters(2, preset="released").named_parameters():
        assert torch.equal(p, gates.get_parameter(name))


def test_a_membrane_gate_is_its_definition() -> None:
    gate = MembraneGate().double()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in gate.parameters():
            p.add_(torch.randn(1))
    leak, threshold, k = (v.item() for v in (gate.leak, gate.threshold, gate.steepness))
    layers = [torch.randn(2, 2, 3, 4, dtype=torch.float64) for _ in range(3)]
    potential = torch.zeros(1, 1, 1)
    by_token: dict[tuple[int, int], float] = {}
    for z, y in layers:
        out, potential = gate(z, y, potential)
        for place in [(b, t) for b in range(2) for t in range(3)]:
            v = leak * by_token.get(place, 0.0) + math.sqrt(sum(e**2 for e in y[place].tolist()))
            g = sigmoid(k * (v - threshold))
            by_token[place] = v * (1 - g)
            torch.testing.assert_close(out[place], g * z[place])
            assert potential[place].item() == pytest.approx(by_token[place])


def test_a_membrane_gate_starts_where_the_released_code_does() -> None:
    gate = MembraneGate()
    z = torch.ones(1, 1, 2)
    passed, _ = gate(z, torch.zeros(1, 1, 2), torch.zeros(1))
    assert passed[0, 0, 0].item() == pytest.approx(0.235, abs=5e-4)
    assert [p.numel() for p in gate.parameters()] == [1, 1, 1]
    with torch.no_grad():
        gate.raw_leak.fill_(9)
    gate.reset_parameters()
    assert gate.leak.item() == pytest.approx(sigmoid(1.0))


def test_the_potential_is_carried_across_layers() -> None:
    """Each gate gets what the gate below returned, and the output of its block's attention."""
    torch.manual_seed(0)
    model = small("lif-temporal").eval()
    attended: list[Tensor] = []
    passed: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda _m, _i, out: attended.append(out[0]))
        block.membrane.register_forward_hook(lambda _m, i, out: passed.append((i, out)))
    model(torch.randint(11, (2, 5)))
    potential = torch.zeros(1, 1, 1)
    for (arguments, results), y in zip(passed, attended, strict=True):
        assert torch.equal(arguments[1], y)
        assert torch.equal(arguments[2], potential)
        potential = results[1]
    assert potential.shape == (2, 5, 1)
    assert len(passed) == 3


def small(condition: Any, **changes: Any) -> Ember:
    sizes = {"block_size": 70, "vocab_size": 11, "n_layer": 3, "n_head": 2, "n_embd": 16}
    return Ember(EmberConfig(**{**sizes, "dropout": 0.0, "condition": condition, **changes}))


@pytest.mark.parametrize("gate_preset", ["text", "released"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_sigmoid_is_lif_up_to_rounding(gate_preset: Any, dropout: float) -> None:
    torch.manual_seed(0)
    lif = small("lif", gate_preset=gate_preset, dropout=dropout)
    control = small("sigmoid", gate_preset=gate_preset, dropout=dropout)
    for p in lif.parameters():
        p.data.add_(0.5 * torch.randn_like(p))
    control.load_state_dict(lif.state_dict())
    idx = torch.randint(11, (3, 70))
    results = []
    for model in (lif.double(), control.double()):
        torch.manual_seed(1)
        logits, loss, _ = model(idx, idx.roll(-1, 1))
        loss.backward()
        results.append((logits, *(p.grad for p in model.parameters())))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-10)
    if dropout == 0:
        assert not torch.equal(lif.float()(idx)[0], control.float()(idx)[0])


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (70, 70), (3, 130), (64, 64)])
def test_what_is_dropped_is_what_the_operator_drops(queries: int, keys: int) -> None:
    torch.manual_seed(0)
    weights = torch.empty(2, 3, queries, keys)
    torch.manual_seed(5)
    dropped = _dropped(weights, 0.3)
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, ())
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    expected = ~(dropout_keep(seed, weights.shape, 0.3) & visible)
    assert torch.equal(dropped, expected)


@pytest.mark.parametrize("condition", ["lif-temporal", "lif-persistent", "sigmoid"])
def test_autocast_rounds_as_with_lif_gates(condition: str) -> None:
    """What is carried and the gates stay in fp32, so that the loss is off by bf16's rounding."""
    torch.manual_seed(0)
    model = small(condition)
    idx = torch.randint(11, (2, 20))
    exact = model(idx, idx.roll(-1, 1))[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(idx, idx.roll(-1, 1))[1]
    rounded.backward()
    assert rounded.item() == pytest.approx(exact.item(), rel=0.01)
    half = model.bfloat16()(idx, idx.roll(-1, 1))[1]
    assert half.item() == pytest.approx(exact.item(), rel=0.02)
