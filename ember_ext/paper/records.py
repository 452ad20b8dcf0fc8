"""Reading back the JSON that the package wrote, with errors that say what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WORDS = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "an integer",
    list: "a list",
    str: "a text",
}


class RecordError(Exception):
    """Something is not what was written; the message names it, what is expected, and what is there.

    It does not name the file.
    """


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        RecordError: it cannot be read, or is not JSON.
    """
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise RecordError(f"it cannot be read: {error.strerror}") from None


def parse_json(content: bytes | str) -> Any:
    """Parse a JSON text.

    Raises:
        RecordError: it is not JSON.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"expected JSON, got what breaks off or is no JSON: {error}") from None


def check_record(
    record: object, fields: Mapping[str, type], what: str = "it", *, exact: bool = False
) -> dict[str, Any]:
    """Make sure that a value is an object with certain fields.

    Args:
        record: the value.
        fields: their types, among `bool`, `dict`, `float` (which integers are too), `int`, `list`
            and `str`.
        what: names the value in the message.
        exact: whether other fields are an error.

    Returns:
        The record.

    Raises:
        RecordError: it is not one.
    """
    if not isinstance(record, dict):
        raise RecordError(f"{what} must be {_WORDS[dict]}, got {_shown(record)}")
    missing = [name for name in fields if name not in record]
    unknown = [name for name in record if name not in fields] if exact else []
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has the unknown {', '.join(unknown)}"] if unknown else []
        expected = ", ".join(fields)
        raise RecordError(
            f"{what} must have the fields {expected}, got one that {' and '.join(parts)} "
            "(it is damaged, or another version of ember-ext wrote it)"
        )
    for name, kind in fields.items():
        value = record[name]
        fits = type(value) in (int, float) if kind is float else type(value) is kind
        if not fits:
            raise RecordError(f"{name} must be {_WORDS[kind]}, got {_shown(value)}")
    return record


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
