"""The frontier: FLOPs of lists, requests of a size, ratios, and rows measured with small models."""

import argparse
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_market import TEACHER, Funnel, filled, small_tokenizer
from test_tasks import build, configured

from jaxsearch.config import load_config, to_dict
from jaxsearch.data.datasets import Dataset
from jaxsearch.data.prompts import PromptRoom
from jaxsearch.data.records import Query
from jaxsearch.errors import InputError
from jaxsearch.models import presets
from jaxsearch.models.contract import Model, load_model
from jaxsearch.models.presets import preset
from jaxsearch.scoring.mixed import check_pair

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def frontier(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("frontier")


def settings(frontier: Any, **changes: Any) -> argparse.Namespace:
    """The benchmark's options, as far as a row needs them."""
    defaults = {**frontier.FORMER, "call_tokens": list(frontier.CALL_TOKENS)}
    return argparse.Namespace(**{**defaults, **changes})


def test_flops_of_lists_by_hand(frontier: Any) -> None:
    config = preset("tiny_student", vocab_size=100)
    linear = 3 * (4 * 64 * 8 * 16 + 6 * 64 * 192)
    pair = 4 * 3 * 64

    def head(p: int) -> float:
        return p * linear + pair * p * (p + 1) / 2

    def item(p: int, t: int) -> float:
        return t * linear + pair * (t * p + t * (t + 1) / 2)

    found = frontier.item_flops(config, [[1] * 5, [1] * 3], [[[1] * 2, [1] * 7], [[1] * 4]])
    assert found == pytest.approx((head(5) + item(5, 2) + item(5, 7) + head(3) + item(3, 4)) / 3)


def test_requests_hold_their_number_of_items(frontier: Any) -> None:
    queries = [Query(f"q{i}", "nurse") for i in range(4)]
    lists = [np.arange(n) for n in (5, 3, 4, 6)]
    small = frontier.requests(queries, lists, 3)
    assert [(q[0].id, c[0].tolist()) for q, c in small] == [(f"q{i}", [0, 1, 2]) for i in range(4)]
    large = frontier.requests(queries, lists, 7)
    assert [[q.id for q in some] for some, _ in large] == [["q0", "q1"], ["q2", "q3"]]
    assert [[len(rows) for rows in c] for _, c in large] == [[5, 2], [4, 3]]
    alone = frontier.alone(*large[0])
    assert [q.id for q in alone[0]] == ["q0"] * 5 + ["q1"] * 2
    assert np.concatenate(alone[1]).tolist() == [0, 1, 2, 3, 4, 0, 1]


def test_rate_counts_items_and_takes_the_slowest(frontier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(frontier.time, "perf_counter", lambda: clock[0])

    def call(seconds: float) -> Any:
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    found, p99, calls = frontier.rate([call(1.0), call(3.0)], [10, 20], 8.0)
    assert (found, p99, calls) == (60 / 8, 3000.0, 4)


def test_rates_of_clients_add_up(frontier: Any) -> None:
    made = []
    calls = [lambda i=i: made.append(i) for i in range(6)]
    found, p99, number = frontier.rate(calls, [10] * 6, 0.0, 2)
    assert sorted(made) == list(range(6))  # the first takes the even ones, at least three
    assert number == 6
    assert found > 0 < p99


def test_ratios_stand_over_the_fastest_full_text_path(frontier: Any) -> None:
    def row(name: str, ndcg: list[float], clicks: float, speed: float, flops: float) -> dict[str, Any]:
        return {
            "model": name, "ndcg@10": float(np.mean(ndcg)), "ndcg_of_queries": ndcg, "click_auroc": clicks,
            "items_per_s": speed, "flops_per_item": flops,
        }  # fmt: skip

    rows = {
        "full_text": row("full_text", [0.8, 0.6], 0.7, 50.0, 900.0),
        "shared_prefix": row("shared_prefix", [0.8, 0.6], 0.7, 60.0, 800.0),
        "mixlm_1": row("mixlm_1", [0.7, 0.63], 0.69, 6000.0, 4.0),
    }
    found = frontier.compare(rows)["mixlm_1"]
    assert found["over"] == "shared_prefix"
    assert found["speed_ratio"] == pytest.approx(100)
    assert found["flop_ratio"] == pytest.approx(200)
    assert found["ndcg_kept"] == pytest.approx(0.665 / 0.7)
    assert found["clicks_kept"] == pytest.approx(0.19 / 0.2)
    # What was timed in turns counts in place of rates from different moments, if it is over that path.
    rows["mixlm_1"]["in_turns"] = {"over": "shared_prefix", "ratios": [80.0, 120.0, 90.0, 100.0, 95.0]}
    found = frontier.compare(rows)["mixlm_1"]
    assert (found["speed_ratio"], found["speed_ratio_quartiles"]) == (95.0, [90.0, 100.0])
    rows["mixlm_1"]["in_turns"]["over"] = "full_text"
    assert frontier.compare(rows)["mixlm_1"]["speed_ratio"] == pytest.approx(100)
    assert "ndcg_kept_of_cut" not in found
    taught = row("cut", [0.8, 0.75], 0.7, 70.0, 20.0)
    found = frontier.compare(rows | {"cut": taught})["mixlm_1"]
    assert found["ndcg_kept_of_cut"] == pytest.approx(0.665 / 0.775)
    assert found["ndcg_difference_from_cut"][0] == pytest.approx(-0.11)
    text = frontier.table(rows)
    assert "| mixlm_1 | 0.6650 |" in text
    assert text.splitlines()[2].endswith("| 0.9432 | 270 |")
    assert frontier.compare({"mixlm_1": rows["mixlm_1"]}) == {}
    del rows["mixlm_1"]["in_turns"]
    for name in rows:
        del rows[name]["items_per_s"]
    unseen = frontier.compare(rows)["mixlm_1"]
    assert unseen["ndcg_kept"] == pytest.approx(0.665 / 0.7)
    assert "speed_ratio" not in unseen


class SmallChain:
    """The models of the small funnel, and a MixLM that nobody trained."""

    warm = 0
    can_summarise = False

    def __init__(self, funnel: Funnel, folder: Path, demo: Any, *text_fields: str):
        self.demo, self._funnel, self.text_fields = demo, funnel, text_fields
        store = str(funnel.store("relevance_teacher"))
        options = ["--task.relevance-teachers", store, "--task.model.init-from", str(funnel.model("ranker"))]
        options += ["--task.text-fields", *text_fields] if text_fields else []
        task = build("mixlm", *options, "--task.encoder.init-from", str(funnel.model("retriever")))
        self._mixlm = folder / "mixlm"
        task.export(filled(task.init, 3), self._mixlm, configured("mixlm", *options))

    def mixlm_name(self, tokens: int) -> str:
        return importlib.import_module("frontier_models").Chain.mixlm_name(self, tokens)

    def ranker(self) -> Model:
        return load_model(self._funnel.model("ranker"))

    def retriever(self) -> Model:
        return load_model(self._funnel.model("retriever"))

    def mixlm(self, tokens: int) -> tuple[Model, Model]:
        return load_model(self._mixlm), load_model(self._mixlm / "encoder")


def test_rows_are_measured_once_and_kept(
    frontier: Any, funnel: Funnel, world: Dataset, tmp_path: Path
) -> None:
    demo = frontier.Demo(tmp_path, "small", "", 0, 1.0, 0, False)
    options = settings(
        frontier, test_queries=3, click_queries=0, budget_ms=60_000.0, seconds=0.02, tokens=[1], parts=list(frontier.PARTS), unseen=False,
        seed=0, steps=1.0, untrained=False, rounds=3, clients=2,
    )  # fmt: skip
    bench = frontier.Bench(SmallChain(funnel, tmp_path, demo), world, options)
    every = frontier.rows(bench)
    names = ["shared_prefix", "full_text", "mixlm_1", "retrieval"]
    found = {name: frontier.measure(bench, name, every[name]) for name in names}
    for name, row in found.items():
        assert 0 <= row["ndcg@10"] <= 1
        assert row["items_per_s"] > 0
        assert row["p99_ms"] > 0
        assert (row["click_auroc"] is None) == (name == "retrieval")
        assert len(row["ndcg_of_queries"]) == 3
    full, mixed = found["full_text"], found["mixlm_1"]
    assert full["ndcg_of_queries"] == found["shared_prefix"]["ndcg_of_queries"]
    assert full["flops_per_item"] > found["shared_prefix"]["flops_per_item"] > mixed["flops_per_item"]
    assert mixed["bytes_per_document"] == 4 * load_model(funnel.model("ranker")).contract.architecture.width
    frontier.in_turns(bench, found)
    turns, best = mixed["in_turns"], frontier.fastest(found)
    assert best is not None
    assert turns["over"] == best["model"]
    assert turns["ratios"] == [
        a / b for a, b in zip(turns["items_per_s"], turns["over_items_per_s"], strict=True)
    ]
    assert frontier.compare(found)["mixlm_1"]["speed_ratio"] == np.median(turns["ratios"])
    assert [name for name, row in found.items() if "in_turns" in row] == ["mixlm_1"]
    frontier.in_turns(bench, found)
    assert mixed["in_turns"] is turns  # done, and not again
    frontier.draw(tmp_path / "frontier.png", found, "small")
    assert (tmp_path / "frontier.png").is_file()
    # With embeddings of other documents the order is another one, of MixLM alone.
    assert mixed["swapped_ndcg@10"] != mixed["ndcg@10"]
    assert "swapped_ndcg@10" not in full
    # A row from before its size, dtype and attention could be chosen has those that there were.
    path = tmp_path / "rows/mixlm_1.json"
    before = {
        k: v
        for k, v in json.loads(path.read_text()).items()
        if k not in ("preset", "compute_dtype", "backend")
    }
    path.write_text(json.dumps(before))
    # Not measured again; not under other settings either.
    assert frontier.measure(bench, "mixlm_1", frontier.Row(lambda: pytest.fail("made again"))) == mixed
    # What is missing is measured with the model that the rest was measured with, or not at all.
    path = tmp_path / "rows/mixlm_1.json"
    values = json.loads(path.read_text())
    assert values["weights"] == bench.chain.mixlm(1)[0].hash
    path.write_text(
        json.dumps({k: v for k, v in values.items() if k != "items_per_s"} | {"weights": "f" * 64})
    )
    with pytest.raises(InputError, match=r"mixlm_1\.json was measured with model ffffffffffff, there is"):
        frontier.measure(bench, "mixlm_1", every["mixlm_1"])
    # Nor are figures of a row with the same scores taken over, or two rows timed in turns, where one is of another model.
    path = tmp_path / "rows/shared_prefix.json"
    shared = path.read_text()
    path.write_text(json.dumps(json.loads(shared) | {"weights": "f" * 64}))
    (tmp_path / "rows/full_text.json").unlink()
    with pytest.raises(InputError, match=r"shared_prefix\.json was measured with model ffffffffffff"):
        frontier.measure(bench, "full_text", every["full_text"])
    path.write_text(shared)
    options.rounds = 2
    with pytest.raises(InputError, match=r"mixlm_1\.json was measured with model eeeeeeeeeeee"):
        frontier.in_turns(bench, found | {"mixlm_1": mixed | {"weights": "e" * 64}})
    # A file from before models were named goes on without a name.
    (tmp_path / "rows/retrieval.json").write_text(
        json.dumps({k: v for k, v in found["retrieval"].items() if k not in ("weights", "items_per_s")})
    )
    assert "weights" not in frontier.measure(bench, "retrieval", every["retrieval"])
    options.budget_ms, options.seed, options.backend = 1.0, 2, "fused"
    wanted = (
        r"mixlm_1\.json .* budget_ms 60000.0 \(not 1.0\), seed 0 \(not 2\), backend 'xla' \(not 'fused'\)"
    )
    with pytest.raises(InputError, match=wanted):
        frontier.measure(bench, "mixlm_1", every["mixlm_1"])


def test_requests_are_made_until_nothing_more_is_compiled(frontier: Any) -> None:
    """The second request needs a shape that suits the first one better, which then needs another."""
    asked, shapes = [], [0]

    def score(queries: Any, lists: Any) -> Any:
        asked.append(len(lists))
        shapes[0] += {1: 1, 3: 1, 4: 1}.get(len(asked), 0)
        return lists

    contender = frontier.Contender(score, 0.0, compiled=lambda: shapes[0])
    frontier._compile(contender, [([], [1]), ([], [1, 2])])
    assert asked == [1, 2] * 3
    assert shapes == [3]


def test_a_lucky_size_counts_by_its_second_timing(frontier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of 1, 6 and 16 items keep the budget at first, 24 never do; 16 miss it later, and 6 were lucky."""
    evaluation = argparse.Namespace(queries=[Query("q", "nurse")], candidates=[np.arange(48)])
    bench = argparse.Namespace(evaluation=evaluation, options=settings(frontier, budget_ms=100.0))
    timings = {1: [(10.0, 1.0), (11.0, 1.0)], 6: [(90.0, 10.0), (40.0, 50.0)]}
    timings |= {16: [(80.0, 90.0), (99.0, 101.0)], 24: [(70.0, 200.0)]}

    def timed(contender: Any, some: Any, tokens: int, options: Any) -> dict[str, float]:
        size = sum(map(len, some[0][1]))
        rate, p99 = timings[size].pop(0)
        return {"items_per_s": rate, "p99_ms": p99, "size": size}

    monkeypatch.setattr(frontier, "_timed", timed)
    contender = frontier.Contender(lambda queries, lists: lists, 0.0)
    row = frontier.Row(lambda: contender)
    found = frontier.speed(bench, contender, row)
    assert (found["items_per_s"], found["size"], found["p99_ms"]) == (40.0, 6, 50.0)
    assert not any(timings.values())
    timings[1] = [(10.0, 1000.0)]
    none = frontier.speed(bench, contender, row)
    assert (none["items_per_s"], none["p99_ms"]) == (0.0, None)


def test_fields_that_stay_text_are_counted(
    frontier: Any, funnel: Funnel, world: Dataset, tmp_path: Path
) -> None:
    """A row of its own, whose documents hold the tokens of their titles beside their embeddings."""
    options = settings(frontier, test_queries=3, tokens=[1], unseen=False)
    queries, lists = list(world.queries["test"][:2]), [np.arange(8), np.arange(3)]
    rows = {}
    for fields in ((), ("title",)):
        folder = tmp_path / "-".join(("run", *fields))
        folder.mkdir()
        demo = frontier.Demo(folder, "small", "", 0, 1.0, 0, False)
        bench = frontier.Bench(SmallChain(funnel, folder, demo, *fields), world, options)
        name = "_".join(("mixlm", "1", *fields))
        assert name in frontier.rows(bench)
        rows[fields] = bench.mixlm(1)
    plain, titled = rows.values()
    room = PromptRoom(small_tokenizer(), load_model(funnel.model("ranker")).contract.prompts["pair"])
    titles = [dataclasses.replace(d, fields={"title": d.fields["title"]}) for d in world.documents]
    tokens = float(np.mean([len(part.ids) for part in room.documents(titles)]))
    assert titled.bytes_per_document == pytest.approx(plain.bytes_per_document + 4 * tokens)
    assert titled.flops(queries, lists) > plain.flops(queries, lists)


def test_scores_alone_are_those_behind_a_shared_prefix(
    frontier: Any, funnel: Funnel, world: Dataset, tmp_path: Path
) -> None:
    demo = frontier.Demo(tmp_path, "small", "", 0, 1.0, 0, False)
    bench = frontier.Bench(
        SmallChain(funnel, tmp_path, demo), world, settings(frontier, test_queries=2, unseen=False)
    )
    queries, lists = list(world.queries["test"][:2]), [np.arange(8), np.arange(3)]
    shared, alone = (bench.text(bench.chain.ranker(), share=share) for share in (True, False))
    one, other = (np.concatenate(row.score(queries, lists)) for row in (shared, alone))
    np.testing.assert_allclose(one, other, atol=1e-4)
    shared.fit(queries, lists, 64)
    np.testing.assert_allclose(np.concatenate(shared.score(queries, lists)), one, atol=1e-4)
    np.testing.assert_allclose(np.concatenate(shared.engine(queries, lists)()), one, atol=1e-4)


def test_unseen_postings_are_ranked_by_the_same_models(
    frontier: Any, funnel: Funnel, world: Dataset, tmp_path: Path
) -> None:
    """Another corpus, files of its own, no clicks."""
    demo = frontier.Demo(tmp_path, "small", "", 0, 1.0, 0, False)
    options = settings(
        frontier, test_queries=3, click_queries=0, budget_ms=60_000.0, seconds=0.02, tokens=[1], parts=["quality"], unseen=True, seed=0,
        steps=1.0, untrained=False, clients=1,
    )  # fmt: skip
    chain = SmallChain(funnel, tmp_path, demo)
    chain.data = world
    documents = [dataclasses.replace(d, id=f"other {d.id}") for d in reversed(world.documents)]
    graded = {
        q: {len(documents) - 1 - row: g for row, g in known.items()} for q, known in world.graded.items()
    }
    corpus = dataclasses.replace(world, documents=documents, graded=graded, impressions={})
    bench = frontier.Bench(chain, corpus, options)
    every = frontier.rows(bench)
    assert not {"summarised", "pruned_summarised"} & set(every)
    found = {
        name: frontier.measure(bench, name, every[name]) for name in ("shared_prefix", "lightgbm", "mixlm_1")
    }
    assert all(row["click_auroc"] is None for row in found.values())
    assert (tmp_path / "rows_unseen/mixlm_1.json").is_file()
    assert (tmp_path / "embeddings_mixlm_1_unseen").is_dir()
    assert not (tmp_path / "rows").exists()


def test_untrained_models_have_the_sizes_of_trained_ones(
    frontier: Any, world: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = frontier.Demo(tmp_path, "small", "", 0, 1.0, 0, False)
    monkeypatch.setitem(presets.PRESETS, "tiny_student", TEACHER)  # of two layers
    chain = frontier.Untrained(demo, world, 4)
    ranker, encoder = chain.mixlm(2)
    check_pair(ranker, encoder)
    full, short, pruned = chain.ranker(), chain.short_ranker(), chain.pruned()
    assert full.contract.architecture == short.contract.architecture == ranker.contract.architecture
    assert full.contract.actions == world.actions
    assert [m.contract.prompts["pair"].max_document_tokens for m in (full, short)] == [1400, 4]
    assert pruned.contract.architecture.mlp_width == full.contract.architecture.mlp_width // 2
    assert chain.retriever().contract.kind == "bi_encoder"
    assert chain.ranker().hash == full.hash  # kept, not made again
    # Rankers and encoder of another size and dtype; the retriever stays small.
    monkeypatch.setitem(presets.PRESETS, "wide", dataclasses.replace(TEACHER, width=2 * TEACHER.width))
    demo = frontier.Demo(tmp_path / "wide", "small", "", 0, 1.0, 0, False)
    wide = frontier.Untrained(demo, world, 4, (), "wide", "bfloat16")
    ranker, encoder = wide.mixlm(2)
    check_pair(ranker, encoder)
    for model in (ranker, encoder, wide.ranker()):
        assert model.contract.architecture.width == 2 * TEACHER.width
        assert model.contract.architecture.compute_dtype == "bfloat16"
    assert wide.retriever().contract.architecture == chain.retriever().contract.architecture


@pytest.mark.usefixtures("frontier")
@pytest.mark.parametrize("arms", [[], ["no_alignment"], ["full", "tokens_5", "stage_1"]])
def test_the_figure_of_arms_needs_none_of_them(arms: list[str], tmp_path: Path) -> None:
    mixlm = importlib.import_module("mixlm")
    lines = [{"arm": arm, "ndcg@10": 0.5, "full_text": 0.9} for arm in arms]
    mixlm.draw(tmp_path / "mixlm.png", lines)
    assert (tmp_path / "mixlm.png").read_bytes().startswith(b"\x89PNG")


def test_a_stage_trained_before_a_setting_existed_counts_as_trained_with_its_default(
    frontier: Any, tmp_path: Path
) -> None:
    stages = importlib.import_module("stages")
    config = load_config("configs/ranker.py:tiny", [])
    folder = tmp_path / "model"
    folder.mkdir()
    settings = json.loads(json.dumps(to_dict(config)))
    del settings["task"]["prompt"]["longest_first"]
    (folder / "contract.json").write_text(json.dumps({"training": settings}))
    assert stages.finished(tmp_path, config)
    other = load_config("configs/ranker.py:tiny", ["--task.prompt.longest-first", "True"])
    with pytest.raises(InputError, match=r"task\.prompt\.longest_first False \(not True\)"):
        stages.finished(tmp_path, other)
    del settings["steps"]
    (folder / "contract.json").write_text(json.dumps({"training": settings}))
    with pytest.raises(InputError, match=r"steps None \(not 440\)"):
        stages.finished(tmp_path, config)


@pytest.mark.usefixtures("frontier")
def test_where_an_arm_with_the_encoders_first_lesson_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder from the retriever, for the funnel's ranker and the arm's tokens; MixLM from both."""
    mixlm, trained = importlib.import_module("mixlm"), list[tuple[str, str]]()
    bench = mixlm.Bench(tmp_path / "funnel", tmp_path / "runs", 1.0, 10)

    def train(demo: object, name: str, config: str, *options: str) -> None:
        trained.append((name, " ".join((config, *options)).replace(str(tmp_path), "")))

    monkeypatch.setattr(mixlm.Demo, "train", train)
    monkeypatch.setattr(mixlm.Bench, "scores", "/scores")
    monkeypatch.setattr(mixlm.Bench, "stage", lambda self, name: None)
    monkeypatch.setattr(mixlm, "load_model", lambda folder: folder)
    folder = tmp_path / "runs/words_5_2/model"
    assert bench.train("words_5", 2) == (folder, folder / "encoder")
    (first, words), (second, pair) = trained
    assert (first, second) == ("encoder_5_2", "words_5_2")
    assert "init-from /funnel/retriever/model --task.ranker /funnel/ranker/model --task.tokens 5" in words
    assert (
        "--task.encoder.init-from /runs/encoder_5_2/model --task.model.init-from /funnel/ranker/model" in pair
    )
