"""Every file in `configs/`: each variant loads, its documented commands are valid, and unknown variants are refused."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from jaxsearch.config import ConfigError, TrainConfig, config_folders, load_config, to_dict
from jaxsearch.models.presets import PRESETS

FILES = sorted(path for folder in config_folders() for path in folder.glob("[!_]*.py"))
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in FILES}


def variants(name: str) -> list[str]:
    """As the docstring of `get_config` lists them."""
    (words,) = re.findall(r'"""Variants: (.*)\."""', TEXTS[name])
    return re.sub(r" \([^)]*\)", "", words).split(", ")


ALL = [(name, variant) for name in TEXTS for variant in variants(name)]


def test_there_is_a_config_for_every_stage() -> None:
    stages = {"base", "judge", "retriever", "relevance_teacher", "engagement_teacher", "ranker"}
    stages |= {"encoder", "mixlm"}
    assert stages <= set(TEXTS)
    assert all((name, "tiny") in ALL for name in stages)


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_every_variant_loads(name: str, variant: str) -> None:
    config = load_config(f"configs/{name}.py:{variant}")
    assert isinstance(config, TrainConfig)
    assert config.name == name
    model = config.task.model  # type: ignore[attr-defined]
    assert model.preset in PRESETS
    assert variant.startswith("tiny") == model.preset.startswith("tiny")
    assert to_dict(config)["task"]["data"]["name"].split(":")[0] in ("job_market", "onet_jobs")
    prompts = [getattr(config.task, f.name) for f in dataclasses.fields(config.task) if "prompt" in f.name]
    chat = {"tiny": "tiny", "qwen3": "qwen3", "smollm2": "chatml"}[model.preset.split("_")[0]]
    assert {prompt.chat for prompt in prompts} == {chat}
    if variant == "tiny":
        assert load_config(f"configs/{name}.py") == config  # the first one


@pytest.mark.parametrize("name", TEXTS)
def test_unknown_variants_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown variant 'huge': known are {', '.join(variants(name))}$"):
        load_config(f"configs/{name}.py:huge")


@pytest.mark.parametrize("name", TEXTS)
def test_commands_in_the_docstring_are_valid(name: str) -> None:
    """Each names a variant of this file, and every option is a field."""
    text = re.sub(r"\\\n\s*", "", TEXTS[name])
    commands = re.findall(r"python train\.py (--config .*)", text)
    assert commands
    for command in commands:
        (_, config, *options) = shlex.split(command)
        assert Path(config.split(":")[0]).name == f"{name}.py"
        workdir = options.index("--workdir")
        del options[workdir : workdir + 2]
        assert load_config(config, options).name == name


def test_the_student_is_small_enough() -> None:
    """At most 40% of a teacher's parameters, as 0.6B are of 1.7B."""
    for student, teacher in (("tiny_student", "tiny"), ("qwen3_0_6b", "qwen3_1_7b")):
        sizes = [
            dataclasses.replace(PRESETS[name], vocab_size=PRESETS[name].vocab_size)
            for name in (student, teacher)
        ]
        if student.startswith("tiny"):
            sizes = [dataclasses.replace(size, vocab_size=2048) for size in sizes]
        assert sizes[0].parameters <= 0.4 * sizes[1].parameters
