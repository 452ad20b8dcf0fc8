"""Turns e-texts of plays into the "Name:" / speech form that character models train on.

The e-texts separate everything by blank lines: a speech opens with its speaker on a line of its own
that ends in a full stop, stage directions stand in brackets, and "ACT" and "SCENE" lines divide.
"""

from __future__ import annotations

import re
from collections import Counter

_SPEAKER = re.compile(r"[A-Z][A-Za-z'’ ]{0,30}\.")
_DIVISION = re.compile(r"(act|scene|prologue|epilogue|induction)\b", re.IGNORECASE)
_FIRST_ACT = re.compile(r"^act i\b", re.IGNORECASE | re.MULTILINE)
_DIRECTION = re.compile(r"\[[^\]]*\]")
_NOT_IN_PLAYS = re.compile(r"[^A-Za-z\n !$&',.:;?3-]")


def to_dialogue(etext: str) -> str:
    r"""The speeches of one play, each as "Name:\nspeech\n" with an empty line between speeches.

    Args:
        etext: a play whose speakers stand on lines of their own ("HAMLET.").

    Returns:
        The play without title, list of persons, act and scene headings and stage directions; in
        the 65 characters of the well-known Tiny Shakespeare file.
    """
    start = _FIRST_ACT.search(etext)
    body = _DIRECTION.sub("", etext[start.start() :] if start else etext)
    stripped = "\n".join(" ".join(line.split()) for line in body.splitlines())
    blocks = [block.splitlines() for block in re.split(r"\n{2,}", stripped.strip()) if block]
    heads = Counter(lines[0] for lines in blocks)
    speeches: list[list[str]] = []
    for lines in blocks:
        head = lines[0]
        if _DIVISION.match(head):
            continue
        # A line of verse may look like a name, but no verse recurs.
        if _SPEAKER.fullmatch(head) and (head.isupper() or heads[head] > 1):
            speeches.append([_name(head), *lines[1:]])
        elif speeches:
            # A stage direction stood in the middle of this speech.
            speeches[-1] += lines
    text = "\n".join("\n".join(speech) + "\n" for speech in speeches if len(speech) > 1)
    return _NOT_IN_PLAYS.sub("", text.replace("’", "'"))


def _name(line: str) -> str:
    """Turn "FIRST LORD." into "First Lord:"."""
    return " ".join(word.capitalize() for word in line[:-1].split()) + ":"
