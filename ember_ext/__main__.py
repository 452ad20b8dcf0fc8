"""`python -m ember_ext`: an environment report to paste into an issue, and a self-test."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator

import torch

import ember_ext
from ember_ext import _native, testing
from ember_ext._command_line import prepare_output


def environment() -> Iterator[tuple[str, str]]:
    """What decides which kernels run: versions, devices, instruction set, threads."""
    build = _native.build_info
    yield "ember-ext", f"{ember_ext.__version__} in {', '.join(ember_ext.__path__)}"
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if build:
        yield "built with", f"torch {build['torch']}, {build['compiler']}"
        cuda = build["cuda"]
        yield "CUDA kernels", build["cuda_operators"] or "not built"
        if cuda:
            yield "CUDA build", f"nvcc {cuda}, {build['cuda_architectures']}"
    yield "instruction set", _native.isa or "none (no compiled kernels)"
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    for device, reason in _native.unavailable.items():
        yield f"no {device} kernels", reason


def self_test() -> bool:
    """Hold every operator to its reference on every device; print a line each, True if all do."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    good = True
    for name, operator, reference, samples in testing.OPERATORS:
        for device in devices:
            kernels = "kernels" if _native.has(device, name) else "reference only"
            for dtype in testing.DTYPES:
                failures, count = [], 0
                for sample in samples(dtype):
                    count += 1
                    try:
                        testing.check_sample(operator, reference, sample.to(device))
                    except (AssertionError, RuntimeError) as error:
                        failures.append(str(error).splitlines()[0])
                verdict = "ok" if not failures else f"{len(failures)} FAILED: {failures[0]}"
                print(f"{name:24} {device:5} {str(dtype)[6:]:9} {count:3} samples  "
                      f"{kernels}: {verdict}")  # fmt: skip
                good = good and not failures
    return good


def main() -> int:
    """Print the report, run the self-test unless told not to, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ember_ext", description=__doc__)
    parser.add_argument(
        "--selftest", action=argparse.BooleanOptionalAction, default=True,
        help="compare every operator with its reference (default: yes)",
    )  # fmt: skip
    prepare_output()
    options = parser.parse_args()
    for what, value in environment():
        print(f"{what:16} {value}")
    if not options.selftest:
        return 0
    good = self_test()
    print("self-test passed" if good else "self-test FAILED: please report this page")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
