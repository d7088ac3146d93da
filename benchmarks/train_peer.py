"""One training step in PyTorch with transformers; called by benchmarks/train_throughput.py in an environment of its own.

    .venv-peers/bin/python benchmarks/train_peer.py --dtype float32 --folder HF --warm-up 3 --steps 5

`HF/batch.json` holds what train_throughput.py writes: tokens, labels, label ids and the optimiser's settings. With bfloat16 the parameters
and AdamW stay fp32 and the forward pass runs under autocast. Prints one JSON object: seconds of the timed steps, the losses of all
steps, the first gradient's norm. No JAX in here, no project code.
"""

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def make_optimizer(model: Any, values: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices but the embedding."""
    decayed, rest = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 and "embed" not in name else rest).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": values["weight_decay"]},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=values["learning_rate"], betas=(values["b1"], values["b2"]), eps=values["eps"], fused=True
    )


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--folder", required=True, help="Hugging Face folder, with batch.json")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=3)
    options = parser.parse_args()
    values = json.loads((Path(options.folder) / "batch.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(
        options.folder, dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    optimizer = make_optimizer(model, values)
    tokens, labels = torch.tensor(values["tokens"]), torch.tensor(values["labels"])
    ids = torch.tensor(values["label_ids"])
    half = (
        torch.autocast("cpu", dtype=torch.bfloat16)
        if options.dtype == "bfloat16"
        else contextlib.nullcontext()
    )
    seconds, losses, norms = [], [], []
    for _ in range(options.warm_up + options.steps):
        started = time.perf_counter()
        with half:
            hidden = model.model(tokens, use_cache=False).last_hidden_state[:, -1]
        logits = hidden.float() @ model.lm_head.weight[ids].T
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), values["clip_norm"])))
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss))
    answer = {"seconds": seconds[options.warm_up :], "losses": losses, "grad_norm": norms[0]}
    print("RESULT " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
