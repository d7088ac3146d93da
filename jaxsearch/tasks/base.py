"""What every task starts from: data, tokenizer and initial decoder by config; the export of a model with its contract."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxsearch.config import ConfigError
from jaxsearch.data import tokenizer as tokenizers
from jaxsearch.data.datasets import Dataset, load_dataset
from jaxsearch.data.network import CONNECTIONS
from jaxsearch.data.prompts import FEATURES, PromptConfig, PromptRoom
from jaxsearch.data.records import Query
from jaxsearch.data.tokenizer import CountingTokenizer, Tokenizer
from jaxsearch.metrics import mrr, ndcg, poor_match_rate_at_k
from jaxsearch.models import contract as contracts
from jaxsearch.models.decoder import Decoder, DecoderConfig
from jaxsearch.models.presets import preset
from jaxsearch.models.scorer import Scorer
from jaxsearch.models.weights import gguf, huggingface
from jaxsearch.retrieval.bm25 import Bm25, document_text

EVALUATION_DEPTH = 50


@dataclass(frozen=True)
class DataConfig:
    """The data set and where it is kept."""

    name: str = "job_market:tiny"
    """`job_market:tiny`, `:default`, `:long`, `:tiny_people`, `:default_people`, `onet_jobs` (needs ONET_DIR once), or a folder of your own
    (`docs/data.md`), with `:jobs` or `:people` behind it where it holds both."""
    dir: str = ""
    """Folder of prepared data; empty for TFDS's own (~/tensorflow_datasets)."""
    max_queries: int = 0
    """Training queries in use, the first ones by id; 0 for all."""
    eval_queries: int = 100
    """Dev queries in an evaluation."""


@dataclass(frozen=True)
class ModelConfig:
    """Size and start of a model."""

    preset: str = "tiny"
    """A name of `models.presets.PRESETS`; with `init_from` the checkpoint's own sizes are taken instead."""
    init_from: str = ""
    """Start from the decoder of a model folder of ours, of a Hugging Face folder, or of a .gguf file; empty: at random."""
    layers: int = 0
    """Keep only so many of the first layers of `init_from`; 0 keeps all."""
    tokenizer: str = ""
    """Folder with a tokenizer.json (such as another run's model folder). Empty: that of `init_from`; without one, a small BPE
    trained on the data set's text."""
    vocab_size: int = 2048
    """Of the small BPE."""
    compute_dtype: str = "float32"
    """"float32" or "bfloat16"; parameters, norms and softmax stay fp32."""
    remat: str = ""
    """What a layer keeps for the backward pass: "none" keeps all, "dots" the projections, "lean" no more than it takes to do
    no projection again, "full" its input only; empty: the preset's own choice."""
    attention: str = ""
    """Backend of attention in the training step: "xla" anywhere; "pallas" on TPU, JAX's splash attention; "fused" on GPU, cuDNN's in
    bfloat16. Empty: "pallas" on TPU, else "xla"."""


