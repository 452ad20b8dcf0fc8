"""Our modules inside what people train models with: wrappers, optimisers, many processes."""

from __future__ import annotations

import copy
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate as hugging_face
import ncps.torch
import pytest
import pytorch_lightning as lightning
import torch
import torch.distributed
import torch.multiprocessing
from ncps.wirings import AutoNCP
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import ember_ext

PROCESSES = 2


class Network(nn.Module):
    """Every kind of module of ours once, and one that forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.gate = ember_ext.nn.LIFGate(8)
        self.attention = ember_ext.nn.LIFSelfAttention(8, 2)
        self.refractory = ember_ext.nn.LIFSelfAttention(8, 2, refractory="causal")
        self.wired = ember_ext.nn.CfC(8, AutoNCP(16, 4))
        self.dense = ember_ext.nn.CfC(4, 8)
        self.ltc = ember_ext.nn.LTC(8, AutoNCP(12, 8))
        self.mixed = ember_ext.nn.CfC(8, 6, mixed_memory=True)
        self.unused = ember_ext.nn.CfC(4, 5)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 6] to [B, T, 2]."""
        y = self.gate(self.embed(x))
        y = y + self.attention(y)
        y = y + self.refractory(y)
        for network in (self.wired, self.dense, self.ltc, self.mixed):
            y, _ = network(y)
        return self.head(y)  # type: ignore[no-any-return]


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def batch(rows: int = 2 * PROCESSES) -> Tensor:
    return torch.randn(rows, 5, 6, generator=torch.Generator().manual_seed(1))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()  # type: ignore[no-any-return]


def assert_gradients(model: nn.Module, expected: nn.Module) -> None:
    """The gradients of `expected`, where missing ones may be zeros."""
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        grad = p.grad
        if q.grad is None:
            assert grad is None or not grad.any(), name
        else:
            assert grad is not None, name
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            torch.testing.assert_close(grad, q.grad, msg=name)


def in_processes(worker: Callable[[int], None]) -> None:
    """Run `worker(rank)` in processes that form a gloo group on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_in_group, (port, worker), PROCESSES)  # type: ignore[no-untyped-call]


def _in_group(rank: int, port: int, worker: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, PROCESSES, rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    try:
        worker(rank)
    finally:
        torch.distributed.destroy_process_group()


def _data_parallel(rank: int) -> None:
    expected, x = network(), batch()
    loss(expected, x).backward()
    model = DistributedDataParallel(network(), find_unused_parameters=True)
    first, second = x[2 * rank : 2 * rank + 2].split(1)
    with model.no_sync():
        (loss(model, first) / 2).backward()
    (loss(model, second) / 2).backward()
    assert_gradients(model.module, expected)


def test_data_parallel_accumulates_gradients_with_unused_parameters() -> None:
    in_processes(_data_parallel)


def _fully_sharded(rank: int) -> None:
    expected, x = network(), batch()
    loss(expected, x).backward()
    model, part = network(), x[2 * rank : 2 * rank + 2]
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for name, child in model.named_children():
        if name not in ("embed", "gate", "head"):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss(model, part).backward()
    assert_gradients(model, expected)
    for trained in (model, expected):
        torch.optim.AdamW(trained.parameters(), lr=1e-2).step()
    with torch.no_grad():
        torch.testing.assert_close(model(part), expected(part))


def test_fully_sharded_data_parallel() -> None:
    in_processes(_fully_sharded)


class Wrapped(lightning.LightningModule):
    """A Lightning module as people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, data: list[Tensor], _: int) -> Tensor:
        return loss(self.network, data[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trained_by_hand(steps: int = 3) -> Network:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batch()).backward()
        optimizer.step()
    return model


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(batch()), batch_size=2 * PROCESSES)


def test_lightning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on loggers and data loaders
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, default_root_dir=tmp_path,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        model = Wrapped()
        trainer.fit(model, loader())
    assert_same_weights(model.network, trained_by_hand())
    saved = next(tmp_path.rglob("*.ckpt"))
    assert_same_weights(Wrapped.load_from_checkpoint(saved).network, model.network)


