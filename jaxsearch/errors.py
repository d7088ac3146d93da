"""The one thing that all errors of bad input have in common, and how commands show them."""

import sys
from collections.abc import Callable, Mapping
from typing import Any


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it, its value and the fix. Commands print it without a traceback."""


def differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """For a message: each entry of `wanted` that is another one in `there`, with both values."""
    return [
        f"{name} {there.get(name)!r} (not {value!r})"
        for name, value in wanted.items()
        if there.get(name) != value
    ]


def exit_status(program: str, command: Callable[[], object]) -> int:
    """Run a command; 0, or 2 where its input cannot be used, which is then said on standard error."""
    try:
        command()
    except InputError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0
