"""Results of finished runs from other folders: read for a report, or taken over into a grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ember_ext.paper.data import Corpus
from ember_ext.paper.files import write_atomically
from ember_ext.paper.runs.grid import differences_of, other_configuration
from ember_ext.paper.runs.results import RunResult, read_results
from ember_ext.paper.runs.suites import SuiteName, plan
from ember_ext.paper.runs.worker import GridFolder
from ember_ext.paper.training import ConfigError


def suite_results(suite: SuiteName, folder: GridFolder) -> list[RunResult]:
    """The results in a grid's folder, all of which must be of one suite.

    Raises:
        ConfigError: a result is of another suite; the message names it.
        ResultError: the folder is missing, or a file in it is damaged.
    """
    results = read_results(folder.results)
    for result in results:
        path = folder.result(result.name)
        specs = plan(suite, [result.seed], [result.variant], [result.backbone], device="cpu")  # type: ignore[list-item]
        differences = differences_of(result, specs[0], path)
        if differences:
            raise ConfigError(f"{other_configuration(path, differences)}, not one of suite {suite}")
    return results


def take_over(
    suite: SuiteName,
    folder: GridFolder,
    sources: Sequence[Path],
    corpus: Corpus | None = None,
) -> list[str]:
    """Copy the results that other folders have of a suite, and this one lacks.

    Checkpoints stay where they are. A result that is here already is left as it is. Nothing is
    copied unless all results, those here included, are of one text.

    Args:
        suite: what all of them must be runs of.
        folder: where to.
        sources: folders of grids.
        corpus: the text that they must be of. Default: any one text.

    Returns:
        The names of the results that are new here.

    Raises:
        ConfigError: a result is of another suite, or two are of different texts; the message
            names both files.
        ResultError: a folder is missing, or a file in it is damaged.
    """
    # All are checked before any is copied.
    found = [(GridFolder(source), suite_results(suite, GridFolder(source))) for source in sources]
    here = read_results(folder.results) if folder.results.is_dir() else []
    _require_one_text([(folder, here), *found], corpus)
    folder.results.mkdir(parents=True, exist_ok=True)
    new = []
    for source, results in found:
        for result in results:
            if not folder.result(result.name).exists():
                content = source.result(result.name).read_bytes()
                write_atomically(folder.result(result.name), content)
                new.append(result.name)
    return new


def _require_one_text(
    found: Sequence[tuple[GridFolder, list[RunResult]]], corpus: Corpus | None
) -> None:
    """Require that all results are of one text, by its checksum.

    Raises:
        ConfigError: two are of different texts, or one is not of `corpus`.
    """
    texts = [
        (folder.result(result.name), result.corpus["name"], result.corpus.get("sha256"))
        for folder, results in found
        for result in results
    ]
    for path, name, digest in texts[1:]:
        first, first_name, first_digest = texts[0]
        if digest != first_digest:
            raise ConfigError(
                f"{path} is of the text {_named(name, digest)}, but {first} is of "
                f"{_named(first_name, first_digest)}: results of one folder must be of one text"
            )
    if corpus is not None and texts and texts[0][2] != corpus.sha256:
        path, name, digest = texts[0]
        raise ConfigError(
            f"{path} is of the text {_named(name, digest)}, but this call trains on "
            f"{_named(corpus.name, corpus.sha256)}: give the text with --data"
        )


def _named(name: str, digest: object) -> str:
    """A text's name, and the start of its checksum, since two texts can have one name."""
    return f"{name!r} (SHA-256 {str(digest)[:12]})"
