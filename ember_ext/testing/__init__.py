"""Inputs and tolerances that tests, benchmarks and the self-test share."""

from ember_ext.testing.lif_gate import gate_parameters, gate_samples
from ember_ext.testing.sample import DTYPES, Sample, check_sample
from ember_ext.testing.tolerance import assert_close, error_bound

__all__ = [
    "DTYPES",
    "Sample",
    "assert_close",
    "check_sample",
    "error_bound",
    "gate_parameters",
    "gate_samples",
]
