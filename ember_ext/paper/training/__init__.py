"""Training of the paper's language models: presets, the loop, run folders and their command lines.

A run of a few steps from Python:

    >>> import tempfile
    >>> from dataclasses import replace
    >>> from ember_ext.paper.data import load_text
    >>> from ember_ext.paper.training import RunFolder, preset_config, train
    >>> config = preset_config("cfc", "quick", device="cpu")
    >>> config = replace(config, steps=3, batch_size=4, eval_iters=1, val_tokens=200)
    >>> summary = train(config, load_text("lighthouse"), RunFolder(tempfile.mkdtemp()))
    >>> summary["val_loss"] < 5
    True
"""

from ember_ext.paper.training.config import (
    ConfigError,
    TrainConfig,
    build_model,
    preset_config,
    resolve_device,
)
from ember_ext.paper.training.evaluation import evaluate
from ember_ext.paper.training.reporter import Reporter
from ember_ext.paper.training.run_folder import RunError, RunFolder
from ember_ext.paper.training.sampling import load_run, stream_text
from ember_ext.paper.training.signals import StopRequested
from ember_ext.paper.training.trainer import NonFiniteLossError, train

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
