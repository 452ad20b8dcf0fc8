"""The names of backbones and variants in tables, figures and claims."""

from __future__ import annotations

BACKBONE_LABELS = {"transformer": "Transformer", "cfc": "CfC"}

VARIANT_LABELS = {
    "transformer": {
        "standard": "Standard",
        "lif-fixed": "LIF-fixed",
        "lif": "LIF-learnable",
        "lif-text": "LIF-learnable",
        "lif-refractory": "LIF-refractory",
        "qwen-gate": "Qwen-gate",
        "null": "Null (Standard again)",
    },
    "cfc": {
        "standard": "CfC-only (base)",
        "lif": "CfC+LIF",
        "lif-text": "CfC+LIF",
        "null": "Null (base again)",
    },
}
"""The name of each variant in tables, in the order of their rows."""

LATER_LABELS = {
    "transformer": {
        "lif-persistent": "LIF-persistent",
        "lif-temporal": "LIF-temporal",
        "sigmoid": "Sigmoid (LIF again)",
    },
    "cfc": {},
}
"""The names of variants that the paper's tables lack, which have rows only where they were run."""


def variant_label(backbone: str, variant: str) -> str:
    """The name of a variant, without its gate preset; its own if it has no other."""
    labels = {**LATER_LABELS[backbone], **VARIANT_LABELS[backbone]}
    return labels.get(variant, variant)
