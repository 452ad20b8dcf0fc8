"""Writing files so that no crash leaves half of one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from glob import escape
from pathlib import Path

STALE_SECONDS = 3600.0
"""No file takes this long to write: what lies there unfinished for longer has lost its writer."""

_PART = ".part"


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step, and only once the new content is on the disk.

    Several processes, also of several machines, may write the same file: the last one to finish
    wins. After this the file survives a power cut. What writers of the same file that were killed
    left behind an hour ago or earlier is removed.

    Args:
        path: the file; its folder is made if it is missing.
        content: all of it.

    Raises:
        OSError: it cannot be written; what was there is untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_PART}")
    made = _missing_folders(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # The file system's own clock, which another machine's writer is measured by too.
        now = temporary.stat().st_mtime
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    for folder in (path.parent, *(folder.parent for folder in made)):
        _sync_folder(folder)
    _remove_parts(path.parent.glob(f".{escape(path.name)}.*{_PART}"), now - STALE_SECONDS)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed left in a folder that nobody else writes to now."""
    _remove_parts(folder.glob(f".*{_PART}"), float("inf"))


def _remove_parts(parts: Iterable[Path], before: float) -> None:
    for part in parts:
        # Another writer may be as quick to remove it.
        with suppress(OSError):
            if part.stat().st_mtime < before:
                part.unlink()


def _missing_folders(folder: Path) -> list[Path]:
    """The folders that have to be made for this one to be there."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    return missing


def _sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk, where the system can: a file without its name is lost."""
    # Windows opens no folder, and some network file systems sync none.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
