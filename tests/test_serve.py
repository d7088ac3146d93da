"""The commands of serving: build, batch, calibrate, label; bad input ends with a message and 2, never with a traceback."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_market import Funnel, documents, fast_compilation, query

import jaxsearch.data.datasets
from jaxsearch.data.jsonl import write_lines
from jaxsearch.data.records import to_dict
from jaxsearch.data.score_store import read_scores
from jaxsearch.models.contract import load_model
from jaxsearch.serving.main import main


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with fast_compilation():
        yield


def test_build_then_batch(funnel: Funnel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "d.jsonl", map(to_dict, documents()[:5]))
    write_lines(tmp_path / "q.jsonl", [to_dict(query("x", i)) for i in range(3)])
    models = ["--ranker", str(funnel.model("ranker")), "--retriever", str(funnel.model("retriever"))]
    bundle, out = str(tmp_path / "bundle"), str(tmp_path / "out")
    assert main(["build", *models, "--documents", str(tmp_path / "d.jsonl"), "--output", bundle]) == 0
    assert capsys.readouterr().out == f"{bundle}: 5 documents\n"
    options = [
        "batch",
        "--bundle",
        bundle,
        "--queries",
        str(tmp_path / "q.jsonl"),
        "--output",
        out,
        "--top",
        "2",
    ]
    assert main(options) == 0
    assert capsys.readouterr().out == f"{out}: 3 queries, 0 of them from an earlier run, 0 without a result\n"
    assert main(options) == 0
    assert capsys.readouterr().out == f"{out}: 3 queries, 3 of them from an earlier run, 0 without a result\n"
    rows = [json.loads(line) for line in (tmp_path / "out" / "rankings.jsonl").read_text().splitlines()]
    assert [len(row["results"]) for row in rows] == [2, 2, 2]


def test_the_final_order(funnel: Funnel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "d.jsonl", map(to_dict, documents()[:5]))
    write_lines(tmp_path / "q.jsonl", [to_dict(query("x", i)) for i in range(3)])
    models = ["--ranker", str(funnel.model("ranker")), "--retriever", str(funnel.model("retriever"))]
    build = ["build", *models, "--documents", str(tmp_path / "d.jsonl"), "--output", str(tmp_path / "bundle")]
    assert main([*build, "--utility", "relevance=1,connect=1"]) == 2
    assert "'connect' is not scored by this ranker" in capsys.readouterr().err
    assert main([*build, "--floor", "-1"]) == 2
    assert "the floor is -1.0: give a probability from 0 to 1" in capsys.readouterr().err
    assert main([*build, "--utility", "relevance=1,apply=0.5", "--floor", "0.2"]) == 0
    built = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert built["utility"] == {"weights": {"relevance": 1, "apply": 0.5}, "floor": 0.2}
    batch = ["batch", "--bundle", str(tmp_path / "bundle"), "--queries", str(tmp_path / "q.jsonl")]
    for options, utility in (
        ([], built["utility"]),
        (["--floor", "0"], {"weights": {"relevance": 1, "apply": 0.5}, "floor": 0}),
        (["--utility", "dismiss=-1"], {"weights": {"dismiss": -1}, "floor": 0.2}),
    ):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert main([*batch, "--output", str(out), *options]) == 0
        assert json.loads((out / "batch.json").read_text())["utility"] == utility
    assert main([*batch, "--output", str(out)]) == 2
    assert "holds results made with another utility" in capsys.readouterr().err
    assert main([*batch, "--output", str(tmp_path / "no"), "--utility", "click"]) == 2
    assert "'click' is no weight: write it as" in capsys.readouterr().err


def test_calibrate(
    funnel: Funnel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jaxsearch.data.datasets, "load_dataset", lambda name, folder: funnel.data)
    source, out, picture = funnel.model("ranker"), tmp_path / "calibrated", tmp_path / "r.png"
    options = ["calibrate", "--model", str(source), "--dataset", "job_market:tiny", "--output", str(out)]
    assert main([*options, "--report", str(picture)]) == 0
    before, after = load_model(source), load_model(out)
    assert after.hash != before.hash
    assert set(after.contract.calibrators) == {"relevance", *before.contract.actions}
    assert dataclasses.replace(after.contract, calibrators={}) == before.contract
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{out}: {after.hash}"
    assert [line.split()[:6] for line in printed[1:3]] == [
        ["test", "relevance", "8", "of", "16", "1"],
        ["test", "click", "4", "of", "20", "1"],
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(options) == 0  # over its own output: the same model
    assert load_model(out).hash == after.hash


def test_calibrate_refuses(
    funnel: Funnel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jaxsearch.data.datasets, "load_dataset", lambda name, folder: funnel.data)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("keep me")
    source = funnel.model("ranker")
    for model, output, more, words in (
        (source, source, [], "holds the model itself: give another folder"),
        (source, tmp_path / "letters", [], "is not empty and holds no model: give a new folder"),
        (source, tmp_path / "letters" / "love.txt", [], "is not empty and holds no model"),
        (source, tmp_path / "o", ["--split", "test"], "--split is test, which calibration is measured on"),
        (source, tmp_path / "o", ["--split", "train"], "which the model has learned from"),
        (source, tmp_path / "o", ["--split", "x"], "split is 'x': small has train, dev, test"),
        (source, tmp_path / "o", ["--report", str(tmp_path / "no" / "r.png")], "there is no such folder"),
        (funnel.model("judge"), tmp_path / "o", [], "a judge cannot be calibrated"),
    ):
        options = ["--model", str(model), "--dataset", "d", "--output", str(output), *more]
        assert main(["calibrate", *options]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert (tmp_path / "letters" / "love.txt").read_text() == "keep me"


def test_label(
    funnel: Funnel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jaxsearch.data.datasets, "load_dataset", lambda name, folder: funnel.data)
    options = [
        "label",
        "--model",
        str(funnel.model("judge")),
        "--dataset",
        "job_market:tiny",
        "--per-query",
        "1",
    ]
    # Nobody measured this judge against precedents: it may not label unless it is told that nothing is asked.
    assert main([*options, "--output", str(tmp_path / "store")]) == 2
    assert "measure the judge with" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
    options += ["--minimum-kappa", "-1"]
    assert main([*options, "--output", str(tmp_path / "store")]) == 0
    assert "12 pairs scored" in capsys.readouterr().out
    assert len(read_scores(tmp_path / "store", funnel.data.fingerprint)[1]) == 12
    options[2] = str(funnel.model("retriever"))
    assert main([*options, "--output", str(tmp_path / "other")]) == 2
    assert "a bi_encoder gives no scores per pair" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["build", "--ranker", "no", "--retriever", "no", "--documents", "d", "--output", "o"],
            "no holds no contract.json",
        ),
        (["batch", "--bundle", "no", "--queries", "q", "--output", "o"], "no holds no bundle.json"),
        (["label", "--model", "no", "--dataset", "jobs", "--output", "o"], "data set is 'jobs': use one of"),
    ],
)
def test_bad_input(
    options: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(options) == 2
    message = capsys.readouterr().err
    assert message.startswith("serve.py: ")
    assert words in message
    assert not list(tmp_path.iterdir())


def test_bad_files(
    funnel: Funnel, bundle_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "text": ""}\n')
    assert (
        main(
            [
                "batch",
                "--bundle",
                str(bundle_folder),
                "--queries",
                str(tmp_path / "bad.jsonl"),
                "--output",
                str(tmp_path / "o"),
            ]
        )
        == 2
    )
    assert "bad.jsonl:1: Query.text is ''" in capsys.readouterr().err
    models = ["--ranker", str(funnel.model("judge")), "--retriever", str(funnel.model("retriever"))]
    (tmp_path / "d.jsonl").write_text('{"id": "a", "fields": {"t": "x"}}\n')
    assert (
        main(["build", *models, "--documents", str(tmp_path / "d.jsonl"), "--output", str(tmp_path / "b")])
        == 2
    )
    assert "ranker is a judge" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["serve"], ["batch"], ["batch", "--bund", "x", "--queries", "q", "--output", "o"],
                                     ["build", "--ranker", "r", "--retriever", "e", "--output", "o"]])  # fmt: skip
def test_wrong_usage(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2
    assert "usage: serve.py" in capsys.readouterr().err


def test_importing_the_commands_starts_no_jax_backend() -> None:
    """Devices and processes are set up after the import, which is impossible once anything has run."""
    code = (
        "import jaxsearch.training.loop, jaxsearch.tasks.ranker, jaxsearch.tasks.retriever, jaxsearch.serving.batch, jax; "
        "jax.config.update('jax_num_cpu_devices', 3); assert jax.device_count() == 3"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
