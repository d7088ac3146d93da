"""The ranker (paper section 4): one student of the relevance and the engagement teacher, whose scores are read from stores.

    python train.py --config configs/ranker.py:tiny --workdir runs/ranker --task.model.init-from runs/retriever/model \
        --task.relevance-teachers runs/relevance_scores --task.engagement-teachers runs/engagement_scores

Hardware: tiny 2 CPU cores; smollm2_135m_8l (its first 8 layers) a GPU, or CPU cores and patience; qwen3_0_6b a TPU or GPU slice.
"""

from jaxsearch.config import MeshConfig, OptimizerConfig, TrainConfig, pick
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.tasks.base import DataConfig, ModelConfig
from jaxsearch.tasks.defaults import (
    SERVED,
    TINY_SERVED,
    full_data,
    smollm2_optimizer,
    tiny_data,
    tiny_optimizer,
    tiny_prompt,
)
from jaxsearch.tasks.ranker import RankerConfig


def _tiny(steps: int, data: DataConfig | None = None) -> TrainConfig:
    return TrainConfig(
        name="ranker",
        task=RankerConfig(
            data=data or tiny_data(),
            model=ModelConfig("tiny_student"),
            prompt=tiny_prompt("ranker", TINY_SERVED),
            candidates=16,
            alpha=0.7,
        ),
        steps=steps,
        batch_size=32,
        optimizer=tiny_optimizer(),
    )


def _smollm2() -> TrainConfig:
    """On real occupations, where nobody has acted."""
    return TrainConfig(
        name="ranker",
        task=RankerConfig(
            data=DataConfig("onet_jobs"),
            model=ModelConfig("smollm2_135m", layers=8),
            prompt=PromptConfig("ranker", chat="chatml", max_document_tokens=128),
            candidates=8,
        ),
        steps=600,
        batch_size=8,
        optimizer=smollm2_optimizer(),
    )


def _qwen3() -> TrainConfig:
    return TrainConfig(
        name="ranker",
        task=RankerConfig(
            data=full_data(),
            model=ModelConfig("qwen3_0_6b", compute_dtype="bfloat16", remat="full"),
            prompt=PromptConfig("ranker", chat="qwen3", features=SERVED),
        ),
        steps=4_000,
        batch_size=128,
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=100),
        mesh=MeshConfig(fsdp=-1),
    )


def get_config(variant: str) -> TrainConfig:
    """Variants: tiny, tiny_people, smollm2_135m_8l, qwen3_0_6b."""
    return pick(
        variant,
        {
            "tiny": lambda: _tiny(440),
            # After the steps of job search the student is still seven times as far from its teachers.
            "tiny_people": lambda: _tiny(1200, DataConfig("job_market:tiny_people")),
            "smollm2_135m_8l": _smollm2,
            "qwen3_0_6b": _qwen3,
        },
    )
