"""LIF attention against its reference: values, gradients, summaries, refractory modes, errors."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

import ember_ext
from ember_ext import _native, nn, ops, reference
from ember_ext.nn import AttentionCache
from ember_ext.ops import lif_attention
from ember_ext.reference.lif_attention import attention_probabilities as probabilities
from ember_ext.reference.lif_attention import dropout_keep, philox, summarize, visible_keys
from ember_ext.testing import (
    DTYPES,
    Sample,
    attention_samples,
    attention_tensors,
    check_sample,
)
from ember_ext.testing.lif_attention import gradient_scales

needs_kernels = pytest.mark.skipif(not _native.has("cpu"), reason="no compiled kernels")


def tensors(
    batch: int = 2,
    heads: int = 2,
    queries: int = 7,
    keys: int | None = None,
    size: int = 4,
    dtype: torch.dtype = torch.float32,
    groups: int | None = None,
) -> dict[str, Tensor]:
    keys, groups = queries if keys is None else keys, groups or heads
    generator = torch.Generator().manual_seed(3)
    values = attention_tensors(batch, heads, groups, queries, keys, size, dtype, generator)
    if dtype == torch.float64:
        values = {name: value.double() for name, value in values.items()}
    return values


def gradients(out: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return torch.autograd.grad(out, list(leaves.values()), weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype: torch.dtype) -> None:
    for sample in attention_samples(dtype):
        check_sample(lif_attention, reference.lif_attention, sample)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_on_a_gpu(dtype: torch.dtype) -> None:
    for sample in attention_samples(dtype):
        check_sample(lif_attention, reference.lif_attention, sample.to("cuda"))


def test_matches_reference_over_a_long_sequence() -> None:
    generator = torch.Generator().manual_seed(0)
    values = attention_tensors(1, 2, 1, 1100, 1201, 8, torch.float32, generator)
    options = {"is_causal": True, "dropout_p": 0.1, "seed": torch.tensor(7)}
    sample = Sample("long", values, options, gradient_scales(values))
    check_sample(lif_attention, reference.lif_attention, sample)


@needs_kernels
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str, assert_matches_with: Callable[[str, str], None]) -> None:
    assert_matches_with(isa, "lif_attention")


def test_gates_that_pass_everything_leave_plain_attention() -> None:
    values = tensors(queries=50, size=16, dtype=torch.float64)
    values["leak"] = torch.ones(2, dtype=torch.float64)
    actual = lif_attention(**values, is_causal=True, eps=0.0)
    expected = F.scaled_dot_product_attention(
        values["query"], values["key"], values["value"], is_causal=True
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(causal: bool) -> None:
    leaves = {
        name: value.requires_grad_()
        for name, value in tensors(1, 2, 4, 5, 3, torch.float64, groups=1).items()
    }
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.8
    options: dict[str, Any] = {"dropout_p": 0.3, "seed": torch.tensor(11), "is_causal": causal}

    def call(*values: Tensor) -> Tensor:
        return lif_attention(*values, attn_mask=mask, **options)

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


@needs_kernels
@pytest.mark.parametrize("extras", [True, False])
def test_opcheck(extras: bool) -> None:
    leaves = [value.requires_grad_() for value in tensors().values()]
    mask = torch.ones(2, 2, 7, 7, dtype=torch.bool) if extras else None
    seed = torch.tensor(5) if extras else None
    options = (0.2 if extras else 0.0, True, 0.5, 1e-8, False)
    operators = torch.ops.ember_ext
    torch.library.opcheck(operators.lif_attention.default, (*leaves, mask, seed, *options, extras))
    detached = [leaf.detach() for leaf in leaves]
    arguments = (*detached, mask, seed, *options)
    torch.library.opcheck(operators.lif_attention_forward.default, (*arguments, extras))
    out, row_stats, _, _ = operators.lif_attention_forward(*arguments, False)
    for kept in (out, None):
        torch.library.opcheck(
            operators.lif_attention_backward.default,
            (torch.randn_like(out), *detached, kept, row_stats, mask, seed, *options),
        )


@needs_kernels
def test_compiles_without_recompiling_for_new_sizes(
    counted_compile: Callable[[Callable[..., Any]], tuple[Callable[..., Any], list[Any]]],
) -> None:
    compiled, graphs = counted_compile(lif_attention)
    for i, (batch, queries) in enumerate([(2, 7), (3, 9), (4, 11), (5, 13)]):
        leaves = {n: v.requires_grad_() for n, v in tensors(batch, queries=queries).items()}
        out = compiled(**leaves, is_causal=True)
        expected = lif_attention(**leaves, is_causal=True)
        assert torch.equal(out, expected)
        for a, b in zip(gradients(out, leaves), gradients(expected, leaves), strict=True):
            assert torch.equal(a, b)
        if i >= 1:
            assert len(graphs) <= 2


@needs_kernels
def test_repeats_to_the_bit(assert_repeats: Callable[[Callable[[], list[Tensor]]], None]) -> None:
    # One head with a long sequence is split among tasks; many heads are not.
    for batch, heads, queries in ((1, 1, 1500), (5, 4, 60)):
        leaves = {
            name: value.requires_grad_()
            for name, value in tensors(batch, heads, queries, size=8).items()
        }

        def run(leaves: dict[str, Tensor] = leaves) -> list[Tensor]:
            out, summary = lif_attention(
                **leaves,
                is_causal=True,
                dropout_p=0.1,
                seed=torch.tensor(1),
                return_summary=True,
            )
            return [out, *summary, *gradients(out, leaves)]

        assert_repeats(run)


@needs_kernels
@pytest.mark.usefixtures("nan_filled_memory")
def test_no_result_depends_on_uninitialised_memory() -> None:
    for sample in attention_samples(torch.float32):
        check_sample(lif_attention, reference.lif_attention, sample)
        _, summary = lif_attention(**sample.tensors, **sample.options, return_summary=True)
        assert all(value.isfinite().all() for value in summary)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_inputs_and_keeps_the_gates(dtype: torch.dtype) -> None:
    values = tensors(queries=20)
    with torch.autocast("cpu", dtype):
        actual = lif_attention(**values, is_causal=True)
    low = {n: v.to(dtype) if v.dim() == 4 else v for n, v in values.items()}
    assert actual.dtype == dtype
    assert torch.equal(actual, lif_attention(**low, is_causal=True))
    double = {name: value.double() for name, value in values.items()}
    with torch.autocast("cpu", dtype):
        assert lif_attention(**double).dtype == torch.float64
        with pytest.raises(TypeError, match=r"key must be of query's dtype torch\.float64"):
            lif_attention(**values | {"query": double["query"]})


def _allow(tf32: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = tf32


@pytest.fixture
def precision() -> Iterator[None]:
    """What the test sets for products of fp32 ends with it."""
    owners: tuple[Any, ...] = (
        torch.backends,
        torch.backends.cuda.matmul,
        torch.backends.mkldnn.matmul,
    )
    before = [owner.fp32_precision for owner in owners]
    torch.backends.cuda.matmul.fp32_precision = "none"
    yield
    torch.set_float32_matmul_precision("highest")
    for owner, value in zip(owners, before, strict=True):
        owner.fp32_precision = value


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(
    ("ask", "allowed"),
    [
        (lambda: None, False),
        (lambda: torch.set_float32_matmul_precision("highest"), False),
        (lambda: torch.set_float32_matmul_precision("high"), True),
        (lambda: torch.set_float32_matmul_precision("medium"), True),
        (lambda: _allow(False), False),
        (lambda: _allow(True), True),
        (lambda: setattr(torch.backends, "fp32_precision", "tf32"), True),
        (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"), False),
    ],
    ids=["default", "highest", "high", "medium", "not allowed", "allowed", "everywhere", "ieee"],
)
def test_kernels_round_to_tf32_where_products_of_matrices_may(
    ask: Callable[[], None], allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 on a GPU, for which the raw operator stands in here."""
    ask()
    asked: list[bool] = []

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        query, tf32 = arguments[0], arguments[12]
        asked.append(tf32)
        return (query, query, query, query)

    monkeypatch.setattr(_native, "runs", lambda *_: True)
    monkeypatch.setattr(torch.ops.ember_ext, "lif_attention_forward", forward)
    for device, dtype in itertools.product(("cuda", "cpu"), DTYPES):
        with FakeTensorMode(allow_non_fake_inputs=True):
            query = torch.empty(1, 1, 2, 2, dtype=dtype, device=device)
            gate = torch.empty(3, 1, device=device).unbind()
            lif_attention(query, query, query, *gate)
        assert asked.pop() == (allowed and dtype == torch.float32 and device == "cuda")


