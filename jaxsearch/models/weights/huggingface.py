"""Hugging Face folders of the Qwen3 and Llama families, in and out (safetensors only)."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxsearch.errors import InputError
from jaxsearch.models.decoder import Decoder, DecoderConfig
from jaxsearch.models.weights import Slot, assemble, check, slots, tensors

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FAMILIES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
OUTER = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "unembedding": "lm_head.weight",
}
INNER = {
    name: f"model.layers.{{layer}}.{part}.weight"
    for name, part in {
        "attention_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }.items()
}
# Fields that change what the model computes, and the only values that this decoder computes.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, False),
    "rope_interleaved": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
}
COMPUTE_DTYPES = {None: "float32", "float32": "float32", "float16": "float32", "bfloat16": "bfloat16"}


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face `config.json` describes.

    Reads the layouts of transformers 4 (`rope_theta`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`). A
    checkpoint of bfloat16 computes in bfloat16, any other in float32.

    Raises:
        InputError: a field is missing, contradicts another, or asks for what this decoder does not compute.
    """
    family = _field(config, "model_type")
    if family not in FAMILIES:
        raise InputError(f"config.model_type is {family!r}: use one of {', '.join(FAMILIES)}")
    _field(config, "hidden_act")
    for name, allowed in ONLY.items():
        if config.get(name) not in allowed:
            raise InputError(f"config.{name} is {config[name]!r}: this decoder supports {allowed[-1]!r} only")
    if config.get("sliding_window") is not None and config.get("use_sliding_window") is not False:
        raise InputError(
            f"config.sliding_window is {config['sliding_window']!r}: only full attention is supported"
        )
    for kind in config.get("layer_types") or ():
        if kind != "full_attention":
            raise InputError(f"config.layer_types contains {kind!r}: only full_attention is supported")
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype not in COMPUTE_DTYPES:
        raise InputError(f"config.dtype is {dtype!r}: use one of {', '.join(filter(None, COMPUTE_DTYPES))}")
    width, heads = _field(config, "hidden_size"), _field(config, "num_attention_heads")
    # Llama without head_dim divides its width; Qwen3 never does, so that there the field must be given.
    head_dim = config.get("head_dim") if family == "llama" else _field(config, "head_dim")
    if head_dim is None and width % heads:
        raise InputError(f"config.num_attention_heads is {heads}: it does not divide hidden_size ({width})")
    return DecoderConfig(
        vocab_size=_field(config, "vocab_size"),
        layers=_field(config, "num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=_field(config, "num_key_value_heads"),
        head_dim=width // heads if head_dim is None else head_dim,
        mlp_width=_field(config, "intermediate_size"),
        rope_theta=_rope_theta(config),
        rms_eps=_field(config, "rms_norm_eps"),
        qk_norm=family == "qwen3",
        tied=_field(config, "tie_word_embeddings"),
        compute_dtype=COMPUTE_DTYPES[dtype],
    )


def _field(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise InputError(f"config.{name} is missing: add the value that the checkpoint was trained with")
    return config[name]


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The rotary base, from wherever the config has it; any rotary embedding but the plain one is refused."""
    thetas = [config["rope_theta"]] if config.get("rope_theta") is not None else []
    for name in ("rope_parameters", "rope_scaling"):
        rope = dict(config.get(name) or {})
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        if kind != "default":
            raise InputError(
                f"config.{name}.rope_type is {kind!r}: rope scaling is not supported, only 'default'"
            )
        if (theta := rope.pop("rope_theta", None)) is not None:
            thetas.append(theta)
        if rope.pop("partial_rotary_factor", 1.0) != 1.0 or rope:
            raise InputError(
                f"config.{name} is {config[name]!r}: only rope_theta and rope_type 'default' are supported"
            )
    if not thetas:
        raise InputError("config.rope_theta is missing: give it there or as rope_parameters.rope_theta")
    if len(set(thetas)) > 1:
        raise InputError(
            f"config.rope_theta is {thetas[0]}, but rope_parameters says {thetas[1]}: give one value"
        )
    return float(thetas[0])


def load_decoder(folder: str | os.PathLike[str], *, compute_dtype: str | None = None) -> Decoder:
    """The decoder of a Hugging Face folder (`config.json` and one `model.safetensors`, or several with an
    index).

    Args:
        folder: where the files are.
        compute_dtype: "float32" or "bfloat16"; None: as the checkpoint says. Parameters are held in fp32
          either way.

    Raises:
        InputError: a file or tensor is missing, unknown, damaged or of a wrong shape, or `config_from_hf`
          refuses.
    """
    folder = Path(folder)
    fields = _json(folder / CONFIG_FILE)
    config = config_from_hf(fields | ({"dtype": compute_dtype} if compute_dtype else {}))
    expected = slots(config, OUTER, INNER)
    with ExitStack() as stack:
        where = _open(folder, stack)
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in where.items()}
        head, tied_to = OUTER["unembedding"], OUTER["embedding"]
        # Some tied checkpoints store the output matrix a second time.
        doubled = config.tied and head in shapes and tied_to in shapes
        extra = {head: Slot("unembedding", None, expected[tied_to].shape)} if doubled else {}
        check(folder, expected | extra, shapes)
        if doubled and not np.array_equal(_read(where, head), _read(where, tied_to)):
            raise InputError(
                f"{folder}: tensor {head} differs from {tied_to}, but config.tie_word_embeddings is true"
            )
        return assemble(config, expected, lambda name: _read(where, name))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a Hugging Face folder with {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}: it must hold an object")
    return value


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> the opened file that holds it."""
    if (folder / WEIGHTS_FILE).is_file():
        file = _enter(folder / WEIGHTS_FILE, stack)
        return dict.fromkeys(file.keys(), file)
    index = folder / INDEX_FILE
    if not index.is_file():
        raise InputError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}: only safetensors are read")
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: weight_map must say the file of each tensor")
    files = {}
    for name in sorted(set(weight_map.values())):
        if name in (".", "..") or "/" in name or "\\" in name:
            raise InputError(f"{index}: weight_map names the file {name!r}, which lies outside of the folder")
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} does not exist, but {INDEX_FILE} names it: download it")
        files[name] = _enter(folder / name, stack)
    stored = {(tensor, name) for name, file in files.items() for tensor in file.keys()}  # noqa: SIM118
    for tensor, name in sorted(stored ^ set(weight_map.items())):
        problem = "but is not in weight_map" if (tensor, name) in stored else "but the file lacks it"
        raise InputError(f"{index}: tensor {tensor} belongs to {name}, {problem}")
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _enter(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="numpy"))
    except SafetensorError as error:
        raise InputError(f"{path} is damaged: {error}") from error


