"""Base language model for the `:tiny` variants, from scratch; larger variants start from a pretrained checkpoint instead.

    python train.py --config configs/base.py:tiny --workdir runs/base
    python train.py --config configs/base.py:tiny_student --workdir runs/base_student --task.model.tokenizer runs/base/model

    python train.py --config configs/base.py:tiny_people --workdir runs/base_people

Hardware: 2 CPU cores, a minute or two each (tiny_long and tiny_people: five, tiny_student_people: eight).
"""

from jaxsearch.config import TrainConfig, pick
from jaxsearch.tasks.base import DataConfig, ModelConfig
from jaxsearch.tasks.defaults import tiny_data, tiny_optimizer, tiny_prompt
from jaxsearch.tasks.language_model import LanguageModelConfig


def _tiny(preset: str, steps: int, data: DataConfig | None = None) -> TrainConfig:
    return TrainConfig(
        name="base",
        task=LanguageModelConfig(
            data=data or tiny_data(),
            model=ModelConfig(preset),
            prompt=tiny_prompt("ranker"),
            documents=3,
            shuffle_fields=True,
        ),
        steps=steps,
        batch_size=48,
        optimizer=tiny_optimizer(),
    )


def get_config(variant: str) -> TrainConfig:
    """Variants: tiny (teacher size), tiny_student, tiny_long, tiny_student_people, tiny_people."""
    return pick(
        variant,
        {
            "tiny": lambda: _tiny("tiny", 240),
            "tiny_student": lambda: _tiny("tiny_student", 180),
            # Copying companies and skills is learned late: the demo has no time for it.
            "tiny_long": lambda: _tiny("tiny", 600),
            # One search in eight is for a name, and copying names is learned late: after 240 steps not at all.
            "tiny_student_people": lambda: _tiny("tiny_student", 1600, DataConfig("job_market:tiny_people")),
            "tiny_people": lambda: _tiny("tiny", 600, DataConfig("job_market:tiny_people")),
        },
    )
