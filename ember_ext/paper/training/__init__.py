"""Training of the paper's language models: presets, the loop, run folders and their command lines.

A run from Python::

config = preset_config("cfc", "quick")
summary = train(config, load_text("shakespeare"), RunFolder("runs/mine"))
"""

from ember_ext.paper.training.config import (
    ConfigError,
    TrainConfig,
    build_model,
    preset_config,
    resolve_device,
)
from ember_ext.paper.training.evaluation import evaluate
from ember_ext.paper.training.run_folder import RunError, RunFolder
from ember_ext.paper.training.sampling import load_run, stream_text
from ember_ext.paper.training.signals import StopRequested
from ember_ext.paper.training.trainer import NonFiniteLossError, Reporter, train

__all__ = [
    "ConfigError",
    "NonFiniteLossError",
    "Reporter",
    "RunError",
    "RunFolder",
    "StopRequested",
    "TrainConfig",
    "build_model",
    "evaluate",
    "load_run",
    "preset_config",
    "resolve_device",
    "stream_text",
    "train",
]
