"""A judge and a bundle with random parameters: what measurement needs of models, without training any."""

from pathlib import Path

from small_market import STUDENT, TEACHER, documents, filled, small_tokenizer

from jaxsearch.data.prompts import PromptConfig
from jaxsearch.data.tokenizer import LABELS
from jaxsearch.models.contract import Contract, Model, load_model, make_module, save_model
from jaxsearch.models.decoder import DecoderConfig
from jaxsearch.serving.bundle import build_bundle

SMALL = ("short", "tiny")
"""Style and chat format of prompts."""


def untrained(folder: Path, contract: Contract, seed: int = 0) -> Model:
    """A model of this contract with random parameters, saved and read again."""
    save_model(folder, filled(lambda rngs: make_module(contract, rngs), seed), contract, small_tokenizer())
    return load_model(folder)


def _model(
    folder: Path,
    kind: str,
    architecture: DecoderConfig,
    prompts: dict[str, PromptConfig],
    labels: tuple[str, ...] = (),
    seed: int = 0,
) -> Model:
    tokenizer = small_tokenizer()
    contract = Contract(kind, architecture, prompts, {label: tokenizer.label(label) for label in labels})
    return untrained(folder, contract, seed)


def small_judge(folder: Path, seed: int = 0) -> Model:
    """A judge that grades at random, but always the same."""
    prompts = {"pair": PromptConfig("judge", *SMALL)}
    return _model(folder, "judge", TEACHER, prompts, LABELS[2:], seed)


def small_bundle(folder: Path, seed: int = 0) -> Path:
    """A bundle that ranks at random, but always the same; returns its folder."""
    ranker = _model(
        folder / "ranker", "ranker", STUDENT, {"pair": PromptConfig("ranker", *SMALL)}, LABELS[:2], seed
    )
    towers = {"query": PromptConfig("query", *SMALL), "document": PromptConfig("document", *SMALL)}
    retriever = _model(folder / "retriever", "bi_encoder", STUDENT, towers)
    build_bundle(folder / "bundle", ranker, retriever, documents())
    return folder / "bundle"
