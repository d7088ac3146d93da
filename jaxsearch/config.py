"""Training configurations: frozen dataclasses, Python files that return them, typed command-line overrides.

`configs/NAME.py` defines `get_config(variant: str) -> TrainConfig`. These files are code and trusted. Every
field can be overridden as `--field value` or `--group.field value`; a name that does not exist is refused.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from jaxsearch.errors import InputError

if TYPE_CHECKING:
    from jaxsearch.training.task import Task

T = TypeVar("T")


class ConfigError(InputError):
    """A configuration that cannot be used; the message names the field, its value and what would do."""


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}: expected {expected}")


@dataclass(frozen=True)
class TaskConfig:
    """What is trained and on which data; the tasks derive their own fields from this."""

    def build(self, config: "TrainConfig") -> "Task":
        """Load the data and return the task.

        Args:
            config: the whole training configuration this one is part of.
        """
        raise NotImplementedError(f"{type(self).__name__} has no build()")

    def build_abstract(self) -> "Task":
        """Return the task without data and weights: enough to compile its step (`init`, `trainable`, `loss`, `batch_shape`).

        Raises:
            ConfigError: this kind of task needs its data.
        """
        raise ConfigError(
            f"{type(self).__name__} cannot be compiled without its data: it has no build_abstract()"
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon with linear warm-up, cosine decay and clipping by global norm."""

    kind: str = "adamw"
    """"adamw", or "muon": orthogonalised momentum for the matrices of the layers, AdamW for the rest. From scratch, small models learn to
    match a query with a document in less than half the steps with it."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of the matrices under "muon"."""
    learning_rate: float = 1e-3
    """Peak learning rate, reached after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    decay_steps: int = 0
    """Step at which the cosine ends; 0 means the run's `steps`. Set it where a run may be extended later."""
    final_fraction: float = 0.1
    """Learning rate at the end of the cosine, as a share of the peak."""
    weight_decay: float = 0.01
    """Decoupled weight decay on matrices; never on norms, biases and other vectors."""
    decay_embeddings: bool = False
    """Whether weight decay also reaches matrices with a vocabulary axis."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it; 0 switches clipping off."""

    def __post_init__(self) -> None:
        _require(self.kind in ("adamw", "muon"), "optimizer.kind", self.kind, "adamw or muon")
        _require(
            self.muon_learning_rate > 0,
            "optimizer.muon_learning_rate",
            self.muon_learning_rate,
            "a positive number",
        )
        _require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "a positive number")
        for name in ("warmup_steps", "decay_steps", "weight_decay", "clip_norm"):
            _require(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "zero or more")
        for name in ("final_fraction", "b1", "b2"):
            _require(
                0 <= getattr(self, name) <= 1, f"optimizer.{name}", getattr(self, name), "a share from 0 to 1"
            )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one device is 1 x 1 x 1. One axis may be -1: all that are left."""

    data: int = 1
    """Copies of the model that see different examples."""
    fsdp: int = 1
    """Devices that split parameters and optimiser state, and see different examples."""
    tensor: int = 1
    """Devices that split heads, MLP width and vocabulary, and see the same examples."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor")}
        for name, size in sizes.items():
            _require(size == -1 or size >= 1, f"mesh.{name}", size, "a positive number, or -1")
        _require(list(sizes.values()).count(-1) <= 1, "mesh", sizes, "-1 on at most one axis")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every: int = 0
    """Steps between checkpoints; 0 writes one at the end only."""
    keep: int = 2
    """How many of the latest checkpoints stay on disk."""
    best: str = ""
    """Metric of the evaluations, the higher the better ("dev/ndcg@10"): the state with the best one is kept apart, and exported at the end.
    Empty: the last state is."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "checkpoint.every", self.every, "zero or more")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "one or more")


@dataclass(frozen=True)
class FaultsConfig:
    """What happens when a step goes wrong."""

    on_bad_step: str = "stop"
    """A loss or gradient that is not finite, or a spike: "stop" names the step and its examples; "skip" leaves the parameters as they
    were and counts it in the metric `skipped`."""
    spike_factor: float = 0.0
    """A loss above this many times its running mean is a bad step too; 0: only what is not finite is."""
    skip_limit: int = 10
    """Under "skip", more bad steps in a row than this stop the run."""
    watchdog_seconds: float = 0.0
    """Longest time a step may take before the run ends with all stacks and exit code 76 (the first step, evaluations and checkpoints:
    ten times as long); the loop then waits for every step. 0: no watchdog."""

    def __post_init__(self) -> None:
        _require(self.on_bad_step in ("stop", "skip"), "faults.on_bad_step", self.on_bad_step, "stop or skip")
        factor = self.spike_factor
        _require(factor == 0 or factor > 1, "faults.spike_factor", factor, "zero, or more than one")
        _require(self.skip_limit >= 0, "faults.skip_limit", self.skip_limit, "zero or more")
        seconds = self.watchdog_seconds
        _require(0 <= seconds < float("inf"), "faults.watchdog_seconds", seconds, "zero or more")


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    name: str
    """Name of the experiment, for logs and the model contract."""
    task: TaskConfig
    """What is trained, on which data."""
    steps: int
    """Optimiser steps in all."""
    batch_size: int
    """Examples (queries) in one step, over all devices, processes and microbatches."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser and learning-rate schedule."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the devices are laid out."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoint cadence."""
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    """Bad steps and steps that never end."""
    accumulation: int = 1
    """Microbatches one step is computed in; the result equals one big batch."""
    seed: int = 0
    """Seed of the initial parameters, the order of the data and everything random in a step."""
    log_every: int = 10
    """Steps between rows of metrics; a non-finite loss is found here at the latest."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    profile: str = ""
    """FIRST:COUNT traces so many steps into `workdir/profile`, for XProf; SIGUSR1 traces five at any time. Empty: none."""
    peak_flops: float = 0.0
    """FLOP/s of one device at most, for the metric `mfu`; 0: what is published of TPU chips, and no `mfu` elsewhere."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "one or more")
        _require(self.eval_every >= 0, "eval_every", self.eval_every, "zero or more")
        _require(self.peak_flops >= 0, "peak_flops", self.peak_flops, "zero or more")
        _require(
            not self.profile or bool(re.fullmatch(r"[1-9]\d{0,8}:[1-9]\d{0,3}", self.profile)),
            "profile",
            self.profile,
            "FIRST:COUNT, such as 20:5, or nothing",
        )
        best = self.checkpoint.best
        _require(
            not best or self.eval_every > 0, "checkpoint.best", best, "nothing, or eval_every above zero"
        )
        _require(0 <= self.seed < 2**32, "seed", self.seed, "a number from 0 to 2**32 - 1")
        decay = self.decay_steps
        _require(
            self.optimizer.warmup_steps < decay,
            "optimizer.warmup_steps",
            self.optimizer.warmup_steps,
            f"less than the {decay} steps of the schedule",
        )
        _require(
            self.batch_size % self.accumulation == 0,
            "accumulation",
            self.accumulation,
            f"a divisor of batch_size {self.batch_size}",
        )

    @property
    def profiled(self) -> tuple[int, int] | None:
        """First step to trace and how many."""
        first, _, count = self.profile.partition(":")
        return (int(first), int(count)) if count else None

    @property
    def decay_steps(self) -> int:
        """Step at which the learning-rate schedule ends."""
        return self.optimizer.decay_steps or self.steps


