"""The shim finds the faults that it is there to find, planted in cuda_shim/faulty.cu."""

from __future__ import annotations

import cuda_shim
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def faulty() -> cuda_shim.Shim:
    shim = cuda_shim.Shim([cuda_shim.HERE / "faulty.cu"])
    shim.library.cuda_shim_limit_clusters(2)
    return shim


def run(shim: cuda_shim.Shim, kernel: str) -> Tensor:
    function = getattr(shim.library, kernel)
    function.argtypes = [cuda_shim.ctypes.c_void_p] * 2
    values = torch.arange(64.0)
    return shim.call(
        lambda at: int(function(at["in"], at["out"])), {"in": values}, {"out": values}
    )["out"]


def test_sound_kernel_passes(faulty: cuda_shim.Shim) -> None:
    assert torch.equal(run(faulty, "sound"), torch.arange(64.0).flip(0))


def test_a_refused_launch_leaves_no_error_for_the_next(faulty: cuda_shim.Shim) -> None:
    faulty.library.cuda_shim_refuse_attributes(1)
    try:
        with pytest.raises(cuda_shim.KernelFaultError, match="the launcher returned 1"):
            run(faulty, "sound_with_much_memory")
    finally:
        faulty.library.cuda_shim_refuse_attributes(0)
    assert faulty.library.cuda_shim_last_error() == 0
    run(faulty, "sound_with_much_memory")


def test_sound_product_passes(faulty: cuda_shim.Shim) -> None:
    a = torch.arange(64.0).repeat(4).view(16, 16)
    assert torch.equal(run(faulty, "sound_product")[:32], (a @ a.T).flatten()[:32])


def test_sound_copy_passes(faulty: cuda_shim.Shim) -> None:
    assert torch.equal(run(faulty, "sound_copy"), torch.arange(64.0).roll(32).flip(0))


def test_sound_fragments_pass(faulty: cuda_shim.Shim) -> None:
    a = (torch.arange(64.0) - 32).repeat(4).view(16, 16)
    assert torch.equal(run(faulty, "sound_fragments").view(8, 8), a[:8] @ a[:8].T)
    transposed = torch.arange(64.0).view(8, 8).T
    assert torch.equal(run(faulty, "sound_transposed").view(8, 8), transposed)


def tf32_products() -> Tensor:
    """Of factors rounded to the nearest tf32, of two to the one further from 0."""
    numbers = 1 + torch.arange(256.0) * 3 / 4096
    rounded = torch.floor(numbers * 1024 + 0.5) / 1024
    products = rounded[:128].view(16, 8) @ rounded.flip(0).view(32, 8).T
    return products[torch.arange(32) % 16, torch.arange(32)].repeat(2)


def test_sound_tf32_passes(faulty: cuda_shim.Shim) -> None:
    torch.testing.assert_close(run(faulty, "sound_tf32"), tf32_products(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [("unrounded_tf32_a", 64), ("unrounded_tf32_b", 64), ("tf32_rows_for_columns", 32)],
)
def test_wrong_tf32_differs(faulty: cuda_shim.Shim, kernel: str, wrong: int) -> None:
    """By more than the sound products may."""
    error = (run(faulty, kernel) / tf32_products() - 1).abs()
    assert (error > 5e-5).sum() >= 0.9 * wrong


def test_sound_exchange_passes(faulty: cuda_shim.Shim) -> None:
    assert torch.equal(run(faulty, "sound_exchange"), torch.arange(64.0).roll(32))
    assert faulty.launches()[-1].cluster == 2


def test_clusters_that_the_device_has_not_are_refused(faulty: cuda_shim.Shim) -> None:
    faulty.library.cuda_shim_limit_clusters(1)
    try:
        with pytest.raises(cuda_shim.KernelFaultError, match="launch configuration"):
            run(faulty, "sound_exchange")
    finally:
        faulty.library.cuda_shim_limit_clusters(2)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("missing_barrier", "depends on the order of threads"),
        ("divergent_barrier", "some have left the kernel; some wait at the barrier in faulty.cu"),
        ("divergent_shuffle", "some wait for their warp in team.cuh"),
        ("out_of_bounds", "access to memory outside the arrays"),
        ("shared_out_of_bounds", "write past the block's shared memory"),
        ("misaligned", "misaligned access"),
        ("divergent_product", "some wait for their warp in faulty.cu"),
        ("misaligned_product", "not aligned to 32 bytes"),
        ("unawaited_copy", "depends on the order of threads"),
        ("copy_over_what_is_read", "depends on the order of threads"),
        ("misaligned_copy", "memory that is not aligned to 16 bytes"),
        ("abandoned_copy", "leaves with copies under way"),
        ("divergent_fragments", "some wait for their warp in faulty.cu"),
        ("divergent_transposed", "some wait for their warp in faulty.cu"),
        ("divergent_tf32", "some wait for their warp in attention_warp_sums.cuh"),
        ("unpublished_tf32", "depends on the order of threads"),
        ("misaligned_fragments", "shared memory that is not aligned to 16 bytes"),
        ("fragments_past_the_end", "past the block's shared memory"),
        ("unpublished_exchange", "depends on the order of threads"),
        ("exchange_over_what_is_read", "depends on the order of threads"),
        ("exchange_after_arrival", "depends on the order of threads"),
        ("unstarted_exchange", "shared memory of a block that may not run yet at faulty.cu"),
        ("exchange_with_the_absent", "shared memory of a block that may have left at faulty.cu"),
        ("divergent_exchange", "a wait without arrival at the cluster's barrier at faulty.cu"),
    ],
)
def test_fault_is_found(faulty: cuda_shim.Shim, kernel: str, message: str) -> None:
    with pytest.raises(cuda_shim.KernelFaultError, match=message):
        run(faulty, kernel)
    # and the next launch works
    test_sound_kernel_passes(faulty)


def test_uninitialised_shared_memory_reads_as_nan(faulty: cuda_shim.Shim) -> None:
    out = run(faulty, "uninitialised")
    assert out.isnan().sum() == 1
    assert out[63].isnan()


def test_unloaded_fragment_reads_as_nan(faulty: cuda_shim.Shim) -> None:
    assert run(faulty, "unloaded_product")[:32].isnan().all()
