"""A step follows the weights, whoever changes them and by whatever way.

The truth is ncps with the very same cells, which reads them at each step.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import ncps.torch
import pytest
import torch
from ncps.wirings import AutoNCP
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize
from torch.optim import swa_utils

from ember_ext import _native, nn
from ember_ext.ops._watch import Watch

needs_kernels = pytest.mark.skipif(not _native.has("cpu"), reason="no compiled kernels")

NETWORKS: dict[str, dict[str, Any]] = {
    "wired": {"units": AutoNCP(13, 3)},
    "dense": {"units": 6, "backbone_units": 7, "backbone_layers": 2},
    "pure": {"units": 5, "mode": "pure", "backbone_units": 5},
    "mixed": {"units": AutoNCP(13, 3), "mixed_memory": True},
}
SLOWER = "ignore:.*step, which is slower:UserWarning"
pytestmark = pytest.mark.filterwarnings(SLOWER, "ignore:.*deprecated")


def build(name: str) -> nn.CfC:
    torch.manual_seed(5)
    return nn.CfC(4, **copy.deepcopy(NETWORKS[name]))


def truth(network: nn.CfC, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
    theirs = copy.copy(network)
    theirs.__class__ = ncps.torch.CfC
    y, hx = theirs(x[:, None], hx)
    return y[:, 0], hx


def check(network: nn.CfC, rows: int = 2) -> Tensor:
    """Compare steps with ncps; returns one step's output."""
    dtype = next(network.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    state = torch.rand(rows, network.state_size, generator=generator).to(dtype)
    hx = (state, state / 2) if network.use_mixed else state
    outputs = []
    with torch.no_grad():
        for _ in range(2):
            x = torch.rand(rows, 4, generator=generator).to(dtype)
            expected, expected_hx = truth(network, x, hx)
            for actual, actual_hx in (network.step(x, hx), network(x[:, None], hx)):
                torch.testing.assert_close(actual.reshape(expected.shape), expected)
                torch.testing.assert_close(actual_hx, expected_hx)
            hx = expected_hx
            outputs.append(expected)
    return torch.cat(outputs)


def trainable(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def some_cell(network: Any) -> Any:
    cell = network.rnn_cell
    return cell if isinstance(cell, ncps.torch.CfCCell) else cell.layer_1


def soft_update(network: Any) -> None:
    online = copy.deepcopy(network)
    for p in trainable(online):
        p.data.mul_(-3)
    for a, b in zip(network.parameters(), online.parameters(), strict=True):
        a.data.copy_(0.5 * a.data + 0.5 * b.data)


def add_noise(network: Any) -> None:
    for p in trainable(network):
        p.data.add_(0.2 * torch.randn_like(p))


def change_one_word(network: Any) -> None:
    some_cell(network).ff1.bias.data[-1] += 0.5


def flip_signs(network: Any) -> None:
    for p in trainable(network):
        p.data.neg_()


def swap_rows(network: Any) -> None:
    weight = some_cell(network).ff1.weight.data
    weight.copy_(weight.flip(0))


def from_a_vector(network: Any) -> None:
    parameters = trainable(network)
    vector = torch.nn.utils.parameters_to_vector(parameters).detach()
    torch.nn.utils.vector_to_parameters(vector * 1.5, parameters)


def through_numpy(network: Any) -> None:
    some_cell(network).ff1.weight.detach().numpy()[:] = 0.25


def other_data(network: Any) -> None:
    weight = some_cell(network).ff1.weight
    weight.data = torch.randn_like(weight)


def transposed_data(network: Any) -> None:
    weight = some_cell(network).ff1.weight
    size = min(weight.shape)
    weight.data[:size, :size] = torch.randn(size, size).to(weight)
    square = weight.data[:, : weight.shape[0]]
    weight.data = torch.cat([square.t(), weight.data[:, weight.shape[0] :]], 1).t().contiguous().t()


def new_parameter(network: Any) -> None:
    head = some_cell(network).ff1
    head.weight = torch.nn.Parameter(2 * head.weight.detach())


def plain_tensor(network: Any) -> None:
    """A weight that is no parameter, as a network that generates weights has them."""
    head = some_cell(network).ff1
    weight = 2 * head.weight.detach()
    del head.weight
    head.weight = weight


def plain_tensor_twice(network: Any) -> None:
    plain_tensor(network)
    check(network)
    some_cell(network).ff1.weight = some_cell(network).ff1.weight * -1


def assign_state(network: Any) -> None:
    state = {k: 1.5 * v for k, v in network.state_dict().items()}
    network.load_state_dict(state, assign=True)


def other_cell(network: Any) -> None:
    network.rnn_cell = build("wired" if network.use_mixed else _name(network)).rnn_cell
    add_noise(network.rnn_cell)


def _name(network: Any) -> str:
    if hasattr(network, "wiring"):
        return "wired"
    return "pure" if network.rnn_cell.mode == "pure" else "dense"


def other_mode(network: Any) -> None:
    cell = some_cell(network)
    if cell.mode == "pure":
        add_noise(network)
    cells = network.rnn_cell._layers if hasattr(network, "wiring") else [cell]
    for cell in cells:
        cell.mode = "no_gate" if cell.mode == "default" else cell.mode


def other_mask(network: Any) -> None:
    cell = some_cell(network)
    if cell.sparsity_mask is None:
        cell.sparsity_mask = torch.nn.Parameter(
            torch.linspace(0, 1, cell.ff1.weight.numel()).view_as(cell.ff1.weight), False
        )
    else:
        cell.sparsity_mask.data.fill_(0.3)


def replaced_forward(network: Any) -> None:
    head = some_cell(network).ff1 if hasattr(network, "wiring") else some_cell(network).backbone[0]
    if hasattr(network, "wiring"):
        head = some_cell(network).time_b
    head.forward = lambda z: torch.nn.functional.linear(z, head.weight) - 1


def hooked(network: Any) -> None:
    cell = some_cell(network)
    head = cell.time_a if hasattr(network, "wiring") else cell.ff1
    head.register_forward_hook(lambda _module, _input, output: output / 2)


def weight_norm(network: Any) -> None:
    head = some_cell(network).ff1
    parametrizations.weight_norm(head)
    head.parametrizations.weight.original0.data.mul_(2)
    check(network)
    head.parametrizations.weight.original1.data.add_(0.3)


def spectral_norm_in_eval(network: Any) -> None:
    head = parametrizations.spectral_norm(some_cell(network).ff1)
    network.eval()
    check(network)
    head.parametrizations.weight.original.data[0] *= -2


def stateful_parametrization(network: Any) -> None:
    scale = torch.nn.Module()
    scale.factor = 2.0
    scale.forward = lambda weight: scale.factor * weight  # type: ignore[method-assign]
    parametrize.register_parametrization(some_cell(network).ff1, "weight", scale)
    check(network)
    scale.factor = -3.0


def averaged(network: Any) -> None:
    # Writes into a network that was stepped before.
    online = copy.deepcopy(network)
    model = swa_utils.AveragedModel(online, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    model.module = network
    add_noise(online)
    model.n_averaged.fill_(1)
    model.update_parameters(online)


def to_double(network: Any) -> None:
    network.double()
    add_noise(network)


def cell_to_double(network: Any) -> None:
    network.rnn_cell.double()
    if network.use_mixed:
        network.lstm.double()
    add_noise(network)


CHANGES: list[Callable[[Any], None]] = [
    soft_update,
    add_noise,
    change_one_word,
    flip_signs,
    swap_rows,
    from_a_vector,
    through_numpy,
    other_data,
    transposed_data,
    new_parameter,
    plain_tensor,
    plain_tensor_twice,
    assign_state,
    other_cell,
    other_mode,
    other_mask,
    replaced_forward,
    hooked,
    weight_norm,
    spectral_norm_in_eval,
    stateful_parametrization,
    averaged,
    to_double,
    cell_to_double,
]


@pytest.mark.parametrize("name", [*NETWORKS, "LTC", "hooked", "projected"])
def test_a_streamer_is_a_copy(name: str) -> None:
    torch.manual_seed(5)
    network: Any
    if name == "LTC":
        network = nn.LTC(4, AutoNCP(13, 3))
    elif name == "projected":
        network = nn.CfC(4, 6, proj_size=3)
    else:
        network = build("wired" if name == "hooked" else name)
    if name == "hooked":
        some_cell(network).ff1.register_forward_hook(lambda *_: None)
    streamer = network.streamer()
    x, spans = torch.rand(2, 4), torch.tensor([0.3, 2.0])
    with torch.no_grad():
        _, hx = network.step(x)
    with torch.no_grad():
        expected, expected_rows = network.step(x, hx, 0.7), network.step(x, hx, spans)
        for _ in range(2):
            torch.testing.assert_close(streamer.step(x, hx, 0.7), expected)
            torch.testing.assert_close(streamer.step(x, hx, spans), expected_rows)
            add_noise(network)
        assert not torch.allclose(network.step(x, hx, 0.7)[0], expected[0])
    assert not streamer.step(x.requires_grad_(), hx, 0.7)[0].requires_grad


@pytest.mark.parametrize("kind", [nn.CfC, nn.LTC])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_streamer_is_copied_and_pickled(kind: Any, copied: Any) -> None:
    streamer = kind(3, AutoNCP(8, 2)).streamer()
    x, h = torch.randn(2, 3), torch.randn(2, 8)
    for actual, expected in zip(copied(streamer).step(x, h), streamer.step(x, h), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_step_follows(change: Callable[[Any], None], name: str) -> None:
    network = build(name)
    before = check(network)
    change(network)
    after = check(network)
    assert not torch.allclose(before.to(after.dtype), after)


def test_inference_tensors() -> None:
    with torch.inference_mode():
        network = build("wired")
        before = check(network)
        for parameter in trainable(network):
            parameter.mul_(1.5)
        after = check(network)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(check(network), after)


def test_spectral_norm_in_training_goes_on() -> None:
    """There every look at the weight changes it, so nothing can be laid out."""
    network, twin = build("dense"), build("dense")
    for cfc in (network, twin):
        torch.manual_seed(1)
        parametrizations.spectral_norm(cfc.rnn_cell.ff1)
    x, h = torch.randn(2, 4), torch.zeros(2, 6)
    with torch.no_grad():
        for _ in range(40):  # to where another iteration changes little
            network.step(x, h), truth(twin, x, h)
        torch.testing.assert_close(
            network.step(x, h)[0], truth(twin, x, h)[0], rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_go_their_own_ways(name: str) -> None:
    network = build(name)
    before = check(network)
    copies = [copy.deepcopy(network), copy.copy(network), pickle.loads(pickle.dumps(network))]
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    for twin in copies:
        assert torch.equal(check(twin), before)
    add_noise(copies[0])
    assert not torch.allclose(check(copies[0]), before)
    assert torch.equal(check(network), before)
    add_noise(network)
    assert torch.equal(check(copies[1]), check(network))  # a shallow copy has the same cells


def _store(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.data.mul_(-1)


def test_another_process_stores_weights() -> None:
    network = build("wired").share_memory()
    before = check(network)
    parameters = [p.detach() for p in trainable(network)]
    child = torch.multiprocessing.get_context("spawn").Process(target=_store, args=(parameters,))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    assert not torch.allclose(check(network), before)


def test_threads_share_a_network() -> None:
    """Every step is that of one of the two states of the weights, whichever thread lays out."""
    network = build("wired")
    x, h = torch.randn(3, 4), torch.rand(3, 13)
    outcomes = []
    bias = network.rnn_cell.layer_2.ff1.bias
    with torch.no_grad():
        for value in (0.0, 1.0):
            bias.data[0] = value  # one word, which is stored at once
            outcomes.append(truth(network, x, h)[0])
    wrong: list[Tensor] = []
    over = threading.Event()

    def run(call: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            for _ in range(300):
                y = call()
                if not any(torch.allclose(y, outcome, atol=1e-6) for outcome in outcomes):
                    wrong.append(y)

    def store() -> None:
        while not over.wait(0.0002):
            bias.data[0] = 1.0 - bias.data[0]

    calls = [lambda: network.step(x, h)[0], lambda: network(x[:, None], h)[0][:, 0]]
    threads = [threading.Thread(target=run, args=(call,)) for call in calls + calls[:1]]
    writer = threading.Thread(target=store)
    for thread in (writer, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    writer.join()
    assert not wrong


@pytest.mark.parametrize("earlier", [False, True])
def test_modules_that_swap_their_parameters(earlier: bool) -> None:
    network = build("dense")
    check(network)
    state = {k: 2 * v for k, v in network.state_dict().items()}
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        if earlier:
            check(network)
        network.load_state_dict(state)
        check(network)
        network.double()
        check(network)
        if earlier:
            network.rnn_cell.float()
            check(network)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@needs_kernels
def test_what_is_watched_can_be_freed() -> None:
    network = build("wired")
    check(network)
    weight = network.rnn_cell.layer_0.ff1.weight
    freed = []
    storage = torch.nn.Parameter(torch.randn(100))
    watch = Watch([storage])
    number = watch.number
    weakref.finalize(storage, freed.append, True)
    del storage
    gc.collect()
    assert not freed
    del watch
    gc.collect()
    assert freed
    with pytest.raises(RuntimeError, match="no watch"):
        torch.ops.ember_ext.cfc_scan_packed(
            torch.zeros(1, 4), torch.zeros(1, 13), None, None, weight, [0, 0], number
        )


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("size", [0, 1, 3, 31, 129, 1000, 300_001])
def test_fingerprints(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    tensor = torch.randint(-100, 100, (size,), generator=generator).to(dtype)
    other = torch.ones(3)
    base = torch.ops.ember_ext.fingerprint([tensor, other])
    assert torch.ops.ember_ext.fingerprint([tensor.clone(), other]) == base

    def expect_new(*tensors: Tensor) -> None:
        assert torch.ops.ember_ext.fingerprint(list(tensors)) != base

    expect_new(tensor)
    expect_new(tensor.unsqueeze(0), other)
    if size == 0:
        return
    expect_new(other, tensor)
    expect_new(tensor.roll(1) if size > 1 else tensor + 1, other)
    expect_new(-tensor, other)
    expect_new(2 * tensor, other)
    expect_new(tensor.repeat_interleave(2)[::2], other)
    for index in {0, size // 2, size - 1}:
        for value in (tensor[index] + 1, -tensor[index] if tensor[index] else 7):
            changed = tensor.clone()
            changed[index] = value
            expect_new(changed, other)
    # What lies between the elements does not matter.
    doubled = tensor.repeat_interleave(2)
    spread = torch.ops.ember_ext.fingerprint([doubled[::2]])
    doubled[1::2] += 1
    assert torch.ops.ember_ext.fingerprint([doubled[::2]]) == spread


@needs_kernels
@pytest.mark.parametrize("shape", [(64, 64), (128, 512), (4096,)])
def test_fingerprints_see_changes_of_the_same_bits(shape: tuple[int, ...]) -> None:
    """What sums would miss: the same bits of all words, and exchanged words."""
    fingerprint = torch.ops.ember_ext.fingerprint
    for dtype in (torch.float32, torch.float64):
        tensor = torch.randn(shape, dtype=dtype)
        changed = [tensor, -tensor, 2 * tensor, tensor / 256, tensor.abs(), tensor * 2.0**60]
        changed += [tensor.flip(0), tensor.roll(1, 0), tensor.roll(32, 0), tensor.roll(16, -1)]
        changed += [torch.zeros(shape, dtype=dtype), -torch.zeros(shape, dtype=dtype)]
        assert len({fingerprint([t.contiguous()]) for t in changed}) == len(changed)
