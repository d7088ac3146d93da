"""What stands on a decoder: label rows and action heads, and the two towers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_market import STUDENT, fast_compilation, filled

from jaxsearch.errors import InputError
from jaxsearch.models.attention import Causal
from jaxsearch.models.decoder import DecoderConfig
from jaxsearch.models.scorer import BiEncoder, Scorer

UNTIED = dataclasses.replace(STUDENT, tied=False)


def scorer_of(config: DecoderConfig, label_ids: list[int], actions: int) -> Scorer:
    return filled(lambda rngs: Scorer(config, label_ids=label_ids, actions=actions, rngs=rngs), 0)


@pytest.mark.parametrize("config", [STUDENT, UNTIED])
def test_the_label_matrix_is_rows_of_the_output_then_the_heads(config: DecoderConfig) -> None:
    scorer = scorer_of(config, [7, 3], 2)
    decoder = scorer.decoder
    output = decoder.embedding if config.tied else decoder.unembedding
    assert output is not None
    matrix = scorer.label_matrix()
    assert matrix.shape == (4, config.width)
    assert matrix.dtype == jnp.float32
    np.testing.assert_array_equal(matrix[:2], output[...][jnp.array([7, 3])])
    np.testing.assert_array_equal(matrix[2:], scorer.action_head[...])
    assert scorer.action_head.get_metadata()["axes"] == ("actions", "embed")


def test_labels_or_actions_alone() -> None:
    labels = scorer_of(STUDENT, [1, 2, 3], 0)
    assert labels.label_matrix().shape == (3, STUDENT.width)
    assert not hasattr(labels, "action_head")
    heads = scorer_of(STUDENT, [], 5)
    assert heads.label_matrix().shape == (5, STUDENT.width)
    # A decoder alone has no parameter beyond its own.
    base = scorer_of(STUDENT, [], 0)
    assert sum(x.size for x in jax.tree.leaves(nnx.state(base, nnx.Param))) == STUDENT.parameters


def test_a_label_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="ids contains 300"):
        scorer_of(STUDENT, [300], 0).label_matrix()


def test_gradients_reach_label_rows_and_heads() -> None:
    scorer = scorer_of(STUDENT, [7], 1)
    gradient = nnx.grad(lambda s: jnp.sum(s.label_matrix()))(scorer)
    rows = np.asarray(gradient.decoder.embedding[...])
    assert rows[7].tolist() == [1.0] * STUDENT.width
    assert np.abs(rows).sum() == STUDENT.width
    assert gradient.action_head[...].tolist() == [[1.0] * STUDENT.width]


def test_an_embedding_is_the_last_tokens_hidden_state_of_length_one() -> None:
    with fast_compilation():
        encoder = filled(lambda rngs: BiEncoder(STUDENT, rngs=rngs), 1)
        tokens = np.random.default_rng(0).integers(0, 300, (3, 6)).astype(np.int32)
        lengths = np.array([6, 1, 4])
        where = np.arange(6)[None] < lengths[:, None]
        found = np.asarray(jax.jit(lambda t, w: encoder(t, w))(jnp.asarray(tokens), jnp.asarray(where)))
        # Whatever stands in the padding, and however much of it there is.
        wild = np.pad(np.where(where, tokens, 299), ((0, 0), (0, 5)))
        more = np.asarray(
            jax.jit(lambda t, w: encoder(t, w))(
                jnp.asarray(wild), jnp.asarray(np.pad(where, ((0, 0), (0, 5))))
            )
        )
        alone = []
        for row, length in zip(tokens, lengths, strict=True):
            text = jnp.asarray(row[None, :length])
            mask = Causal(jnp.ones(text.shape, bool))
            hidden, _ = encoder.decoder(encoder.decoder.embed(text), jnp.arange(length)[None], mask)
            alone.append(np.asarray(hidden)[0, -1] / np.linalg.norm(hidden[0, -1]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found, np.stack(alone), atol=1e-5)
    np.testing.assert_allclose(more, found, atol=1e-5)
    assert np.abs(found[0] - found[2]).max() > 0.01
