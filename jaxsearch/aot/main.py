"""Command line of the compile check."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from jaxsearch.config import load_config
from jaxsearch.errors import InputError

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no chip that two compilers could fight for
}


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and print; returns 0 where it fits, 1 where it does not, 2 where it cannot be compiled."""
    parser = argparse.ArgumentParser(
        prog="compile_check.py",
        description="Does a configuration fit on a TPU slice, and what bounds its speed? Needs no TPU, no data and no weights. "
        "Other options are fields of the configuration, as in train.py (--batch-size 64 --accumulation 8 --mesh.tensor 2 ...).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--topology", required=True, help="v4, v5e, v5p or v6e and the shape of the slice: v5e:4x4"
    )
    parser.add_argument("--config", required=True, help="configs/NAME.py[:variant]")
    parser.add_argument("--scoring", action="store_true", help="the scoring call instead of the train step")
    parser.add_argument("--json", action="store_true", help="print JSON")
    known, overrides = parser.parse_known_args(argv)
    try:
        config = load_config(known.config, overrides)
        # Before JAX is loaded: the compiler then asks no cloud for the machine that it is on, and no device is looked for.
        for variable, value in _ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        from jaxsearch.aot.check import check, write

        report = check(config, known.topology, scoring=known.scoring)
    except InputError as error:
        print(f"compile_check.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(report)) if known.json else write(report))
    return 0 if report.fits else 1
