"""The prompt room: every prompt of the project is built here, as (prefix, document, pair, suffix).

- prefix: system text, query and searcher, and nothing of the document: shared by all candidates of a query;
- document: depends on the document alone; the only part that is ever truncated, summarised or replaced by embeddings;
- pair: features of this searcher with this document (position, pay, place, click rates), as text;
- suffix: ends at the answer position.

Each part is tokenised apart, always in the same way, so that an item's tokens do not depend on what stands beside it. Text comes in through
`Tokenizer.encode`, which cannot produce a control token; control tokens come from the chat format alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

import numpy as np

from jaxsearch.data import network
from jaxsearch.data.records import Document, Query
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.errors import InputError

KINDS = ("judge", "ranker", "query", "document", "summariser")
STYLES = ("full", "short")
ANSWERS = ("grade", "grade_rationale", "rationale_grade")


class Control(str):
    """A control token, by name."""

    __slots__ = ()


Pieces = tuple[str, ...]
"""Text and `Control` tokens in order."""


@dataclass(frozen=True)
class ChatFormat:
    """How a family of checkpoints was taught to tell roles apart."""

    system: Pieces
    """Opens the system message."""
    user: Pieces
    """Ends the system message, where there is one, and opens the user's."""
    answer: Pieces
    """Ends the user's message and opens the answer."""
    end: Control
    """Ends a text; what a tower is pooled at, and what ends a generated answer."""


_START, _END = Control("<|im_start|>"), Control("<|im_end|>")
FORMATS = {
    "tiny": ChatFormat((), (Control("<|user|>"),), (Control("<|assistant|>"),), Control("<|end|>")),
    "chatml": ChatFormat(
        (_START, "system\n"), (_END, "\n", _START, "user\n"), (_END, "\n", _START, "assistant\n"), _END
    ),
    "qwen3": ChatFormat(
        (_START, "system\n"),
        (_END, "\n", _START, "user\n"),
        (_END, "\n", _START, "assistant\n", Control("<think>"), "\n\n", Control("</think>"), "\n\n"),
        Control("<|endoftext|>"),
    ),
}
"""Chat formats by name: tokenizers trained here, SmolLM2, Qwen3 (with thinking closed)."""

_SYSTEM = {
    "ranker": "You decide whether a {thing} is relevant to a search. Answer Yes or No.",
    "judge": "You grade how well a {thing} answers a search, from 0 to 4, by this policy.\n\n{policy}",
    "summariser": "You shorten a {thing} to the few words that decide which searches it answers. Use its own words.",
}
_INSTRUCT = "Instruct: Given a search, find the {thing}s that answer it.\nQuery: "
_QUESTION = {"ranker": "\nIs it relevant?", "judge": "\nGrade?", "summariser": "\nIn short?"}
_THING = {"jobs": "job posting", "people": "member profile"}


Value = bool | int | float | None
"""Of a feature: a whole number is written as it is, a fraction with so many decimals; None: unknown, left out."""


class Feature(NamedTuple):
    """One feature of the pair part: its name in prompts of either style, and its value."""

    full: str
    short: str
    value: Callable[[Query, Document, int], Value]


def _fraction(name: str) -> Callable[[Query, Document, int], Value]:
    return lambda query, document, position: document.numeric.get(name)


def _whole(name: str) -> Callable[[Query, Document, int], Value]:
    def value(query: Query, document: Document, position: int) -> Value:
        return round(document.numeric[name]) if name in document.numeric else None

    return value


def _pays(query: Query, document: Document, position: int) -> Value:
    try:
        wanted = float(query.searcher["wanted_salary"])
    except (KeyError, ValueError):
        return None
    return document.numeric["salary"] >= wanted if "salary" in document.numeric else None


def _near(query: Query, document: Document, position: int) -> Value:
    here, there = query.searcher.get("location"), document.attributes.get("city")
    return here.lower() == there.lower() if here and there else None


def _count(count: Callable[[Query, Document], int | None]) -> Callable[[Query, Document, int], Value]:
    return lambda query, document, position: count(query, document)


