"""The quality of a model: its loss on all of the validation text, and on random batches.

Evaluation draws from a random stream of its own and from the same windows each time, so it changes
nothing about training, and two runs are compared on equal terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ember_ext.models import Ember, LiquidEmber
from ember_ext.paper.data import Corpus, every_batch, random_batch
from ember_ext.paper.training.config import TrainConfig
from ember_ext.paper.training.metrics import METRIC_WINDOWS, collect_metrics
from ember_ext.paper.training.streams import generator


@torch.no_grad()
def evaluate(
    model: Ember | LiquidEmber,
    corpus: Corpus,
    config: TrainConfig,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure the model in evaluation mode.

    Args:
        model: of `config`, on any device; it is left in training mode.
        corpus: the text.
        config: gives sizes and the number of random batches.
        check: called before each batch; what it raises ends the evaluation.

    Returns:
        A dictionary. Its "val_loss" is the mean over the whole validation text, or over its first
        `val_tokens` characters, each but the first predicted once. "val_loss_estimate" and
        "train_loss_estimate" are means over `eval_iters` random batches, the paper's protocol.
        Losses are in nats per character. The other entries are those of `collect_metrics`.
    """
    device = next(model.parameters()).device

    def mean_loss(batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        total, count = 0.0, 0
        for inputs, targets in batches:
            check()
            loss = model(inputs.to(device), targets.to(device))[1]
            total += float(loss) * targets.numel()
            count += targets.numel()
        return total / count

    def estimate(split: str, tokens: Tensor) -> float:
        stream = generator(config.seed, f"evaluation/{split}")
        return mean_loss(
            random_batch(tokens, config.batch_size, config.block_size, stream)
            for _ in range(config.eval_iters)
        )

    model.eval()
    try:
        stream = generator(config.seed, "evaluation/metrics")
        windows, _ = random_batch(corpus.val, METRIC_WINDOWS, config.block_size, stream)
        return {
            "val_loss": mean_loss(
                every_batch(corpus.val[: config.val_tokens], config.batch_size, config.block_size)
            ),
            "val_loss_estimate": estimate("val", corpus.val),
            "train_loss_estimate": estimate("train", corpus.train),
            **collect_metrics(model, windows.to(device), config.gate_preset),
        }
    finally:
        model.train()
