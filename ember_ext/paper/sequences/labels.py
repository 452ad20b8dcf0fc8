"""What cells, kinds of sampling and machines are called in tables and figures."""

from __future__ import annotations

CELL_LABELS = {
    "cfc": "CfC",
    "cfc-mixed": "CfC, mixed memory",
    "ltc": "LTC",
    "gru": "GRU",
    "lstm": "LSTM",
}
"""All cells, in the order of tables and figures."""


def sampling_label(drop: float) -> str:
    """How a series is sampled after a share of its steps was dropped."""
    return f"{drop:.0%} of the steps dropped" if drop else "all steps"


def short_machine(machine: str) -> str:
    """A machine without marks and versions: "Intel Xeon, 1 thread, avx512"."""
    return machine.split(", torch")[0].replace("(R)", "").replace(" Processor", "")
