"""What MixLM's encoder learns before stage III: a document's words, said in the ranker's token embeddings. No part of the paper.

    python train.py --config configs/encoder.py:tiny --workdir runs/encoder --task.model.init-from runs/retriever/model \
        --task.ranker runs/ranker/model --task.tokens 5

Then `--task.encoder.init-from runs/encoder/model` in configs/mixlm.py, with the same number of tokens.
Hardware: tiny a CPU core and a minute; smollm2_135m_8l and qwen3_0_6b what configs/mixlm.py needs, for a fraction of its time.
"""

from jaxsearch.config import MeshConfig, OptimizerConfig, TrainConfig, pick
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.tasks.base import DataConfig, ModelConfig
from jaxsearch.tasks.defaults import full_data, smollm2_optimizer, tiny_data, tiny_optimizer, tiny_prompt
from jaxsearch.tasks.encoder import EncoderConfig


def _tiny() -> TrainConfig:
    return TrainConfig(
        name="encoder",
        task=EncoderConfig(
            data=tiny_data(), model=ModelConfig("tiny_student"), prompt=tiny_prompt("document")
        ),
        steps=200,
        batch_size=128,
        optimizer=tiny_optimizer(),
    )


def _smollm2() -> TrainConfig:
    return TrainConfig(
        name="encoder",
        task=EncoderConfig(
            data=DataConfig("onet_jobs"),
            model=ModelConfig("smollm2_135m", layers=8),
            prompt=PromptConfig("document", chat="chatml", max_document_tokens=128),
        ),
        steps=200,
        batch_size=32,
        optimizer=smollm2_optimizer(),
    )


def _qwen3() -> TrainConfig:
    return TrainConfig(
        name="encoder",
        task=EncoderConfig(
            data=full_data(),
            model=ModelConfig("qwen3_0_6b", compute_dtype="bfloat16", remat="full"),
            prompt=PromptConfig("document", chat="qwen3"),
        ),
        steps=1_000,
        batch_size=256,
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=100),
        mesh=MeshConfig(fsdp=-1),
    )


def get_config(variant: str) -> TrainConfig:
    """Variants: tiny, smollm2_135m_8l, qwen3_0_6b."""
    return pick(variant, {"tiny": _tiny, "smollm2_135m_8l": _smollm2, "qwen3_0_6b": _qwen3})
