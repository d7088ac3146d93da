"""One of several processes that train the toy task: `python two_processes.py WORKDIR PORT COUNT INDEX DEVICES [BATCH_SIZE]`."""

import sys
from pathlib import Path

import jax
from toy_task import toy_config

from jaxsearch.config import ConfigError, MeshConfig
from jaxsearch.training.distributed import find_processes, start
from jaxsearch.training.loop import run


def main(folder: str, port: str, count: str, index: str, devices: str, batch_size: str = "8") -> int:
    """Train; 2 with the message for a `ConfigError`."""
    jax.config.update("jax_num_cpu_devices", int(devices))
    if count != "1":
        start(find_processes(f"localhost:{port}", count, int(index)))
    config = toy_config(mesh=MeshConfig(fsdp=-1), batch_size=int(batch_size), steps=4, log_every=1)
    try:
        run(config, Path(folder))
    except ConfigError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
