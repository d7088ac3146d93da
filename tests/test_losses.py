import doctest
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsearch import losses

A = 3
WEIGHTS = (1.0, 0.5, 2.0)


def cross(targets):
    """KL(targets || softmax(0)) by hand for the two-class case."""
    return sum(p * math.log(p / 0.5) for p in targets if p)


# Every loss as a function of (x, where): x is differentiated, where masks along the axis of the items.
# x [B=2, L=4, ...] and where [2, 4].
GRADES = jnp.array([[4.0, 0.0, 2.0, 1.0], [3.0, 3.0, 0.0, 1.0]])
SOFT = GRADES / 4
ACTIONS = jnp.stack([SOFT, 1 - SOFT, SOFT > 0.5], axis=-1)
CASES = {
    "masked_mean": ((), lambda x, where: losses.masked_mean(x, where=where)),
    "soft_label_kl": (
        (2,),
        lambda x, where: losses.soft_label_kl(x, jnp.stack([1 - SOFT, SOFT], -1), where=where),
    ),
    "binary_kl": ((), lambda x, where: losses.binary_kl(x, SOFT, where=where)),
    "binary_kl_softened": ((), lambda x, where: losses.binary_kl(x, SOFT, where=where, temperature=3.0)),
    "softmax_listwise": ((), lambda x, where: losses.softmax_listwise(x, GRADES, where=where)),
    "listwise_kl": ((), lambda x, where: losses.listwise_kl(x, GRADES, where=where)),
    "listwise_kl_sharp": ((), lambda x, where: losses.listwise_kl(x, GRADES, where=where, temperature=0.5)),
    "pairwise_logistic": ((), lambda x, where: losses.pairwise_logistic(x, GRADES, where=where)),
    "pairwise_margin": ((), lambda x, where: losses.pairwise_margin(x, -x, margin=1.0, where=where)),
    "token_cross_entropy": (
        (5,),
        lambda x, where: losses.token_cross_entropy(x, GRADES.astype(jnp.int32), where=where),
    ),
    "action_loss": (
        (A,),
        lambda x, where: losses.action_loss(
            x, ACTIONS, where=jnp.broadcast_to(where[..., None], x.shape), task_weights=WEIGHTS
        ),
    ),
    "distillation": (
        (A,),
        lambda x, where: losses.distillation(
            x[..., 0],
            SOFT,
            x,
            ACTIONS,
            alpha=0.3,
            task_weights=WEIGHTS,
            where_rel=where,
            where_eng=jnp.broadcast_to(where[..., None], x.shape),
        ),
    ),
    "clipped_policy": (
        (),
        lambda x, where: losses.clipped_policy(x, SOFT, jnp.array([1.0, -2.0]), where=where, clip=0.2),
    ),
    "reference_kl": ((), lambda x, where: losses.reference_kl(x, SOFT, where=where)),
    "info_nce": (
        (6,),
        lambda x, where: losses.info_nce(
            x[:, 0], x[0] + x[1], jnp.array([0, 2]), temperature=0.1, where=where
        ),
    ),
}
MASK = jnp.array([[True, True, True, False], [True, False, True, True]])


@functools.cache
def graded(name):
    """The case's (loss, gradient) function, compiled once."""
    return jax.jit(jax.value_and_grad(CASES[name][1]))


def inputs(name, scale=1.0):
    return scale * np.random.default_rng(0).standard_normal((2, 4, *CASES[name][0])).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_everything_masked_gives_zero_and_zero_gradient(name):
    x = inputs(name, scale=1e4)
    x[0, 0], x[1, 1] = np.nan, np.inf
    value, gradient = graded(name)(x, np.zeros((2, 4), bool))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros(x.shape))


@pytest.mark.parametrize("name", CASES)
def test_extreme_inputs_stay_finite(name):
    x = inputs(name)
    for extreme in (1e4 * np.sign(x), 1e4 * np.ones_like(x), -1e4 * np.ones_like(x), np.zeros_like(x)):
        value, gradient = graded(name)(extreme, MASK)
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", [n for n in CASES if n != "info_nce"])
@pytest.mark.parametrize("junk", [0.0, 1e9, jnp.nan, jnp.inf, -jnp.inf])
def test_padding_changes_neither_value_nor_gradient(name, junk):
    x = inputs(name)
    clean = graded(name)(x, MASK)
    x[0, 3] = x[1, 1] = junk
    value, gradient = graded(name)(x, MASK)
    assert clean[0] == value
    assert value != 0
    np.testing.assert_array_equal(gradient, clean[1])


