"""The summariser (paper section 5): a document in a few words that a ranker reads almost as it reads the whole.

First the ranker's scores of the full text, and short texts to begin with; then imitation, then GRPO against the ranker:

    python serve.py label --model runs/ranker/model --dataset job_market:tiny --output runs/ranker_scores --per-query 16
    python serve.py summarise --method extractive --tokenizer runs/ranker/model --tokens 8 --dataset job_market:tiny \
        --output runs/extractive
    python serve.py summarise --method truncate --tokenizer runs/ranker/model --tokens 8 --dataset job_market:tiny --output runs/truncated
    python train.py --config configs/summariser.py:tiny_imitation --workdir runs/imitation \
        --task.model.init-from runs/base/model --task.targets runs/extractive runs/truncated
    python train.py --config configs/summariser.py:tiny --workdir runs/summariser --task.model.init-from runs/imitation/model \
        --task.ranker runs/ranker/model --task.scores runs/ranker_scores
    python serve.py summarise --model runs/summariser/model --dataset job_market:tiny --output runs/summaries

Hardware: tiny 2 CPU cores; smollm2_135m_8l (the first 8 layers) a GPU, or CPU cores and patience; qwen3_1_7b, the paper's size, a TPU or
GPU slice.
"""

import dataclasses

from jaxsearch.config import MeshConfig, OptimizerConfig, TrainConfig, pick
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.tasks.base import DataConfig, ModelConfig
from jaxsearch.tasks.defaults import full_data, smollm2_optimizer, tiny_data, tiny_optimizer, tiny_prompt
from jaxsearch.tasks.summariser import SummariserConfig


def _tiny() -> TrainConfig:
    """Rewards move a decoder slowly and noisily: rates far below those of learning to read, and AdamW."""
    return TrainConfig(
        name="summariser",
        task=SummariserConfig(
            data=tiny_data(),
            model=ModelConfig("tiny"),
            prompt=dataclasses.replace(tiny_prompt("summariser"), max_answer_tokens=9),
            length_weight=0.002,
            copy_weight=0.05,
        ),
        steps=300,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=15, b2=0.98),
    )


def _tiny_imitation() -> TrainConfig:
    return dataclasses.replace(_tiny(), steps=100, batch_size=64, optimizer=tiny_optimizer())


def _smollm2() -> TrainConfig:
    """On real occupations. Start from a folder of ours with SmolLM2's tokenizer, as the ranker does."""
    return TrainConfig(
        name="summariser",
        task=SummariserConfig(
            data=DataConfig("onet_jobs"),
            model=ModelConfig("smollm2_135m", layers=8),
            prompt=PromptConfig("summariser", chat="chatml", max_document_tokens=512, max_answer_tokens=96),
            length_weight=0.0005,
            copy_weight=0.05,
        ),
        steps=600,
        batch_size=8,
        optimizer=dataclasses.replace(smollm2_optimizer(), kind="adamw", learning_rate=5e-5),
    )


def _qwen3() -> TrainConfig:
    return TrainConfig(
        name="summariser",
        task=SummariserConfig(
            data=full_data(),
            model=ModelConfig("qwen3_1_7b", compute_dtype="bfloat16", remat="full"),
            prompt=PromptConfig("summariser", chat="qwen3", max_document_tokens=2048, max_answer_tokens=256),
            length_weight=0.0002,
            copy_weight=0.05,
        ),
        steps=1_000,
        batch_size=64,
        optimizer=OptimizerConfig(learning_rate=1e-6, warmup_steps=50),
        mesh=MeshConfig(fsdp=-1),
    )


def get_config(variant: str) -> TrainConfig:
    """Variants: tiny (GRPO), tiny_imitation (its start), smollm2_135m_8l, qwen3_1_7b."""
    return pick(
        variant,
        {
            "tiny": _tiny,
            "tiny_imitation": _tiny_imitation,
            "smollm2_135m_8l": _smollm2,
            "qwen3_1_7b": _qwen3,
        },
    )
