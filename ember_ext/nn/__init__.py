"""Modules that own the raw parameters of the operators and their transforms."""

from ember_ext.nn._streamer import Streamer
from ember_ext.nn.accelerate import Acceleration, Deceleration, accelerate, decelerate
from ember_ext.nn.cells import CfCCell, LTCCell, WiredCfCCell
from ember_ext.nn.cfc import CfC
from ember_ext.nn.lif_attention import (
    AttentionCache,
    AttentionOutput,
    LIFSelfAttention,
    RefractoryParameters,
)
from ember_ext.nn.lif_gate import GATE_PRESETS, GatePreset, LIFGate, LIFParameters
from ember_ext.nn.ltc import LTC

__all__ = [
    "GATE_PRESETS",
    "LTC",
    "Acceleration",
    "AttentionCache",
    "AttentionOutput",
    "CfC",
    "CfCCell",
    "Deceleration",
    "GatePreset",
    "LIFGate",
    "LIFParameters",
    "LIFSelfAttention",
    "LTCCell",
    "RefractoryParameters",
    "Streamer",
    "WiredCfCCell",
    "accelerate",
    "decelerate",
]