# Dropout.


def test_philox_known_answers() -> None:
    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    assert [int(w) for w in philox(zero, zero, zero, zero, zero)] == [
        0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8,
    ]  # fmt: skip
    assert [int(w) for w in philox(torch.tensor(-1), ones, ones, ones, ones)] == [
        0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD,
    ]  # fmt: skip


def test_dropout_keeps_the_right_share_in_every_direction() -> None:
    keep = dropout_keep(torch.tensor(123), (4, 5, 31, 103), 0.3).double()
    for dim in range(4):
        share = keep.transpose(0, dim).flatten(1).mean(1)
        assert (share - 0.7).abs().max() < 5 * math.sqrt(0.21 / (keep.numel() / keep.shape[dim]))
    other = dropout_keep(torch.tensor(124), (4, 5, 31, 103), 0.3).double()
    correlation = torch.corrcoef(torch.stack([keep.flatten(), other.flatten()]))[0, 1]
    assert correlation.abs() < 5 / math.sqrt(keep.numel())


def test_dropout_follows_torch_s_seed() -> None:
    values = tensors(queries=30)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return lif_attention(**values, is_causal=True, dropout_p=0.4)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


# Extremes.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0, 1e4])
def test_large_scores(dtype: torch.dtype, scale: float) -> None:
    """Up to scores of 1e4 either way, with probabilities down to 0."""
    values = tensors(1, 2, 40, size=8)
    values["query"] *= scale / 3
    values = {n: v.to(dtype) if v.dim() == 4 else v for n, v in values.items()}
    sample = Sample(
        f"{scale}", values, {"is_causal": True}, dict.fromkeys(gradient_scales(values), 10.0)
    )
    check_sample(lif_attention, reference.lif_attention, sample)


