"""What the experiments share: prompts of the `:tiny` models and data of each variant."""

from jaxsearch.data.prompts import FEATURES, PromptConfig
from jaxsearch.tasks.base import DataConfig

TINY_TOKENS = 96
"""Longest document of a `:tiny` model."""
SERVED = tuple(name for name in FEATURES if name != "position")
"""Pair features that are known when serving."""


def tiny_prompt(kind: str, features: tuple[str, ...] = ()) -> PromptConfig:
    """A short template for models trained from scratch."""
    return PromptConfig(
        kind,
        style="short",
        chat="tiny",
        max_document_tokens=TINY_TOKENS,
        features=features,
        searcher=("headline",),
    )


def tiny_data() -> DataConfig:
    """The generated market, small."""
    return DataConfig("job_market:tiny")


def full_data() -> DataConfig:
    """The generated market at its default size."""
    return DataConfig("job_market:default")