@pytest.mark.parametrize("name", [n for n in CASES if n != "info_nce"])
def test_nan_that_counts_is_not_hidden(name):
    x = inputs(name)
    x[0, 0] = np.nan
    assert np.isnan(graded(name)(x, MASK)[0])


@pytest.mark.parametrize("name", CASES)
def test_half_precision_inputs_give_fp32(name):
    x = jax.ShapeDtypeStruct((2, 4, *CASES[name][0]), jnp.bfloat16)
    assert jax.eval_shape(CASES[name][1], x, MASK).dtype == jnp.float32


def per_example(name):
    """The unreduced loss of each case that has one, over x [L, ...] or [B, L, ...]."""
    t = jnp.array([0.2, 0.9, 0.0, 1.0])
    w = jnp.array([True, True, False, True])

    def spread(value, x, tail=()):
        return jnp.broadcast_to(value.reshape(value.shape + (1,) * len(tail)), x.shape)

    return {
        "soft_label_kl": lambda x: losses.soft_label_kl(
            x,
            jnp.broadcast_to(jnp.stack([t, 1 - t], -1), x.shape),
            where=jnp.broadcast_to(w, x.shape[:-1]),
            reduction="none",
        ),
        "binary_kl": lambda x: losses.binary_kl(x, spread(t, x), where=spread(w, x), reduction="none"),
        "softmax_listwise": lambda x: losses.softmax_listwise(
            x, spread(t, x), where=spread(w, x), reduction="none"
        ),
        "listwise_kl": lambda x: losses.listwise_kl(x, spread(t, x), where=spread(w, x), reduction="none"),
        "pairwise_logistic": lambda x: losses.pairwise_logistic(
            x, spread(t, x), where=spread(w, x), reduction="none"
        ),
        "pairwise_margin": lambda x: losses.pairwise_margin(
            x, -x, margin=0.5, where=spread(w, x), reduction="none"
        ),
        "action_loss": lambda x: losses.action_loss(
            x, spread(t, x, (1,)), where=spread(w, x, (1,)), task_weights=WEIGHTS, reduction="none"
        ),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "soft_label_kl",
        "binary_kl",
        "softmax_listwise",
        "listwise_kl",
        "pairwise_logistic",
        "pairwise_margin",
        "action_loss",
    ],
)
def test_vmap_equals_the_batch(name):
    tail = {"soft_label_kl": (2,), "action_loss": (A,)}.get(name, ())
    x = np.random.default_rng(1).standard_normal((5, 4, *tail), np.float32)
    loss = per_example(name)
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(x), jax.jit(loss)(x), rtol=1e-6)


def test_vmap_of_info_nce_tokens_and_distillation():
    x = np.random.default_rng(2).standard_normal((3, 2, 4, 5), np.float32)
    where = jnp.ones((2, 4), bool)

    def tokens(x):
        return losses.token_cross_entropy(x, jnp.ones((2, 4), jnp.int32), where=where)

    def contrast(x):
        return losses.info_nce(x[:, 0], x[0], jnp.array([0, 3]), temperature=0.5, where=where)

    def student(x):
        return CASES["distillation"][1](x[..., :A], where)

    for loss in (tokens, contrast, student):
        one_by_one = [jax.jit(loss)(one) for one in x]
        np.testing.assert_allclose(jax.jit(jax.vmap(loss))(x), one_by_one, rtol=1e-5)


def test_soft_label_kl_by_hand():
    logits = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    target = jnp.array([[0.5, 0.5], [1.0, 0.0]])
    where = jnp.array([True, True])
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    per_entry = losses.soft_label_kl(logits, target, where=where, reduction="none")
    np.testing.assert_allclose(per_entry, [first, math.log(2)], rtol=1e-6)
    np.testing.assert_allclose(
        losses.soft_label_kl(logits, target, where=where), (first + math.log(2)) / 2, rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.soft_label_kl(logits, target, where=where, reduction="sum"), first + math.log(2), rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.soft_label_kl(jnp.zeros((1, 2)), jnp.array([[0.1, 0.9]]), where=where[:1]),
        cross((0.1, 0.9)),
        rtol=1e-6,
    )