def test_tiny_probabilities_keep_their_gradients() -> None:
    """A key of probability 1e-30 with a value of 1e30 counts as much as the others."""
    values = tensors(1, 1, 1, 2, 1, torch.float32)
    values["query"] = torch.ones(1, 1, 1, 1)
    values["key"] = torch.tensor([0.0, -69.0]).view(1, 1, 2, 1)
    values["value"] = torch.tensor([1.0, 1e30]).view(1, 1, 2, 1)
    leaves = {name: value.double().requires_grad_() for name, value in values.items()}
    exact = gradients(reference.lif_attention(**leaves, is_causal=True), leaves)
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    out = lif_attention(**leaves, is_causal=True)
    for actual, expected in zip(gradients(out, leaves), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_queries_that_see_nothing_give_zeros(dtype: torch.dtype, eps: float) -> None:
    values = tensors(queries=70, dtype=dtype)
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    mask = torch.ones(70, 70, dtype=torch.bool)
    mask[[0, 5, 69]] = False
    mask[:, 3] = False
    out = lif_attention(**leaves, is_causal=True, attn_mask=mask, eps=eps)
    assert (out[:, :, [0, 5, 69]] == 0).all()
    results = gradients(out, leaves)
    assert all(g.isfinite().all() for g in results)
    assert (results[0][:, :, [0, 5, 69]] == 0).all()
    assert (results[1][:, :, 3] == 0).all()
    assert (results[2][:, :, 3] == 0).all()


def test_nan_stays_in_its_row() -> None:
    values = tensors(queries=60)
    values["query"][0, 1, 17] = math.nan
    out = lif_attention(**values, is_causal=True)
    bad = out.isnan().any(-1)
    assert bad[0, 1, 17]
    assert bad.sum() == 1


# Summaries.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_summary_describes_the_reference_s_weights(dtype: torch.dtype, causal: bool) -> None:
    for queries, keys, mask in (
        (40, 40, None),
        (600, 610, None),
        (30, 50, torch.arange(50) % 3 > 0),
    ):
        values = tensors(2, 3, queries, keys, 16, dtype)
        options: dict[str, Any] = {"is_causal": causal, "attn_mask": mask}
        out, summary = lif_attention(**values, **options, return_summary=True)
        assert torch.equal(out, lif_attention(**values, **options))
        exact = {name: value.double() for name, value in values.items()}
        _, w = reference.lif_attention(**exact, **options, return_weights=True)
        visible = visible_keys(exact["query"], exact["key"], mask, causal)
        p = probabilities(exact["query"], exact["key"], visible, None)
        expected = summarize(p, w, exact["threshold"], visible)
        for name, value in summary._asdict().items():
            # Counts may differ where a weight is at the border.
            tolerance = 2 / queries if name in ("support", "fire_rate") else 1e-5
            target = getattr(expected, name)
            torch.testing.assert_close(value.double(), target, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("queries", [7, 300])
def test_summary_without_columns_is_that_of_equal_scores(queries: int) -> None:
    values = tensors(2, 3, queries, 305, 1, torch.float32)
    equal = values | {"query": torch.zeros_like(values["query"])}
    none = {name: value[..., :0] if value.dim() == 4 else value for name, value in values.items()}
    out, summary = lif_attention(**none, is_causal=True, return_summary=True)
    _, expected = lif_attention(**equal, is_causal=True, return_summary=True)
    assert out.shape == (2, 3, queries, 0)
    for actual, target in zip(summary, expected, strict=True):
        assert torch.equal(actual, target)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_hidden_keys_never_fire(dtype: torch.dtype) -> None:
    """Not even below a negative threshold, which their probability of 0 exceeds."""
    q = torch.randn(1, 1, 4, 8, dtype=dtype)
    gate = (torch.full((1,), -0.1), torch.ones(1), torch.ones(1))
    hidden = torch.tensor([True, False, True, False])
    for mask, causal in ((hidden, False), (hidden, True), (None, True)):
        _, summary = lif_attention(
            q, q, q, *gate, attn_mask=mask, is_causal=causal, return_summary=True
        )
        assert summary.fire_rate.item() == 1


LONG_SUMS = """
import math
import torch
from ember_ext import ops
from ember_ext.testing.tolerance import assert_close

def check(name, value, exact):
    exact = torch.as_tensor(exact, dtype=torch.float64).expand(value.shape)
    assert_close(name, value, exact.to(value.dtype), exact)

for dtype in (torch.float64, torch.float32):
    for queries, keys in ((8, 6000), (5000, 24)):
        query = torch.zeros(1, 2, queries, 8, dtype=dtype)
        key = torch.ones(1, 2, keys, 8, dtype=dtype)
        value = torch.linspace(1, 2, keys, dtype=dtype).view(1, 1, keys, 1).expand_as(key)
        gates = [torch.tensor(v, dtype=dtype) for v in ((0.1, 0.23), (0.3, 0.37), (3.0, 4.0))]
        leaves = [t.requires_grad_() for t in (query, key, value)]
        out, summary = ops.lif_attention(
            *leaves, *gates, is_causal=False, eps=0.0, return_summary=True)
        exact = value.detach().double().mean(2, keepdim=True)
        check("out", out, exact)
        check("entropy", summary.entropy, math.log(keys))
        check("support", summary.support, keys * float(1 / keys > 0.01))
        check("first token", summary.first_token, 1 / keys)
        check("load", summary.load, 1 / keys)
        ones = torch.ones_like(out)
        grad_query, _, grad_value = torch.autograd.grad(out, leaves, ones)
        check("grad_value", grad_value, queries / keys)
        if queries == keys:
            continue
        # The same through refractory attention, whose only query that sees every key is the last.
        sums = ops.RefractoryState(torch.zeros(1, 2, keys - 1, dtype=dtype),
                                   torch.zeros(1, keys - 1, dtype=dtype))
        out, load, state = ops.refractory_lif_attention(
            query[:, :, :1], key, value, *gates, torch.zeros(2, dtype=dtype),
            torch.zeros(2, dtype=dtype), is_causal=True, past=sums, eps=0.0)
        check("refractory out", out, exact)
        check("refractory weights", state.weights, 1 / keys)
"""


@needs_kernels
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "neon"])
def test_long_sums_of_equal_terms(isa: str, run_with_isa: Callable[[str, str], None]) -> None:
    """Roundings of equal terms do not cancel: uniform attention over many keys, or queries."""
    run_with_isa(isa, LONG_SUMS)


