"""Inputs and tolerances that tests, benchmarks and the self-test share."""

from ember_ext.testing.tolerance import assert_close, error_bound

__all__ = ["assert_close", "error_bound"]