FEATURES = {
    "position": Feature("position on the page", "position", lambda query, document, position: position),
    "company_ctr": Feature("company click rate", "rate", _fraction("company_ctr")),
    "age_days": Feature("days since posting", "age", _whole("age_days")),
    "pays": Feature("pays what the searcher wants", "pays", _pays),
    "near": Feature("in the searcher's city", "near", _near),
    "distance": Feature("network distance", "distance", _count(network.distance)),
    "mutual": Feature("mutual connections", "mutual", _count(network.mutual)),
    "connect_rate": Feature("connect rate", "rate", _fraction("connect_rate")),
    "active_days": Feature("days since active", "active", _whole("active_days")),
}
"""Pair features by name. How they are written is for `PromptConfig` to say; what a vertical does not know (people have no pay, postings no
network distance) is left out of its prompts. Rates come smoothed from the data."""
FEATURE_NAMES = ("style", "full", "short", "code")
BOOLEANS = ("words", "digits")
_LONGEST_VALUE = "99.99"


@dataclass(frozen=True)
class PromptConfig:
    """One prompt template; part of the model contract.

    Raises:
      InputError: an unknown kind, style, chat format or feature, a limit below 1, or a value of another type.
    """

    kind: str
    """"judge", "ranker", "query" (tower), "document" (tower) or "summariser"."""
    style: str = "full"
    """"full" (instructions, field names) or "short" (for models trained from scratch, which learn what the places mean)."""
    chat: str = "chatml"
    """Chat format of the base model: "tiny", "chatml" or "qwen3"."""
    max_query_tokens: int = 128
    """Longer queries (with searcher) are refused: a prefix is never cut."""
    max_document_tokens: int = 1024
    """Longer documents lose their end, which is reported."""
    longest_first: bool = False
    """Put a document's longest field before the others. Titles, places and skills then stand next to where the document is summed up,
    not a thousand tokens away from it; a cut would take them, so that documents should be read whole."""
    features: tuple[str, ...] = ()
    """Names from `FEATURES` for the pair part, in order."""
    feature_names: str = "style"
    """"full" (descriptive, as the paper found best), "short" (one word), "code" (f1, f2, ...: what a log would call them), or "style":
    full in full prompts, short in short ones."""
    booleans: str = "words"
    """"words" (True and False, as the paper found best) or "digits" (1 and 0)."""
    decimals: int = 2
    """Decimals of fractions such as click rates; the paper cuts them to two."""
    searcher: tuple[str, ...] = ("headline", "location")
    """Searcher fields shown in the prefix."""
    serving_position: int = 1
    """The position that is written where the true one is not known yet: always, when serving."""
    answer: str = "grade"
    """What a judge writes: "grade", "grade_rationale" (the grade first) or "rationale_grade"."""
    max_answer_tokens: int = 64
    """Longest answer of a judge, or longest summary, the end token included: what may be learned from, and where generated text is cut."""

    def __post_init__(self) -> None:
        checked: tuple[tuple[str, tuple[str, ...]], ...] = (
            ("kind", KINDS),
            ("style", STYLES),
            ("chat", tuple(FORMATS)),
            ("answer", ANSWERS),
            ("feature_names", FEATURE_NAMES),
            ("booleans", BOOLEANS),
        )
        for name, known in checked:
            if getattr(self, name) not in known:
                raise InputError(f"prompt.{name} is {getattr(self, name)!r}: use one of {', '.join(known)}")
        for name in ("features", "searcher"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(part, str) for part in value):
                raise InputError(f"prompt.{name} is {value!r}: give a tuple of names")
        for feature in self.features:
            if feature not in FEATURES:
                raise InputError(f"prompt.features has {feature!r}: known are {', '.join(FEATURES)}")
        for name in (
            "max_query_tokens",
            "max_document_tokens",
            "serving_position",
            "max_answer_tokens",
            "decimals",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"prompt.{name} is {value!r}: use a whole number of at least 1")


class DocumentTokens(NamedTuple):
    """The document part, and how many tokens were cut off its end."""

    ids: list[int]
    truncated: int


class Longest(NamedTuple):
    """Most tokens that the parts of a prompt can have."""

    prefix: int
    """For the document tower, which has none, of no meaning; for a summariser what stands before the document."""
    document: int
    """Without pair and suffix; for the document tower with its tail."""
    item: int
    """Document, pair and suffix."""


