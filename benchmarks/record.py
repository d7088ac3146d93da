"""Where measured figures go: one JSON object a line, behind those that are there."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def show(line: Mapping[str, Any]) -> None:
    """Print a row, four digits of each number."""
    words = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
    print(*words, sep="  ", flush=True)


def append(path: str | os.PathLike[str] | None, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a file, which is made with its folder if need be; without a path nothing is kept."""
    if not path:
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
