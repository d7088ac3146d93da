"""Records as JSON lines: reading with every bad line named, writing whole or not at all."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxsearch.data.records import R, RecordError, from_dict

MAX_LINE_BYTES = 4_000_000
_SHOWN_PROBLEMS = 10


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
    with open(file, "rb") as lines:
        for number, raw in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES + 1), b""), start=1):
            if len(raw) > MAX_LINE_BYTES:
                problems.append(f"{file.name}:{number}: longer than {MAX_LINE_BYTES:,} bytes")
                break
            if raw.strip():
                try:
                    records.append(from_dict(kind, json.loads(raw.decode("utf-8"))))
                except UnicodeDecodeError as error:
                    problems.append(f"{file.name}:{number}: not UTF-8 ({error.reason})")
                except (ValueError, RecursionError) as error:
                    problems.append(f"{file.name}:{number}: {error}")
    if problems:
        shown = "\n  ".join(problems[:_SHOWN_PROBLEMS])
        raise RecordError(f"{file} has {len(problems)} bad lines, mend or remove them:\n  {shown}")
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