def test_hugging_face_accelerate() -> None:
    accelerator = hugging_face.Accelerator(cpu=True)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, data = accelerator.prepare(model, optimizer, loader())
    for _ in range(3):
        for (x,) in data:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                accelerator.backward(loss(model, x))
                optimizer.step()
    assert_same_weights(accelerator.unwrap_model(model), trained_by_hand())


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str
)
def test_streaming_follows_every_kind_of_optimiser(options: dict[str, Any]) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    x, state = torch.randn(2, 8), torch.zeros(2, 16)
    for _ in range(3):
        with torch.no_grad():
            before = model.wired.step(x, state)[0]
        optimizer.zero_grad()
        loss(model, batch()).backward()
        optimizer.step()
        with torch.no_grad():
            after = model.wired.step(x, state)[0]
            expected = model.wired(x[:, None], state)[0][:, 0]
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, expected)
    assert_same_weights(model, trained_by_hand())


def test_loss_scaling() -> None:
    expected = network()
    loss(expected, batch()).backward()
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler.scale(loss(model, batch())).backward()  # type: ignore[no-untyped-call]
    scaler.unscale_(optimizer)
    assert_gradients(model, expected)


@pytest.fixture
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_by_default")
def test_another_default_dtype() -> None:
    model = ember_ext.nn.CfC(4, 8)
    assert model(torch.randn(2, 3, 4))[0].dtype == torch.float64


def test_copies_are_independent() -> None:
    model = network()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        expected = copied(batch())
        for parameter in model.parameters():
            parameter.add_(0.1)
        torch.testing.assert_close(copied(batch()), expected)
        assert not torch.allclose(model(batch()), expected)


def test_whole_modules_are_saved_and_loaded(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model.wired.step(torch.randn(1, 8), torch.zeros(1, 16))  # lays its weights out
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch()), model(batch()), rtol=0, atol=0)


POLICIES: dict[str, Callable[[], nn.Module]] = {
    "CfC": lambda: ncps.torch.CfC(6, AutoNCP(12, 3)),
    "CfC with memory": lambda: ncps.torch.CfC(6, 5, mixed_memory=True),
    "LTC": lambda: ncps.torch.LTC(6, AutoNCP(12, 3)),
}


def rollout(policy: nn.Module, ended: Tensor) -> list[Tensor]:
    """Outputs and gradients of a recurrent policy as agents train it.

    Two steps of burn-in without a gradient, then steps between which the episodes of some rows
    end, whose states are then reset.
    """
    steps = batch()
    with torch.no_grad():
        _, state = policy(steps[:, :2])
    outputs = []
    for t in range(2, steps.shape[1]):
        keep = 1 - ended[:, t, None]
        state = tuple(h * keep for h in state) if isinstance(state, tuple) else state * keep
        y, state = policy(steps[:, t : t + 1], state)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), parameters)]


@pytest.mark.parametrize("name", POLICIES)
def test_a_recurrent_policy_whose_episodes_end_within_a_batch(name: str) -> None:
    torch.manual_seed(0)
    policy = POLICIES[name]()
    ended = (torch.rand(batch().shape[:2]) < 0.4).float()
    expected = rollout(policy, ended)
    ember_ext.accelerate(policy)
    torch.testing.assert_close(rollout(policy, ended), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.cuda
def test_a_streaming_step_is_captured_in_a_cuda_graph() -> None:
    model = ember_ext.nn.CfC(8, AutoNCP(16, 4)).cuda().requires_grad_(False)
    x, state = torch.randn(1, 8, device="cuda"), torch.zeros(1, 16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model.step(x, state)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, state_after = model.step(x, state)
    x.copy_(torch.randn(1, 8, device="cuda"))
    graph.replay()
    expected, expected_state = model.step(x, state)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state_after, expected_state)
