"""Where measured figures go: one JSON object a line, behind those that are there."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def append(path: str | os.PathLike[str] | None, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a file, which is made with its folder if need be; without a path nothing is kept."""
    if not path:
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
