"""The model contract: a folder with everything that is needed to use a model right, and nothing that could be executed.

`contract.json` (architecture, prompts, labels, actions, calibrators, training config, golden scores, hashes), `model.safetensors`,
`tokenizer.json`. Loading checks each against the others and refuses what does not fit.
"""

import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxsearch.data.prompts import PromptConfig
from jaxsearch.data.records import Document, Query, from_dict, to_dict
from jaxsearch.data.tokenizer import FILE as TOKENIZER_FILE
from jaxsearch.data.tokenizer import LABELS, Tokenizer
from jaxsearch.errors import InputError
from jaxsearch.models.decoder import DecoderConfig
from jaxsearch.models.mixlm import DocumentEncoder
from jaxsearch.models.scorer import BiEncoder, Scorer

FORMAT = 1
KINDS = ("base", "judge", "ranker", "bi_encoder", "encoder", "summariser")
_ANSWERS = {"judge": LABELS[2:], "ranker": LABELS[:2]}
"""Labels in the order of the logits; a kind that is not here has none."""
_PARTS = {
    "judge": {"pair": "judge"},
    "ranker": {"pair": "ranker"},
    "bi_encoder": {"query": "query", "document": "document"},
    "encoder": {"document": "document"},
    "summariser": {"summary": "summariser"},
}
"""Prompts that a kind needs, and their kinds."""
CONTRACT_FILE, WEIGHTS_FILE = "contract.json", "model.safetensors"
RELEVANCE = "relevance"
"""The objective beside the actions."""
MAX_KNOTS = 256
"""Of one map of a calibrator."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15}
"""How far a golden score may move between machines and backends, by compute dtype (log-odds; cosine for a bi-encoder)."""


GOLDEN_NUMBERS = 8
"""Of an encoder's golden embedding: the first so many of its last row, fewer where it is narrower."""


class ContractError(InputError):
    """A model folder that cannot be used as it is; the message names what does not fit and what to do."""


@dataclass(frozen=True)
class MixLMPart:
    """What an encoder, or a ranker that reads its embeddings, has in its contract beside the rest (paper section 6)."""

    tokens: int
    """T_S, embeddings per document at most."""
    width: int
    """Of an embedding."""
    encoder: str = ""
    """Of a ranker: contract hash of the encoder that it was trained with."""
    text_fields: tuple[str, ...] = ()
    """Of a ranker: fields of a document that it reads as text behind the embeddings."""
    golden: tuple[tuple[float, ...], ...] = ()
    """Of a ranker: the label logits of its golden pairs with the documents as embeddings."""


