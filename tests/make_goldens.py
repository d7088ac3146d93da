"""Make `tests/goldens/`: random small models with their hidden states and logits, as transformers computes them.

Run once, in an environment of its own that has torch (the project has not):

    python -m venv /tmp/torch && /tmp/torch/bin/pip install torch==2.13.0 transformers==5.23.0
    /tmp/torch/bin/python tests/make_goldens.py

Each folder is a Hugging Face folder with a `golden.npz`: tokens and where [B, T], hidden_states
[layers + 1, B, T, D] (the last one after the final norm) and logits [B, T, V]. Together they cover: both
families, tied and untied, theta, eps, head size and grouping other than the defaults, one file and a
sharded index, fp32 and bf16 storage, and both ways of writing the rotary base and the dtype.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

GOLDENS = Path(__file__).parent / "goldens"
COMMON = {"vocab_size": 61, "hidden_size": 24, "initializer_range": 0.25, "attn_implementation": "eager"}
MODELS = {
    "qwen3_untied": Qwen3Config(
        intermediate_size=40, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=10,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0}, rms_norm_eps=1e-3,
        tie_word_embeddings=False, **COMMON,
    ),
    "qwen3_tied_sharded_bf16": Qwen3Config(
        intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 77.0}, rms_norm_eps=1e-5,
        tie_word_embeddings=True, **COMMON,
    ),
    "llama_untied": LlamaConfig(
        intermediate_size=36, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=14,
        rope_parameters={"rope_type": "default", "rope_theta": 250000.0}, rms_norm_eps=1e-2,
        tie_word_embeddings=False, **COMMON,
    ),
    "llama_tied_old_config": LlamaConfig(
        intermediate_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-4,
        tie_word_embeddings=True, **COMMON,
    ),
}  # fmt: skip


def make(name: str, config: Qwen3Config | LlamaConfig) -> None:
    """Write one folder."""
    torch.manual_seed(len(name))
    kind = Qwen3ForCausalLM if config.model_type == "qwen3" else LlamaForCausalLM
    model = kind(config)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("norm.weight"):
                value += 0.3 * torch.randn_like(value)
    if name.endswith("bf16"):
        model = model.to(torch.bfloat16)
    folder = GOLDENS / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size="20KB" if "sharded" in name else "5GB")
    if name.endswith("old_config"):
        write_old_config(folder / "config.json")
    (folder / "generation_config.json").unlink(missing_ok=True)
    # What was stored, computed in fp32 (casting the model back would keep a rotary base rounded to bf16).
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    random = np.random.default_rng(0)
    tokens = random.integers(0, config.vocab_size, (2, 9))
    where = np.arange(9)[None] < np.array([[9], [6]])
    with torch.no_grad():
        out = model(
            torch.tensor(tokens), attention_mask=torch.tensor(where.astype(int)), output_hidden_states=True
        )
    np.savez(
        folder / "golden.npz",
        tokens=tokens.astype(np.int32),
        where=where,
        hidden_states=torch.stack(out.hidden_states).numpy(),
        logits=out.logits.numpy(),
    )


def write_old_config(path: Path) -> None:
    """As transformers 4 wrote it: `rope_theta` at the top, `torch_dtype`, no head_dim."""
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype")
    del config["head_dim"]
    path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    for model_name, model_config in MODELS.items():
        make(model_name, model_config)
