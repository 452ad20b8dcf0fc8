"""The training loop: AdamW on random windows, evaluated and checkpointed as it goes."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import ember_ext
from ember_ext._machine import machine
from ember_ext.paper.data import Corpus, random_batch
from ember_ext.paper.training.checkpoint import Progress
from ember_ext.paper.training.config import ConfigError, TrainConfig, build_model, resolve_device
from ember_ext.paper.training.distributed import Processes, is_lost_connection
from ember_ext.paper.training.evaluation import evaluate
from ember_ext.paper.training.reporter import Reporter, SilentReporter
from ember_ext.paper.training.run_folder import RunError, RunFolder
from ember_ext.paper.training.sampling import stream_text
from ember_ext.paper.training.signals import StopRequested, StopSignals
from ember_ext.paper.training.streams import generator, stream_seed


class NonFiniteLossError(Exception):
    """The loss or its gradient overflowed; the message says where, and what to try."""


def train(
    config: TrainConfig,
    corpus: Corpus,
    folder: RunFolder,
    *,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Train one model to the end.

    Seeds torch's global random generator before every step.

    Args:
        config: what to do; `preset_config` makes one.
        corpus: the text.
        folder: where results go.
        resume: continue the run that the folder holds, from its last checkpoint. On a CPU the
            loss curve is bit-identical to that of a run that was never stopped.
        reporter: told of the progress. Default: nobody.

    Returns:
        The summary that `summary.json` holds: losses, parameter counts, speed, and what was run.
        Empty in all but the first of several processes.

    Raises:
        ConfigError: the model does not accept the configuration, or the text is too short for it.
        RunError: the folder cannot be written, holds another run, or is in use.
        NonFiniteLossError: the loss became NaN or infinite, or the weights what no operator takes.
        StopRequested: SIGINT or SIGTERM; a checkpoint was written.
    """
    return _Training(config, corpus, folder, resume, reporter or SilentReporter()).run()


