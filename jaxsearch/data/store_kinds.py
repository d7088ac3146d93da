"""Which kind of store a `store.json` belongs to: stores of scores, of summaries and of embeddings all have one."""

from typing import Any

FIELDS = {
    "scores": ("columns", "kind"),
    "summaries": ("summariser",),
    "embeddings": ("encoder", "width"),
}
"""Kind -> fields of `store.json` that no other kind has."""
COMMANDS = {"scores": "label", "summaries": "summarise", "embeddings": "encode"}
"""Kind -> command of `serve.py` that makes it."""


def other_kind(where: object, values: Any, wanted: str) -> str:
    """Why a healthy store cannot be used as one of the kind `wanted`; "" where it is of that kind, or of none.

    Args:
      where: folder of the store.
      values: what its `store.json` holds.
      wanted: a kind.
    """
    for kind, fields in FIELDS.items():
        if kind != wanted and isinstance(values, dict) and all(name in values for name in fields):
            return f"{where} is a store of {kind}: give one of `serve.py {COMMANDS[wanted]}`"
    return ""
