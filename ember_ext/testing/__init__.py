"""Inputs and tolerances that tests, benchmarks and the self-test share."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ember_ext import ops, reference
from ember_ext.testing.cfc_scan import cfc_samples, flat
from ember_ext.testing.lif_attention import attention_samples, attention_tensors
from ember_ext.testing.lif_gate import gate_parameters, gate_samples
from ember_ext.testing.ltc_scan import flat_ltc, ltc_samples, ltc_weights
from ember_ext.testing.refractory_lif_attention import (
    refractory_samples,
    refractory_tensors,
    with_flat_state,
)
from ember_ext.testing.sample import DTYPES, Operator, Sample, check_sample
from ember_ext.testing.tolerance import assert_close, error_bound


class Registered(NamedTuple):
    """An operator, what defines it, and inputs to compare the two on."""

    name: str
    operator: Operator
    reference: Operator
    samples: Callable[[torch.dtype], Iterator[Sample]]


OPERATORS = (
    Registered("lif_gate", ops.lif_gate, reference.lif_gate, gate_samples),
    Registered("lif_attention", ops.lif_attention, reference.lif_attention, attention_samples),
    Registered(
        "refractory_lif_attention",
        with_flat_state(ops.refractory_lif_attention),
        with_flat_state(reference.refractory_lif_attention),
        refractory_samples,
    ),
    Registered("cfc_scan", flat(ops.cfc_scan), flat(reference.cfc_scan), cfc_samples),
    Registered("ltc_scan", flat_ltc(ops.ltc_scan), flat_ltc(reference.ltc_scan), ltc_samples),
)
"""What the self-test goes through."""

__all__ = [
    "DTYPES",
    "OPERATORS",
    "Registered",
    "Sample",
    "assert_close",
    "attention_samples",
    "attention_tensors",
    "check_sample",
    "error_bound",
    "flat_ltc",
    "gate_parameters",
    "gate_samples",
    "ltc_samples",
    "ltc_weights",
    "refractory_samples",
    "refractory_tensors",
    "with_flat_state",
]