@dataclass(frozen=True)
class Start:
    """The tokenizer and decoder that a task begins with."""

    tokenizer: Tokenizer
    architecture: DecoderConfig
    weights: Decoder | None
    """None: random."""
    action_rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Action -> its row [D] of the head, where the checkpoint has action heads."""


def load_start(config: ModelConfig, data: Dataset, field: str = "model") -> Start:
    """Tokenizer, sizes and weights as the config says; `field` is its name in messages.

    Raises:
      ConfigError: the checkpoint is nowhere, or the layers are more than it has.
    """
    changes: dict[str, Any] = {"compute_dtype": config.compute_dtype, "attention": config.attention} | (
        {"remat": config.remat} if config.remat else {}
    )
    if not config.init_from:
        if config.layers:
            raise ConfigError(
                f"{field}.layers is {config.layers}, but there is no {field}.init_from to take them from"
            )
        found = (
            Tokenizer.load(config.tokenizer) if config.tokenizer else train_tokenizer(data, config.vocab_size)
        )
        sizes = preset(config.preset)
        return Start(
            found,
            dataclasses.replace(sizes, vocab_size=max(found.vocab_size, _least(config)), **changes),
            None,
        )
    decoder, found, action_rows = _load_checkpoint(Path(config.init_from), field)
    if config.tokenizer:
        found = Tokenizer.load(config.tokenizer)
    if found.vocab_size > decoder.config.vocab_size:
        raise ConfigError(
            f"{field}.tokenizer has {found.vocab_size} tokens, {config.init_from} only {decoder.config.vocab_size}: "
            "use the checkpoint's own"
        )
    if config.layers:
        decoder = first_layers(decoder, config.layers, field)
    architecture = dataclasses.replace(decoder.config, **changes)
    return Start(found, architecture, decoder, action_rows)


def abstract_start(config: ModelConfig, field: str = "model") -> Start:
    """Sizes as the config says, without weights or data; where no tokenizer is named, one that only counts. `field` is as in `load_start`.

    Raises:
      ConfigError: the sizes would have to be read from a checkpoint.
    """
    if config.init_from:
        raise ConfigError(
            f"{field}.init_from is {config.init_from!r}: without weights the sizes come from {field}.preset; leave init_from out"
        )
    sizes = preset(config.preset)
    rows = sizes.vocab_size if _least(config) else config.vocab_size
    found = Tokenizer.load(config.tokenizer) if config.tokenizer else CountingTokenizer(rows)
    sizes = dataclasses.replace(
        sizes,
        vocab_size=max(found.vocab_size, _least(config)),
        layers=config.layers or sizes.layers,
        compute_dtype=config.compute_dtype,
        remat=config.remat or sizes.remat,
        attention=config.attention,
    )
    return Start(found, sizes, None)


def _least(config: ModelConfig) -> int:
    """Vocabulary rows of the published presets stay as published, so that their checkpoints fit."""
    return 0 if config.preset.startswith("tiny") else preset(config.preset).vocab_size


def _load_checkpoint(path: Path, field: str) -> tuple[Decoder, Tokenizer, Mapping[str, np.ndarray]]:
    if path.suffix == ".gguf":
        return gguf.load_decoder(path), Tokenizer(gguf.load_tokenizer(path)), {}
    if (path / contracts.CONTRACT_FILE).is_file():
        model = contracts.load_model(path)
        module, names = model.module, model.contract.actions
        head = np.asarray(module.action_head[...]) if isinstance(module, Scorer) and names else ()
        return module.decoder, model.tokenizer, dict(zip(names, head, strict=True))
    if (path / "config.json").is_file():
        return huggingface.load_decoder(path), Tokenizer.load(path), {}
    raise ConfigError(
        f"{field}.init_from is {str(path)!r}: give a model folder of a finished run, a Hugging Face folder or a .gguf file"
    )


def first_layers(decoder: Decoder, layers: int, field: str = "model") -> Decoder:
    """A decoder of the first `layers` layers, with the same embeddings and final norm."""
    if not 1 <= layers <= decoder.config.layers:
        raise ConfigError(f"{field}.layers is {layers}: the checkpoint has {decoder.config.layers}")
    shorter = nnx.eval_shape(
        lambda: Decoder(dataclasses.replace(decoder.config, layers=layers), rngs=nnx.Rngs(0))
    )
    kept = jax.tree.map(lambda old, new: old[: new.shape[0]], nnx.state(decoder), nnx.state(shorter))
    return nnx.merge(nnx.graphdef(shorter), kept)


def train_tokenizer(data: Dataset, vocab_size: int) -> Tokenizer:
    """A small BPE on the training queries and on the documents that training may see."""
    hidden = set(data.held_out.tolist())
    texts = [
        " ".join(document.fields.values()) for row, document in enumerate(data.documents) if row not in hidden
    ]
    texts += [
        " ".join([query.text, *(text for name, text in query.searcher.items() if name != CONNECTIONS)])
        for query in data.queries["train"]
    ]
    # What a judge says of them: few words, each of which should be one token.
    texts += sorted({reason for pairs in data.pairs for reason in pairs.rationales}) * 10
    # The words of pair features stand in every prompt, so that each should be one token.
    texts += [
        " ".join(["", feature.short, feature.full, "True False"]) for feature in FEATURES.values()
    ] * 200
    return tokenizers.train(texts, vocab_size)


def check_prompt(name: str, prompt: PromptConfig, kind: str, tokenizer: Tokenizer) -> PromptRoom:
    """The room of `task.<name>`; another kind, or a chat format that the tokenizer lacks, is a `ConfigError`."""
    if prompt.kind != kind:
        raise ConfigError(f"task.{name}.kind is {prompt.kind!r}: this task needs {kind!r}")
    try:
        return PromptRoom(tokenizer, prompt)
    except ValueError as error:
        raise ConfigError(f"task.{name}: {error}") from error


def open_data(config: DataConfig) -> Dataset:
    """The configured data set with `max_queries` applied."""
    data = load_dataset(config.name, config.dir or None)
    if not config.max_queries:
        return data
    first = dataclasses.replace(data, pairs=data.pairs[: config.max_queries])
    # Scores are stored by row, so that a store of all queries serves the first ones too.
    vars(first)["fingerprint"] = data.fingerprint
    return first


def may_learn(pairs: Iterable[tuple[int, int]], data: Dataset, max_queries: int) -> list[tuple[int, int]]:
    """Those of a store's pairs (query row, document row) that training may see: no held-out document, and under `DataConfig.max_queries`
    no query beyond the limit."""
    hidden, first = set(data.held_out.tolist()), {known.query for known in data.pairs}
    return [(q, row) for q, row in pairs if row not in hidden and (not max_queries or q in first)]


def precedent_count(share: float, data: Dataset, least: int = 1) -> int:
    """How many training queries, the first ones, are precedents: what base model, retriever and judge may learn grades from."""
    return max(round(share * len(data.pairs)), least)


def evaluation_lists(data: Dataset, split: str, queries: int) -> tuple[list[Query], list[np.ndarray]]:
    """The first queries of a split and the candidates to rank: the data set's own lists, else BM25's first 50."""
    chosen = list(data.queries[split])[:queries]
    if data.rerank:
        return chosen, [data.rerank[query.id] for query in chosen]
    found, _ = Bm25.build([document_text(document) for document in data.documents]).search(
        [query.text for query in chosen], EVALUATION_DEPTH
    )
    return chosen, [row[row >= 0] for row in found]


def ranking_metrics(
    data: Dataset, queries: list[Query], candidates: list[np.ndarray], scores: list[np.ndarray]
) -> dict[str, np.ndarray]:
    """NDCG@10 (gain 2^grade - 1, ideal over all graded documents), poor-match rate@10 and MRR of grade 4, one value per query [Q].

    Candidates without a place in a list count as nothing: a relevant document that is not among them is a loss.
    """
    width = max([10, *map(len, candidates)])
    padded = np.full((len(queries), width), -1, np.int64)
    values = np.zeros(padded.shape)
    for i, (rows, found) in enumerate(zip(candidates, scores, strict=True)):
        padded[i, : len(rows)] = rows
        values[i, : len(rows)] = found
    where = padded >= 0
    grades = np.array(
        [data.grades(query, row) for query, row in zip(queries, padded, strict=True)], np.int32
    ).reshape(padded.shape)
    ideal = [sorted(data.graded[query.id].values(), reverse=True)[:10] for query in queries]
    best = np.array([row + [0] * (10 - len(row)) for row in ideal], np.int32).reshape(-1, 10)
    return {
        "ndcg@10": ndcg(
            values, grades, where=where, k=10, ideal_grades=best, ideal_where=np.ones(best.shape, bool)
        ),
        "poor_match@10": poor_match_rate_at_k(values, grades, where=where, k=10),
        "mrr": mrr(values, grades, where=where),
    }
