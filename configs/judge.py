"""The relevance judge (paper section 1): grades 0 to 4 at the answer position, trained on precedents.

    python train.py --config configs/judge.py:tiny --workdir runs/judge --task.model.init-from runs/base/model
    python train.py --config configs/judge.py:qwen3_8b --workdir runs/judge --task.model.init-from QWEN3_8B_FOLDER

Hardware: tiny 2 CPU cores; smollm2_135m_4l (the first 4 layers) one CPU core and an hour;
qwen3_8b a v5p or v6e slice (mesh data x fsdp x tensor by `--mesh.*`).
"""

import dataclasses

from jaxsearch.config import MeshConfig, OptimizerConfig, TrainConfig, pick
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.tasks.base import DataConfig, ModelConfig
from jaxsearch.tasks.defaults import full_data, smollm2_optimizer, tiny_data, tiny_optimizer, tiny_prompt
from jaxsearch.tasks.judge import JudgeConfig


def _tiny(answer: str, steps: int = 390, data: DataConfig | None = None) -> TrainConfig:
    prompt = dataclasses.replace(tiny_prompt("judge"), answer=answer)
    return TrainConfig(
        name="judge",
        task=JudgeConfig(data=data or tiny_data(), model=ModelConfig("tiny"), prompt=prompt, candidates=12),
        steps=steps,
        batch_size=32,
        optimizer=tiny_optimizer(),
    )


def _smollm2() -> TrainConfig:
    """On real occupations, from a retriever (`configs/retriever.py:smollm2_135m_4l`) that has learned what titles mean.

    The titles that people assigned are the precedents (grade 4), with O*NET's tiers below them; nobody wrote reasons there. The policy
    speaks of levels, places and companies, which occupations do not have: the prompt is short.
    """
    return TrainConfig(
        name="judge",
        task=JudgeConfig(
            data=DataConfig("onet_jobs"),
            model=ModelConfig("smollm2_135m", layers=4),
            prompt=PromptConfig("judge", style="short", chat="chatml", max_document_tokens=128),
            candidates=8,
            golden=("golden", "golden_unseen"),
        ),
        steps=600,
        batch_size=8,
        optimizer=smollm2_optimizer(),
    )


def _qwen3(preset: str) -> TrainConfig:
    model = ModelConfig(preset, compute_dtype="bfloat16", remat="full")
    return TrainConfig(
        name="judge",
        task=JudgeConfig(
            data=full_data(),
            model=model,
            prompt=PromptConfig("judge", chat="qwen3", max_query_tokens=256, answer="grade_rationale"),
        ),
        steps=2_000,
        batch_size=64,
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=100),
        mesh=MeshConfig(fsdp=-1),
    )


def get_config(variant: str) -> TrainConfig:
    """Variants: tiny (the grade alone), tiny_grade_first, tiny_rationale_first, tiny_people, smollm2_135m_4l, qwen3_1_7b, qwen3_8b."""
    return pick(
        variant,
        {
            "tiny": lambda: _tiny("grade"),
            "tiny_grade_first": lambda: _tiny("grade_rationale"),
            # Its two readings come to agree late: the one by prefill has to foresee what the rationale will say.
            "tiny_rationale_first": lambda: _tiny("rationale_grade", 900),
            # That a model can copy a name does not make it compare two: it takes as long again.
            "tiny_people": lambda: _tiny("grade_rationale", 900, DataConfig("job_market:tiny_people")),
            "smollm2_135m_4l": _smollm2,
            "qwen3_1_7b": lambda: _qwen3("qwen3_1_7b"),
            "qwen3_8b": lambda: _qwen3("qwen3_8b"),
        },
    )
