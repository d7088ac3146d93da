"""Qwen3-0.6B's scoring function compiled for one chip of v5e, v6e and v5p, on a machine without one.

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python benchmarks/scoring_tpu.py --jsonl benchmarks/results/scoring_tpu.jsonl

Needs `pip install "jax[tpu]==0.10.2"`, best in an environment of its own. Per workload and chip: FLOPs of the model
(linear layers and causal attention, no padding), bytes that must move (weights once, and per layer the residual stream,
keys and values), memory of the compiled program against the chip's, and the bound in items/s/chip that follows from the
chip's peak rates (`jaxsearch/training/chips.py`): whichever takes longer, compute or bandwidth. A bound, not a forecast: no
program reaches the peak rates. Weights and activations are bf16; items are packed in rows of about 128 tokens or one per
row; the Pallas kernel computes the attention.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from record import append
from workloads import WORKLOADS, Workload, flops

from jaxsearch.models.attention import BACKENDS
from jaxsearch.models.decoder import DecoderConfig
from jaxsearch.models.presets import preset
from jaxsearch.models.scorer import Scorer
from jaxsearch.scoring.packing import PackedItems
from jaxsearch.scoring.prefill import Prefix, score_at_once
from jaxsearch.training.chips import find_chip

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
"""Of each chip the smallest slice; one of its devices is compiled for."""


def arrays(w: Workload, width: int, sharding: Any) -> tuple[Any, Any, PackedItems]:
    """Abstract inputs of one call: one query with all its items."""
    per_row = max(1, 128 // w.tokens)
    rows, length = -(-w.items // per_row), per_row * w.tokens

    def spec(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    places = spec((1, rows, length), jnp.int32)
    items = PackedItems(
        tokens=places,
        segments=places,
        offsets=places,
        last=spec((1, w.items, 2), jnp.int32),
        where=spec((1, w.items), bool),
        embeddings=spec((1, w.items * w.embeddings, width), jnp.bfloat16) if w.embeddings else None,
        embedded=places if w.embeddings else None,
    )
    return spec((1, w.prefix), jnp.int32), spec((1, w.prefix), bool), items


def moved(c: DecoderConfig, w: Workload) -> float:
    """Bytes that have to move in bf16: weights once; per token and layer residual stream, keys and values, in and out."""
    weights = c.parameters - c.vocab_size * c.width
    tokens = w.prefix + w.items * w.tokens
    per_token = c.layers * (2 * c.width + 4 * c.kv_heads * c.head_dim)
    return 2 * (weights + tokens * (per_token + c.width))


def compile_for(topology: str, c: DecoderConfig, w: Workload, backend: str) -> dict[str, float]:
    """The figures of one workload on one chip."""
    chip = find_chip(topology)
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    scorer = nnx.eval_shape(lambda: Scorer(c, label_ids=(9454, 2753), actions=0, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(scorer)
    # Matrices are served in bf16; norms and the label rows are computed in fp32 from them.
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=sharding), state)

    def run(state: Any, tokens: Any, where: Any, items: PackedItems) -> jax.Array:
        alone = items.tokens.shape[1] == w.items
        return score_at_once(
            nnx.merge(graphdef, state), Prefix(tokens, where), items, alone=alone, backend=backend
        )

    program = jax.jit(run).lower(state, *arrays(w, c.width, sharding)).compile()
    memory = program.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    work, traffic = flops(c, w, w.items, prefixes=1), moved(c, w)
    compute, bandwidth = work / chip.flops, traffic / chip.hbm_bandwidth
    return {
        "flops": work,
        "bytes": traffic,
        "memory_bytes": peak,
        "fits": bool(peak < chip.hbm_bytes),
        "bound": "compute" if compute >= bandwidth else "bandwidth",
        "bound_items_per_s": w.items / max(compute, bandwidth),
        "bound_ms": 1e3 * max(compute, bandwidth),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--preset", default="qwen3_0_6b")
    parser.add_argument("--backend", choices=BACKENDS, default="pallas")
    parser.add_argument("--jsonl", type=Path, help="append the results to this file")
    options = parser.parse_args()
    c = preset(options.preset, compute_dtype="bfloat16")
    rows = []
    for name in options.workloads:
        for chip in options.chips:
            found = compile_for(TOPOLOGIES[chip], c, WORKLOADS[name], options.backend)
            rows.append(
                {"workload": name, "chip": chip, "model": options.preset, "backend": options.backend, **found}
            )
            print(
                f"{name:12s} {chip}  {found['flops'] / 1e12:7.2f} TFLOP  {found['bytes'] / 1e9:6.2f} GB moved  "
                f"{found['memory_bytes'] / 1e9:6.2f} GB held  {found['bound_items_per_s']:10.0f} items/s ({found['bound']})",
                flush=True,
            )
    common = {"command": " ".join(["python", *sys.argv]), "jax": jax.__version__, "numpy": np.__version__}
    append(options.jsonl, [row | common for row in rows])


if __name__ == "__main__":
    main()
