"""Strict reading of JSON: what is missing, unknown, given twice or of another type is refused by name."""

import json
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

__all__ = [
    "MOST_NAME",
    "MOST_TEXT",
    "check_name",
    "check_text",
    "nearest",
    "parse_json",
    "read_fields",
    "shown",
    "unique",
]

# Bytes of a text that is read, and characters of a name. The spec of DeepSeek V3 takes 4 MB; its longest name, 64.
MOST_TEXT, MOST_NAME = 2**26, 1000


def _is_number(value: Any) -> bool:
    # Not math.isfinite, which raises for integers beyond a float.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(of(item) for item in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # not isinstance: True is an int


# What a field can be. The words are those of the message.
KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "an integer": lambda value: type(value) is int,
    "a count": _is_count,
    "a number": _is_number,
    "an object": lambda value: isinstance(value, dict),
    "a list": lambda value: isinstance(value, list),
    "a list of text": lambda value: _is_list(value, lambda item: isinstance(item, str)),
    "a list of counts": lambda value: _is_list(value, _is_count),
    "two counts": lambda value: _is_list(value, _is_count) and len(value) == 2,
    "two sides, each a count or null": lambda value: (
        _is_list(value, lambda item: item is None or _is_count(item)) and len(value) == 2
    ),
    "a format": lambda value: value is None or isinstance(value, str | dict),
}


def parse_json(text: str) -> Any:
    """What a JSON text holds. Raises ValueError if it is not JSON, or if an object has a key twice.

    Example:
        >>> parse_json('{"pattern": "*", "pattern": "a"}')
        Traceback (most recent call last):
        ValueError: found the key 'pattern' twice in {'pattern': 'a'}
    """
    if len(check_text(text)) > MOST_TEXT:
        raise ValueError(f"found JSON of {len(text)} characters, wanted at most {MOST_TEXT}")
    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("found JSON that is nested too deeply") from None


def check_text(text: Any) -> str:
    """The text, if it is one. Raises ValueError for a path or bytes."""
    if not isinstance(text, str):
        raise ValueError(f"found {type(text).__name__}, wanted the text itself, such as path.read_text()")
    return text


def check_name(name: str, what: str) -> str:
    """The name, if it can be one. Raises ValueError for one so long that to look for what it is like takes minutes."""
    if len(name) > MOST_NAME:
        raise ValueError(f"{what}: found a name of {len(name)} characters, {shown(name)}, wanted at most {MOST_NAME}")
    return name


def unique(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dict of pairs. Raises ValueError if a key comes twice, of which a dict would drop one."""
    pairs = list(pairs)
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[Any] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"found the key {twice!r} twice in {shown(made)}")
    return made


def read_fields(
    data: Any, what: str, required: Mapping[str, str], optional: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The fields of a JSON object, once each is known to be there and of its kind in `KINDS`.

    Raises:
        ValueError: A field is missing, unknown or of another kind; `what` says whose.

    Example:
        >>> read_fields({"name": "FP8", "blok": 16}, "format 'FP8'", {"name": "text"}, {"block": "a count"})
        Traceback (most recent call last):
        ValueError: format 'FP8': found the unknown key 'blok' (did you mean 'block'?), wanted name, block
    """
    kinds = {**required, **(optional or {})}
    if not isinstance(data, dict):
        raise ValueError(f"{what}: found {shown(data)}, wanted an object with {', '.join(kinds)}")
    for key, value in data.items():
        if key not in kinds:
            meant = f" (did you mean {nearest(key, kinds)[0]!r}?)" if isinstance(key, str) else ""
            raise ValueError(f"{what}: found the unknown key {shown(key)}{meant}, wanted {', '.join(kinds)}")
        if not KINDS[kinds[key]](value):
            raise ValueError(f"{what}: found {key}={shown(value)}, wanted {kinds[key]}")
    if missing := [key for key in required if key not in data]:
        raise ValueError(f"{what}: found no {missing[0]!r}, wanted {', '.join(kinds)}")
    return dict(data)


def nearest(name: str, names: Iterable[str], count: int = 1) -> list[str]:
    """Those of some names that are spelled most like one."""
    spelled = {known.upper(): known for known in names}
    name = name[:MOST_NAME]
    return [spelled[known] for known in get_close_matches(name.upper(), spelled, count, cutoff=0.0)]


def shown(value: Any) -> str:
    """A value for a message: short, whatever it is."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # of a number with more digits than Python prints
        text = f"a long {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:117]}..."
