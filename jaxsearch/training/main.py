"""Command line of the trainer: `--config configs/NAME.py[:variant] --workdir DIR [--field value ...]`."""

import argparse
import logging
import sys
from collections.abc import Sequence

from jaxsearch.config import ConfigError, load_config
from jaxsearch.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainer; returns 0, 1 for a bad step, 2 for input that cannot be used, 75 after SIGTERM (saved)."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train one stage. Every field of the configuration is an option; "
        "--config NAME --help lists them.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--config", help="configs/NAME.py[:variant]")
    parser.add_argument("--workdir", help="folder of the run; one that holds a checkpoint is resumed")
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this help, or a configuration's fields"
    )
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, in a job of several processes")
    parser.add_argument("--processes", help="how many there are; auto: as Cloud TPU, GKE or SLURM say")
    parser.add_argument("--process-id", type=int, help="number of this one")
    parser.add_argument(
        "--heartbeat",
        type=int,
        default=100,
        help="seconds without a sign of life after which a process counts as gone",
    )
    known, overrides = parser.parse_known_args(argv)
    if known.config is None:
        parser.print_help(sys.stdout if known.help else sys.stderr)
        return 0 if known.help else 2
    try:
        config = load_config(known.config, [*overrides, "--help"] if known.help else overrides)
        if known.workdir is None:
            raise ConfigError("--workdir is missing: name a folder for the run")
        # Only here: JAX takes seconds to load, a mistyped option should not.
        from jaxsearch.training.distributed import find_processes, start
        from jaxsearch.training.interruption import EXIT_PREEMPTED, Preempted
        from jaxsearch.training.loop import run

        start(find_processes(known.coordinator, known.processes, known.process_id), known.heartbeat)
        logger, handler = logging.getLogger("jaxsearch"), logging.StreamHandler()
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        # A library may have put a handler at the root: every line would stand twice.
        logger.propagate = False
        try:
            final = run(config, known.workdir)
        except Preempted as stopped:
            print(f"train.py: {stopped}", file=sys.stderr)
            return EXIT_PREEMPTED
        finally:
            logger.removeHandler(handler)
            logger.propagate = True
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    for name, value in final.items():
        print(f"{name} {value:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
