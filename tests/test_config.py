"""Configurations: overrides, variants, files, and what is said when one is wrong."""

import ast
import dataclasses
from pathlib import Path

import pytest
from toy_task import ToyConfig, toy_config

import jaxsearch.config
from jaxsearch.config import (
    CheckpointConfig,
    ConfigError,
    MeshConfig,
    OptimizerConfig,
    apply_overrides,
    load_config,
    pick,
    to_dict,
)
from jaxsearch.training.main import main

FILE = """
from jaxsearch.config import pick
from toy_task import ToyConfig, toy_config

def get_config(variant):
    return pick(variant, {"tiny": toy_config, "large": lambda: toy_config(batch_size=16)})
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "toy.py"
    path.write_text(FILE)
    return path


def test_variants(config_file: Path) -> None:
    assert load_config(str(config_file)).batch_size == 8  # the first one
    assert load_config(f"{config_file}:tiny").batch_size == 8
    assert load_config(f"{config_file}:large").batch_size == 16
    with pytest.raises(ConfigError, match=r"unknown variant 'huge': known are tiny, large"):
        load_config(f"{config_file}:huge")


def test_overrides_reach_every_level(config_file: Path) -> None:
    config = load_config(
        f"{config_file}:large",
        ["--steps", "7", "--optimizer.learning-rate", "0.5", "--task.noise-scale=0.25", "--mesh.data", "-1",
         "--task.data.examples", "99", "--task.names", "b", "c", "--task.flag", "True"],
    )  # fmt: skip
    assert (config.steps, config.batch_size, config.optimizer.learning_rate) == (7, 16, 0.5)
    assert isinstance(config.task, ToyConfig)
    assert config.task.noise_scale == 0.25
    assert config.task.flag is True
    assert config.task.data.examples == 99
    assert config.task.names == ("b", "c")
    assert config.mesh.data == -1
    assert apply_overrides(config, ["--task.data.examples", "5"]).task.names == ("b", "c")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stepz", "3"], ["'stepz'", "did you mean steps?", "batch_size"]),
        (["--task.noise", "3"], ["'task.noise'", "task has", "noise_scale", "two_terms"]),
        (["--task.data.example", "3"], ["did you mean task.data.examples?", "task.data has examples"]),
        (["--optimizer.learning_rate.x", "3"], ["optimizer.learning_rate has no fields"]),
        (["--steps", "many"], ["--steps", "'many'"]),
        (["--steps", "0"], ["steps is 0", "one or more"]),
        (["--task.noise-scale", "-1"], ["task.noise_scale is -1.0"]),
        (["--task.flag", "maybe"], ["--task.flag", "maybe"]),
        (["--mesh.data", "0"], ["mesh.data is 0", "or -1"]),
        (["--mesh.data", "-1", "--mesh.fsdp", "-1"], ["-1 on at most one axis"]),
        (["--accumulation", "3"], ["accumulation is 3", "divisor of batch_size 8"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--optimizer.warmup-steps", "10"], ["optimizer.warmup_steps is 10", "less than the 10 steps"]),
        (["--optimizer.b1", "1.5"], ["optimizer.b1 is 1.5"]),
        (["--checkpoint.keep", "0"], ["checkpoint.keep is 0"]),
        (["stray"], ["stray"]),
    ],
)
def test_bad_overrides_are_named(config_file: Path, options: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(str(config_file), options)
    for word in words:
        assert word in str(error.value)


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "installed.py").write_text(FILE)
    monkeypatch.setattr(jaxsearch.config, "config_folders", lambda: [tmp_path / "configs"])
    assert load_config("configs/installed.py:large").batch_size == 16
    with pytest.raises(ConfigError, match=r"configs/other\.py: known are configs/installed\.py"):
        load_config("configs/other.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="defines no get_config"):
        load_config(str(tmp_path / "empty.py"))
    (tmp_path / "wrong.py").write_text("def get_config(variant):\n    return 3\n")
    with pytest.raises(ConfigError, match="returned a int"):
        load_config(str(tmp_path / "wrong.py"))


def test_to_dict_is_json_and_names_the_task() -> None:
    values = to_dict(toy_config(mesh=MeshConfig(data=2)))
    assert values["task"]["class"] == "ToyConfig"
    assert values["task"]["names"] == ["a"]
    assert values["task"]["data"] == {"examples": 24}
    assert values["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert values["checkpoint"] == {"every": 0, "keep": CheckpointConfig().keep, "best": ""}


def test_pick_takes_the_first_without_a_name() -> None:
    assert pick("", {"a": lambda: 1, "b": lambda: 2}) == 1


def test_every_field_is_documented() -> None:
    tree = ast.parse(Path(jaxsearch.config.__file__).read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            for item, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(item, ast.AnnAssign):
                    assert isinstance(after, ast.Expr), f"{node.name}.{ast.unparse(item.target)}"
                    assert isinstance(after.value, ast.Constant)


def test_help_shows_fields_and_their_text(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--config", str(config_file), "--help"])
    assert error.value.code == 0
    out = capsys.readouterr().out
    assert "--task.noise-scale" in out
    assert "Size of the noise that the step adds" in out
    assert "--optimizer.learning-rate" in out


def test_command_line_exit_codes(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = ["--workdir", str(tmp_path / "run")]
    for argv, word in [
        (["--config", f"{config_file}:nope", *workdir], "unknown variant 'nope'"),
        (["--config", str(config_file), *workdir, "--stepz", "3"], "did you mean steps?"),
        (["--config", str(config_file), *workdir, "--steps", "x"], "--steps"),
        (["--config", str(config_file)], "--workdir is missing"),
        (["--config", str(tmp_path / "no.py"), *workdir], "no configuration file"),
    ]:
        assert main(argv) == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([]) == 2
    assert "--workdir" in capsys.readouterr().err
    assert main(["--config", str(config_file), *workdir, "--steps", "2"]) == 0
    assert capsys.readouterr().out.startswith("norm ")
    poisoned = ["--config", str(config_file), "--workdir", str(tmp_path / "bad"), "--task.poison", "1"]
    assert main(poisoned) == 1
    assert "toy-1" in capsys.readouterr().err


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        OptimizerConfig().eps = 1.0  # type: ignore[misc]
