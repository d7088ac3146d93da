"""The one thing that all errors of bad input have in common."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it, its value and the fix. Commands print it without a traceback."""
