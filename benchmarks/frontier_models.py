"""The models of the frontier on documents that are too long to learn from the start: short first, then whole.

Nothing that a judge would have to read is needed: teachers learn the data set's own grades and impressions. What reads documents first
reads `warm` tokens of them, in which the structured fields of a generated posting stand; the ranker and MixLM's encoder then go on with
samples of whole documents (`data.sampling`), which teach them distances cheaply: a hundred steps on the documents themselves added nothing
to that. With warm = 0 they read whole ones from the start. The ranker of whole documents is pruned.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flax import nnx
from funnel import DEPTH, Demo
from stages import check_pruned

from jaxsearch.compression.pruning import Pruning, prune_model, save_pruned
from jaxsearch.data.datasets import Dataset
from jaxsearch.data.prompts import PromptConfig
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.models.contract import (
    CONTRACT_FILE,
    Contract,
    MixLMPart,
    Model,
    load_model,
    make_module,
    save_model,
)
from jaxsearch.models.decoder import DecoderConfig
from jaxsearch.models.presets import preset
from jaxsearch.scoring.records import RANKER_LABELS
from jaxsearch.serving.first_stage import FirstStage
from jaxsearch.tasks.base import train_tokenizer
from jaxsearch.tasks.defaults import TINY_SERVED, tiny_prompt

VOCABULARY = 4096
WHOLE = 1400
"""Tokens of a whole document at most."""


SAMPLE = 160
"""Tokens of a document that are read in training by what has to get used to whole ones."""
SAMPLED = ("--batch-size", "16", "--task.candidates", "8")
"""Half of a first training's queries, with half of their candidates: a pair is four times as long."""
SUMMARY = 64
"""Tokens of a summary at most."""
STEPS = {
    "base": 450, "retriever": 300, "relevance_teacher": 2_000, "engagement_teacher": 300, "student": 600, "sampled": 600, "summarised": 150,
    "pruned": 600, "words": 200, "mixlm_1": 5_000, "mixlm": 600, "mixlm_1_title": 1_500, "mixlm_5_title": 300, "mixlm_sampled": 450,
}  # fmt: skip
"""Of each stage: about three hours of one core. After a few hundred of the relevance teacher's, rankers stand below the retriever. One
embedding learns slowly what several learn in a fraction of the steps, and a title that stays text saves some."""
PRUNED = Pruning(mlp=0.5, layers=1, method="osscar")
FINE = ("--optimizer.learning-rate", "1e-3", "--optimizer.muon-learning-rate", "6e-3")
"""A third of a first training's rates, for what only has to get used to summaries or to whole documents."""
FULL_RATES = ("--optimizer.learning-rate", "3e-3", "--optimizer.muon-learning-rate", "0.02")


