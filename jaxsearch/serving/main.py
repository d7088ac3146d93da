"""Command line of serving: `build` a bundle, rank a file of queries in `batch`, `label` training pairs for students."""

import argparse
import sys
from collections.abc import Sequence

from jaxsearch.errors import InputError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="serve.py", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser(
        "build", allow_abbrev=False, help="encode documents, build the index, write a bundle"
    )
    build.add_argument("--ranker", required=True, help="model folder of a ranker")
    build.add_argument("--retriever", required=True, help="model folder of a bi-encoder")
    source = build.add_mutually_exclusive_group(required=True)
    source.add_argument("--documents", help="JSONL file, one Document a line")
    source.add_argument("--dataset", help="take the documents of a data set, such as job_market:tiny")
    build.add_argument(
        "--data-dir", default="", help="folder of prepared data (default: ~/tensorflow_datasets)"
    )
    build.add_argument("--output", required=True, help="folder of the new bundle")
    batch = commands.add_parser("batch", allow_abbrev=False, help="rank a file of queries")
    batch.add_argument("--bundle", required=True)
    batch.add_argument("--queries", required=True, help="JSONL file, one Query a line")
    batch.add_argument("--output", required=True, help="folder for rankings.jsonl and run.trec")
    batch.add_argument(
        "--depth", type=int, default=50, help="candidates retrieved and ranked per query (default 50)"
    )
    batch.add_argument("--top", type=int, default=10, help="results written per query (default 10)")
    label = commands.add_parser(
        "label", allow_abbrev=False, help="score training pairs into a store for students"
    )
    label.add_argument("--model", required=True, help="model folder of a judge or teacher")
    label.add_argument("--dataset", required=True, help="such as job_market:tiny")
    label.add_argument(
        "--data-dir", default="", help="folder of prepared data (default: ~/tensorflow_datasets)"
    )
    label.add_argument("--output", required=True, help="folder of the store; an unfinished one is resumed")
    label.add_argument(
        "--minimum-kappa",
        type=float,
        help="kappa with the golden precedents below which a judge may not label (default: the judge's own; -1: no gate)",
    )
    label.add_argument("--per-query", type=int, default=0, help="pairs scored per query (default 0: all)")
    return parser


def _build(options: argparse.Namespace) -> None:
    from jaxsearch.data.datasets import load_dataset
    from jaxsearch.data.jsonl import read_records
    from jaxsearch.data.records import Document
    from jaxsearch.models.contract import load_model
    from jaxsearch.serving.bundle import build_bundle

    ranker, retriever = load_model(options.ranker), load_model(options.retriever)
    if options.documents:
        documents = read_records(options.documents, Document)
    else:
        documents = list(load_dataset(options.dataset, options.data_dir or None).documents)
    build_bundle(options.output, ranker, retriever, documents)
    print(f"{options.output}: {len(documents)} documents")


def _batch(options: argparse.Namespace) -> None:
    from jaxsearch.serving.batch import rank_file
    from jaxsearch.serving.bundle import Bundle

    bundle = Bundle.open(options.bundle)
    report = rank_file(bundle, options.queries, options.output, depth=options.depth, top=options.top)
    print(
        f"{options.output}: {report.queries} queries, {report.resumed} of them from an earlier run, "
        f"{report.empty} without a result"
    )


def _label(options: argparse.Namespace) -> None:
    from jaxsearch.data.datasets import load_dataset
    from jaxsearch.measurement.gate import gate_of, require_agreement
    from jaxsearch.models.contract import load_model
    from jaxsearch.scoring.label import label

    data, model = load_dataset(options.dataset, options.data_dir or None), load_model(options.model)
    require_agreement(options.model, model, data, gate_of(model, options.minimum_kappa))
    report = label(model, data, options.output, per_query=options.per_query)
    rate = report.pairs / max(report.seconds, 1e-9)
    print(f"{report.store}: {report.pairs} pairs scored, {rate:.0f} pairs/s")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, or 2 where the input cannot be used."""
    options = _parser().parse_args(argv)
    try:
        {"build": _build, "batch": _batch, "label": _label}[options.command](options)
    except InputError as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
