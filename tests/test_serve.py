"""The commands of serving: build, batch, label; bad input ends with a message and 2, never with a traceback."""

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
