"""The folder in which fetched data is kept for later runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from ember_ext.paper.files import write_atomically


def cache_folder() -> Path:
    """`EMBER_EXT_CACHE` if set, else the platform's cache folder for ember-ext."""
    import platformdirs

    chosen = os.environ.get("EMBER_EXT_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("ember-ext"))


def sha256(content: bytes) -> str:
    """The hexadecimal SHA-256 digest of `content`."""
    return hashlib.sha256(content).hexdigest()


def cached(file: str, digest: str, notify: Callable[[str], None]) -> bytes | None:
    """The content of a file in the cache; None unless it is there and has the digest."""
    path = cache_folder() / file
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if sha256(content) != digest:
        notify(f"{path} is damaged (unexpected checksum) and is fetched anew")
        return None
    return content


def store(file: str, content: bytes, notify: Callable[[str], None]) -> None:
    """Cache `content` in one step, so that a reader never sees half a file."""
    path = cache_folder() / file
    try:
        write_atomically(path, content)
    except OSError as error:
        notify(f"cannot cache {file} in {path.parent}: {error.strerror}")
