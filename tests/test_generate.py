"""Generation: equal to forwarding the whole text again for each token, and honest sampling."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsearch.models.attention import Causal
from jaxsearch.models.decoder import Decoder, DecoderConfig
from jaxsearch.models.generate import generate, sample

CONFIG = DecoderConfig(
    vocab_size=23, layers=2, width=16, heads=4, kv_heads=2, head_dim=8, mlp_width=24,
    rope_theta=1e3, rms_eps=1e-5, qk_norm=True, tied=False,
)  # fmt: skip
PROMPTS = [[5, 1, 9], [2], [7, 7, 3, 11, 20]]
LENGTHS = [len(p) for p in PROMPTS]
# Padding on the right is arbitrary, even outside the vocabulary.
TOKENS = np.array([p + [999] * (5 - len(p)) for p in PROMPTS])
MORE = 8


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    decoder = nnx.jit(lambda: Decoder(CONFIG, rngs=nnx.Rngs(3)))()
    decoder.unembedding[...] = 4 * decoder.unembedding[...]  # livelier texts
    return decoder


@pytest.fixture(scope="module")
def naive(decoder) -> list[list[int]]:
    """The greedy texts, each token from forwarding the whole text again (in one fixed shape)."""

    @nnx.jit
    def following(decoder, tokens, length):
        positions = jnp.arange(16)
        hidden, _ = decoder(decoder.embed(tokens), positions, Causal(positions < length))
        return jnp.argmax(decoder.logits(hidden[length - 1]))

    texts = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(MORE):
            text.append(int(following(decoder, np.array(text + [0] * (16 - len(text))), len(text))))
        texts.append(text[len(prompt) :])
    return texts


def test_greedy_equals_naive_forwarding(decoder, naive):
    tokens, counts = generate(decoder, TOKENS, LENGTHS, max_new_tokens=MORE, eos_id=None)
    assert tokens.tolist() == naive
    assert counts.tolist() == [MORE] * 3
    assert len({token for text in naive for token in text}) > 4  # not one token over and over


def test_stops_at_an_end_token_and_counts_it(decoder, naive):
    ends = [naive[0][2], naive[2][4]]
    tokens, counts = generate(decoder, TOKENS, LENGTHS, max_new_tokens=MORE, eos_id=ends)
    for text, out, count in zip(naive, tokens.tolist(), counts.tolist(), strict=True):
        expected = next((i + 1 for i, token in enumerate(text) if token in ends), MORE)
        assert count == expected
        assert out == text[:count] + [0] * (MORE - count)
    assert counts[0] <= 3


def test_a_batch_changes_no_text(decoder, naive):
    tokens, _ = generate(decoder, np.array([PROMPTS[1]]), [1], max_new_tokens=MORE, eos_id=None)
    assert tokens[0].tolist() == naive[1]


def test_a_text_begins_as_it_must(decoder, naive):
    likeliest = [text[0] for text in naive]
    others = [i for i in range(23) if i not in likeliest]
    out, _ = generate(decoder, TOKENS, LENGTHS, max_new_tokens=MORE, eos_id=None, first_ids=others[:4])
    assert set(np.asarray(out)[:, 0].tolist()) <= set(others[:4])
    assert not set(np.asarray(out)[:, 1:].ravel().tolist()) <= set(others[:4])  # the rest is free
    same, _ = generate(decoder, TOKENS, LENGTHS, max_new_tokens=MORE, eos_id=None, first_ids=likeliest)
    np.testing.assert_array_equal(same, naive)


def test_one_new_token(decoder, naive):
    tokens, counts = generate(decoder, TOKENS, LENGTHS, max_new_tokens=1, eos_id=0)
    assert tokens[:, 0].tolist() == [text[0] for text in naive]
    assert counts.tolist() == [1, 1, 1]


def test_sampling_within_one_token_is_greedy_and_a_key_repeats(decoder, naive):
    options = {"max_new_tokens": MORE, "eos_id": None, "temperature": 1.5}
    only, _ = generate(decoder, TOKENS, LENGTHS, top_k=1, key=jax.random.key(0), **options)
    assert only.tolist() == naive
    one, two, three = (
        generate(decoder, TOKENS, LENGTHS, key=jax.random.key(seed), **options)[0].tolist()
        for seed in (1, 1, 2)
    )
    assert one == two != three


LOGITS = np.log(np.array([0.5, 0.05, 0.3, 0.15], np.float32))


def shares(temperature=1.0, **options) -> np.ndarray:
    draw = jax.jit(lambda logits, key: sample(logits, key, jnp.float32(temperature), **options))
    drawn = draw(np.tile(LOGITS, (20_000, 1)), jax.random.key(7))
    return np.bincount(drawn, minlength=4) / 20_000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.05, 0.3, 0.15]),
        ({"temperature": 0.5}, np.array([0.25, 0.0025, 0.09, 0.0225]) / 0.365),
        ({"top_k": 2}, [0.625, 0, 0.375, 0]),
        ({"top_p": 0.79}, [0.625, 0, 0.375, 0]),
        ({"top_p": 0.81}, np.array([0.5, 0, 0.3, 0.15]) / 0.95),
        ({"top_p": 1e-6}, [1, 0, 0, 0]),
        ({"top_p": 1.0}, [0.5, 0.05, 0.3, 0.15]),
        # top_k first: of the three left, 0.526 and 0.316 pass 0.8.
        ({"top_k": 3, "top_p": 0.8}, [0.625, 0, 0.375, 0]),
    ],
)
def test_sampled_shares(options, expected):
    # Five standard deviations of a share of 20,000 draws.
    np.testing.assert_allclose(shares(**options), expected, atol=0.018)
    np.testing.assert_array_equal(shares(**options)[np.asarray(expected) == 0], 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("top_k", 0),
        ("top_k", 24), ("top_p", 0.0), ("top_p", 1.5), ("first_ids", []), ("first_ids", [23]),
    ],
)  # fmt: skip
def test_bad_options_are_refused_by_name(decoder, name, value):
    options = {"max_new_tokens": 2, "eos_id": 0, "key": jax.random.key(0)} | {name: value}
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value}")):
        generate(decoder, TOKENS, LENGTHS, **options)


def test_bad_prompts_are_refused(decoder):
    with pytest.raises(ValueError, match="lengths is"):
        generate(decoder, TOKENS, [3, 0, 5], max_new_tokens=2, eos_id=0)
    with pytest.raises(ValueError, match=r"tokens has shape \(5,\)"):
        generate(decoder, TOKENS[0], [3], max_new_tokens=2, eos_id=0)
    with pytest.raises(ValueError, match="key is None"):
        generate(decoder, TOKENS, LENGTHS, max_new_tokens=2, eos_id=0, temperature=1.0)