def test_summary_of_uniform_attention() -> None:
    """A causal softmax of equal scores over 256 keys: the figures that the paper reports."""
    zeros, one = torch.zeros(1, 1, 256, 4), torch.ones(1)
    _, summary = lif_attention(
        zeros, zeros, zeros, one, one, one, is_causal=True, return_summary=True
    )
    assert summary.entropy.item() == pytest.approx(4.560, abs=1e-3)
    # Whether 1 / 100 counts as more than 0.01 is up to rounding, and worth 100 / 256.
    assert summary.support.item() == pytest.approx(19.34, abs=0.4)
    assert summary.first_token.item() == pytest.approx(0.0239, abs=1e-4)
    assert summary.load.sum().item() == pytest.approx(1.0)


# The module.


@pytest.mark.parametrize("refractory", [None, "causal"])
def test_any_split_with_a_cache_gives_the_whole(refractory: Any) -> None:
    torch.manual_seed(0)
    layers = [nn.LIFSelfAttention(12, 3, refractory=refractory).double() for _ in range(2)]
    x = torch.randn(2, 9, 12, dtype=torch.float64)

    def run(x: Tensor, caches: list[Any]) -> tuple[Tensor, list[Any], Tensor]:
        load, after = None, []
        for layer, cache in zip(layers, caches, strict=True):
            out = layer(x, cache, load, need_load=True, need_weights=True)
            x, load = out.output, out.load
            after.append(out.cache)
        return x, after, out.weights

    whole, _, weights = run(x, [None, None])
    empty = torch.empty(2, 3, 0, 4, dtype=torch.float64)
    caches: list[Any] = [nn.AttentionCache(empty, empty, None)] * 2
    pieces, rows = [], []
    for piece in x.split([4, 1, 1, 3], 1):
        out, caches, part = run(piece, caches)
        pieces.append(out)
        rows.append(torch.nn.functional.pad(part, (0, 9 - part.shape[-1])))
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(torch.cat(rows, 2), weights)