class _Training:
    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        folder: RunFolder,
        resume: bool,
        reporter: Reporter,
    ) -> None:
        for split, tokens in (("training", corpus.train), ("validation", corpus.val)):
            if len(tokens) <= config.block_size:
                raise ConfigError(
                    f"block_size {config.block_size} needs a {split} text of more characters than "
                    f"that, but {corpus.name} has {len(tokens)}"
                )
        self.processes = Processes.current()
        if config.batch_size % self.processes.count:
            raise ConfigError(
                f"batch_size must be a multiple of the {self.processes.count} processes, "
                f"got {config.batch_size}"
            )
        config = dataclasses.replace(config, device=resolve_device(config.device))
        self.config, self.corpus, self.folder = config, corpus, folder
        self.reporter = reporter if self.processes.leads else SilentReporter()
        self.device = torch.device(config.device)
        torch.manual_seed(stream_seed(config.seed, "initial weights"))
        self.model = build_model(config, len(corpus.vocabulary))
        self._add_init_noise()
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameter_groups(config.weight_decay),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=True,
        )
        self.averaging_model = self.processes.wrap(self.model)
        self.resume = resume
        self.progress = Progress()
        self.signals = StopSignals()
        self.saved = time.monotonic()

    @torch.no_grad()
    def _add_init_noise(self) -> None:
        if not self.config.init_noise:
            return
        stream = generator(self.config.seed, "initial noise")
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=stream)
                parameter.mul_(1 + self.config.init_noise * noise)

    def run(self) -> dict[str, Any]:
        with ExitStack() as claimed:
            with self.processes.together(RunError):
                if self.processes.leads:
                    claimed.enter_context(self.folder.claim())
            # Only now: who had the folder before may have written a checkpoint meanwhile.
            with self.processes.together(ConfigError, RunError):
                self._open_folder()
            try:
                return self._train()
            except RuntimeError as error:
                if self.processes.count == 1 or not is_lost_connection(error):
                    raise
                raise RunError(
                    f"process {self.processes.rank} of {self.processes.count} lost the others: one "
                    "of them has ended, and its message says why"
                ) from None

    def _open_folder(self) -> None:
        folder, config, corpus = self.folder, self.config, self.corpus
        if self.resume:
            folder.check(config, corpus)
            self.progress = folder.load_checkpoint(self.model, self.optimizer)
            if config.steps < self.progress.step:
                raise ConfigError(
                    f"steps must be at least {self.progress.step}, which the run in {folder.path} "
                    f"has made already, got {config.steps}"
                )
        if self.processes.leads:
            if self.resume:
                folder.cut_metrics(self.progress.metrics_bytes)
                folder.update_config(config)
            else:
                folder.create(config, corpus)

    def _train(self) -> dict[str, Any]:
        config, progress = self.config, self.progress
        self.reporter.note(
            f"{config.backbone} {config.condition}, preset {config.preset}: "
            f"{self.model.num_parameters():,} parameters, "
            f"{self.model.num_lif_parameters():,} of them LIF; {self.corpus.name}, "
            f"{config.device}, seed {config.seed}; run folder {self.folder.path}"
        )
        self.reporter.start(progress.step, config.steps)
        try:
            with self.signals:
                while progress.step < config.steps:
                    if progress.step % config.eval_interval == 0:
                        self._evaluate()
                    self._stop_if_asked()
                    self._update()
                    if time.monotonic() - self.saved >= config.checkpoint_seconds:
                        self._save()
                self._evaluate()
        except StopRequested:
            self._save()
            raise
        finally:
            self.reporter.stop()
        return self._finish() if self.processes.leads else {}

    def _stop_if_asked(self) -> None:
        """Stop at the same step in all processes."""
        number = self.processes.largest(self.signals.received, self.device)
        if number:
            raise StopRequested(number)

    def _update(self) -> None:
        config, step = self.config, self.progress.step
        rank, count = self.processes.rank, self.processes.count
        started = time.perf_counter()
        inputs, targets = random_batch(
            self.corpus.train,
            config.batch_size,
            config.block_size,
            generator(config.seed, "batches", step),
        )
        learning_rate = config.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        torch.manual_seed(stream_seed(config.seed, f"dropout/{rank}", step))
        with self._diagnosing():
            _, loss, _ = self.averaging_model(
                inputs[rank::count].to(self.device), targets[rank::count].to(self.device)
            )
            self.optimizer.zero_grad()
            loss.backward()
        parameters = [weight for weight in self.model.parameters() if weight.grad is not None]
        norm = get_total_norm([weight.grad for weight in parameters if weight.grad is not None])
        record: dict[str, Any] = {
            "event": "step",
            "step": step,
            "loss": self.processes.mean(loss.detach()).item(),
            "grad_norm": norm.item(),
            "learning_rate": learning_rate,
        }
        if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
            raise NonFiniteLossError(self._diagnosis(record))
        clip_grads_with_norm_(parameters, config.grad_clip, norm)
        self.optimizer.step()

        self.progress.step += 1
        self.progress.evaluated = False
        elapsed = time.perf_counter() - started
        self.progress.step_seconds += elapsed
        self.progress.seconds += elapsed
        if self.processes.leads:
            self.folder.append(record)
        self.reporter.step(self.progress.step, record["loss"], self._tokens_per_second())

    def _evaluate(self) -> None:
        progress = self.progress
        if progress.evaluated or not self.processes.leads:
            return
        started = time.perf_counter()
        # Among several processes one alone must not stop: the others would wait for it forever.
        check = self._stop_if_asked if self.processes.count == 1 else lambda: None
        with self._diagnosing():
            result = evaluate(self.model, self.corpus, self.config, check)
        if not math.isfinite(result["val_loss"]):
            raise NonFiniteLossError(self._advice(f"val loss {result['val_loss']}"))
        progress.seconds += time.perf_counter() - started
        record = {"event": "evaluation", "step": progress.step, **result}
        record["seconds"] = progress.seconds
        progress.evaluated = True
        estimate = result["val_loss_estimate"]
        progress.best_val_loss_estimate = min(progress.best_val_loss_estimate, estimate)
        progress.val_loss, progress.val_loss_estimate = result["val_loss"], estimate
        if result["val_loss"] < progress.best_val_loss:
            progress.best_val_loss, progress.best_step = result["val_loss"], progress.step
            self.folder.save_best(self.model, progress.step, progress.best_val_loss)
        self.folder.append(record)
        self._save()
        self.reporter.evaluated(record)

    def _save(self) -> None:
        if not self.processes.leads:
            return
        spoilt = self._spoilt()
        if spoilt:
            raise NonFiniteLossError(self._advice(spoilt))
        self.folder.save_checkpoint(self.model, self.optimizer, self.progress)
        self.saved = time.monotonic()

    def _finish(self) -> dict[str, Any]:
        config, progress, model = self.config, self.progress, self.model
        summary = {
            "backbone": config.backbone,
            "condition": config.condition,
            "preset": config.preset,
            "seed": config.seed,
            "corpus": self.corpus.name,
            "steps": progress.step,
            "val_loss": progress.val_loss,
            "best_val_loss": progress.best_val_loss,
            "best_step": progress.best_step,
            "val_loss_estimate": progress.val_loss_estimate,
            "best_val_loss_estimate": progress.best_val_loss_estimate,
            "parameters": model.num_parameters(),
            "trainable_parameters": model.num_parameters(trainable_only=True),
            "lif_parameters": model.num_lif_parameters(),
            "tokens_per_second": self._tokens_per_second(),
            "seconds": progress.seconds,
            "device": config.device,
            "machine": machine(self.device),
            "processes": self.processes.count,
            "threads": torch.get_num_threads(),
            "matmul_precision": torch.get_float32_matmul_precision(),
            "torch": torch.__version__,
            "ember_ext": ember_ext.__version__,
        }
        self.folder.load_best(model)
        pieces = stream_text(
            model,
            self.corpus.vocabulary,
            length=config.sample_length,
            seed=stream_seed(config.seed, "sample"),
        )
        sample = "".join(pieces)
        self.folder.write_sample(sample)
        title = f"{config.backbone} {config.condition}, {self.corpus.name}"
        self.folder.write_plot(title)
        self.folder.write_summary(summary)
        self.reporter.finished(summary, sample, self.folder.path)
        return summary

    def _tokens_per_second(self) -> float:
        tokens = self.progress.step * self.config.batch_size * self.config.block_size
        return tokens / self.progress.step_seconds

    @contextmanager
    def _diagnosing(self) -> Iterator[None]:
        """Turn an operator's error about weights that have diverged into the run's diagnosis."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            spoilt = self._spoilt()
            if not spoilt:
                raise
            raise NonFiniteLossError(self._advice(spoilt)) from error

    @torch.no_grad()
    def _spoilt(self) -> str:
        """Name the faults of the weights that no further step can mend; empty if there are none."""
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                return f"{name} is not finite"
        for name, gate in self.model.gates().items():
            threshold, leak, steepness = gate.threshold, gate.leak, gate.steepness
            if not bool(threshold.isfinite().all() & leak.isfinite().all()):
                return f"a threshold or leak of {name} is not finite"
            if not bool((steepness.isfinite() & (steepness > 0)).all()):
                return f"a steepness of {name} is {steepness.min():g} and must be above 0"
        return ""

    def _advice(self, what: str) -> str:
        step = self.progress.step
        return (
            f"the run has diverged: {what} after {step} steps, learning rate "
            f"{self.config.learning_rate_at(max(0, step - 1)):g}; {self._kept()}"
            "try a smaller --learning-rate, or a smaller --grad-clip"
        )

    def _kept(self) -> str:
        last = self.folder.last
        return f"the last good checkpoint is {last}; " if last.exists() else ""

    def _diagnosis(self, record: Mapping[str, Any]) -> str:
        culprits = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
        ]
        where = f"first non-finite gradient: {culprits[0]}; " if culprits else ""
        return (
            f"loss {record['loss']} and gradient norm {record['grad_norm']} at step "
            f"{record['step']}, learning rate {record['learning_rate']:g}; {where}{self._kept()}"
            "try a smaller --learning-rate, or a smaller --grad-clip"
        )
