"""What the experiments share: prompts of the `:tiny` models and data of each variant."""

from jaxsearch.config import OptimizerConfig
from jaxsearch.data.prompts import FEATURES, PromptConfig
from jaxsearch.tasks.base import DataConfig

TINY_TOKENS = 96
"""Longest document of a `:tiny` model."""
SERVED = tuple(name for name in FEATURES if name != "position")
"""Pair features that are known when serving."""
TINY_SERVED = ("company_ctr", "age_days", "pays", "distance", "connect_rate", "active_days")
"""Those of them that actions in the generated market depend on; each vertical has its own."""


def tiny_prompt(kind: str, features: tuple[str, ...] = ()) -> PromptConfig:
    """A short template for models trained from scratch."""
    return PromptConfig(
        kind,
        style="short",
        chat="tiny",
        max_document_tokens=TINY_TOKENS,
        features=features,
        searcher=(),
    )


def tiny_optimizer(scale: float = 1.0) -> OptimizerConfig:
    """Muon: the difference between minutes and hours for models from scratch.

    Args:
        scale: of both learning rates; below 1 where a trained model is only turned to a related task.
    """
    return OptimizerConfig(
        kind="muon",
        learning_rate=3e-3 * scale,
        muon_learning_rate=0.02 * scale,
        warmup_steps=15,
        b2=0.98,
        final_fraction=0.05,
    )


def smollm2_optimizer() -> OptimizerConfig:
    """The first layers of a pretrained model: what they lost in the layers above has to be learned anew, so that the rates are high."""
    return OptimizerConfig(kind="muon", learning_rate=5e-4, muon_learning_rate=5e-3, warmup_steps=15)


def tiny_data() -> DataConfig:
    """The generated market, small."""
    return DataConfig("job_market:tiny")


def full_data() -> DataConfig:
    """The generated market at its default size."""
    return DataConfig("job_market:default")
