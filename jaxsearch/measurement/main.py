"""Command line of measurement: `agreement` of a judge with precedents, and `run`, search quality by a judge."""

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxsearch.errors import InputError, exit_status

if TYPE_CHECKING:
    from jaxsearch.data.records import Document, Query


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxsearch.measurement", description=__doc__, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    agreement = commands.add_parser(
        "agreement", allow_abbrev=False, help="kappa of a judge against graded precedents"
    )
    agreement.add_argument("--judge", required=True, help="model folder of a judge")
    agreement.add_argument("--dataset", required=True, help="such as job_market:tiny")
    agreement.add_argument("--split", default="golden", help="precedents to measure on (default golden)")
    agreement.add_argument("--limit", type=int, default=0, help="queries drawn of the split (default 0: all)")
    agreement.add_argument("--worst", type=int, default=30, help="disagreements listed (default 30)")
    agreement.add_argument(
        "--output", help="folder of the report (default: the judge's, where the labelling job looks for it)"
    )
    run = commands.add_parser("run", allow_abbrev=False, help="NDCG, precision and poor matches by a judge")
    system = run.add_mutually_exclusive_group(required=True)
    system.add_argument("--bundle", help="bundle that ranks the sampled queries")
    system.add_argument("--trec", help="TREC run: query_id Q0 doc_id rank score tag a line")
    run.add_argument("--documents", help="JSONL file, one Document a line (with --trec)")
    run.add_argument("--queries", help="JSONL file, one Query a line")
    run.add_argument("--dataset", help="take queries, and with --trec documents, of a data set")
    run.add_argument("--split", default="test", help="of the data set (default test)")
    run.add_argument("--judge", required=True, help="model folder of a judge")
    run.add_argument("--per-bucket", type=int, default=50, help="queries sampled of each bucket (default 50)")
    run.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    run.add_argument("--depth", type=int, default=50, help="candidates that the bundle ranks (default 50)")
    run.add_argument("--top", type=int, default=10, help="results graded per query, at least 10 (default 10)")
    run.add_argument(
        "--reading",
        choices=("argmax", "expected"),
        default="argmax",
        help="of a grade: the likeliest, or the mean rounded (default argmax)",
    )
    run.add_argument("--grades", help="folder of grades, shared between runs (default: OUTPUT/grades)")
    run.add_argument("--previous", help="folder of an earlier run to compare with")
    run.add_argument("--output", required=True, help="folder of the report")
    for command in (agreement, run):
        command.add_argument(
            "--data-dir", default="", help="folder of prepared data (default: ~/tensorflow_datasets)"
        )
    return parser


def _agreement(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from jaxsearch.data.datasets import load_dataset
    from jaxsearch.measurement.agreement import PAGE, measure_judge, precedents, write_report
    from jaxsearch.measurement.judging import answer_writer
    from jaxsearch.measurement.report import interval
    from jaxsearch.models.contract import load_model

    if options.worst < 0:
        raise InputError(f"worst is {options.worst}: use at least 0")
    model, data = load_model(options.judge), load_dataset(options.dataset, options.data_dir or None)
    count = len(precedents(data, options.split, options.limit).queries)
    with tqdm(total=count, desc="grading", unit="query") as bar:
        report = measure_judge(
            model,
            data,
            options.split,
            limit=options.limit,
            worst=options.worst,
            explain=answer_writer(model),
            progress=bar.update,
        )
    folder = options.output or options.judge
    write_report(report, folder)
    for reading, found in report.readings.items():
        for name, group in {"overall": found.overall, **found.buckets}.items():
            print(f"{reading} {name}: kappa {interval(group.linear_kappa)} {group.note}".rstrip())
    print(f"{folder}/{PAGE}")


def _run(options: argparse.Namespace) -> None:
    import hashlib
    from pathlib import Path

    from tqdm import tqdm

    from jaxsearch.measurement import continuous
    from jaxsearch.measurement.judging import check_judge
    from jaxsearch.measurement.report import interval
    from jaxsearch.measurement.trec import read_trec
    from jaxsearch.models.contract import load_model
    from jaxsearch.serving.bundle import Bundle

    model = load_model(options.judge)
    check_judge(model)
    previous = continuous.read_report(options.previous) if options.previous else None
    queries, documents = _records(options)
    sample = continuous.sample_queries(queries, options.per_bucket, options.seed)
    if options.bundle:
        bundle = Bundle.open(options.bundle)
        documents, system = bundle.documents, bundle.hash
        with tqdm(total=len(sample), desc="ranking", unit="query") as bar:
            rankings = continuous.rank_with_bundle(
                bundle, sample, depth=options.depth, top=options.top, progress=bar.update
            )
    else:
        ids = {query.id for query in queries}, {document.id for document in documents}
        rankings = read_trec(options.trec, *ids)
        system = hashlib.sha256(Path(options.trec).read_bytes()).hexdigest()
    with tqdm(desc="grading", unit="query") as bar:
        report = continuous.measure(
            model,
            sample,
            documents,
            rankings,
            system=system,
            grades=options.grades or Path(options.output) / "grades",
            population=Counter(query.bucket or continuous.NO_BUCKET for query in queries),
            per_bucket=options.per_bucket,
            seed=options.seed,
            top=options.top,
            reading=options.reading,
            previous=previous,
            progress=bar.update,
        )
    continuous.write_report(report, documents, options.output)
    for name, group in {"overall": report.overall, **report.buckets}.items():
        figures = ", ".join(
            f"{metric}@10 {interval(getattr(group, metric))}" for metric in continuous.METRICS
        )
        print(f"{name}: {group.queries} queries, {figures} {group.note}".rstrip())
    if report.comparison is not None:
        for metric, change in report.comparison.changes["overall"].items():
            print(f"{metric}@10 now - before: {interval(change.difference)}, p {change.p:.4f}")
    print(
        f"{options.output}/{continuous.PAGE}: {report.graded} pairs graded, {report.remembered} known before"
    )


def _records(options: argparse.Namespace) -> "tuple[Sequence[Query], Sequence[Document]]":
    """Queries, and the documents of a TREC run (a bundle brings its own)."""
    from jaxsearch.data.datasets import load_dataset
    from jaxsearch.data.jsonl import read_records
    from jaxsearch.data.records import Document, Query

    if options.depth < 1:
        raise InputError(f"depth is {options.depth}: use at least 1")
    if bool(options.queries) == bool(options.dataset):
        raise InputError("give either --queries FILE or --dataset NAME")
    if options.bundle and options.documents:
        raise InputError("--documents goes with --trec: a bundle brings its own")
    data = load_dataset(options.dataset, options.data_dir or None) if options.dataset else None
    if data is not None and options.split not in data.queries:
        raise InputError(f"split is {options.split!r}: {data.name} has {', '.join(data.queries)}")
    queries = data.queries[options.split] if data is not None else read_records(options.queries, Query)
    if options.bundle:
        return queries, []
    if options.documents:
        return queries, read_records(options.documents, Document)
    if data is None:
        raise InputError("a TREC run has ids alone: give --documents FILE, too")
    return queries, data.documents


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, or 2 where the input cannot be used."""
    options = _parser().parse_args(argv)
    command = {"agreement": _agreement, "run": _run}[options.command]
    return exit_status("jaxsearch.measurement", lambda: command(options))
