"""The command lines of `scripts/train.py` and `scripts/sample.py`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import tyro

from ember_ext._command_line import (
    A_SEED,
    FlagError,
    at_least,
    prepare_output,
    refuse_empty,
    require,
)
from ember_ext.paper.data import CorpusError, load_text
from ember_ext.paper.training.config import (
    Backbone,
    ConfigError,
    Preset,
    TrainConfig,
    preset_config,
    read_config,
    resolve_device,
)
from ember_ext.paper.training.console import TrainingConsole
from ember_ext.paper.training.distributed import join, leave
from ember_ext.paper.training.run_folder import RunError, RunFolder
from ember_ext.paper.training.sampling import load_run, stream_text
from ember_ext.paper.training.signals import StopRequested
from ember_ext.paper.training.trainer import NonFiniteLossError, train

_ERRORS = (ConfigError, CorpusError, FlagError, NonFiniteLossError, RunError)


@dataclass(frozen=True)
class TrainArguments:
    """Train one of the paper's language models on Shakespeare, or on a text of your own."""

    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The run to train; shown with the values of the chosen preset."""
    config: Path | None = None
    """A JSON file of fields that replace the preset's; a run's config.json is one."""
    out: Path | None = None
    """The run folder. Default: a new one under runs/."""
    resume: Path | None = None
    """A run folder to continue, with its own configuration."""


@dataclass(frozen=True)
class SampleArguments:
    """Write text with a trained model."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    prompt: str | None = None
    """The text to continue. Default: a line break, or the first character of a vocabulary without.
    """
    length: int = 600
    """Characters to write."""
    temperature: float = 0.8
    """Below 1 for likelier text, 0 for the likeliest."""
    top_k: int | None = None
    """Choose among this many likeliest characters only."""
    seed: int = 0
    """Another seed, another text."""
    device: str = "auto"
    """A torch device."""


def train_main(argv: Sequence[str] | None = None) -> int:
    """Run `scripts/train.py`; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    prepare_output()
    try:
        refuse_empty(arguments)
        options = tyro.cli(
            TrainArguments,
            args=arguments,
            default=TrainArguments(_defaults(arguments)),
            prog="train.py",
        )
        return _train(options)
    except _ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        print(
            f"error: out of memory: {str(error).splitlines()[0]}; try a smaller --batch-size, "
            "--block-size or model",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130


def _is_out_of_memory(error: RuntimeError) -> bool:
    # On a CPU torch has no type of its own for it.
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _train(options: TrainArguments) -> int:
    console = TrainingConsole()
    if options.resume and options.out:
        raise ConfigError("--resume names the run folder already: leave --out away")
    processes, device = join(resolve_device(options.train.device))
    config = dataclasses.replace(options.train, device=device)
    if config.data is not None:
        config = dataclasses.replace(config, data=str(Path(config.data).resolve()))
    try:
        corpus = load_text(data=config.data, notify=console.note)
        path = processes.from_leader(str(options.resume or options.out or _new_folder(config)))
        train(config, corpus, RunFolder(path), resume=options.resume is not None, reporter=console)
    except StopRequested as stop:
        console.note(f"{stop}; continue with: python scripts/train.py --resume {path}")
        return stop.exit_code
    finally:
        leave()
    return 0


def _defaults(arguments: list[str]) -> TrainConfig:
    """The values that flags change: those of the preset and file, or of the run, that they name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--backbone", "--preset", "--device", "--config", "--resume"):
        parser.add_argument(flag, nargs="?")
    given = vars(parser.parse_known_args(arguments)[0])
    if given["resume"]:
        for flag in ("preset", "config"):
            if given[flag]:
                raise ConfigError(
                    f"--resume goes on with the run's own configuration: leave --{flag} away"
                )
        return RunFolder(given["resume"]).read_config()
    fields = read_config(Path(given["config"])) if given["config"] else {}
    # tyro reports a value that is no choice, and knows the choices.
    backbone: Backbone = _choice(given["backbone"] or fields.get("backbone"), Backbone, "cfc")
    preset: Preset = _choice(given["preset"] or fields.get("preset"), Preset, "auto")
    config = preset_config(backbone, preset, given["device"] or fields.get("device") or "auto")
    fields.pop("preset", None)
    return dataclasses.replace(config, **fields)


def _choice(value: str | None, choices: Any, default: str) -> Any:
    return value if value in get_args(choices) else default


def _new_folder(config: TrainConfig) -> Path:
    name = f"{config.backbone}-{config.condition}-{config.preset}-seed{config.seed}"
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(path for name in names if not (path := Path("runs", name)).exists())


def sample_main(argv: Sequence[str] | None = None) -> int:
    """Run `scripts/sample.py`; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    prepare_output()
    try:
        refuse_empty(arguments)
        options = tyro.cli(SampleArguments, args=arguments, prog="sample.py")
        require("--length", options.length, at_least(0))
        require("--temperature", options.temperature, at_least(0))
        require("--top-k", options.top_k, at_least(1))
        require("--seed", options.seed, A_SEED)
        model, vocabulary = load_run(RunFolder(options.run), resolve_device(options.device))
        prompt = vocabulary.opening if options.prompt is None else options.prompt
        pieces = stream_text(
            model,
            vocabulary,
            prompt=prompt,
            length=options.length,
            temperature=options.temperature,
            top_k=options.top_k,
            seed=options.seed,
        )
        # Whatever is wrong with the request shows before the first character.
        first = next(pieces, "")
        print(prompt, first, sep="", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    except (*_ERRORS, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:
        # The reader has seen enough; Python would complain when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
