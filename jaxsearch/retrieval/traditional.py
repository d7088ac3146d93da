"""The traditional ranker to beat: LightGBM over BM25, embedding similarity and structured features.

`FeatureSpec.from_records` decides the features once, from the training queries; `Features` computes them;
`train_ranker` (LambdaMART) and `train_click_model` (binary) fit a `TraditionalModel`, which carries its spec
and refuses features of other names. Features see what a production ranker sees: the query's text and filters,
the searcher's fields, the document's texts, attributes and numbers.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightgbm as lgb
import numpy as np

from jaxsearch.data.records import GRADES, Document, Query
from jaxsearch.retrieval.bm25 import Bm25, Bm25Params, document_text, words
from jaxsearch.retrieval.common import ABSENT, check_candidates, new_folder

_FORMAT = 1
_SETTINGS, _MODEL = "traditional.json", "model.txt"
_NUMBER = re.compile(r"(\d[\d,]*(?:\.\d+)?)\s*(k\b|m\b)?")


class FeatureMatrix(NamedTuple):
    """The features of every candidate."""

    values: np.ndarray
    """fp32 [B, L, F]; NaN where a feature says nothing about the pair."""
    where: np.ndarray
    """bool [B, L]: a candidate stands here."""
    names: tuple[str, ...]


@dataclass(frozen=True)
class FeatureSpec:
    """Which features there are. `names` is derived from it and is the same in the same order everywhere.

    The three kinds of agreement (with a filter, the query's text, a searcher's field) are 1 where they hold,
    0 where only other values were named, and NaN where none was, or the document has none.
    """

    text_fields: tuple[str, ...]
    """Per field: BM25 `bm25:title`, share of the query's words in it `covers:title`, share of its words in
    the query `named:title`."""
    filters: tuple[str, ...]
    """Attributes that queries filter on, `filter:workplace`: the attribute equals the query's filter."""
    mentions: tuple[str, ...]
    """Attributes that query texts name, `query:workplace`: the text names the document's value."""
    searcher_mentions: tuple[tuple[str, str], ...]
    """(searcher field, attribute), `searcher.location:city`: the field names the document's value."""
    numeric: tuple[str, ...]
    """Numbers of the document as they are, `number:age_days`."""
    searcher_numbers: tuple[str, ...]
    """Searcher fields that hold a number, `searcher:desired_salary`; also its distance from every number of
    the document whose name shares a word with it, `salary_min-desired_salary`."""
    similarity: bool
    """Whether the embedding similarity is a feature."""
    bm25: Bm25Params
    """For every BM25 feature."""

    @classmethod
    def from_records(
        cls,
        queries: Sequence[Query],
        documents: Sequence[Document],
        *,
        similarity: bool = True,
        text_fields: Sequence[str] | None = None,
        bm25: Bm25Params | None = None,
    ) -> "FeatureSpec":
        """Every feature that the training `queries` and `documents` give rise to.

        Args:
          queries: training queries; what none of them filters on or mentions is no feature.
          documents: the corpus.
          similarity: whether embedding similarities will be given.
          text_fields: fields to take BM25 of; by default all that hold words.
          bm25: parameters of every BM25 feature.
        """
        if text_fields is None:
            text_fields = _names(document.fields for document in documents)
            text_fields = [
                name for name in text_fields if any(words(d.fields.get(name, "")) for d in documents)
            ]
        attributes = [_Attribute(name, documents) for name in _names(d.attributes for d in documents)]
        searcher = _names(query.searcher for query in queries)
        return cls(
            text_fields=tuple(text_fields),
            filters=tuple(a.name for a in attributes if any(a.name in query.filters for query in queries)),
            mentions=tuple(
                a.name for a in attributes if any(map(a.named, (query.text for query in queries)))
            ),
            searcher_mentions=tuple(
                (field, a.name)
                for field in searcher
                for a in attributes
                if any(a.named(query.searcher.get(field, "")) for query in queries)
            ),
            numeric=tuple(_names(document.numeric for document in documents)),
            searcher_numbers=tuple(
                field
                for field in searcher
                if all(_number(text) is not None for text in _texts(field, queries))
            ),
            similarity=similarity,
            bm25=bm25 or Bm25Params(),
        )

    @property
    def distances(self) -> tuple[tuple[str, str], ...]:
        """(document number, searcher number) whose names share a word: salary_min and desired_salary."""
        return tuple(
            (number, field)
            for number in self.numeric
            for field in self.searcher_numbers
            if set(number.lower().split("_")) & set(field.lower().split("_"))
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Feature names, in the order of the feature matrix."""
        return (
            "query_words",
            "bm25",
            *(f"{kind}:{field}" for field in self.text_fields for kind in ("bm25", "covers", "named")),
            *(["similarity"] if self.similarity else []),
            *(f"filter:{name}" for name in self.filters),
            *(f"query:{name}" for name in self.mentions),
            *(f"searcher.{field}:{name}" for field, name in self.searcher_mentions),
            *(f"number:{name}" for name in self.numeric),
            *(f"searcher:{field}" for field in self.searcher_numbers),
            *(f"{number}-{field}" for number, field in self.distances),
        )


class Features:
    """Computes the features of a spec over one corpus; its BM25 indexes are built once."""

    def __init__(self, documents: Sequence[Document], spec: FeatureSpec, *, bm25: Bm25 | None = None) -> None:
        """Index `documents`.

        Args:
          documents: the corpus, M documents; candidates are positions in it.
          spec: the features wanted.
          bm25: an index over `document_text` of the same documents, if there is one already.

        Raises:
          ValueError: `bm25` has another number of documents or other parameters than the corpus and the spec,
            or a text field holds no word in any document.
        """
        if bm25 is not None and (len(bm25), bm25.params) != (len(documents), spec.bm25):
            raise ValueError(
                f"bm25 is of {len(bm25)} documents with {bm25.params}: give one of these {len(documents)} "
                f"with {spec.bm25}, or leave it out"
            )
        self.spec = spec
        self._size = len(documents)
        self._bm25 = bm25 or Bm25.build([document_text(document) for document in documents], spec.bm25)
        self._fields = [_field_index(field, documents, spec.bm25) for field in spec.text_fields]
        wanted = {*spec.filters, *spec.mentions, *(name for _, name in spec.searcher_mentions)}
        self._attributes = {name: _Attribute(name, documents) for name in wanted}
        self._numbers = {
            name: np.array([document.numeric.get(name, np.nan) for document in documents], np.float32)
            for name in spec.numeric
        }

    def __call__(
        self, queries: Sequence[Query], candidates: np.ndarray, similarity: np.ndarray | None = None
    ) -> FeatureMatrix:
        """The features of each candidate.

        Args:
          queries: B queries.
          candidates: int [B, L] document positions, -1 for an empty place.
          similarity: fp32 [B, L], required exactly when the spec has it.

        Raises:
          ValueError: shapes do not fit, a candidate does not exist, or `similarity` is missing, superfluous
            or not finite.
        """
        candidates = check_candidates(candidates, len(queries), self._size)
        where = candidates != ABSENT
        columns = [
            *self._text_columns([query.text for query in queries], candidates),
            *self._similarity_columns(similarity, where),
            *self._agreement_columns(queries, candidates),
            *self._number_columns(queries, candidates),
        ]
        values = np.stack(np.broadcast_arrays(*columns), axis=-1).astype(np.float32)
        values[~where] = np.nan
        return FeatureMatrix(values, where, self.spec.names)

    def _text_columns(self, texts: list[str], candidates: np.ndarray) -> list[np.ndarray]:
        columns = [_per_query(len(words(text)) for text in texts), self._bm25.score(texts, candidates)]
        for field in self._fields:
            columns += [field.score(texts, candidates), *field.overlap(texts, candidates)]
        return columns

    def _similarity_columns(self, similarity: np.ndarray | None, where: np.ndarray) -> list[np.ndarray]:
        if (similarity is not None) != self.spec.similarity:
            state = "was not given" if similarity is None else "was given"
            raise ValueError(f"similarity {state}: FeatureSpec.similarity is {self.spec.similarity}")
        if similarity is None:
            return []
        if np.shape(similarity) != where.shape or not np.isfinite(similarity[where]).all():
            raise ValueError(
                f"similarity has shape {np.shape(similarity)}: give finite numbers of shape {where.shape}"
            )
        return [similarity]

    def _agreement_columns(self, queries: Sequence[Query], candidates: np.ndarray) -> list[np.ndarray]:
        def agreement(name: str, asked: Callable[[_Attribute, Query], set[int]]) -> np.ndarray:
            attribute = self._attributes[name]
            return attribute.agreement([asked(attribute, query) for query in queries], candidates)

        def searcher(field: str) -> Callable[[_Attribute, Query], set[int]]:
            return lambda attribute, query: attribute.named(query.searcher.get(field, ""))

        return [
            *(agreement(name, lambda a, query: a.required(query.filters)) for name in self.spec.filters),
            *(agreement(name, lambda a, query: a.named(query.text)) for name in self.spec.mentions),
            *(agreement(name, searcher(field)) for field, name in self.spec.searcher_mentions),
        ]

    def _number_columns(self, queries: Sequence[Query], candidates: np.ndarray) -> list[np.ndarray]:
        own = {name: values[candidates] for name, values in self._numbers.items()}
        asked = {
            field: _per_query(_number(query.searcher.get(field, "")) for query in queries)
            for field in self.spec.searcher_numbers
        }
        return [*own.values(), *asked.values(), *(own[n] - asked[f] for n, f in self.spec.distances)]


class _Attribute:
    """The values of one attribute over the corpus, as codes."""

    def __init__(self, name: str, documents: Sequence[Document]) -> None:
        self.name = name
        values = [" ".join(words(document.attributes.get(name, ""))) for document in documents]
        self._codes = {value: code for code, value in enumerate(sorted(set(values) - {""}))}
        self._longest = max((value.count(" ") + 1 for value in self._codes), default=0)
        self._of_document = np.array([self._codes.get(value, -1) for value in values], np.int64)

    def named(self, text: str) -> set[int]:
        """Codes of the values that occur in `text` as whole words."""
        found = words(text)
        spans = (
            " ".join(found[start : start + length])
            for length in range(1, min(self._longest, len(found)) + 1)
            for start in range(len(found) - length + 1)
        )
        return {self._codes[span] for span in spans if span in self._codes}

    def required(self, filters: Mapping[str, str]) -> set[int]:
        """The code that the query's filter requires; len(codes) for a value that no document has."""
        if self.name not in filters:
            return set()
        return {self._codes.get(" ".join(words(filters[self.name])), len(self._codes))}

    def agreement(self, asked: Sequence[set[int]], candidates: np.ndarray) -> np.ndarray:
        """fp32 [B, L]: 1 if the document's value is asked for, 0 if only others are, NaN if none is."""
        values = self._of_document[candidates]
        width = len(self._codes) + 1
        # One number per (query, value), so that a single isin answers for all pairs.
        pairs = np.arange(len(asked))[:, None] * width + values
        wanted = np.array([row * width + code for row, codes in enumerate(asked) for code in codes], np.int64)
        says_something = np.array([bool(codes) for codes in asked], bool)[:, None] & (values >= 0)
        return np.where(says_something, np.isin(pairs, wanted), np.nan).astype(np.float32)


@dataclass(frozen=True)
class BoostingParams:
    """LightGBM settings. The same seed and data give the same trees, on any number of threads."""

    rounds: int = 500
    early_stopping: int = 50
    """Rounds without a better dev metric (NDCG@10; log loss for clicks) after which training stops."""
    learning_rate: float = 0.05
    leaves: int = 31
    min_documents_in_leaf: int = 20
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("rounds", 1),
            ("early_stopping", 1),
            ("leaves", 2),
            ("min_documents_in_leaf", 1),
            ("threads", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"BoostingParams.{name} is {getattr(self, name)}: use at least {least}")
        if not self.learning_rate > 0:
            raise ValueError(f"BoostingParams.learning_rate is {self.learning_rate}: use a number above 0")

    def for_lightgbm(self) -> dict[str, Any]:
        """The settings in LightGBM's own names."""
        return {
            "learning_rate": self.learning_rate,
            "num_leaves": self.leaves,
            "min_data_in_leaf": self.min_documents_in_leaf,
            "num_threads": self.threads,
            "seed": self.seed,
            "deterministic": True,
            "force_row_wise": True,
            "verbosity": -1,
        }


@dataclass(frozen=True)
class TraditionalModel:
    """Boosted trees with the spec of the features they were trained on."""

    objective: Literal["lambdarank", "binary"]
    spec: FeatureSpec
    booster: lgb.Booster

    def score(self, features: FeatureMatrix) -> np.ndarray:
        """What to rank by (lambdarank) or the probability of a click (binary): fp32 [B, L], -inf where no
        candidate stands.

        Raises:
          ValueError: the features have other names than the model's.
        """
        _check_names(features.names, self.spec.names)
        scores = np.full(features.where.shape, -np.inf, np.float32)
        if features.where.any():
            scores[features.where] = self.booster.predict(features.values[features.where])
        return scores

    def importance(self) -> dict[str, float]:
        """Feature name -> share of the total gain, largest first."""
        gain = self.booster.feature_importance("gain")
        order = np.argsort(-gain, kind="stable")
        return {self.spec.names[i]: float(gain[i] / max(gain.sum(), 1e-12)) for i in order}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write model.txt (LightGBM's text) and traditional.json to `folder`, whole or not at all."""
        settings = {
            "format": _FORMAT,
            "objective": self.objective,
            "features": self.spec.names,
            "spec": dataclasses.asdict(self.spec),
        }
        with new_folder(folder) as new:
            (new / _MODEL).write_text(self.booster.model_to_string())
            (new / _SETTINGS).write_text(json.dumps(settings, indent=1))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "TraditionalModel":
        """The model that `save` wrote.

        Raises:
          FileNotFoundError: there is no model in `folder`.
          ValueError: its format, feature names or number of features differ from what this version derives
            from its spec.
        """
        settings = json.loads((Path(folder) / _SETTINGS).read_text())
        if settings.get("format") != _FORMAT:
            raise ValueError(f"{folder}: format {settings.get('format')!r}; this version reads {_FORMAT}")
        spec = FeatureSpec(
            **{name: _tuples(value) for name, value in settings["spec"].items() if name != "bm25"},
            bm25=Bm25Params(**settings["spec"]["bm25"]),
        )
        _check_names(tuple(settings["features"]), spec.names)
        booster = lgb.Booster(model_str=(Path(folder) / _MODEL).read_text())
        if booster.num_feature() != len(spec.names):
            raise ValueError(
                f"{folder}: {_MODEL} has {booster.num_feature()} features and {_SETTINGS} {len(spec.names)}: "
                "the two files are of different models"
            )
        return cls(settings["objective"], spec, booster)


def train_ranker(
    spec: FeatureSpec,
    train: tuple[FeatureMatrix, np.ndarray],
    dev: tuple[FeatureMatrix, np.ndarray],
    params: BoostingParams = BoostingParams(),
) -> TraditionalModel:
    """LambdaMART on grades, gain 2^g - 1, stopped early by NDCG@10 on dev.

    Args:
      spec: of the features.
      train: features [B, L, F] and grades [B, L], whole numbers 0 to 4 (ignored where no candidate stands).
      dev: the same for other queries.
      params: LightGBM settings.

    Raises:
      ValueError: feature names differ from the spec's, a grade is none, or no training query has two
        different grades.
    """
    sets = []
    for name, (features, grades) in (("train", train), ("dev", dev)):
        labels = _labels(features, grades, spec, name, GRADES)
        sets.append((features, labels, [int(n) for n in features.where.sum(axis=1) if n]))
    lowest, highest = (
        fill(np.where(train[0].where, train[1], default), axis=1)
        for fill, default in ((np.min, max(GRADES)), (np.max, min(GRADES)))
    )
    if not (highest > lowest).any():
        raise ValueError("train: no query has candidates of two different grades; there is no order to learn")
    settings = {
        "objective": "lambdarank",
        "label_gain": [2**grade - 1 for grade in GRADES],
        "metric": "ndcg",
        "eval_at": [10],
    }
    return TraditionalModel("lambdarank", spec, _boost(sets, settings, params))


def train_click_model(
    spec: FeatureSpec,
    train: tuple[FeatureMatrix, np.ndarray],
    dev: tuple[FeatureMatrix, np.ndarray],
    params: BoostingParams = BoostingParams(),
) -> TraditionalModel:
    """Probability of a click (or any other action) from what was shown, stopped early by log loss on dev.

    Args:
      spec: of the features.
      train: features [B, L, F] of the shown documents and clicks [B, L], 0 or 1 (ignored where no candidate
        stands).
      dev: the same for other queries.
      params: LightGBM settings.

    Raises:
      ValueError: feature names differ from the spec's, a click is neither 0 nor 1, or all training clicks are
        equal.
    """
    sets = [
        (features, _labels(features, clicks, spec, name, (0, 1)), None)
        for name, (features, clicks) in (("train", train), ("dev", dev))
    ]
    if len(np.unique(sets[0][1])) < 2:
        raise ValueError("train: all clicks are equal; give examples with and without a click")
    return TraditionalModel(
        "binary", spec, _boost(sets, {"objective": "binary", "metric": "binary_logloss"}, params)
    )


def _boost(
    sets: Sequence[tuple[FeatureMatrix, np.ndarray, list[int] | None]],
    settings: dict[str, Any],
    params: BoostingParams,
) -> lgb.Booster:
    train, dev = (
        lgb.Dataset(features.values[features.where], labels, group=group) for features, labels, group in sets
    )
    booster = lgb.train(
        {**settings, **params.for_lightgbm()},
        train,
        num_boost_round=params.rounds,
        valid_sets=[dev.set_reference(train)],
        callbacks=[lgb.early_stopping(params.early_stopping, verbose=False)],
    )
    # Only the trees up to the best round remain, so that a saved and a fresh model are the same thing.
    return lgb.Booster(model_str=booster.model_to_string(num_iteration=booster.best_iteration))


def _labels(
    features: FeatureMatrix, labels: np.ndarray, spec: FeatureSpec, name: str, allowed: tuple[int, ...]
) -> np.ndarray:
    _check_names(features.names, spec.names)
    if np.shape(labels) != features.where.shape:
        raise ValueError(f"{name}: labels have shape {np.shape(labels)}, candidates {features.where.shape}")
    flat = np.asarray(labels)[features.where]
    if not flat.size:
        raise ValueError(f"{name}: there is no candidate at all")
    if not np.isin(flat, allowed).all():
        raise ValueError(f"{name}: label {flat[~np.isin(flat, allowed)][0]} is none of {allowed}")
    return flat.astype(np.float32)


def _check_names(names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    if names != expected:
        missing, unknown = (sorted(set(a) - set(b)) for a, b in ((expected, names), (names, expected)))
        raise ValueError(
            f"feature names differ from the model's: missing {missing}, unknown {unknown}"
            + ("" if missing or unknown else ", the same in another order")
            + "; build Features from the model's spec"
        )


def _field_index(field: str, documents: Sequence[Document], params: Bm25Params) -> Bm25:
    try:
        return Bm25.build([document.fields.get(field, "") for document in documents], params)
    except ValueError as error:
        raise ValueError(f"FeatureSpec.text_fields: {field!r}: {error}") from error


def _names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys of all the mappings, in the order they are first met."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _texts(field: str, queries: Sequence[Query]) -> list[str]:
    """The texts of a searcher's field, where there is one; a lone empty text if there is none."""
    return [text for query in queries if (text := query.searcher.get(field, "")).strip()] or [""]


def _number(text: str) -> float | None:
    """The number in a text that holds exactly one ("$120,000", "120k USD"), otherwise None."""
    found = _NUMBER.findall(text.lower())
    if len(found) != 1:
        return None
    digits, unit = found[0]
    return float(digits.replace(",", "")) * {"": 1, "k": 1e3, "m": 1e6}[unit]


def _per_query(values: Iterable[float | None]) -> np.ndarray:
    """fp32 [B, 1], NaN for None."""
    return np.array([np.nan if value is None else value for value in values], np.float32)[:, None]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
