"""Command line of compression: `prune` a ranker or judge to a smaller one."""

import argparse
from collections.abc import Sequence

from jaxsearch.errors import exit_status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxsearch.compression", description=__doc__, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prune = commands.add_parser(
        "prune", allow_abbrev=False, help="remove neurons, groups of heads and whole layers; then fine-tune"
    )
    prune.add_argument("--model", required=True, help="model folder of a ranker or judge")
    prune.add_argument(
        "--dataset", required=True, help="calibrate on its training queries, such as job_market:tiny"
    )
    prune.add_argument(
        "--data-dir", default="", help="folder of prepared data (default: ~/tensorflow_datasets)"
    )
    prune.add_argument(
        "--queries", type=int, default=64, help="training queries to calibrate on (default 64)"
    )
    prune.add_argument("--candidates", type=int, default=16, help="documents of each, at most (default 16)")
    prune.add_argument(
        "--mlp", type=float, default=0.0, help="share of each layer's neurons that goes (default 0)"
    )
    prune.add_argument(
        "--heads", type=float, default=0.0, help="share of each layer's key/value heads that goes (default 0)"
    )
    prune.add_argument("--layers-drop", type=int, default=0, help="whole layers that go (default 0)")
    prune.add_argument(
        "--which",
        default="last",
        help="layers that go: the last, or those that change their input least (last or least, default last)",
    )
    prune.add_argument(
        "--method", default="osscar", help="osscar, random, magnitude or activation (default osscar)"
    )
    prune.add_argument("--refit", action="store_true", help="refit the kept weights of a baseline, too")
    prune.add_argument(
        "--damping", type=float, default=1e-3, help="share of the mean diagonal (default 0.001)"
    )
    prune.add_argument("--swaps", type=int, default=10, help="most rounds of local swaps (default 10)")
    prune.add_argument("--seed", type=int, default=0, help="of the method random (default 0)")
    prune.add_argument(
        "--mesh", type=int, nargs=3, metavar=("DATA", "FSDP", "TENSOR"), help="devices (default: one device)"
    )
    prune.add_argument(
        "--summaries",
        default="",
        help="store of `serve.py summarise` that the model reads in the place of text (default: the text)",
    )
    prune.add_argument("--output", required=True, help="model folder of the smaller model")
    return parser


def _prune(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from jaxsearch.compression import pruning
    from jaxsearch.compression.calibration import check_model
    from jaxsearch.config import MeshConfig
    from jaxsearch.data.datasets import load_dataset
    from jaxsearch.data.summaries import show_data
    from jaxsearch.models.contract import check_output, load_model
    from jaxsearch.training.sharding import make_mesh

    plan = pruning.Pruning(
        mlp=options.mlp,
        heads=options.heads,
        layers=options.layers_drop,
        which=options.which,
        method=options.method,
        refit=options.refit,
        damping=options.damping,
        swaps=options.swaps,
        seed=options.seed,
    )
    output = check_output(options.output, options.model)
    model = load_model(options.model)
    check_model(model)  # before minutes are spent on data
    before = model.contract.architecture
    plan.apply(before)
    mesh = make_mesh(MeshConfig(*options.mesh)) if options.mesh else None
    data = load_dataset(options.dataset, options.data_dir or None)
    data = show_data(data, options.summaries, model.contract.summariser)
    with tqdm(total=pruning.steps(before, plan), desc="pruning", unit="layer") as bar:
        pruned = pruning.prune_model(
            model,
            data,
            plan,
            queries=options.queries,
            candidates=options.candidates,
            mesh=mesh,
            progress=bar.update,
        )
    digest = pruning.save_pruned(output, pruned, model)
    after = pruned.contract.architecture
    for name in ("layers", "heads", "kv_heads", "mlp_width", "parameters"):
        print(f"{name}: {getattr(before, name):,} -> {getattr(after, name):,}")
    for name in ("heads_error", "mlp_error"):
        errors = [getattr(report, name) for report in pruned.layers]
        if any(errors):
            print(
                f"{name} by layer: {' '.join(f'{e:.4f}' for e in errors)}, mean {sum(errors) / len(errors):.4f}"
            )
    print(f"{options.output}: {digest}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, or 2 where the input cannot be used."""
    options = _parser().parse_args(argv)
    command = {"prune": _prune}[options.command]
    return exit_status("jaxsearch.compression", lambda: command(options))
