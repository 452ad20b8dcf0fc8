"""Derivatives of gradients, and many gradients at once: operators and modules as the definitions.

The definition of a module is the module without compiled kernels.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from modules import FEATURES, MODULES, build, every_module, trainable
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd import functional as AF
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, jacfwd, jacrev, stack_module_state, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from ember_ext import _native, nn, ops
from ember_ext.testing import OPERATORS, Registered, Sample

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is to be differentiated again:UserWarning",
    "ignore:.*torch.func transform is active:UserWarning",
    "ignore:.*no compiled kernels for cpu tensors:UserWarning",
)

needs_kernels = pytest.mark.skipif(not _native.has("cpu"), reason="no compiled kernels")
# The others run their definitions.
every_operator = pytest.mark.parametrize(
    "entry",
    [entry for entry in OPERATORS if hasattr(torch.ops.ember_ext, entry.name)],
    ids=lambda entry: entry.name,
)

Function = Callable[..., tuple[Tensor, ...]]


def samples(entry: Registered, dtype: torch.dtype = torch.float64) -> list[Sample]:
    """Those in which no row of one makes results the rounding of what cancels."""
    return [
        sample
        for sample in entry.samples(dtype)
        if all(0 < t.numel() < 3000 and t.shape[-1] > 1 for t in sample.tensors.values())
        and sample.options.get("eps", 1) > 0
    ]


def function(operator: Callable[..., Any], sample: Sample) -> Function:
    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = operator(**dict(zip(sample.tensors, tensors, strict=True)), **sample.options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return call


def leaves_of(sample: Sample) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in sample.tensors.values()]


def weighted(values: Any, seed: int = 0) -> Tensor:
    """A sum that is not linear, so that everything has derivatives of every order."""
    sums = []
    for index, value in enumerate(values):
        places = torch.arange(value.numel()).view(value.shape)
        weights = torch.cos(1.3 * places + index + seed).double()
        sums.append((value.double().sin() * weights).sum())
    return torch.stack(sums).sum()


def derivatives(run: Function, leaves: list[Tensor], order: int = 2) -> list[Tensor]:
    """The gradients of every order up to `order`, each of the sum of those before."""
    total, found = weighted(run(*leaves)), []
    for again in range(order):
        gradients = torch.autograd.grad(
            total, leaves, create_graph=again + 1 < order, materialize_grads=True
        )
        found += gradients
        total = weighted(gradients, again + 1)
    return [value.detach() for value in found]


@contextmanager
def without_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "_devices", set())
        patch.setitem(_native.unavailable, "cpu", "a test does without")
        yield


@every_operator
def test_second_derivatives(entry: Registered) -> None:
    for sample in samples(entry):
        actual, expected = (
            derivatives(function(operator, sample), leaves_of(sample))
            for operator in (entry.operator, entry.reference)
        )
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, rtol=1e-7, atol=1e-9 * (1 + float(b.abs().max())))


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivatives_in_other_dtypes(entry: Registered, dtype: torch.dtype) -> None:
    for sample in samples(entry, dtype)[1::4]:
        exact = Sample("", {n: t.double() for n, t in sample.tensors.items()}, sample.options)
        actual = derivatives(function(entry.operator, sample), leaves_of(sample))
        expected = derivatives(function(entry.reference, exact), leaves_of(exact))
        tolerance = 1e-3 if dtype == torch.float32 else 0.1
        for a, b, t in zip(actual, expected, [*sample.tensors.values()] * 2, strict=True):
            assert a.dtype == t.dtype
            size = float(b.abs().max())
            assert_close(a.double(), b, rtol=tolerance, atol=tolerance * (0.1 + size))


@every_operator
def test_third_derivatives(entry: Registered) -> None:
    sample = min(samples(entry), key=lambda s: sum(t.numel() for t in s.tensors.values()))
    actual, expected = (
        derivatives(function(operator, sample), leaves_of(sample), 3)
        for operator in (entry.operator, entry.reference)
    )
    assert_close(actual, expected, rtol=1e-7, atol=1e-7)


@every_operator
def test_second_derivatives_where_inputs_depend_on_each_other(entry: Registered) -> None:
    """A gradient of one input is not to be counted to those that it was computed from."""
    for sample in samples(entry)[1::5]:

        def chain(*tensors: Tensor, sample: Sample = sample, operator: Any) -> tuple[Tensor, ...]:
            common = torch.stack([t.mean() for t in tensors]).sum()
            # Leaks stay within [0, 1], and time spans and steepness positive.
            mixed = [t * (0.5 + 0.4 * torch.sigmoid(common)) for t in tensors]
            return function(operator, sample)(*mixed)

        actual, expected = (
            derivatives(lambda *t, o=operator: chain(*t, operator=o), leaves_of(sample))
            for operator in (entry.operator, entry.reference)
        )
        assert_close(actual, expected, rtol=1e-7, atol=1e-8)


@every_operator
def test_gradgradcheck(entry: Registered) -> None:
    """By differences, and batched."""
    by_size = sorted(samples(entry), key=lambda s: sum(t.numel() for t in s.tensors.values()))
    for sample in by_size[: 1 if entry.name == "ltc_scan" else 2]:
        run = function(entry.operator, sample)
        leaves = [leaf.detach().double().requires_grad_() for leaf in leaves_of(sample)]
        check: dict[str, Any] = {"fast_mode": True, "check_batched_grad": True, "atol": 1e-4}
        assert torch.autograd.gradcheck(run, leaves, **check)
        assert torch.autograd.gradgradcheck(run, leaves, **check)


@every_operator
def test_first_gradients_do_not_change_when_graphed(entry: Registered) -> None:
    for sample in samples(entry)[::3]:
        run, leaves = function(entry.operator, sample), leaves_of(sample)
        plain = torch.autograd.grad(weighted(run(*leaves)), leaves)
        graphed = torch.autograd.grad(
            weighted(run(*leaves)), leaves, create_graph=True, materialize_grads=True
        )
        assert_close(graphed, plain, rtol=1e-9, atol=1e-9)


@every_operator
def test_batched_gradients(entry: Registered) -> None:
    for sample in samples(entry)[::4]:
        run, leaves = function(entry.operator, sample), leaves_of(sample)
        outputs = run(*leaves)
        vectors = tuple(torch.randn(3, *out.shape, dtype=out.dtype) for out in outputs)
        for graphed in (False, True):

            def gradients(
                vectors: Any,
                outputs: Any = outputs,
                leaves: Any = leaves,
                graphed: bool = graphed,
                **options: Any,
            ) -> tuple[Tensor, ...]:
                return torch.autograd.grad(
                    outputs, leaves, vectors, retain_graph=True, create_graph=graphed, **options
                )

            batched = gradients(vectors, is_grads_batched=True)
            rows = [gradients([v[i] for v in vectors]) for i in range(3)]
            expected = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
            assert_close(batched, expected, rtol=1e-8, atol=1e-9)
            if graphed:
                again, once = (
                    torch.autograd.grad(
                        weighted(g), leaves, retain_graph=True, materialize_grads=True
                    )
                    for g in (batched, expected)
                )
                assert_close(again, once, rtol=1e-7, atol=1e-8)


@needs_kernels
@every_operator
def test_batched_gradients_by_torch_func(entry: Registered) -> None:
    sample = samples(entry)[0]
    run, leaves = function(entry.operator, sample), leaves_of(sample)
    outputs = run(*leaves)

    def gradients(*vectors: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, leaves, vectors, retain_graph=True)

    vectors = [torch.randn(3, *out.shape, dtype=out.dtype) for out in outputs]
    batched = vmap(gradients)(*vectors)
    for index in range(3):
        expected = gradients(*(v[index] for v in vectors))
        assert all(map(torch.equal, (part[index] for part in batched), expected))
    for gradient, leaf in zip(vmap(gradients)(*(v[:0] for v in vectors)), leaves, strict=True):
        assert gradient.shape == (0, *leaf.shape)


@every_operator
def test_autograd_functional(entry: Registered) -> None:
    sample = min(samples(entry), key=lambda s: sum(t.numel() for t in s.tensors.values()))
    tensors = tuple(sample.tensors.values())

    def both(compute: Callable[[Function], Any]) -> None:
        actual, expected = (
            compute(function(operator, sample)) for operator in (entry.operator, entry.reference)
        )
        assert_close(actual, expected, rtol=1e-7, atol=1e-8)

    whole, *rest = tensors
    first, others = whole.flatten()[:5], whole.flatten()[5:]

    def outputs(run: Function, first: Tensor) -> tuple[Tensor, ...]:
        return run(torch.cat([first, others]).view(whole.shape), *rest)

    def scalar(run: Function) -> Callable[[Tensor], Tensor]:
        return lambda first: weighted(outputs(run, first))

    def vector(run: Function) -> Callable[[Tensor], Tensor]:
        return lambda first: outputs(run, first)[0].flatten()[:3]

    tangent = torch.ones_like(first)
    both(lambda run: AF.hessian(scalar(run), first))
    both(lambda run: AF.hessian(scalar(run), first, vectorize=True))
    both(
        lambda run: AF.hessian(
            scalar(run), first, vectorize=True, outer_jacobian_strategy="forward-mode"
        )
    )
    both(lambda run: AF.jacobian(vector(run), first, create_graph=True))
    both(lambda run: AF.jacobian(vector(run), first, vectorize=True))
    both(lambda run: AF.hvp(scalar(run), first, tangent)[1])
    both(lambda run: AF.vhp(scalar(run), first, tangent)[1])
    both(lambda run: AF.jvp(vector(run), first, tangent)[1])
    both(lambda run: AF.vjp(scalar(run), first)[1])
    both(lambda run: jacrev(jacfwd(scalar(run)))(first))
    both(lambda run: jacfwd(jacrev(scalar(run)))(first))


@every_operator
def test_forward_mode_over_a_backward_pass(entry: Registered) -> None:
    """The forward pass ran before anyone spoke of tangents, so its kernels did it."""
    for sample in samples(entry)[:2]:
        tangents = []
        for operator in (entry.operator, entry.reference):
            leaves = leaves_of(sample)
            outputs = function(operator, sample)(*leaves)
            with forward_ad.dual_level():
                duals = [
                    forward_ad.make_dual(torch.ones_like(out), torch.full_like(out, 2.0))
                    for out in outputs
                ]
                gradients = torch.autograd.grad(outputs, leaves, duals, materialize_grads=True)
                tangents.append([forward_ad.unpack_dual(g).tangent for g in gradients])
        actual, expected = (
            [
                torch.zeros_like(leaf) if t is None else t
                for t, leaf in zip(each, leaves, strict=True)
            ]
            for each in tangents
        )
        assert any(bool(t.any()) for t in expected)
        assert_close(actual, expected, rtol=1e-7, atol=1e-9)


def penalty(module: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of a gradient penalty in the parameters and in the input."""
    torch.manual_seed(1)
    (slope,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
    loss = (slope.flatten(1).norm(dim=1) - 1).square().sum()
    parameters = list(trainable(module).values())
    return list(torch.autograd.grad(loss, [x, *parameters], materialize_grads=True))


@pytest.mark.parametrize("checkpointed", [False, True])
@every_module
def test_gradient_penalty(name: str, checkpointed: bool) -> None:
    dropout = 0.0 if name == "dropout" else 0.3
    module = torch.nn.Sequential(
        torch.nn.Linear(FEATURES, FEATURES),
        build(name, dropout),
        torch.nn.Tanh(),
        build(name, dropout),
    ).double()
    x = torch.randn(3, 5, FEATURES, dtype=torch.float64, requires_grad=True)
    with without_kernels():
        expected = penalty(module, x)
    assert all(bool(v.isfinite().all()) for v in expected)
    assert expected[0].abs().max() > 0
    if checkpointed:
        whole = module.forward
        module.forward = lambda x: checkpoint(whole, x, use_reentrant=False)  # type: ignore[method-assign,assignment]
    assert_close(penalty(module, x), expected, rtol=1e-7, atol=1e-9)


@every_module
def test_learning_to_learn(name: str) -> None:
    """Two steps of gradient descent, differentiated in what they start from."""
    module = build(name).double()
    start = {key: p.detach().clone().requires_grad_() for key, p in trainable(module).items()}
    if not start:
        pytest.skip("nothing to learn")
    x = torch.randn(2, 4, FEATURES, dtype=torch.float64)

    def meta_gradients() -> list[Tensor]:
        fast: dict[str, Tensor] = dict(start)
        for _ in range(2):
            loss = functional_call(module, fast, (x,)).square().sum()
            slopes = torch.autograd.grad(
                loss, list(fast.values()), create_graph=True, materialize_grads=True
            )
            fast = {key: p - 0.1 * g for (key, p), g in zip(fast.items(), slopes, strict=True)}
        loss = functional_call(module, fast, (x.flip(0),)).square().sum()
        return list(torch.autograd.grad(loss, list(start.values()), materialize_grads=True))

    with without_kernels():
        expected = meta_gradients()
    assert_close(meta_gradients(), expected, rtol=1e-7, atol=1e-9)


@every_module
def test_ensembles(name: str) -> None:
    members = [MODULES[name](0.0).double() for _ in range(3)]
    for index, member in enumerate(members):
        for p in trainable(member).values():
            torch.nn.init.normal_(p, std=0.3 + 0.1 * index)
    parameters, buffers = stack_module_state(members)
    x = torch.randn(2, 4, FEATURES, dtype=torch.float64)

    def call(parameters: Any, buffers: Any) -> Tensor:
        y = functional_call(members[0], (parameters, buffers), (x,))
        return y[0] if isinstance(y, tuple) else y

    outputs = vmap(call)(parameters, buffers) if parameters else call({}, {}).expand(3, -1, -1, -1)
    for member, y in zip(members, outputs, strict=True):
        expected = member(x)
        assert_close(y, expected[0] if isinstance(expected, tuple) else expected)


def cfc_arguments(batch: int, steps: int, width: int) -> tuple[ops.CfCWeights, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def affine() -> ops.Affine:
        weight = torch.randn(width, 2 * width, generator=generator) / 4
        return ops.Affine(weight.requires_grad_(), torch.zeros(width))

    weights = ops.CfCWeights(affine(), affine(), affine(), affine())
    return weights, torch.randn(batch, steps, width, generator=generator)


@pytest.mark.parametrize("chunk_size", [0, 2])
def test_padding_takes_no_part_in_second_derivatives(chunk_size: int) -> None:
    weights, x = cfc_arguments(3, 6, 5)
    lengths = torch.tensor([6, 2, 0])
    beyond = torch.arange(6) >= lengths[:, None]
    h0 = torch.randn(3, 5, requires_grad=True)

    def second(padding: float) -> list[Tensor]:
        leaf = x.masked_fill(beyond[:, :, None], padding).requires_grad_()
        y, h = ops.cfc_scan(leaf, weights, h0, lengths=lengths, chunk_size=chunk_size)
        (slope,) = torch.autograd.grad(weighted([y, h]), leaf, create_graph=True)
        return list(torch.autograd.grad(weighted([slope]), [leaf, h0]))

    expected = second(0.0)
    assert (expected[0][beyond] == 0).all()
    assert_close(second(float("nan")), expected)


@needs_kernels
def test_a_scan_keeps_its_input_once() -> None:
    """The tape has a copy of x: for second derivatives no more than its place is remembered."""
    weights, x = cfc_arguments(4, 50, 32)
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    source = x.requires_grad_()
    middle = source * 2
    alive = weakref.ref(middle.untyped_storage())
    x_bytes, pointer = middle.untyped_storage().nbytes(), middle.data_ptr()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = ops.cfc_scan(middle, weights)
    assert pointer not in held
    stand_ins = [size for size in held.values() if size == middle.element_size()]
    assert len(stand_ins) == 1
    assert x_bytes > 1000
    del middle
    gc.collect()
    assert alive() is None
    (slope,) = torch.autograd.grad(y.sin().sum(), source, create_graph=True)
    assert torch.autograd.grad(slope.square().sum(), source)[0].abs().max() > 0


def test_parameters_frozen_after_the_forward_pass() -> None:
    """As in adversarial training, where two networks take turns."""
    gate, x = nn.LIFGate(FEATURES).double(), torch.randn(4, FEATURES).double().requires_grad_()
    theta, lam, k = (
        p.detach().requires_grad_() for p in (gate.threshold, gate.leak, gate.steepness)
    )
    y = ops.lif_gate(x, theta, lam, k)
    theta.requires_grad_(False)
    (slope,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    actual = torch.autograd.grad(slope.square().sum(), [x, lam])
    with without_kernels():
        (slope,) = torch.autograd.grad(
            ops.lif_gate(x, theta, lam, k).sin().sum(), x, create_graph=True
        )
        assert_close(actual, torch.autograd.grad(slope.square().sum(), [x, lam]))


def test_under_autocast() -> None:
    """Gradients that are taken within autocast are those that are taken outside of it."""
    for name in ("attention", "dense cfc", "gate"):
        module = build(name)
        x = torch.randn(3, 5, FEATURES, requires_grad=True)

        def second(inside: bool, module: Any = module, x: Tensor = x) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = module(x)
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                (slope,) = torch.autograd.grad(y.float().sum(), x, create_graph=True)
            return torch.autograd.grad(slope.square().sum(), x)[0]

        assert_close(second(True), second(False), rtol=0.1, atol=0.05)


@needs_kernels
def test_derivatives_of_raw_backward_operators_are_refused() -> None:
    x, gate = torch.randn(2, 3, requires_grad=True), [torch.full((3,), 0.5)] * 3
    gradient, _ = torch.ops.ember_ext.lif_gate_backward(x, x, *gate, 0, -1, 0.0, True)
    with pytest.raises(RuntimeError, match=r"ember_ext\.lif_gate: double backward is not impl"):
        gradient.sum().backward()


@needs_kernels
@every_operator
def test_registered_operators_and_compiled_code(entry: Registered) -> None:
    """What an exported program calls has second derivatives; torch.compile's own code refuses."""
    sample = samples(entry)[0]
    sample = Sample("", {name: t.double() for name, t in sample.tensors.items()}, sample.options)
    run = function(entry.operator, sample)
    expected = derivatives(run, leaves_of(sample))
    program = torch.export.export(Call(run), tuple(leaves_of(sample))).module()
    assert_close(derivatives(program, leaves_of(sample)), expected, rtol=1e-7, atol=1e-9)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError):
        derivatives(compiled, leaves_of(sample))


class Call(torch.nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.function(*tensors)


@needs_kernels
@pytest.mark.filterwarnings("default")
@every_operator
def test_the_detour_is_announced_once(entry: Registered) -> None:
    _native._warn.cache_clear()
    sample = samples(entry)[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            derivatives(function(entry.operator, sample), leaves_of(sample))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1
    assert messages[0].startswith(
        f"ember_ext: a gradient of {entry.name} is to be differentiated again"
    )
