"""Command line of serving: `label` training pairs, `calibrate` a ranker, `encode` documents for MixLM, `summarise` documents, `build` a
bundle, rank a file of queries in `batch`."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxsearch.errors import InputError, exit_status

if TYPE_CHECKING:
    from jaxsearch.data.records import Document
    from jaxsearch.data.summaries import Summariser
    from jaxsearch.scoring.utility import UtilityConfig


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
    _add_summaries(build)
    _add_embeddings(build)
    _add_utility(build, "relevance=1", "0")
    batch = commands.add_parser("batch", allow_abbrev=False, help="rank a file of queries")
    batch.add_argument("--bundle", required=True)
    batch.add_argument("--queries", required=True, help="JSONL file, one Query a line")
    batch.add_argument("--output", required=True, help="folder for rankings.jsonl and run.trec")
    batch.add_argument(
        "--depth", type=int, default=50, help="candidates retrieved and ranked per query (default 50)"
    )
    batch.add_argument("--top", type=int, default=10, help="results written per query (default 10)")
    _add_utility(batch, "the bundle's", "the bundle's")
    calibrate = commands.add_parser(
        "calibrate", allow_abbrev=False, help="make a ranker's probabilities mean what they say"
    )
    calibrate.add_argument("--model", required=True, help="model folder of a ranker")
    calibrate.add_argument("--dataset", required=True, help="such as job_market:tiny")
    calibrate.add_argument(
        "--data-dir", default="", help="folder of prepared data (default: ~/tensorflow_datasets)"
    )
    calibrate.add_argument(
        "--split", default="dev", help="what is fitted on; test splits are for measuring (default dev)"
    )
    calibrate.add_argument("--output", required=True, help="model folder of the calibrated ranker")
    _add_summaries(calibrate)
    _add_embeddings(calibrate)
    calibrate.add_argument("--report", default="", help="PNG file for reliability diagrams, before and after")
    encode = commands.add_parser(
        "encode", allow_abbrev=False, help="bring a store of document embeddings up to date (MixLM)"
    )
    encode.add_argument("--model", required=True, help="model folder of an encoder")
    source = encode.add_mutually_exclusive_group(required=True)
    source.add_argument("--documents", help="JSONL file with the whole corpus, one Document a line")
    source.add_argument("--dataset", help="take the documents of a data set, such as job_market:tiny")
    encode.add_argument(
        "--data-dir", default="", help="folder of prepared data (default: ~/tensorflow_datasets)"
    )
    encode.add_argument(
        "--output",
        required=True,
        help="folder of the store, or gs://bucket/path; an unfinished one is resumed",
    )
    summarise = commands.add_parser(
        "summarise", allow_abbrev=False, help="bring a store of short texts for documents up to date"
    )
    method = summarise.add_mutually_exclusive_group(required=True)
    method.add_argument("--model", help="model folder of a summariser")
    method.add_argument(
        "--method", choices=("extractive", "truncate"), help="without a model: chosen sentences, or the start"
    )
    summarise.add_argument(
        "--tokenizer", default="", help="for --method: a model folder, whose tokens are counted"
    )
    summarise.add_argument(
        "--tokens", type=int, default=64, help="for --method: most tokens of a summary (default 64)"
    )
    source = summarise.add_mutually_exclusive_group(required=True)
    source.add_argument("--documents", help="JSONL file with the whole corpus, one Document a line")
    source.add_argument("--dataset", help="take the documents of a data set, such as job_market:tiny")
    summarise.add_argument(
        "--data-dir", default="", help="folder of prepared data (default: ~/tensorflow_datasets)"
    )
    summarise.add_argument(
        "--output", required=True, help="folder of the store; an unfinished one is resumed"
    )
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
    _add_summaries(label)
    label.add_argument("--per-query", type=int, default=0, help="pairs scored per query (default 0: all)")
    label.add_argument(
        "--retriever",
        default="",
        help="model folder: score what it and BM25 find for a training query, with its own pairs (default: those alone)",
    )
    label.add_argument("--depth", type=int, help="with --retriever: documents found by each (default 30)")
    return parser


def _add_summaries(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--summaries",
        default="",
        help="store of `summarise` that the model reads in the place of text (default: the text)",
    )


def _add_embeddings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--embeddings",
        default="",
        help="store of `encode`, a folder or gs://bucket/path, that a MixLM ranker reads in the place of text",
    )


def _add_utility(parser: argparse.ArgumentParser, weights: str, floor: str) -> None:
    parser.add_argument(
        "--utility",
        default="",
        help=f"weights of the final order, such as relevance=1,click=0.2,dismiss=-0.5 (default {weights})",
    )
    parser.add_argument(
        "--floor",
        type=float,
        help=f"probability of relevance below which a document comes last (default {floor})",
    )


def _utility(options: argparse.Namespace, default: "UtilityConfig") -> "UtilityConfig":
    """The default with what the options say in its place."""
    from jaxsearch.scoring.utility import UtilityConfig, parse_weights

    return UtilityConfig(
        parse_weights(options.utility) if options.utility else default.weights,
        default.floor if options.floor is None else options.floor,
    )


def _documents(options: argparse.Namespace) -> "list[Document]":
    """The corpus that --documents or --dataset names."""
    from jaxsearch.data.datasets import load_dataset
    from jaxsearch.data.jsonl import read_records
    from jaxsearch.data.records import Document

    if options.documents:
        return read_records(options.documents, Document)
    return list(load_dataset(options.dataset, options.data_dir or None).documents)


def _calibrate(options: argparse.Namespace) -> None:
    from dataclasses import replace
    from pathlib import Path

    from jaxsearch.data.datasets import load_dataset
    from jaxsearch.data.summaries import show_data
    from jaxsearch.models.contract import check_output, load_model, save_model
    from jaxsearch.retrieval.common import new_folder
    from jaxsearch.scoring.calibration import CALIBRATED_ON, calibrate, compare, draw_reliability, observe
    from jaxsearch.scoring.embedding_store import EmbeddingStore
    from jaxsearch.scoring.mixed import mixlm_part

    output = Path(options.output)
    check_output(output, options.model)
    if options.report and not Path(options.report).resolve().parent.is_dir():
        raise InputError(f"--report is {options.report}: there is no such folder")
    if options.summaries and options.embeddings:
        raise InputError(
            f"--summaries is {options.summaries}, --embeddings {options.embeddings}: a ranker reads one of them in the place of text, "
            "leave the other out"
        )
    model = load_model(options.model)
    store = EmbeddingStore.open(options.embeddings, mixlm_part(model)) if options.embeddings else None
    data = load_dataset(options.dataset, options.data_dir or None)
    data = show_data(data, options.summaries, model.contract.summariser)
    if options.split in data.test_splits:
        raise InputError(
            f"--split is {options.split}, which calibration is measured on: give another, such as dev"
        )
    fetch, contract = None, model.contract
    if store is not None:
        as_text = len(data.documents) - int(store.fresh(data.documents).sum())
        if as_text == len(data.documents):
            raise InputError(
                f"--embeddings is {options.embeddings}, which has no fresh embedding of any document of {data.name}: "
                "run `serve.py encode` on them"
            )
        print(f"{as_text} of {len(data.documents)} documents have no fresh embedding and are read in full")
        fetch = store.fetcher(data.documents)
    if contract.mixlm is not None:
        reads = "embeddings" if fetch else "text"
        contract = replace(contract, training={**contract.training, CALIBRATED_ON: reads})
    calibrators = calibrate(model, data, options.split, fetch=fetch)
    values = {name: calibrator.to_dict() for name, calibrator in calibrators.items()}
    with new_folder(output.resolve()) as new:
        digest = save_model(new, model.module, replace(contract, calibrators=values), model.tokenizer)
    print(f"{output}: {digest}")
    comparisons = {}
    for split in data.test_splits:
        for name, seen in observe(model, data, split, fetch=fetch).items():
            if name in calibrators:
                found = compare(calibrators[name], seen)
                comparisons[f"{split}/{name}" if len(data.test_splits) > 1 else name] = found
                print(
                    f"{split:12} {name:12} {found.positives:6} of {found.pairs:6}  {len(calibrators[name].maps)} maps  "
                    f"ECE {found.ece_before:.4f} -> {found.ece_after:.4f}  AUROC {found.auroc_before:.4f} -> {found.auroc_after:.4f}"
                )
    if not comparisons:
        print(f"{data.name} has no test split to measure on")
    elif options.report:
        draw_reliability(options.report, comparisons)


def _build(options: argparse.Namespace) -> None:
    from jaxsearch.models.contract import load_model
    from jaxsearch.scoring.utility import UtilityConfig
    from jaxsearch.serving.bundle import build_bundle

    config = _utility(options, UtilityConfig())
    ranker, retriever = load_model(options.ranker), load_model(options.retriever)
    documents = _documents(options)
    full = build_bundle(
        options.output, ranker, retriever, documents, config, options.summaries, options.embeddings
    )
    read = ""
    if options.summaries or options.embeddings:
        kind = "summary" if options.summaries else "embedding"
        read = f", {full} of them without a fresh {kind}, which are read in full"
    elif ranker.contract.mixlm is not None:
        read = ", read in full: the ranker also reads embeddings, name a store of `encode` (--embeddings) to rank by them"
    print(f"{options.output}: {len(documents)} documents{read}")


def _encode(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from jaxsearch.models.contract import load_model
    from jaxsearch.scoring.embedding_store import encode_documents

    encoder, documents = load_model(options.model), _documents(options)
    with tqdm(total=len(documents), desc="encoding", unit="document", delay=0.5) as bar:
        report = encode_documents(encoder, documents, options.output, progress=bar.update)
    print(
        f"{options.output}: {report.documents} documents, {report.encoded} of them encoded now, "
        f"{report.resumed} by a run that was interrupted, {report.dropped} dropped"
    )


def _summarise(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from jaxsearch.data.summaries import summarise_documents

    documents = _documents(options)
    summariser = _summariser(options, documents)
    with tqdm(total=len(documents), desc="summarising", unit="document", delay=0.5) as bar:
        report = summarise_documents(summariser, documents, options.output, progress=bar.update)
    print(
        f"{options.output}: {report.documents} documents, {report.made} of them summarised now, {report.resumed} by a run that was "
        f"interrupted, {report.dropped} dropped, {report.empty} without a summary"
    )
    if report.replaced:
        print(f"the summaries of another summariser ({report.replaced[:12]}) were replaced")


def _summariser(options: argparse.Namespace, documents: "Sequence[Document]") -> "Summariser":
    """What the options ask for."""
    from jaxsearch.compression.extractive import Extractive, Truncation
    from jaxsearch.data.tokenizer import Tokenizer
    from jaxsearch.models.contract import load_model
    from jaxsearch.scoring.summaries import make_summary_writer

    if options.model:
        return make_summary_writer(load_model(options.model))
    if not options.tokenizer:
        raise InputError(
            f"--method is {options.method}, --tokenizer is missing: give the model folder of the ranker that will read the summaries"
        )
    tokenizer = Tokenizer.load(options.tokenizer)
    if options.method == "truncate":
        return Truncation(tokenizer, options.tokens)
    return Extractive(tokenizer, options.tokens, documents)


def _batch(options: argparse.Namespace) -> None:
    from jaxsearch.serving.batch import rank_file
    from jaxsearch.serving.bundle import Bundle

    bundle = Bundle.open(options.bundle)
    bundle = bundle.with_utility(_utility(options, bundle.utility))
    report = rank_file(bundle, options.queries, options.output, depth=options.depth, top=options.top)
    print(
        f"{options.output}: {report.queries} queries, {report.resumed} of them from an earlier run, "
        f"{report.empty} without a result"
    )


def _label(options: argparse.Namespace) -> None:
    import jax

    from jaxsearch.data.datasets import load_dataset
    from jaxsearch.data.summaries import show_data
    from jaxsearch.measurement.gate import gate_of, require_agreement
    from jaxsearch.models.contract import load_model
    from jaxsearch.scoring.label import label
    from jaxsearch.serving.first_stage import FirstStage
    from jaxsearch.training.distributed import check_agreement, find_processes, start, wait_for_others

    start(find_processes())
    whole, model = load_dataset(options.dataset, options.data_dir or None), load_model(options.model)
    data = show_data(whole, options.summaries, model.contract.summariser)
    require_agreement(options.model, model, data, gate_of(model, options.minimum_kappa))
    if options.depth is not None and not options.retriever:
        raise InputError(f"--depth is {options.depth}: it needs --retriever")
    first = None
    if options.retriever:
        first = FirstStage(load_model(options.retriever), 30 if options.depth is None else options.depth)
    source = first.source if first else ""
    settings = {
        "model": model.hash,
        "dataset": data.name,
        "per_query": options.per_query,
        "source": source,
    }
    check_agreement(settings, data.fingerprint)
    pairs = first.pairs(whole) if first else ()  # retrieval reads the full text
    report = label(model, data, options.output, per_query=options.per_query, pairs=pairs, source=source)
    rate = report.pairs / max(report.seconds, 1e-9)
    who = f" by process {jax.process_index()} of {jax.process_count()}" if jax.process_count() > 1 else ""
    print(f"{report.store}: {report.pairs} pairs scored{who}, {rate:.0f} pairs/s", flush=True)
    wait_for_others("labelled")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, or 2 where the input cannot be used."""
    options = _parser().parse_args(argv)
    commands = {
        "build": _build,
        "batch": _batch,
        "calibrate": _calibrate,
        "encode": _encode,
        "label": _label,
        "summarise": _summarise,
    }
    return exit_status("serve.py", lambda: commands[options.command](options))


if __name__ == "__main__":
    sys.exit(main())
