"""MixLM, stage III (paper section 6): an encoder that turns a document into a few embeddings, and the ranker that reads them.

Stage I is configs/judge.py, stage II configs/ranker.py; the teacher's scores are those that the stage II ranker gave, and the encoder comes
from configs/encoder.py, with as many tokens (or, for the other variants, from the retriever):

    python serve.py label --model runs/ranker/model --dataset job_market:tiny --output runs/ranker_lists \
        --retriever runs/retriever/model
    python train.py --config configs/mixlm.py:tiny_words --workdir runs/mixlm --task.model.init-from runs/ranker/model \
        --task.encoder.init-from runs/encoder/model --task.labels runs/judge_labels \
        --task.relevance-teachers runs/ranker_lists --task.engagement-teachers runs/ranker_lists
    python serve.py encode --model runs/mixlm/model/encoder --dataset job_market:tiny --output runs/embeddings

Hardware: tiny 2 CPU cores; smollm2_135m_8l (the first 8 layers of both) a GPU, or CPU cores and patience; qwen3_0_6b a TPU or GPU slice.
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
from jaxsearch.tasks.mixlm import MixLMConfig


def _tiny(steps: int, *, tokens: int = 1, curriculum: float = 0.15, rates: float = 1.0) -> TrainConfig:
    return TrainConfig(
        name="mixlm",
        task=MixLMConfig(
            data=tiny_data(),
            model=ModelConfig("tiny_student"),
            prompt=tiny_prompt("ranker", TINY_SERVED),
            encoder=ModelConfig("tiny_student"),
            encoder_prompt=tiny_prompt("document"),
            candidates=16,
            alpha=0.7,
            curriculum=curriculum,
            tokens=tokens,
            text_weight=0.5,
            text_every=4,
        ),
        steps=steps,
        batch_size=32,
        optimizer=tiny_optimizer(rates),
    )


def _tiny_words() -> TrainConfig:
    """From an encoder that has learned the ranker's words: nothing is left to be aligned first, and what is there should not be shaken off.

    Muon's steps have one size, however good a model is already: at full rates the ranker loses what it had before it can read embeddings.
    """
    return _tiny(440, tokens=5, curriculum=0.0, rates=0.3)


def _smollm2() -> TrainConfig:
    """On real occupations, without actions. Start both models from folders of ours, or from SmolLM2-135M itself."""
    return TrainConfig(
        name="mixlm",
        task=MixLMConfig(
            data=DataConfig("onet_jobs"),
            model=ModelConfig("smollm2_135m", layers=8),
            prompt=PromptConfig("ranker", chat="chatml", max_document_tokens=128),
            encoder=ModelConfig("smollm2_135m", layers=8),
            encoder_prompt=PromptConfig("document", chat="chatml", max_document_tokens=128),
            candidates=8,
            text_weight=0.5,
            text_every=4,
        ),
        steps=600,
        batch_size=16,
        optimizer=smollm2_optimizer(),
    )


def _qwen3() -> TrainConfig:
    return TrainConfig(
        name="mixlm",
        task=MixLMConfig(
            data=full_data(),
            model=ModelConfig("qwen3_0_6b", compute_dtype="bfloat16", remat="full"),
            prompt=PromptConfig("ranker", chat="qwen3", features=SERVED),
            encoder=ModelConfig("qwen3_0_6b", compute_dtype="bfloat16", remat="full"),
            encoder_prompt=PromptConfig("document", chat="qwen3"),
            text_weight=0.5,
            text_every=2,
        ),
        steps=4_000,
        batch_size=128,
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=100),
        mesh=MeshConfig(fsdp=-1),
    )


def get_config(variant: str) -> TrainConfig:
    """Variants: tiny, tiny_words, tiny_long, smollm2_135m_8l, qwen3_0_6b."""
    return pick(
        variant,
        {
            "tiny": lambda: _tiny(440),
            "tiny_words": _tiny_words,
            # An embedding is a language that ranker and encoder have yet to agree on: NDCG still rises after ten times the ranker's steps.
            "tiny_long": lambda: _tiny(5_000),
            "smollm2_135m_8l": _smollm2,
            "qwen3_0_6b": _qwen3,
        },
    )