def test_soft_label_kl_with_one_hot_targets_is_cross_entropy_over_grades():
    logits = jnp.arange(5.0)[None]
    expected = math.log(sum(math.exp(i) for i in range(5))) - 2
    loss = losses.soft_label_kl(logits, jax.nn.one_hot(jnp.array([2]), 5), where=jnp.array([True]))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_binary_kl_is_soft_label_kl_of_two_classes_and_zero_at_the_target():
    z, p = jnp.array([-3.0, 0.0, 1.5, 40.0]), jnp.array([0.0, 0.5, 0.2, 1.0])
    where = jnp.ones(4, bool)
    two = losses.soft_label_kl(
        jnp.stack([jnp.zeros(4), z], -1), jnp.stack([1 - p, p], -1), where=where, reduction="none"
    )
    np.testing.assert_allclose(losses.binary_kl(z, p, where=where, reduction="none"), two, atol=1e-6)
    np.testing.assert_allclose(losses.binary_kl(z, jax.nn.sigmoid(z), where=where), 0, atol=1e-6)
    far = losses.binary_kl(jnp.array([1e4, -1e4]), jnp.array([0.0, 1.0]), where=where[:2], reduction="none")
    np.testing.assert_allclose(far, [1e4, 1e4])


def test_binary_kl_temperature_by_hand_and_gradient_size():
    z, p, tau = 2.0, 0.9, 4.0
    soft = 1 / (1 + math.exp(-math.log(9) / tau))
    student = 1 / (1 + math.exp(-z / tau))
    expected = tau**2 * (soft * math.log(soft / student) + (1 - soft) * math.log((1 - soft) / (1 - student)))

    def loss(z, tau):
        return losses.binary_kl(z[None], jnp.array([p]), where=jnp.array([True]), temperature=tau)

    np.testing.assert_allclose(loss(jnp.array(z), tau), expected, rtol=1e-4)
    # d/dz = tau (sigma(z / tau) - soft), which tends to (z - logit p) / 4 for high temperatures.
    np.testing.assert_allclose(jax.grad(loss)(jnp.array(z), 100.0), (z - math.log(9)) / 4, rtol=1e-2)
    certain = losses.binary_kl(jnp.array([1.0]), jnp.array([1.0]), where=jnp.array([True]), temperature=2.0)
    assert jnp.isfinite(certain)


def test_no_gradient_flows_into_targets():
    where = jnp.array([True, True])

    def loss(p):
        return losses.binary_kl(jnp.array([1.0, -1.0]), p, where=where, temperature=2.0)

    np.testing.assert_array_equal(jax.grad(loss)(jnp.array([0.0, 0.3])), [0, 0])


def test_softmax_listwise_by_hand():
    scores = jnp.log(jnp.array([[1.0, 2.0, 5.0, 7.0], [1.0, 1.0, 1.0, 1.0]]))
    labels = jnp.array([[3.0, 1.0, 0.0, 9.0], [0.0, 0.0, 0.0, 0.0]])
    where = jnp.array([[True, True, True, False], [True, True, True, True]])
    expected = -0.75 * math.log(1 / 8) - 0.25 * math.log(2 / 8)
    np.testing.assert_allclose(
        losses.softmax_listwise(scores, labels, where=where, reduction="none"), [expected, 0], rtol=1e-6
    )
    # The list without a label above 0 does not water down the mean.
    np.testing.assert_allclose(losses.softmax_listwise(scores, labels, where=where), expected, rtol=1e-6)


def test_pairwise_logistic_by_hand():
    scores = jnp.array([[2.0, 1.0, 0.5, 9.0], [1.0, 2.0, 3.0, 4.0]])
    labels = jnp.array([[0.0, 4.0, 1.0, 4.0], [2.0, 2.0, 2.0, 2.0]])
    where = jnp.array([[True, True, True, False], [True, True, True, True]])

    def pair(better, worse):
        return math.log1p(math.exp(worse - better))

    expected = (pair(1.0, 2.0) + pair(1.0, 0.5) + pair(0.5, 2.0)) / 3
    np.testing.assert_allclose(losses.pairwise_logistic(scores, labels, where=where), expected, rtol=1e-6)


