"""The one thing that all errors of bad input have in common, and how commands show them."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it, its value and the fix. Commands print it without a traceback."""


def exit_status(program: str, command: Callable[[], object]) -> int:
    """Run a command; 0, or 2 where its input cannot be used, which is then said on standard error."""
    try:
        command()
    except InputError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0