def _read(where: Mapping[str, Any], name: str) -> np.ndarray:
    kind = where[name].get_slice(name).get_dtype()
    if kind not in ("F32", "F16", "BF16"):
        raise InputError(f"tensor {name} has dtype {kind}: only F32, F16 and BF16 are supported")
    return where[name].get_tensor(name).astype(np.float32)


def config_to_hf(
    config: DecoderConfig, *, family: Literal["auto", "qwen3", "llama"] = "auto"
) -> dict[str, Any]:
    """The `config.json` that describes this decoder to transformers 4 and 5.

    Raises:
        InputError: the family cannot express this decoder.
    """
    name = ("qwen3" if config.qk_norm else "llama") if family == "auto" else family
    if name not in FAMILIES:
        raise InputError(f"family is {family!r}: use auto, {', '.join(FAMILIES)}")
    if (name == "qwen3") != config.qk_norm:
        raise InputError(f"family is {family!r}, but the decoder's qk_norm is {config.qk_norm}: use 'auto'")
    if name == "llama" and config.width % config.heads:
        raise InputError(
            f"heads is {config.heads}: transformers' Llama needs a divisor of width ({config.width})"
        )
    own = {"use_sliding_window": False, "sliding_window": None} if name == "qwen3" else {"mlp_bias": False}
    return {
        "architectures": [FAMILIES[name]],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": 32_768,
        "dtype": "float32",
        "torch_dtype": "float32",
    } | own


def save_decoder(
    decoder: Decoder,
    folder: str | os.PathLike[str],
    *,
    family: Literal["auto", "qwen3", "llama"] = "auto",
    tokenizer_files: Sequence[str | os.PathLike[str]] = (),
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that transformers loads: fp32 weights, bit for bit, and the config last.

    Args:
        decoder: what to write.
        folder: made if it does not exist; files of the same names are replaced.
        family: "qwen3" or "llama"; "auto" takes the one that fits.
        tokenizer_files: copied into the folder under their names.
        extra: more fields for `config.json`, such as `eos_token_id` or `max_position_embeddings` (32,768
          otherwise).

    Raises:
        InputError: the family does not fit, `extra` contradicts the decoder, or a tokenizer file does not
          fit.
    """
    config = config_to_hf(decoder.config, family=family)
    for name in (extra or {}).keys() & (config.keys() - {"max_position_embeddings"}):
        raise InputError(f"extra contains {name!r}: the decoder itself decides that field")
    for file in map(Path, tokenizer_files):
        if not file.is_file() or file.name in (CONFIG_FILE, WEIGHTS_FILE):
            raise InputError(f"tokenizer_files contains {str(file)!r}: give existing tokenizer files")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in map(Path, tokenizer_files):
        shutil.copyfile(file, folder / f"{file.name}.tmp")
        os.replace(folder / f"{file.name}.tmp", folder / file.name)
    weights = dict(tensors(decoder, slots(decoder.config, OUTER, INNER)))
    save_file(weights, folder / f"{WEIGHTS_FILE}.tmp", metadata={"format": "pt"})
    os.replace(folder / f"{WEIGHTS_FILE}.tmp", folder / WEIGHTS_FILE)
    text = json.dumps(config | dict(extra or {}), indent=2) + "\n"
    (folder / f"{CONFIG_FILE}.tmp").write_text(text, encoding="utf-8")
    os.replace(folder / f"{CONFIG_FILE}.tmp", folder / CONFIG_FILE)