@dataclass(frozen=True)
class Golden:
    """One pair and its label logits (for a bi-encoder: its cosine; for an encoder: the first numbers of the document's last
    embedding; for a summariser: the log-probability of the first token that it writes), as the exporting machine computed them."""

    query: Query
    document: Document
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Contract:
    """What is needed, beside weights and tokenizer, to use a model right."""

    kind: str
    """"base" (decoder alone), "judge", "ranker", "bi_encoder", "encoder" (of MixLM) or "summariser"."""
    architecture: DecoderConfig
    prompts: Mapping[str, PromptConfig]
    """By part: "pair" for judge and ranker; "query" and "document" for a bi-encoder; "document" for an encoder; "summary" for a
    summariser."""
    labels: Mapping[str, int] = field(default_factory=dict)
    """Answer -> token id, in the order of the logits: Yes, No for a ranker, 0 to 4 for a judge."""
    actions: tuple[str, ...] = ()
    """Action heads, after the labels."""
    calibrators: Mapping[str, Any] = field(default_factory=dict)
    """Objective ("relevance" or an action) -> calibrator as plain JSON values, see `check_calibrator`; what has none is used as it is."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """The training configuration."""
    golden: tuple[Golden, ...] = ()
    mixlm: MixLMPart | None = None
    """Of an encoder, and of a ranker that reads embeddings; such a ranker reads text too, as any other."""
    summariser: str = ""
    """Hash of the summariser whose summaries the model was trained to read in the place of text; empty: full text."""

    @property
    def tolerance(self) -> float:
        """Largest allowed deviation of a golden score."""
        return TOLERANCE[self.architecture.compute_dtype]


@dataclass(frozen=True)
class Model:
    """A loaded model folder."""

    module: Scorer | BiEncoder | DocumentEncoder
    contract: Contract
    tokenizer: Tokenizer
    hash: str
    """SHA-256 of the contract with the hashes of weights and tokenizer in it: what teacher scores and indexes are tied to."""


def _flat(module: nnx.Module) -> dict[str, np.ndarray]:
    return {
        ".".join(map(str, path)): np.ascontiguousarray(np.asarray(variable[...]))
        for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }


def _architecture(config: DecoderConfig) -> dict[str, Any]:
    """As JSON values, without how the machine that trained it computed attention."""
    values = dataclasses.asdict(config)
    del values["attention"]
    return values


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_model(
    folder: str | os.PathLike[str],
    module: Scorer | BiEncoder | DocumentEncoder,
    contract: Contract,
    tokenizer: Tokenizer,
) -> str:
    """Write a model folder; the contract comes last, so that a folder without one is known to be unfinished.

    Returns:
      The contract's hash.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    (root / CONTRACT_FILE).unlink(missing_ok=True)
    save_file(_flat(module), root / (WEIGHTS_FILE + ".tmp"))
    os.replace(root / (WEIGHTS_FILE + ".tmp"), root / WEIGHTS_FILE)
    tokenizer.save(root)
    values = {
        "format": FORMAT,
        "kind": contract.kind,
        "architecture": _architecture(contract.architecture),
        "prompts": {name: dataclasses.asdict(prompt) for name, prompt in contract.prompts.items()},
        "labels": dict(contract.labels),
        "actions": list(contract.actions),
        "calibrators": dict(contract.calibrators),
        "training": dict(contract.training),
        "golden": [
            {"query": to_dict(g.query), "document": to_dict(g.document), "scores": list(g.scores)}
            for g in contract.golden
        ],
        "sha256": {name: _digest(root / name) for name in (WEIGHTS_FILE, TOKENIZER_FILE)},
    }
    if contract.mixlm is not None:
        values["mixlm"] = dataclasses.asdict(contract.mixlm)
    if contract.summariser:
        values["summariser"] = contract.summariser
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = root / (CONTRACT_FILE + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, root / CONTRACT_FILE)
    return hashlib.sha256(text.encode()).hexdigest()


def check_output(output: str | os.PathLike[str], model: str | os.PathLike[str]) -> Path:
    """The folder to write a model to, resolved.

    Raises:
      ContractError: it is the folder of the model that is read, or holds something that is no model.
    """
    path = Path(output).resolve()
    if path == Path(model).resolve():
        raise ContractError(f"--output is {output}, which holds the model itself: give another folder")
    empty = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if not empty and not (path / CONTRACT_FILE).is_file():
        raise ContractError(f"--output is {output}, which is not empty and holds no model: give a new folder")
    return path


def read_contract(folder: str | os.PathLike[str]) -> Contract:
    """The contract of a model folder alone; the files it speaks of are not looked at.

    Raises:
      ContractError: it is missing, damaged or of another format.
    """
    return _read_contract(Path(folder))[0]


