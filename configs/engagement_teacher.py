"""The engagement teacher (paper section 4): one head per action, learned from impressions with their position.

    python train.py --config configs/engagement_teacher.py:tiny --workdir runs/engagement_teacher --task.model.init-from runs/judge/model

Hardware: tiny 2 CPU cores; qwen3_1_7b a TPU or GPU slice.
"""

from jaxsearch.config import MeshConfig, OptimizerConfig, TrainConfig, pick
from jaxsearch.data.prompts import FEATURES, PromptConfig
from jaxsearch.tasks.base import ModelConfig
from jaxsearch.tasks.defaults import TINY_SERVED, full_data, tiny_data, tiny_optimizer, tiny_prompt
from jaxsearch.tasks.engagement_teacher import EngagementTeacherConfig


def _tiny() -> TrainConfig:
    return TrainConfig(
        name="engagement_teacher",
        task=EngagementTeacherConfig(
            data=tiny_data(),
            model=ModelConfig("tiny"),
            prompt=tiny_prompt("ranker", ("position", *TINY_SERVED)),
            candidates=10,
        ),
        steps=110,
        batch_size=32,
        optimizer=tiny_optimizer(),
    )


def _qwen3() -> TrainConfig:
    return TrainConfig(
        name="engagement_teacher",
        task=EngagementTeacherConfig(
            data=full_data(),
            model=ModelConfig("qwen3_1_7b", compute_dtype="bfloat16", remat="full"),
            prompt=PromptConfig("ranker", chat="qwen3", features=tuple(FEATURES)),
        ),
        steps=4_000,
        batch_size=64,
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=100),
        mesh=MeshConfig(fsdp=-1),
    )


def get_config(variant: str) -> TrainConfig:
    """Variants: tiny, qwen3_1_7b."""
    return pick(variant, {"tiny": _tiny, "qwen3_1_7b": _qwen3})