@pytest.mark.parametrize("refractory", [None, "causal", "look_ahead"])
def test_module_returns_a_tensor_unless_more_is_asked_for(refractory: Any) -> None:
    torch.manual_seed(0)
    layer = nn.LIFSelfAttention(12, 3, refractory=refractory)
    x, load = torch.randn(2, 9, 12), torch.zeros(1, 1, 1)
    y = layer(x)
    assert type(y) is Tensor
    stack = torch.nn.Sequential(torch.nn.Linear(12, 12), layer, torch.nn.ReLU())
    assert torch.equal(stack(x), layer(stack[0](x)).relu())
    empty = torch.empty(2, 3, 0, 4)
    cache = nn.AttentionCache(empty, empty, None)
    asked: list[tuple[dict[str, Any], set[str]]] = [
        ({"previous_load": load}, {"load"}),
        ({"need_load": True}, set() if refractory is None else {"load"}),
        ({"need_weights": True}, {"weights"}),
        ({"previous_load": load, "need_weights": True}, {"load", "weights"}),
    ]
    if refractory != "look_ahead":
        asked.append(({"cache": cache}, {"cache"}))
    for arguments, given in asked:
        result = layer(x, **arguments)
        assert type(result) is nn.AttentionOutput
        torch.testing.assert_close(result.output, y)
        fields = {name for name, value in result._asdict().items() if value is not None}
        assert fields == {"output"} | given


@pytest.mark.parametrize("refractory", [None, "causal", "look_ahead"])
def test_module_weights_are_those_it_applies(refractory: Any) -> None:
    torch.manual_seed(0)
    layer = nn.LIFSelfAttention(12, 3, refractory=refractory, preset="released").eval()
    x = torch.randn(2, 9, 12)
    w = layer.attention_weights(x)
    assert torch.equal(layer(x, need_weights=True).weights, w)
    _, _, value = layer.qkv(x)
    torch.testing.assert_close(layer.c_proj((w @ value).transpose(1, 2).flatten(2)), layer(x))
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 3, 9))


def test_module_parameters() -> None:
    names = set(nn.LIFSelfAttention(12, 3).state_dict())
    gates = {"gate.raw_threshold", "gate.raw_leak", "gate.raw_steepness"}
    assert names == {"c_attn.weight", "c_proj.weight"} | gates
    refractory = nn.LIFSelfAttention(12, 3, refractory="look_ahead", bias=True)
    assert set(refractory.state_dict()) - names == {
        "c_attn.bias", "c_proj.bias", "gate.raw_within", "gate.raw_across",
    }  # fmt: skip
    fixed = nn.LIFSelfAttention(12, 3, learnable=False, preset="released")
    assert not dict(fixed.gate.named_parameters())
    assert fixed.gate.threshold.tolist() == pytest.approx([0.1] * 3)


