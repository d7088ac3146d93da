"""Reports on disk: dataclasses as strict JSON and back, files written whole or not at all."""

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxsearch.errors import InputError

T = TypeVar("T")
MAX_BYTES = 500_000_000


class ReportError(InputError):
    """A report that cannot be used; the message names the file and what to do."""


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write to a temporary name, then rename."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)


def write_json(path: str | os.PathLike[str], report: Any) -> None:
    """Write a dataclass as JSON; NaN becomes null."""
    write_text(path, json.dumps(to_plain(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str], kind: type[T]) -> T:
    """A dataclass that `write_json` wrote.

    Raises:
      ReportError: the file is missing, damaged, or is something else.
    """
    file = Path(path)
    if not file.is_file():
        raise ReportError(f"{file}: no such file; measure first")
    if file.stat().st_size > MAX_BYTES:
        raise ReportError(f"{file} has more than {MAX_BYTES:,} bytes: this is no report")
    try:
        return typing.cast(T, from_plain(kind, json.loads(file.read_text(encoding="utf-8"))))
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{file} cannot be used ({error}): measure anew") from error


def to_plain(value: Any) -> Any:
    """Plain JSON values of dataclasses, named tuples, sequences and mappings; None for NaN."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return to_plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def from_plain(kind: Any, value: Any, name: str = "report") -> Any:
    """A value of type `kind` from plain JSON values; null is NaN where a float is wanted.

    Raises:
      ValueError: the value is of another type; the message names the field.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        wanted = next(argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else from_plain(wanted, value, name)
    if origin is dict and isinstance(value, dict):
        return {key: from_plain(arguments[1], item, f"{name}.{key[:80]}") for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(from_plain(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if kind is float:
        if value is None:
            return float("nan")
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
            return float(value)
    elif kind in (int, str) and type(value) is kind:
        return value
    elif origin is None and isinstance(kind, type) and isinstance(value, dict) and kind not in (int, str):
        hints = typing.get_type_hints(kind)
        if set(value) != set(hints):
            differing = ", ".join(sorted(set(value) ^ set(hints)))[:200]
            raise ValueError(f"{name}: fields {differing} are missing or unknown")
        return kind(**{key: from_plain(hint, value[key], f"{name}.{key}") for key, hint in hints.items()})
    raise ValueError(f"{name} is {str(value)[:80]!r}")
