"""Records as JSON lines: reading with every bad line named, writing whole or not at all."""

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsearch.data.records import R, RecordError, from_dict

MAX_LINE_BYTES = 4_000_000
_SKIP_BYTES = 65_536
_SHOWN_PROBLEMS = 10
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class BadRow:
    """A line or row that holds no record, and why."""

    code: str
    """The reason in two or three words; what reports count by."""
    reason: str
    field: str = ""
    value: str = ""
    """The value, or the start of the line: shortened, printable."""

    def __str__(self) -> str:
        if self.field:
            return f"{self.field}{f' is {self.value}' if self.value else ''}: {self.reason}"
        return f"{self.reason}: {self.value}" if self.value else self.reason


def printable(text: str, limit: int = 300) -> str:
    """`text` for a terminal: control characters and half characters escaped, long text shortened."""
    short = text if len(text) <= limit else text[:limit] + "..."
    if short.isprintable():
        return short
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in short)


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """(line number, its JSON value or `BadRow`) of each line that is not blank.

    A line longer than `MAX_LINE_BYTES` is passed over without holding it. A byte order mark is left out.

    Raises:
      OSError: the file cannot be read.
    """
    number = 0
    with open(path, "rb") as file:
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                size = len(raw) + _skip_line(file, raw)
                reason = f"the line has {size:,} bytes: longer than {MAX_LINE_BYTES:,} bytes"
                yield number, BadRow("line too long", reason, value=_start(raw))
                continue
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if raw.strip():
                yield number, parse_line(raw)


def _skip_line(file: Any, raw: bytes) -> int:
    """Go to the end of a line whose start was read; the number of bytes passed over."""
    skipped = 0
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(_SKIP_BYTES)
        skipped += len(raw)
    return skipped


def parse_line(raw: bytes) -> Any:
    """The JSON value of one line, or `BadRow`. A key that occurs twice is refused: readers disagree which one counts."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except _DuplicateKey as error:
        reason = "this key occurs twice in one object; keep one"
        return BadRow("duplicate key", reason, printable(error.key, 120))
    except UnicodeDecodeError as error:
        code, reason = "not UTF-8", f"not UTF-8 ({error.reason} at byte {error.start + 1}); save it as UTF-8"
    except json.JSONDecodeError as error:
        code, reason = "not JSON", f"not JSON ({error.msg} at column {error.colno})"
    except RecursionError:
        return BadRow("nested too deeply", "nested too deeply", value=_start(raw))
    except ValueError as error:  # a whole number of thousands of digits
        return BadRow("bad value", str(error).partition(";")[0], value=_start(raw))
    if not raw.endswith(b"\n"):
        code, reason = "cut off", f"the file ends within this line: {reason}"
    return BadRow(code, reason, value=_start(raw))


class _DuplicateKey(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return values


def _start(raw: bytes) -> str:
    text = raw[: 4 * _SHOWN_CHARACTERS].decode("utf-8", "backslashreplace").strip()
    return printable(text if len(raw) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")


def read_records(path: str | os.PathLike[str], kind: type[R]) -> list[R]:
    """All records of a JSONL file.

    Raises:
      RecordError: the file is missing, empty, or has bad lines; the first ten are named with line, field and reason.
    """
    file = Path(path)
    if not file.is_file():
        raise RecordError(f"{file}: no such file; give a JSONL file with one {kind.__name__} a line")
    records: list[R] = []
    problems: list[str] = []
    count = 0
    for number, row in read_rows(file):
        try:
            if not isinstance(row, BadRow):
                records.append(from_dict(kind, row))
                continue
            problem = str(row)
        except (ValueError, RecursionError) as error:
            problem = printable(str(error), 500)
        count += 1
        if len(problems) < _SHOWN_PROBLEMS:
            problems.append(f"{file.name}:{number}: {problem}")
    if problems:
        shown = "\n  ".join(problems)
        first = f" (the first {len(problems)} are shown)" if count > len(problems) else ""
        raise RecordError(f"{file} has {count} bad lines, mend or remove them{first}:\n  {shown}")
    if not records:
        raise RecordError(f"{file} holds no records: give at least one {kind.__name__}")
    return records


def write_lines(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines to a temporary name, then rename."""
    target = Path(path)
    temporary = target.with_name(target.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    os.replace(temporary, target)