@dataclass
class Chain:
    """Trains one model after another into the folders of a run; what a former run finished is kept."""

    demo: Demo
    data: Dataset
    warm: int
    """Tokens of a document at first; 0: all from the start."""
    text_fields: Sequence[str] = ()
    """Fields of a document that MixLM's ranker reads as text beside the embeddings."""

    def mixlm_name(self, tokens: int) -> str:
        """Of the pair with so many embeddings per document, before it has seen whole documents."""
        return "_".join(("mixlm", str(tokens), *self.text_fields))

    def path(self, name: str) -> str:
        """A stage's model folder."""
        return str(self.demo.workdir / name / "model")

    def _steps(self, stage: str) -> list[str]:
        return ["--steps", str(STEPS[stage])]

    def _cut(self, part: str = "prompt") -> list[str]:
        return [f"--task.{part}.max-document-tokens", str(self.warm or WHOLE)]

    def _sampled(self, stage: str, rates: Sequence[str]) -> list[str]:
        """Overrides for training on samples of documents, and an evaluation of few."""
        read = [*SAMPLED, "--task.document-sample", str(SAMPLE)] if self.warm else []
        return [*self._steps(stage), *read, "--task.data.eval-queries", "20", *rates]

    def tokenizer(self) -> str:
        """A vocabulary of the data's own words, so that documents are no longer than they must be."""
        folder = self.demo.workdir / "tokenizer"
        if not (folder / "tokenizer.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            train_tokenizer(self.data, VOCABULARY).save(folder)
        return str(folder)

    def base(self) -> Model:
        """A small language model."""
        order = () if self.data.actions else ("--task.shuffle-fields", "False")
        return self.demo.train(
            "base", "base.py:tiny_student", "--task.model.tokenizer", self.tokenizer(),
            "--task.model.vocab-size", str(VOCABULARY), *self._steps("base"), *order, *self._cut(),
        )  # fmt: skip

    def retriever(self) -> Model:
        """A bi-encoder from the base model."""
        self.base()
        return self.demo.train(
            "retriever", "retriever.py:tiny", "--task.model.init-from", self.path("base"), *self._steps("retriever"),
            *self._cut("document-prompt"),
        )  # fmt: skip

    @cached_property
    def teachers(self) -> list[str]:
        """Overrides that name the stores of both teachers, who are of the student's size."""
        self.retriever()
        relevance = self.demo.train(
            "relevance_teacher", "relevance_teacher.py:tiny", "--task.model.init-from", self.path("retriever"),
            *self._steps("relevance_teacher"), *FULL_RATES, *self._cut(),
        )  # fmt: skip
        stores = ["--task.relevance-teachers", self.score("relevance_scores", relevance)]
        if self.data.actions:
            engagement = self.demo.train(
                "engagement_teacher", "engagement_teacher.py:tiny", "--task.model.init-from",
                self.path("relevance_teacher"), *self._steps("engagement_teacher"), *self._cut(),
            )  # fmt: skip
            stores += ["--task.engagement-teachers", self.score("engagement_scores", engagement)]
        return stores

    def score(self, name: str, model: Model) -> str:
        """A store of scores of the training pairs and of what the first stages find, which is what will be ranked."""
        return self.demo.label(name, model, self.data, 0, FirstStage(self.retriever(), DEPTH))

    def _used_to_whole(self, name: str, init_from: str, stage: str, rates: Sequence[str]) -> Model:
        """A ranker that goes on with samples of whole documents."""
        start = ["--task.model.init-from", init_from, *self.teachers, *self._sampled(stage, rates)]
        return self.demo.train(
            name, "ranker.py:tiny", *start, "--task.prompt.max-document-tokens", str(WHOLE)
        )

    def short_ranker(self) -> Model:
        """The ranker before it has seen whole documents, distilled from both teachers."""
        start = ["--task.model.init-from", self.path("relevance_teacher"), *self.teachers]
        return self.demo.train("ranker", "ranker.py:tiny", *start, *self._steps("student"), *self._cut())

    def ranker(self) -> Model:
        """The ranker that reads text."""
        first = self.short_ranker()
        if not self.warm:
            return first
        return self._used_to_whole("ranker_whole", self.path("ranker"), "sampled", FULL_RATES)

    def pruned(self) -> Model:
        """Half of the MLP neurons and the last layer taken from the ranker, and its recovery on samples of whole documents."""
        whole, start = self.ranker(), self.demo.workdir / "pruned_start"
        calibration = {"queries": 16, "candidates": 16}
        if not start.is_dir():
            with self.demo.stage("pruning"):
                save_pruned(start, prune_model(whole, self.data, PRUNED, **calibration), whole)
        check_pruned(start, whole, PRUNED, **calibration)
        return self._used_to_whole("pruned", str(start), "pruned", FULL_RATES)

    @property
    def can_summarise(self) -> bool:
        """Whether this installation has summaries."""
        return importlib.util.find_spec("jaxsearch.data.summaries") is not None

    def summaries(self) -> str:
        """A store of extractive summaries, brought up to date."""
        summaries = importlib.import_module("jaxsearch.data.summaries")
        extractive = importlib.import_module("jaxsearch.compression.extractive")
        counting = self.short_ranker().tokenizer
        summariser = extractive.Extractive(counting, SUMMARY, self.data.documents)
        with self.demo.stage("summaries"):
            summaries.summarise_documents(summariser, self.data.documents, self.demo.workdir / "summaries")
        return str(self.demo.workdir / "summaries")

    def summarised(self, name: str) -> Model:
        """The ranker, or the pruned one, used to summaries."""
        (self.short_ranker if name == "ranker" else self.pruned)()
        start = [
            "--task.model.init-from",
            self.path(name),
            *self.teachers,
            "--task.summaries",
            self.summaries(),
        ]
        more = ["--task.prompt.max-document-tokens", str(2 * SUMMARY), *self._steps("summarised"), *FINE]
        return self.demo.train(f"{name}_summarised", "ranker.py:tiny", *start, *more)

    @cached_property
    def _ranker_scores(self) -> str:
        """What the ranker of first tokens says."""
        return self.score("ranker_scores", self.short_ranker())

    def _mixlm_stores(self, tokens: int) -> list[str]:
        """Overrides that say what a pair learns from: the ranker's reading of first tokens."""
        scores = self._ranker_scores
        stores = ["--task.relevance-teachers", scores, "--task.tokens", str(tokens)]
        if self.text_fields:
            stores += ["--task.text-fields", *self.text_fields]
        return [*stores, "--task.engagement-teachers", scores] if self.data.actions else stores

    def _pair(self, name: str) -> tuple[Model, Model]:
        """Ranker and encoder of a stage."""
        return load_model(self.path(name)), load_model(Path(self.path(name)) / "encoder")

    def words(self, tokens: int) -> str:
        """Folder of an encoder that learned to say the words of first tokens in the ranker's token embeddings."""
        self.short_ranker()
        name = f"words_{tokens}"
        self.demo.train(
            name, "encoder.py:tiny", "--task.model.init-from", self.path("retriever"), "--task.ranker", self.path("ranker"),
            "--task.tokens", str(tokens), *self._steps("words"), *self._cut(),
        )  # fmt: skip
        return self.path(name)

    def short_mixlm(self, tokens: int) -> tuple[Model, Model]:
        """Ranker and encoder on the first tokens of documents."""
        start = [
            "--task.model.init-from",
            self.path("ranker"),
            "--task.encoder.init-from",
            self.words(tokens),
        ]
        name = self.mixlm_name(tokens)
        stage = next(key for key in (name, f"mixlm_{tokens}", "mixlm") if key in STEPS)
        more = [*self._steps(stage), *self._cut(), *self._cut("encoder-prompt")]
        self.demo.train(name, "mixlm.py:tiny_words", *start, *self._mixlm_stores(tokens), *more)
        return self._pair(name)

    def mixlm(self, tokens: int) -> tuple[Model, Model]:
        """Ranker and encoder with so many embeddings per document.

        What aligned the two is done on the first tokens; the encoder, which alone reads documents, then gets used to whole ones.
        """
        first = self.short_mixlm(tokens)
        if not self.warm:
            return first
        name = self.mixlm_name(tokens)
        start = ["--task.model.init-from", self.path(name), *self._mixlm_stores(tokens)]
        start += ["--task.encoder.init-from", str(Path(self.path(name)) / "encoder")]
        # The ranker goes on reading first tokens: its text pass, cheap and good, is what the encoder's reading is aligned to.
        terms = ["--task.text-every", "1", *self._sampled("mixlm_sampled", FINE)]
        limits = [*self._cut(), "--task.encoder-prompt.max-document-tokens", str(WHOLE)]
        self.demo.train(f"{name}_whole", "mixlm.py:tiny_words", *start, *terms, *limits)
        return self._pair(f"{name}_whole")


@dataclass
class Untrained(Chain):
    """Models with random weights, for what does not depend on them; the retriever is always small."""

    size: str = "tiny_student"
    """Preset of the rankers and of MixLM's encoder."""
    compute_dtype: str = "float32"

    can_summarise = False

    def _random(self, name: str, contract: Contract) -> Model:
        folder = self.demo.workdir / name / "model"
        if not (folder / CONTRACT_FILE).is_file():
            save_model(folder, make_module(contract, nnx.Rngs(0)), contract, Tokenizer.load(self.tokenizer()))
        return load_model(folder)

    def _size(self) -> DecoderConfig:
        return preset(self.size, vocab_size=VOCABULARY, compute_dtype=self.compute_dtype)

    def _prompt(self, kind: str, tokens: int, features: tuple[str, ...] = ()) -> PromptConfig:
        return dataclasses.replace(tiny_prompt(kind, features), max_document_tokens=tokens)

    def _ranker(self, name: str, tokens: int, size: DecoderConfig, mixlm: MixLMPart | None = None) -> Model:
        found = Tokenizer.load(self.tokenizer())
        labels = {label: found.label(label) for label in RANKER_LABELS}
        prompt = self._prompt("ranker", tokens, TINY_SERVED)
        return self._random(
            name, Contract("ranker", size, {"pair": prompt}, labels, self.data.actions, mixlm=mixlm)
        )

    def retriever(self) -> Model:
        """Two towers."""
        prompts = {kind: self._prompt(kind, self.warm or WHOLE) for kind in ("query", "document")}
        return self._random(
            "retriever", Contract("bi_encoder", preset("tiny_student", vocab_size=VOCABULARY), prompts)
        )

    def ranker(self) -> Model:
        """Of whole documents."""
        return self._ranker("ranker_whole", WHOLE, self._size())

    def short_ranker(self) -> Model:
        """Of first tokens."""
        return self._ranker("ranker", self.warm, self._size())

    def pruned(self) -> Model:
        """Half of the neurons and a layer fewer."""
        size = self._size()
        less = dataclasses.replace(size, mlp_width=size.mlp_width // 2, layers=size.layers - 1)
        return self._ranker("pruned_whole", WHOLE, less)

    def mixlm(self, tokens: int) -> tuple[Model, Model]:
        """Ranker and encoder."""
        name = self.mixlm_name(tokens)
        part = MixLMPart(tokens, self._size().width)
        prompts = {"document": self._prompt("document", WHOLE)}
        encoder = self._random(f"{name}_encoder", Contract("encoder", self._size(), prompts, mixlm=part))
        part = dataclasses.replace(part, encoder=encoder.hash, text_fields=tuple(self.text_fields))
        return self._ranker(name, WHOLE, self._size(), part), encoder

    def short_mixlm(self, tokens: int) -> tuple[Model, Model]:
        """The same: what the encoder reads is no part of what a request costs."""
        return self.mixlm(tokens)
