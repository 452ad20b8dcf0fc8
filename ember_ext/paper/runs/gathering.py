"""Results of finished runs from other folders: read for a report, or taken over into a grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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


def take_over(suite: SuiteName, folder: GridFolder, sources: Sequence[Path]) -> list[str]:
    """Copy the results that other folders have of a suite, and this one lacks.

    Checkpoints stay where they are. A result that is here already is left as it is.

    Args:
        suite: what all of them must be runs of.
        folder: where to.
        sources: folders of grids.

    Returns:
        The names of the results that are new here.

    Raises:
        ConfigError: a result is of another suite.
        ResultError: a folder is missing, or a file in it is damaged.
    """
    # All are checked before any is copied.
    found = [(GridFolder(source), suite_results(suite, GridFolder(source))) for source in sources]
    folder.results.mkdir(parents=True, exist_ok=True)
    new = []
    for source, results in found:
        for result in results:
            if not folder.result(result.name).exists():
                content = source.result(result.name).read_bytes()
                write_atomically(folder.result(result.name), content)
                new.append(result.name)
    return new
