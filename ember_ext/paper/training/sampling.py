"""Text from a trained model, as it is generated."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ember_ext.models import Ember, LiquidEmber
from ember_ext.paper.data import Vocabulary
from ember_ext.paper.training.config import build_model
from ember_ext.paper.training.run_folder import RunFolder


def load_run(folder: RunFolder, device: str = "cpu") -> tuple[Ember | LiquidEmber, Vocabulary]:
    """The model of a run with its best weights, in evaluation mode, and its vocabulary.

    Raises:
        RunError: there is no such run, it is damaged, or it has no weights yet.
    """
    config = folder.read_config()
    vocabulary = folder.read_vocabulary()
    model = build_model(config, len(vocabulary))
    folder.load_best(model)
    return model.to(device).eval(), vocabulary


def stream_text(
    model: Ember | LiquidEmber,
    vocabulary: Vocabulary,
    *,
    prompt: str | None = None,
    length: int = 600,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Continue a text, one character at a time.

    Args:
        model: on any device.
        vocabulary: the model's.
        prompt: the text to continue. Default: `vocabulary.opening`, a line break
            where there is one.
        length: characters to add.
        temperature: below 1 for likelier text, 0 for the likeliest.
        top_k: choose among this many likeliest characters only. Default: all.
        seed: of the random stream.

    Yields:
        One character after the other, without the prompt.

    Raises:
        ValueError: an empty prompt, one with characters that the model does not know, or a
            temperature, length or top_k that makes no sense.
    """
    if prompt is None:
        prompt = vocabulary.opening
    if not prompt:
        raise ValueError("the prompt must have at least one character")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    idx = vocabulary.encode(prompt)[None].to(device)
    for token in model.stream(idx, length, temperature, top_k, generator):
        yield vocabulary.decode(token[0])