def test_listwise_kl_by_hand():
    scores = jnp.log(jnp.array([[1.0, 3.0, 5.0], [1.0, 1.0, 1.0]]))
    teacher = jnp.log(jnp.array([[1.0, 1.0, 7.0], [2.0, 1.0, 1.0]]))
    where = jnp.array([[True, True, False], [True, False, False]])
    sharp = 0.25 * (0.5 * math.log(0.5 / 0.1) + 0.5 * math.log(0.5 / 0.9))  # squares: 1 and 9 of 10
    for temperature, expected in (
        (1.0, 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)),
        (0.5, sharp),
    ):
        # A list of one item has no order: it counts neither in the value nor in the mean.
        found = losses.listwise_kl(scores, teacher, where=where, temperature=temperature, reduction="none")
        np.testing.assert_allclose(found, [expected, 0], rtol=1e-5)
        np.testing.assert_allclose(
            losses.listwise_kl(scores, teacher, where=where, temperature=temperature), expected, rtol=1e-5
        )


def test_listwise_kl_knows_no_level_and_is_least_at_the_teachers_scores():
    teacher = jnp.array([[0.3, -1.0, 2.0, 0.5]])
    where = jnp.ones((1, 4), bool)

    def loss(scores):
        return losses.listwise_kl(scores, teacher, where=where, temperature=0.3)

    value, gradient = jax.value_and_grad(loss)(teacher + 5)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, np.zeros((1, 4)), atol=1e-6)
    assert loss(teacher.at[0, 1].add(0.5)) > 1e-5


def test_ranking_losses_have_a_gradient_at_ties():
    labels, where = jnp.array([[1.0, 0.0]]), jnp.ones((1, 2), bool)
    for loss in (losses.pairwise_logistic, losses.softmax_listwise):
        gradient = jax.jit(jax.grad(loss))(jnp.zeros((1, 2)), labels, where=where)
        np.testing.assert_allclose(gradient, [[-0.5, 0.5]], rtol=1e-6)


def test_info_nce_by_hand():
    query = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    docs = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    everything = jnp.ones((2, 3), bool)
    tau = 0.5

    def nce(positive, negatives):
        terms = [math.exp(s / tau) for s in (positive, *negatives)]
        return -math.log(terms[0] / sum(terms))

    def loss(positives, where):
        return losses.info_nce(query, docs, positives, temperature=tau, where=where, reduction="none")

    np.testing.assert_allclose(
        loss(jnp.array([0, 2]), everything), [nce(1, (0.6, 0)), nce(1, (0, 0.8))], rtol=1e-6
    )
    # A false negative of query 0 is masked for query 0 alone.
    where = everything.at[0, 1].set(False)
    np.testing.assert_allclose(loss(jnp.array([0, 2]), where), [nce(1, (0,)), nce(1, (0, 0.8))], rtol=1e-6)
    # Two positives: each against the negatives, not against the other. Query 1 has none that exists.
    positives = jnp.array([[True, True, False], [True, False, False]])
    np.testing.assert_allclose(
        loss(positives, everything.at[1, 0].set(False)), [(nce(1, (0,)) + nce(0.6, (0,))) / 2, 0], rtol=1e-6
    )
    # Nothing but positives: nothing to tell apart.
    np.testing.assert_allclose(loss(jnp.ones((2, 3), bool), everything), [0, 0])


