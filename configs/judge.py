"""The relevance judge (paper section 1): grades 0 to 4 at the answer position, trained on precedents.

    python train.py --config configs/judge.py:tiny --workdir runs/judge --task.model.init-from runs/base/model
    python train.py --config configs/judge.py:qwen3_8b --workdir runs/judge --task.model.init-from QWEN3_8B_FOLDER

Hardware: tiny 2 CPU cores; qwen3_8b a v5p or v6e slice (mesh data x fsdp x tensor by `--mesh.*`).
"""

from jaxsearch.config import MeshConfig, OptimizerConfig, TrainConfig, pick
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.tasks.base import ModelConfig
from jaxsearch.tasks.defaults import full_data, tiny_data, tiny_optimizer, tiny_prompt
from jaxsearch.tasks.judge import JudgeConfig


def _tiny() -> TrainConfig:
    return TrainConfig(
        name="judge",
        task=JudgeConfig(
            data=tiny_data(), model=ModelConfig("tiny"), prompt=tiny_prompt("judge"), candidates=12
        ),
        steps=280,
        batch_size=32,
        optimizer=tiny_optimizer(),
    )


def _qwen3(preset: str) -> TrainConfig:
    model = ModelConfig(preset, compute_dtype="bfloat16", remat="full")
    return TrainConfig(
        name="judge",
        task=JudgeConfig(
            data=full_data(), model=model, prompt=PromptConfig("judge", chat="qwen3", max_query_tokens=256)
        ),
        steps=2_000,
        batch_size=64,
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=100),
        mesh=MeshConfig(fsdp=-1),
    )


def get_config(variant: str) -> TrainConfig:
    """Variants: tiny, qwen3_1_7b, qwen3_8b."""
    return pick(
        variant,
        {"tiny": _tiny, "qwen3_1_7b": lambda: _qwen3("qwen3_1_7b"), "qwen3_8b": lambda: _qwen3("qwen3_8b")},
    )