def pick(variant: str, variants: Mapping[str, Callable[[], T]]) -> T:
    """Return `variants[variant]()`, the first one for an empty name.

    Raises:
        ConfigError: no variant of that name; lists the known ones.
    """
    name = variant or next(iter(variants))
    if name not in variants:
        raise ConfigError(f"unknown variant {name!r}: known are {', '.join(variants)}")
    return variants[name]()


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as JSON values; the task's class stands under `task.class`."""
    out: dict[str, Any] = {}
    if isinstance(config, TaskConfig):
        out["class"] = type(config).__name__
    for item in dataclasses.fields(config):
        out[item.name] = _to_json(getattr(config, item.name))
    return out


def with_defaults(saved: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """`saved`, an earlier configuration of this kind as JSON values, with every setting that has come since at its default.

    A new setting does by default what was done before it, so that runs and models of an older version stay what they are.
    """
    out = dict(saved)
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name not in saved:
            if item.default is not dataclasses.MISSING:
                out[item.name] = _to_json(item.default)
            elif item.default_factory is not dataclasses.MISSING:
                out[item.name] = _to_json(item.default_factory())
        elif dataclasses.is_dataclass(value) and isinstance(saved[item.name], Mapping):
            out[item.name] = with_defaults(saved[item.name], value)
    return out


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def config_folders() -> list[Path]:
    """Return where the project's own `configs` lie: inside the installed package, or beside it."""
    package = Path(__file__).resolve().parent
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def _find_file(path: str) -> Path:
    if Path(path).is_file():
        return Path(path)
    name = Path(path).name
    folders = config_folders()
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    known = sorted({f"configs/{file.name}" for folder in folders for file in folder.glob("[!_]*.py")})
    raise ConfigError(f"no configuration file {path}: known are {', '.join(known) or 'none'}")


def _get_config(path: Path, variant: str) -> TrainConfig:
    spec = importlib.util.spec_from_file_location(f"jaxsearch_config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses defined in the file look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} defines no get_config(variant)")
    config = module.get_config(variant)
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{path}: get_config returned a {type(config).__name__}, not a TrainConfig")
    return config


def _check_names(config: TrainConfig, overrides: Sequence[str]) -> None:
    """Refuse an option whose dotted name is not a field; tyro alone would only guess at what was meant."""
    for option in overrides:
        if not option.startswith("--") or option == "--help":
            continue
        name = option[2:].split("=")[0].replace("-", "_")
        node: Any = config
        seen: list[str] = []
        for part in name.split("."):
            known = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
            if part not in known:
                where = ".".join(seen) or type(config).__name__
                close = difflib.get_close_matches(part, known, n=1)
                hint = f" (did you mean {'.'.join([*seen, close[0]])}?)" if close else ""
                raise ConfigError(
                    f"unknown field {name!r}{hint}: {where} has {', '.join(known) or 'no fields'}"
                )
            seen.append(part)
            node = getattr(node, part)


def _readable(box: str) -> str:
    """Take the first paragraph out of the box that tyro draws around an error."""
    lines = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    end = next((i for i, line in enumerate(lines) if set(line) == {"─"}), len(lines))
    return " ".join(lines[:end]) or box.strip()


def apply_overrides(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """Return the configuration with `--field value` options applied.

    Raises:
        ConfigError: unknown field, or a value of the wrong type or out of range.
        SystemExit: after printing the help that `--help` asks for.
    """
    _check_names(config, overrides)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(
                type(config),
                default=config,
                args=list(overrides),
                prog="train.py",
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
            )
    except SystemExit as error:
        if error.code in (0, None):
            raise
        raise ConfigError(_readable(stderr.getvalue())) from None


def load_config(config: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read `PATH[:VARIANT]` and apply command-line overrides.

    Args:
        config: a Python file, looked for among the project's own `configs` when it does not exist, and
            optionally a colon and the name of a variant; without one the file's first variant is taken.
        overrides: `--field value` pairs; nested fields with dots, words with hyphens or underscores.

    Raises:
        ConfigError: unknown file, variant or field, or a bad value.
    """
    path, _, variant = config.partition(":")
    return apply_overrides(_get_config(_find_file(path), variant), overrides)