def _read_contract(root: Path) -> tuple[Contract, dict[str, str], str]:
    """The contract, the checksums of the files beside it, and its own."""
    path = root / CONTRACT_FILE
    if not path.is_file():
        raise ContractError(f"{root} holds no {CONTRACT_FILE}: give the `model` folder of a finished run")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        contract = _parse(values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ContractError(f"{path} cannot be used ({error}): export the model anew") from error
    return contract, values["sha256"], hashlib.sha256(text.encode()).hexdigest()


def load_model(folder: str | os.PathLike[str]) -> Model:
    """Read a model folder.

    Raises:
      ContractError: it is missing, unfinished, damaged, of another format, or its parts do not fit each other.
    """
    root = Path(folder)
    path = root / CONTRACT_FILE
    contract, checksums, digest = _read_contract(root)
    for name in (WEIGHTS_FILE, TOKENIZER_FILE):
        if not (root / name).is_file() or _digest(root / name) != checksums[name]:
            raise ContractError(
                f"{root / name} is missing or is not the file the contract was written for: copy the whole folder"
            )
    tokenizer = Tokenizer.load(root)
    for label, index in contract.labels.items():
        if tokenizer.label(label) != index:
            raise ContractError(
                f"{path}: label {label!r} is token {index}, the tokenizer says {tokenizer.label(label)}"
            )
    if tokenizer.vocab_size > contract.architecture.vocab_size:
        raise ContractError(
            f"{path}: vocab_size is {contract.architecture.vocab_size}, the tokenizer has {tokenizer.vocab_size} tokens"
        )
    if 4 * contract.architecture.parameters > (root / WEIGHTS_FILE).stat().st_size:
        raise ContractError(
            f"{path}: the architecture has more parameters than {WEIGHTS_FILE} holds; export the model anew"
        )
    try:
        tensors = load_file(root / WEIGHTS_FILE)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise ContractError(f"{root / WEIGHTS_FILE} is damaged ({error}): copy it again") from error
    # Shapes alone: whatever the contract claims, nothing is allocated that the file does not hold.
    module = nnx.eval_shape(lambda: make_module(contract, nnx.Rngs(0)))
    load_weights(module, tensors)
    return Model(module, contract, tokenizer, digest)


def make_module(contract: Contract, rngs: nnx.Rngs) -> Scorer | BiEncoder | DocumentEncoder:
    """A module of the contract's shape with fresh parameters."""
    if contract.kind == "encoder":
        assert contract.mixlm is not None
        part = contract.mixlm
        return DocumentEncoder(contract.architecture, tokens=part.tokens, width=part.width, rngs=rngs)
    if contract.kind == "bi_encoder":
        return BiEncoder(contract.architecture, rngs=rngs)
    return Scorer(
        contract.architecture,
        label_ids=list(contract.labels.values()),
        actions=len(contract.actions),
        rngs=rngs,
    )


def load_weights(module: nnx.Module, tensors: Mapping[str, np.ndarray]) -> None:
    """Put tensors into a module, by name.

    Raises:
      ContractError: a tensor is unknown, missing, or has another shape or dtype.
    """
    flat = {
        ".".join(map(str, path)): variable
        for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }
    for problem, names in (("unknown", set(tensors) - set(flat)), ("missing", set(flat) - set(tensors))):
        if names:
            raise ContractError(
                f"weights: {problem} tensors {', '.join(sorted(names))}; this is another architecture"
            )
    for name, variable in flat.items():
        given = tensors[name]
        if given.shape != variable.shape or given.dtype != variable.dtype:
            raise ContractError(
                f"weights: {name} is {given.dtype} {given.shape}, the architecture needs {variable.dtype} {variable.shape}"
            )
    state = {
        path: variable.replace(jnp.asarray(tensors[".".join(map(str, path))]))
        for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }
    nnx.update(module, nnx.from_flat_state(state))


def check_calibrator(name: str, values: Any) -> None:
    """Raise `ContractError`, which begins with `name`, unless these are the plain JSON values of a calibrator.

    `positions`: the last position of each bucket, ascending; empty where positions do not count. `maps`: one per bucket, `log_odds`
    strictly ascending and `probability` never descending, strictly between 0 and 1, at most 256 of each.
    """

    def check(good: bool, problem: str) -> None:
        if not good:
            raise ContractError(f"{name}{problem}; calibrate the model anew")

    check(
        isinstance(values, dict) and set(values) == {"positions", "maps"},
        " is no object of positions and maps",
    )
    positions, maps = values["positions"], values["maps"]
    check(
        isinstance(positions, list) and all(type(p) is int and 1 <= p < 2**31 for p in positions),
        ".positions is no list of whole numbers from 1",
    )
    check(all(a < b for a, b in pairwise(positions)), ".positions do not ascend")
    check(
        isinstance(maps, list) and len(maps) == max(len(positions), 1),
        ".maps is no list of one map per position bucket",
    )
    for number, item in enumerate(maps):
        place = f".maps[{number}]"
        check(
            isinstance(item, dict) and set(item) == {"log_odds", "probability"},
            f"{place} is no object of log_odds and probability",
        )
        for part in ("log_odds", "probability"):
            check(
                isinstance(item[part], list) and all(map(_is_finite, item[part])),
                f"{place}.{part} is no list of finite numbers",
            )
        log_odds, probability = (list(map(float, item[part])) for part in ("log_odds", "probability"))
        check(
            1 <= len(log_odds) == len(probability) <= MAX_KNOTS,
            f"{place} has {len(log_odds)} log_odds and {len(probability)} probability, not as many of each, 1 to {MAX_KNOTS}",
        )
        check(all(a < b for a, b in pairwise(log_odds)), f"{place}.log_odds do not ascend")
        check(all(a <= b for a, b in pairwise(probability)), f"{place}.probability descends")
        check(probability[0] > 0 and probability[-1] < 1, f"{place}.probability is not between 0 and 1")


def _is_finite(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _check_calibrators(calibrators: Mapping[str, Any], kind: str, actions: list[str]) -> None:
    known = (RELEVANCE, *actions) if kind == "ranker" else ()
    for name, values in calibrators.items():
        if name not in known:
            raise ValueError(f"calibrators.{name} is for none of {', '.join(known) or 'nothing'}")
        check_calibrator(f"calibrators.{name}", values)
        if name == RELEVANCE and values["positions"]:
            raise ValueError(
                f"calibrators.{name}.positions is {values['positions']}: relevance knows no position"
            )


def _parse(values: Mapping[str, Any]) -> Contract:
    if values.get("format") != FORMAT:
        raise ValueError(f"format is {values.get('format')!r}, this version reads {FORMAT}")
    kind = values["kind"]
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, not one of {', '.join(KINDS)}")
    if sorted(values["sha256"]) != sorted((WEIGHTS_FILE, TOKENIZER_FILE)):
        raise ValueError(f"sha256 is {values['sha256']!r}, not of {WEIGHTS_FILE} and {TOKENIZER_FILE}")
    labels, actions = values["labels"], values["actions"]
    if tuple(labels) != _ANSWERS.get(kind, ()):
        raise ValueError(
            f"labels are {', '.join(labels) or 'none'}, a {kind} has {', '.join(_ANSWERS.get(kind, ())) or 'none'}"
        )
    if not isinstance(actions, list) or not all(isinstance(action, str) for action in actions):
        raise ValueError(f"actions are {actions!r}, not a list of names")
    for name in ("calibrators", "training"):
        if not isinstance(values[name], dict):
            raise ValueError(f"{name} is {values[name]!r}, not an object")
    _check_calibrators(values["calibrators"], kind, actions)
    prompts = {name: _prompt(prompt) for name, prompt in values["prompts"].items()}
    for part, wanted in _PARTS.get(kind, {}).items():
        if part not in prompts or prompts[part].kind != wanted:
            raise ValueError(f"prompts.{part} is missing or not of kind {wanted!r}")
    golden = tuple(
        Golden(
            from_dict(Query, item["query"]),
            from_dict(Document, item["document"]),
            tuple(float(score) for score in item["scores"]),
        )
        for item in values["golden"]
    )
    mixlm = _mixlm(values["mixlm"]) if "mixlm" in values else None
    if (kind == "encoder" and mixlm is None) or (mixlm is not None and kind not in ("encoder", "ranker")):
        raise ValueError(f"mixlm is {values.get('mixlm')!r}: an encoder has one, a ranker may")
    if not isinstance(values.get("summariser", ""), str):
        raise ValueError(f"summariser is {values['summariser']!r}, not a hash")
    width = 1 if kind in ("bi_encoder", "summariser") else len(labels) + len(actions)
    if kind == "encoder" and mixlm is not None:
        width = min(GOLDEN_NUMBERS, mixlm.width)
    for item in golden:
        if len(item.scores) != width or not all(map(math.isfinite, item.scores)):
            raise ValueError(f"golden scores {item.scores} are not {width} finite numbers")
    return Contract(
        kind=kind,
        architecture=DecoderConfig(**values["architecture"]),
        prompts=prompts,
        labels={name: int(index) for name, index in labels.items()},
        actions=tuple(actions),
        calibrators=values["calibrators"],
        training=values["training"],
        golden=golden,
        mixlm=mixlm,
        summariser=values.get("summariser", ""),
    )


def _mixlm(values: Mapping[str, Any]) -> MixLMPart:
    part = MixLMPart(
        values["tokens"],
        values["width"],
        values["encoder"],
        tuple(values["text_fields"]),
        tuple(tuple(map(float, scores)) for scores in values["golden"]),
    )
    if not all(type(n) is int and 1 <= n < 2**20 for n in (part.tokens, part.width)):
        raise ValueError(f"mixlm.tokens {part.tokens!r} and width {part.width!r} are no whole numbers from 1")
    if not all(isinstance(text, str) for text in (part.encoder, *part.text_fields)):
        raise ValueError("mixlm.encoder or text_fields are no text")
    if not all(math.isfinite(x) for scores in part.golden for x in scores):
        raise ValueError("mixlm.golden holds numbers that are not finite")
    return part


def _prompt(values: Mapping[str, Any]) -> PromptConfig:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return PromptConfig(**fields)