# Bad input.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": 3}, TypeError, "query must be a torch.Tensor, got int"),
        ({"query": torch.zeros(2, 2, 7)}, ValueError, "query must be [batch, heads, tokens, head"),
        ({"query": torch.zeros(2, 2, 7, 4).int()}, TypeError, "query must be float64, float32,"),
        ({"key": torch.zeros(2, 2, 7, 4).half()}, TypeError, "key must be of query's dtype"),
        ({"key": torch.zeros(2, 3, 7, 4)}, ValueError, "G heads with G a divisor of H = 2, got 3"),
        ({"key": torch.zeros(2, 2, 7, 5)}, ValueError, "key must be [B, G, Tk, D] = [2, 2, 7, 4]"),
        ({"value": torch.zeros(2, 2, 6, 4)}, ValueError, "value must be [B, G, Tk, D] = [2, 2, 7"),
        ({"value": torch.zeros(2, 1, 7, 4)}, ValueError, "value must be [B, G, Tk, D] = [2, 2, 7"),
        ({"threshold": torch.zeros(3)}, ValueError, "threshold must be [H] = [2], got [3]"),
        ({"threshold": torch.tensor([0.0, math.nan])}, ValueError, "threshold must be finite"),
        ({"leak": torch.tensor([0.5, 1.5])}, ValueError, "leak must be within [0, 1], got 1.5"),
        ({"steepness": torch.zeros(2)}, ValueError, "steepness must be finite and > 0, got 0.0"),
        ({"steepness": torch.ones(2).int()}, TypeError, "steepness must be float64"),
        ({"leak": torch.ones(2, device="meta")}, ValueError, "leak must be on query's device cpu"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be within [0, 1), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be within [0, 1), got -0.1"),
        ({"scale": 0.0}, ValueError, "scale must be finite and not 0, got 0.0"),
        ({"scale": math.inf}, ValueError, "scale must be finite and not 0, got inf"),
        ({"eps": -1.0}, ValueError, "eps must be finite and >= 0, got -1.0"),
        ({"attn_mask": torch.zeros(7, 7)}, TypeError, "attn_mask must be a boolean tensor"),
        (
            {"attn_mask": torch.ones(3, 1, 7, 7).bool()},
            ValueError,
            "attn_mask must be broadcastable to [B, H, Tq, Tk] = [2, 2, 7, 7], got [3, 1, 7, 7]",
        ),
        ({"seed": 3, "dropout_p": 0.1}, TypeError, "seed must be an int64 tensor, got int"),
        ({"seed": torch.zeros(2).long()}, ValueError, "seed must be of no dimension, got [2]"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        lif_attention(**(tensors() | change))
    assert str(caught.value).startswith("ember_ext.lif_attention: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_head": 5}, "n_head must be a divisor of n_embd = 12, got 5"),
        ({"dropout": 1.0}, "dropout must be within [0, 1), got 1.0"),
        ({"refractory": "sometimes"}, "refractory must be None, 'causal' or 'look_ahead'"),
        ({"preset": "x"}, "preset must be one of"),
    ],
)
def test_bad_module(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"ember_ext.nn\.") as caught:
        nn.LIFSelfAttention(**({"n_embd": 12, "n_head": 3} | arguments))
    assert message in str(caught.value)


def test_module_refuses_what_does_not_fit() -> None:
    module = nn.LIFSelfAttention(6, 2)
    for x, error, got in (
        (torch.ones(2, 3, 5), ValueError, r"\[2, 3, 5\]"),
        (torch.ones(3, 6), ValueError, r"\[3, 6\]"),
        ([1.0], TypeError, "list"),
    ):
        with pytest.raises(error, match=rf"nn\.LIFSelfAttention: x must be .*, got {got}"):
            module(x)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            (3, 2, 4, 3),
            (3, 2, 4, 3),
            r"cache.key must be \[B, n_head, S, head_dim\] = \[2, 2, 4, 3\]",
        ),
        ((2, 1, 4, 3), (2, 2, 4, 3), r"cache.key must be .*, got \[2, 1, 4, 3\]"),
        ((2, 2, 4, 3), (2, 2, 5, 3), r"cache.value must be .*, got \[2, 2, 5, 3\]"),
        ((4, 3), (2, 2, 4, 3), r"cache.key must be .* = \[2, 2, S, 3\], got \[4, 3\]"),
    ],
)
def test_module_refuses_a_cache_of_another_shape(
    key: tuple[int, ...], value: tuple[int, ...], message: str
) -> None:
    module = nn.LIFSelfAttention(6, 2)
    cache = AttentionCache(torch.zeros(key), torch.zeros(value), None)
    with pytest.raises(ValueError, match=rf"ember_ext\.nn\.LIFSelfAttention: {message}"):
        module(torch.zeros(2, 5, 6), cache)