def test_info_nce_padding_of_queries_and_documents():
    rng = np.random.default_rng(0)
    query, docs = rng.standard_normal((3, 8), np.float32), rng.standard_normal((5, 8), np.float32)
    positives = np.array([0, 3, 1])

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(query, docs, positives, where):
        return losses.info_nce(query, docs, positives, temperature=0.3, where=where)

    clean, gradients = loss(query, docs, positives, np.ones((3, 5), bool))
    query = np.concatenate([query, np.full((1, 8), np.nan, np.float32)])
    docs = np.concatenate([docs, np.full((2, 8), np.inf, np.float32)])
    where = np.zeros((4, 7), bool)
    where[:3, :5] = True
    value, padded = loss(query, docs, np.append(positives, 0), where)
    np.testing.assert_allclose(value, clean, rtol=1e-6)
    np.testing.assert_allclose(padded[0], np.pad(gradients[0], ((0, 1), (0, 0))), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(padded[1], np.pad(gradients[1], ((0, 2), (0, 0))), rtol=1e-5, atol=1e-7)


def test_pairwise_margin_by_hand():
    loss = losses.pairwise_margin(
        jnp.array([0.9, 0.5, 0.1]),
        jnp.array([0.1, 0.4, 0.3]),
        margin=0.2,
        where=jnp.array([True, True, True]),
        reduction="none",
    )
    np.testing.assert_allclose(loss, [0.0, 0.1, 0.4], rtol=1e-5)


def test_token_cross_entropy_by_hand_and_out_of_range_padding():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    tokens, where = jnp.array([[1, -100]]), jnp.array([[True, False]])
    np.testing.assert_allclose(
        losses.token_cross_entropy(logits, tokens, where=where), math.log(4), rtol=1e-6
    )


def test_action_loss_by_hand_and_rare_tasks():
    log_odds = jnp.zeros((3, 2))
    actions = jnp.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    where = jnp.array([[True, True], [True, False], [False, False]])
    # Items 0 and 1 count; the rare second task occurs in one of them, with weight 4.
    expected = (math.log(2) * (1 + 4) + math.log(2)) / 2
    loss = losses.action_loss(log_odds, actions, where=where, task_weights=(1.0, 4.0))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_action_loss_adds_up_over_batches():
    rng = np.random.default_rng(3)
    x, actions = rng.standard_normal((8, A), np.float32), rng.random((8, A), np.float32).round()
    where = rng.random((8, A)) > 0.4

    def part(rows, reduction):
        loss = functools.partial(losses.action_loss, task_weights=WEIGHTS, reduction=reduction)
        return jax.jit(loss)(x[rows], actions[rows], where=where[rows])

    halves = part(slice(0, 3), "sum") + part(slice(3, 8), "sum")
    count = where.any(axis=1).sum()
    np.testing.assert_allclose(halves / count, part(slice(0, 8), "mean"), rtol=1e-6)


def test_distillation_is_the_weighted_sum_of_its_parts_with_missing_teachers():
    rel, eng = jnp.array([0.5, -1.0]), jnp.array([[0.0, 1.0], [2.0, -2.0]])
    p_rel, p_eng = jnp.array([0.9, jnp.nan]), jnp.array([[0.5, jnp.nan], [0.1, 0.2]])
    where_rel, where_eng = jnp.isfinite(p_rel), jnp.isfinite(p_eng)

    def loss(alpha):
        return losses.distillation(
            rel, p_rel, eng, p_eng, alpha=alpha, task_weights=(1.0, 3.0), where_rel=where_rel,
            where_eng=where_eng, temperature=2.0,
        )  # fmt: skip

    relevance = losses.binary_kl(rel[:1], p_rel[:1], where=where_rel[:1], temperature=2.0)
    kl = losses.binary_kl(eng, p_eng, where=where_eng, temperature=2.0, reduction="none")
    engagement = (kl[0, 0] + kl[1, 0] + 3 * kl[1, 1]) / 2
    np.testing.assert_allclose(loss(1.0), relevance, rtol=1e-6)
    np.testing.assert_allclose(loss(0.0), engagement, rtol=1e-6)
    np.testing.assert_allclose(loss(0.25), 0.25 * relevance + 0.75 * engagement, rtol=1e-6)


def test_bad_arguments_are_named():
    x, where = jnp.zeros((2, 4)), jnp.ones((2, 4), bool)
    with pytest.raises(ValueError, match=r"where has shape \(2, 1\)"):
        losses.binary_kl(x, x, where=where[:, :1])
    with pytest.raises(ValueError, match="where has dtype float32"):
        losses.binary_kl(x, x, where=where.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"labels has shape \(4,\)"):
        losses.softmax_listwise(x, x[0], where=where)
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        losses.binary_kl(x, x, where=where, temperature=0.0)
    with pytest.raises(ValueError, match=r"temperature is -1"):
        losses.listwise_kl(x, x, where=where, temperature=-1)
    with pytest.raises(ValueError, match=r"teacher_scores has shape \(4,\)"):
        losses.listwise_kl(x, x[0], where=where)
    with pytest.raises(ValueError, match=r"task_weights has shape \(3,\)"):
        losses.action_loss(x, x, where=where, task_weights=WEIGHTS)
    with pytest.raises(ValueError, match="reduction is 'average'"):
        losses.binary_kl(x, x, where=where, reduction="average")
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        losses.distillation(
            x[..., 0], x[..., 0], x, x, alpha=1.5, task_weights=[1.0] * 4, where_rel=where[..., 0],
            where_eng=where,
        )  # fmt: skip


def test_doctests():
    assert doctest.testmod(losses, extraglobs={"jnp": jnp}).failed == 0
