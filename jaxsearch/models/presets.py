"""The sizes this project speaks of by name."""

import dataclasses
from typing import Any

from jaxsearch.errors import InputError
from jaxsearch.models.decoder import DecoderConfig

_QWEN3: dict[str, Any] = {
    "vocab_size": 151_936, "head_dim": 128, "rope_theta": 1e6, "rms_eps": 1e-6, "qk_norm": True,
}  # fmt: skip

PRESETS: dict[str, DecoderConfig] = {
    # From scratch on a CPU. Head counts divide by 2 and 4, for tensor parallelism; the vocabulary size is
    # that of the data's own tokenizer. "full" took 191 ms of CPU time for a step of 64 x 48 tokens where
    # "none" took 254: at this width writing is dearer than computing.
    "tiny": DecoderConfig(
        vocab_size=4096, layers=3, width=128, heads=4, kv_heads=4, head_dim=32, mlp_width=384,
        rope_theta=1e4, rms_eps=1e-6, qk_norm=True, tied=True, remat="full",
    ),
    "tiny_student": DecoderConfig(
        vocab_size=4096, layers=3, width=64, heads=4, kv_heads=4, head_dim=16, mlp_width=192,
        rope_theta=1e4, rms_eps=1e-6, qk_norm=True, tied=True, remat="full",
    ),
    "smollm2_135m": DecoderConfig(
        vocab_size=49_152, layers=30, width=576, heads=9, kv_heads=3, head_dim=64, mlp_width=1536,
        rope_theta=1e5, rms_eps=1e-5, qk_norm=False, tied=True,
    ),
    "qwen3_0_6b": DecoderConfig(
        layers=28, width=1024, heads=16, kv_heads=8, mlp_width=3072, tied=True, **_QWEN3,
    ),
    "qwen3_1_7b": DecoderConfig(
        layers=28, width=2048, heads=16, kv_heads=8, mlp_width=6144, tied=True, **_QWEN3,
    ),
    "qwen3_8b": DecoderConfig(
        layers=36, width=4096, heads=32, kv_heads=8, mlp_width=12_288, tied=False, **_QWEN3,
    ),
}  # fmt: skip


def preset(name: str, **changes: Any) -> DecoderConfig:
    """The named config, with fields changed: `preset("tiny", vocab_size=2048)`.

    Raises:
        InputError: the name is unknown (the message lists the known), or a changed field is out of range.
        TypeError: a changed field does not exist.
    """
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown: use one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)