def test_module_refuses_what_is_not_a_cache() -> None:
    keys = torch.zeros(2, 2, 0, 3)
    pair: Any = (keys, keys)
    with pytest.raises(TypeError, match="cache must be an AttentionCache, got tuple"):
        nn.LIFSelfAttention(6, 2)(torch.zeros(2, 5, 6), pair)


@pytest.mark.parametrize("refractory", ["causal", "look_ahead"])
def test_refractory_module_refuses_a_cache_without_loads(refractory: Any) -> None:
    module, x = nn.LIFSelfAttention(6, 2, refractory=refractory), torch.randn(2, 3, 6)
    empty, cached = torch.zeros(2, 2, 0, 3), torch.randn(2, 2, 4, 3)
    expected = module(x)
    torch.testing.assert_close(module(x, AttentionCache(empty, empty, None))[0], expected)
    message = "cache.loads must be" if refractory == "causal" else "cache must be None"
    with pytest.raises(ValueError, match=rf"ember_ext\.nn\.LIFSelfAttention: {message}"):
        module(x, AttentionCache(cached, cached, None))


@pytest.mark.filterwarnings("ignore:.*no compiled kernels for meta")
@pytest.mark.parametrize("refractory", [None, "causal", "look_ahead"])
def test_module_on_the_meta_device(refractory: Any) -> None:
    with torch.device("meta"):
        y = nn.LIFSelfAttention(6, 2, refractory=refractory)(torch.empty(2, 3, 6))
    assert y.shape == (2, 3, 6)
    assert y.is_meta


@pytest.mark.parametrize("operator", [lif_attention, reference.lif_attention])
def test_it_takes_the_place_of_scaled_dot_product_attention(operator: Any) -> None:
    """With gates that pass everything, the keywords and their defaults mean the same."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 7, 5, dtype=torch.float64, generator=generator)
    mask = torch.rand(7, 7, generator=generator) < 0.6
    mask[:, 0] = True
    gates = (torch.zeros(2), torch.ones(2), torch.ones(2))
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"scale": 0.3}):
        expected = F.scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(operator(q, k, v, *gates, eps=0.0, **options), expected)


OPERATORS = [
    function
    for package in (ops, reference)
    for function in (package.lif_attention, package.refractory_lif_attention)
]


@pytest.mark.parametrize("operator", OPERATORS)
def test_keywords_have_the_defaults_and_the_order_of_sdpa(operator: Any) -> None:
    signature = inspect.signature(operator).parameters
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
    shared = [name for name in signature if name in defaults]
    assert shared == [name for name in defaults if name in signature]
    assert all(signature[name].default == defaults[name] for name in shared)


def test_public_names() -> None:
    q = torch.zeros(1, 1, 1, 1)
    _, summary = lif_attention(q, q, q, *torch.ones(3, 1), return_summary=True)
    assert type(summary) is ember_ext.ops.AttentionSummary
    assert ember_ext.lif_attention is lif_attention


@pytest.mark.parametrize("operator", [ember_ext.lif_attention, reference.lif_attention])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mask_heads", [1, 4])
def test_padding_under_a_mask_does_not_matter(
    operator: Callable[..., Any], groups: int, mask_heads: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 7, 5, generator=generator)
    key, value = torch.randn(2, 2, groups, 9, 5, generator=generator)
    gates = torch.tensor([[0.1] * 4, [0.6] * 4, [5.0] * 4])
    mask = torch.rand(2, mask_heads, 7, 9, generator=generator) < 0.7
    mask[..., 0] = True
    mask[..., 6:] = False
    mask[:, :, 5] = False
    results = []
    for padding in (0.0, float("nan"), float("inf")):
        q, k, v = query.clone(), key.clone(), value.clone()
        q[:, :, 5], k[:, :, 6:], v[:, :, 6:] = padding, padding, padding
        leaves = [t.requires_grad_() for t in (q, k, v, *gates.clone())]
        out = operator(*leaves, attn_mask=mask, is_causal=False)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    assert not results[0][0][:, :, 5].any()