class PromptRoom:
    """Builds the token ids of prompts for one template and tokenizer.

    Args:
      tokenizer: of the model.
      config: the template.
    """

    def __init__(self, tokenizer: Tokenizer, config: PromptConfig):
        self.tokenizer = tokenizer
        self.config = config
        self.format = FORMATS[config.chat]
        self.end_id = tokenizer.control(self.format.end)
        self._pairs: dict[str, list[int]] = {"": []}
        self._features = [
            (self._feature_name(number), FEATURES[name].value)
            for number, name in enumerate(config.features, start=1)
        ]
        self.suffix: list[int] = self._suffix()

    def _ids(self, pieces: Sequence[str]) -> list[int]:
        """Token ids of fixed text and control tokens, each piece apart."""
        parts = [
            [self.tokenizer.control(piece)]
            if isinstance(piece, Control)
            else self.tokenizer.encode([piece])[0]
            for piece in pieces
            if piece
        ]
        return [token for part in parts for token in part]

    def _suffix(self) -> list[int]:
        if self.config.kind in ("query", "document"):
            return [self.end_id]
        closing = _QUESTION[self.config.kind] if self.config.style == "full" else self.format.end
        return self._ids((closing, *self.format.answer))

    def _opening(self, vertical: str) -> list[int]:
        """Token ids of everything before the query's own text."""
        kind, thing = self.config.kind, _THING[vertical]
        if kind == "query":
            return self._ids((_INSTRUCT.format(thing=thing),)) if self.config.style == "full" else []
        if self.config.style == "short":
            return self._ids(self.format.user)
        policy = _policy(vertical) if kind == "judge" else ""
        system = _SYSTEM[kind].format(thing=thing, policy=policy)
        return self._ids((*self.format.system, system, *self.format.user))

    def _query_text(self, query: Query) -> str:
        searcher = [(name, query.searcher[name]) for name in self.config.searcher if query.searcher.get(name)]
        if self.config.style == "short":
            return "; ".join([query.text, *(text for _, text in searcher)])
        lines = [f"Search: {query.text}"] if self.config.kind != "query" else [query.text]
        lines += [f"Searcher's {name.replace('_', ' ')}: {text}" for name, text in searcher]
        lines += [f"Required {name.replace('_', ' ')}: {value}" for name, value in query.filters.items()]
        return "\n".join(lines) + ("\n" if self.config.kind != "query" else "")

    def prefixes(self, queries: Sequence[Query]) -> list[list[int]]:
        """Token ids of each prefix.

        Raises:
          InputError: a query is empty or too long; names it.
        """
        openings = {vertical: self._opening(vertical) for vertical in {query.vertical for query in queries}}
        texts = self.tokenizer.encode([self._query_text(query) for query in queries])
        for query, ids in zip(queries, texts, strict=True):
            if not query.text.strip():
                raise InputError(f"query {query.id!r} is empty: give at least one word")
            if len(ids) > self.config.max_query_tokens:
                raise InputError(
                    f"query {query.id!r} with its searcher has {len(ids)} tokens, max_query_tokens is "
                    f"{self.config.max_query_tokens}: shorten it, or raise the limit in the prompt config"
                )
        # In short prompts the end token stands where instructions stand in full ones: it closes query and document.
        closed = self.config.kind == "query" or self.config.style == "short"
        tail = [self.end_id] if closed else []
        return [openings[query.vertical] + ids + tail for query, ids in zip(queries, texts, strict=True)]

    def document_text(self, document: Document) -> str:
        """What the document part says, before tokenising."""
        fields = list(document.fields.items())
        if self.config.longest_first:
            fields.sort(key=lambda field: field[1] != max(document.fields.values(), key=len))
        if self.config.style == "short":
            return "; ".join(text for _, text in fields)
        lines = [f"{name.replace('_', ' ').capitalize()}: {text}" for name, text in fields]
        return "\n".join(lines)

    def documents(self, documents: Sequence[Document]) -> list[DocumentTokens]:
        """Token ids of each document part, cut to `max_document_tokens`; the tail of a tower is added after the cut."""
        limit = self.config.max_document_tokens
        tail = self.suffix if self.config.kind == "document" else []
        encoded = self.tokenizer.encode([self.document_text(document) for document in documents])
        return [DocumentTokens(ids[:limit] + tail, max(len(ids) - limit, 0)) for ids in encoded]

    def summary_prompts(self, documents: Sequence[Document]) -> list[list[int]]:
        """Token ids of everything before a summary: instructions, the document cut to `max_document_tokens`, and the answer position."""
        openings = {
            vertical: self._opening(vertical) for vertical in {document.vertical for document in documents}
        }
        parts = self.documents(documents)
        return [
            openings[document.vertical] + part.ids + self.suffix
            for document, part in zip(documents, parts, strict=True)
        ]

    def answers(self, grades: Sequence[int], rationales: Sequence[str]) -> list[list[int]]:
        """Token ids of a judge's whole answers, their end token included.

        Raises:
          InputError: one is longer than `max_answer_tokens`.
        """
        answers = []
        for grade, reason in zip(grades, self.tokenizer.encode(rationales), strict=True):
            label = self.tokenizer.label(str(grade))
            said = [label, *reason] if self.config.answer != "rationale_grade" else [*reason, label]
            answers.append([*said, self.end_id])
            if len(answers[-1]) > self.config.max_answer_tokens:
                raise InputError(
                    f"a rationale of {len(reason)} tokens is too long ({self.tokenizer.decode(reason)[:80]!r}): "
                    f"max_answer_tokens is {self.config.max_answer_tokens}; shorten it, or raise the limit"
                )
        return answers

    def pair_text(self, query: Query, document: Document, position: int | None = None) -> str:
        """The features of a pair as text ("" without features)."""
        place = self.config.serving_position if position is None else position
        written = [(name, self._value(value(query, document, place))) for name, value in self._features]
        if self.config.style == "short":
            # A number stands right behind its name: a space before a digit would be a token of its own.
            return "".join(
                f" {name}{value if value[0].isdigit() else ' ' + value}" for name, value in written if value
            )
        return "".join(f"\n{name[0].upper()}{name[1:]}: {value}" for name, value in written if value)

    def _feature_name(self, number: int) -> str:
        """What the prompt calls its so many-th feature (from 1)."""
        feature, names = FEATURES[self.config.features[number - 1]], self.config.feature_names
        if names == "code":
            return f"f{number}"
        return getattr(feature, self.config.style if names == "style" else names)

    def _value(self, value: Value) -> str:
        """A feature's value as text, "" where it is unknown."""
        if value is None:
            return ""
        if isinstance(value, (bool, np.bool_)):
            return str(bool(value)) if self.config.booleans == "words" else str(int(value))
        return str(value) if isinstance(value, int) else f"{value:.{self.config.decimals}f}"

    def longest(self) -> Longest:
        """Most tokens that prefix, document and item can have, by the limits of the template."""
        verticals = () if self.config.kind == "document" else tuple(_THING)
        openings = [len(self._opening(vertical)) for vertical in verticals] or [0]
        asked = 0 if self.config.kind == "summariser" else self.config.max_query_tokens + 1
        document = self.config.max_document_tokens + len(self.suffix) * (self.config.kind == "document")
        values = [f"\n{FEATURES[name].full.capitalize()}: {_LONGEST_VALUE}" for name in self.config.features]
        pair = sum(map(len, self.pairs(values)))
        return Longest(max(openings) + asked, document, document + pair + len(self.suffix))

    def pairs(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of pair parts. Few different texts occur, so that their ids are kept."""
        if missing := sorted({text for text in texts if text not in self._pairs}):
            if len(self._pairs) + len(missing) > 200_000:
                self._pairs = {"": []}
                missing = sorted({*texts} - {""})
            self._pairs.update(zip(missing, self.tokenizer.encode(missing), strict=True))
        return [self._pairs[text] for text in texts]


def _policy(vertical: str) -> str:
    """The grading policy of a vertical, word for word.

    Raises:
      InputError: no policy was written for it.
    """
    file = resources.files("jaxsearch.data.job_market").joinpath(f"policy_{vertical}.md")
    if not file.is_file():
        raise InputError(f"vertical is {vertical!r}: there is no grading policy policy_{vertical}.md")
    return file.read_text(encoding="utf-8")
