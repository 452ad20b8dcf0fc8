"""Classification of sequences: spoken vowels, irregularly sampled XOR, and series of your own.

`scripts/classify.py` is the command line.
"""

from ember_ext.paper.sequences.models import ClassifierConfig, SequenceClassifier
from ember_ext.paper.sequences.series import SeriesSet
from ember_ext.paper.sequences.tasks import Task, TaskError, folder_task, vowels_task, xor_task
from ember_ext.paper.sequences.training import (
    Outcome,
    TrainingConfig,
    train_classifier,
)
from ember_ext.paper.sequences.ts_files import TsError, TsFile, read_ts

__all__ = [
    "ClassifierConfig",
    "Outcome",
    "SequenceClassifier",
    "SeriesSet",
    "Task",
    "TaskError",
    "TrainingConfig",
    "TsError",
    "TsFile",
    "folder_task",
    "read_ts",
    "train_classifier",
    "vowels_task",
    "xor_task",
]
