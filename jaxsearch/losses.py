r"""The losses of the funnel: pure functions of arrays, masked, in fp32.

What holds for every loss here:

- `where` (bool) is required. What it masks never changes a value nor a gradient, whatever stands there, NaN
  and infinity included; where everything is masked, value and gradients are 0.
- Inputs of any float dtype are cast to fp32, and the result is fp32.
- `reduction="mean"` averages over the entries that count (which ones: see each loss), `"sum"` adds them up,
  for averages over several batches, and `"none"` returns them one by one, 0 where masked.
- Targets are constants: no gradient flows into them.

Axes: B queries, L items, T tokens, D width, V vocabulary, A actions, C classes, M documents, G samples of one prompt.

>>> import jax.numpy as jnp
>>> log_odds, target = jnp.array([0.0, 2.0]), jnp.array([0.5, 0.5])
>>> print(f"{binary_kl(log_odds, target, where=jnp.array([True, True])):.4f}")
0.2169
>>> print(binary_kl(log_odds, target, where=jnp.array([True, False])))
0.0
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import rax
from jax import Array
from jax.scipy.special import entr
from jax.typing import ArrayLike

from jaxsearch.numerics import wide

Reduction = Literal["mean", "sum", "none"]

# Stands for log(0): far below any logit, yet finite, so that no NaN arises where it is multiplied by 0.
_LOG_ZERO = -1e30

# A log-ratio of two models' probabilities beyond this is held there, so that its exponential stays finite.
_FAR = 30.0


def masked_mean(values: Array, *, where: Array) -> Array:
    """The mean of the values (any shape) where the bool mask is True, an fp32 scalar; 0 where nothing is.

    >>> print(masked_mean(jnp.array([1.0, 3.0, jnp.nan]), where=jnp.array([True, True, False])))
    2.0
    """
    _check_where("where", where, values.shape)
    return jnp.sum(_keep(values, where)) / jnp.maximum(jnp.sum(where), 1)


def soft_label_kl(
    logits: Array, target_probs: Array, *, where: Array, reduction: Reduction = "mean"
) -> Array:
    r"""Kullback-Leibler divergence from soft labels over C classes.

    .. math::
        \ell(z, p) = \sum_c p_c \left( \log p_c - \log \frac{\exp(z_c)}{\sum_j \exp(z_j)} \right)

    With C = 2 (no, yes) this is the relevance loss of "Semantic Search At LinkedIn" (arXiv 2602.07309,
    section 4: KL to the judge's own token probabilities); with one-hot targets over the five grades it is the
    ordinal-class baseline.

    Args:
        logits: [..., C].
        target_probs: [..., C], non-negative and summing to 1 over the classes.
        where: bool [...], the entries that count.
        reduction: over the entries of `where`.
    """
    _check_where("where", where, logits.shape[:-1])
    _check_shape("target_probs", target_probs, logits.shape)
    logits = _keep(logits, where[..., None])
    target = jax.lax.stop_gradient(_keep(target_probs, where[..., None]))
    values = -jnp.sum(entr(target) + target * jax.nn.log_softmax(logits, axis=-1), axis=-1)
    return _reduce(values, where, reduction)


def binary_kl(
    log_odds: Array,
    target_prob: Array,
    *,
    where: Array,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Array:
    r"""Kullback-Leibler divergence of a student's yes/no log-odds from a teacher's probability.

    .. math::
        \ell(z, p) = \tau^2 \left( p_\tau \log \frac{p_\tau}{\sigma(z / \tau)}
            + (1 - p_\tau) \log \frac{1 - p_\tau}{1 - \sigma(z / \tau)} \right),
        \quad p_\tau = \sigma(\sigma^{-1}(p) / \tau)

    Equals `soft_label_kl` over (no, yes) logits whose difference is z. Both sides are softened by the
    temperature as in Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531); the
    factor keeps the size of the gradient.

    Args:
        log_odds: [...], log p(yes) - log p(no) of the student.
        target_prob: [...], p(yes) of the teacher, in [0, 1].
        where: bool [...], the entries that count.
        temperature: above 0; 1 changes nothing.
        reduction: over the entries of `where`.

    Raises:
        ValueError: the temperature is not above 0, or shapes disagree.
    """
    _check_where("where", where, log_odds.shape)
    _check_shape("target_prob", target_prob, log_odds.shape)
    _check_temperature(temperature)
    log_odds = _keep(log_odds, where)
    target = jax.lax.stop_gradient(_keep(target_prob, where))
    if temperature != 1.0:
        limit = 1e-7  # a teacher that is certain has infinite log-odds, which no temperature would soften
        target = jax.nn.sigmoid(jax.scipy.special.logit(jnp.clip(target, limit, 1 - limit)) / temperature)
    cross_entropy = optax.losses.sigmoid_binary_cross_entropy(log_odds / temperature, target)
    values = temperature**2 * (cross_entropy - entr(target) - entr(1 - target))
    return _reduce(values, where, reduction)


def softmax_listwise(scores: Array, labels: Array, *, where: Array, reduction: Reduction = "mean") -> Array:
    r"""Listwise softmax loss over a query's items; graded labels are made a distribution (ListNet).

    .. math::
        \ell(s, y) = -\sum_i \frac{y_i}{\sum_j y_j} \log \frac{\exp(s_i)}{\sum_j \exp(s_j)}

    Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach" (ICML 2007), through
    `rax.softmax_loss`. Lists without a label above 0 say nothing about the order: they count neither in the
    value nor in the mean.

    Args:
        scores: [..., L].
        labels: [..., L], non-negative (grades, or gains such as 2^grade - 1).
        where: bool [..., L], the items that exist.
        reduction: over lists [...].

    >>> scores, where = jnp.zeros((1, 4)), jnp.array([[True, True, True, False]])
    >>> loss = softmax_listwise(scores, jnp.array([[4.0, 0.0, 0.0, 0.0]]), where=where)
    >>> print(f"{loss:.4f}")  # log 3
    1.0986
    """
    _check_where("where", where, scores.shape)
    _check_shape("labels", labels, scores.shape)
    labels = jax.lax.stop_gradient(_keep(labels, where))
    total = jnp.sum(labels, axis=-1, keepdims=True)
    values = rax.softmax_loss(
        _keep(scores, where), labels / jnp.where(total > 0, total, 1.0), where=where, reduce_fn=None
    )
    return _reduce(values, total[..., 0] > 0, reduction)


def listwise_kl(
    scores: Array,
    teacher_scores: Array,
    *,
    where: Array,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Array:
    r"""Kullback-Leibler divergence between a teacher's and a student's distribution over a query's items.

    .. math::
        \ell(s, t) = \tau^2 \sum_i P_\tau(t)_i \log \frac{P_\tau(t)_i}{P_\tau(s)_i},
        \quad P_\tau(x)_i = \frac{\exp(x_i / \tau)}{\sum_j \exp(x_j / \tau)}

    ListNet's top-one distributions (Cao et al., ICML 2007) with a teacher's scores for labels, softened, or below 1
    sharpened, as in Hinton et al. (arXiv 1503.02531). Unlike `softmax_listwise` on gains it is 0 where `binary_kl`
    of the same log-odds is, so that the two have one minimum; a small temperature makes it see the small differences
    between items that are all good, which hardly move the pointwise term.

    Args:
        scores: [..., L], the student's.
        teacher_scores: [..., L], on the same scale.
        where: bool [..., L], the items that exist.
        temperature: above 0.
        reduction: over lists [...] with two items or more.

    Raises:
        ValueError: the temperature is not above 0, or shapes disagree.

    >>> scores, where = jnp.array([[0.0, 1.0, 9.0]]), jnp.array([[True, True, False]])
    >>> print(f"{listwise_kl(scores, scores[:, ::-1] * 0, where=where):.4f}")
    0.1201
    """
    _check_where("where", where, scores.shape)
    _check_shape("teacher_scores", teacher_scores, scores.shape)
    _check_temperature(temperature)
    lists = jnp.sum(where, axis=-1) > 1

    def log_probs(values: Array) -> Array:
        return jax.nn.log_softmax(jnp.where(where, _keep(values, where) / temperature, _LOG_ZERO), axis=-1)

    teacher = jax.lax.stop_gradient(log_probs(teacher_scores))
    values = jnp.exp(teacher) * _keep(teacher - log_probs(scores), where)
    return _reduce(temperature**2 * jnp.sum(values, axis=-1), lists, reduction)


def pairwise_logistic(scores: Array, labels: Array, *, where: Array, reduction: Reduction = "mean") -> Array:
    r"""Pairwise logistic loss over a query's items: each better-labelled item above each worse-labelled one.

    .. math::
        \ell(s, y) = \frac{\sum_{i, j} [y_i > y_j] \log(1 + \exp(s_j - s_i))}{\sum_{i, j} [y_i > y_j]}

    Burges et al., "Learning to Rank using Gradient Descent" (ICML 2005), through
    `rax.pairwise_logistic_loss`. Lists in which no two labels differ count neither in the value nor in the
    mean.

    Args:
        scores: [..., L].
        labels: [..., L], any numbers; only their order matters.
        where: bool [..., L], the items that exist.
        reduction: over lists [...].

    >>> scores, labels = jnp.array([[3.0, 3.0, 0.0]]), jnp.array([[1.0, 0.0, 4.0]])
    >>> loss = pairwise_logistic(scores, labels, where=jnp.array([[True, True, False]]))
    >>> print(f"{loss:.4f}")  # one pair, tied: log 2
    0.6931
    """
    _check_where("where", where, scores.shape)
    _check_shape("labels", labels, scores.shape)
    labels = jax.lax.stop_gradient(_keep(labels, where))
    pair_losses = rax.pairwise_logistic_loss(_keep(scores, where), labels, where=where, reduce_fn=None)
    better = labels[..., :, None] > labels[..., None, :]
    pairs = jnp.sum(better & where[..., :, None] & where[..., None, :], axis=(-2, -1))
    return _reduce(jnp.sum(pair_losses, axis=-1) / jnp.maximum(pairs, 1), pairs > 0, reduction)


def info_nce(
    query_emb: Array,
    doc_emb: Array,
    positives: Array,
    *,
    temperature: float,
    where: Array,
    reduction: Reduction = "mean",
) -> Array:
    r"""InfoNCE with in-batch negatives: each positive of a query against all of its negatives.

    .. math::
        \ell_b = -\frac{1}{|P_b|} \sum_{p \in P_b}
            \log \frac{\exp(s_{bp})}{\exp(s_{bp}) + \sum_{n \notin P_b} \exp(s_{bn})},
        \quad s_{bm} = \langle q_b, d_m \rangle / \tau

    van den Oord et al., "Representation Learning with Contrastive Predictive Coding" (arXiv 1807.03748).
    Other positives of the same query are no negatives. Embeddings are used as they come: normalise them first
    for cosine similarity.

    Args: query_emb: [B, D]. doc_emb: [M, D], the documents of the whole batch. positives: int [B], each
        query's one positive, or bool [B, M]. temperature: tau, above 0. where: bool [B, M], the pairs that
        exist. Mask a suspected false negative of one query here, or a column for a document that is
            padding. Queries without a positive that exists do not count.
        reduction: over queries [B].

    Raises:
        ValueError: the temperature is not above 0, or shapes disagree.
    """
    shape = (query_emb.shape[0], doc_emb.shape[0])
    _check_where("where", where, shape)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: give a number above 0")
    if positives.dtype != bool:
        _check_shape("positives", positives, shape[:1])
        positives = positives[:, None] == jnp.arange(shape[1])[None, :]
    _check_shape("positives", positives, shape)

    # Embeddings of padding may hold anything: cleared here, or 0 * NaN would reach the gradient.
    query_emb = _keep(query_emb, where.any(axis=1)[:, None])
    doc_emb = _keep(doc_emb, where.any(axis=0)[:, None])
    scores = jnp.einsum("BD,MD->BM", query_emb, doc_emb, precision="highest") / temperature
    positives, negatives = positives & where, ~positives & where
    against = jax.nn.logsumexp(jnp.where(negatives, scores, _LOG_ZERO), axis=1, keepdims=True)
    per_positive = _keep(jax.nn.softplus(against - scores), positives)
    count = jnp.sum(positives, axis=1)
    return _reduce(jnp.sum(per_positive, axis=1) / jnp.maximum(count, 1), count > 0, reduction)


def pairwise_margin(
    positive_scores: Array,
    negative_scores: Array,
    *,
    margin: float,
    where: Array,
    reduction: Reduction = "mean",
) -> Array:
    r"""Margin loss on mined pairs, the second half of the retriever's loss (arXiv 2602.07309, section 3).

    .. math::
        \ell(s^+, s^-) = \max(0, m - (s^+ - s^-))

    Args:
        positive_scores: [...], similarity of the query with its positive.
        negative_scores: [...], similarity of the same query with a mined negative.
        margin: m, how far the positive must stand above.
        where: bool [...], the pairs that exist.
        reduction: over pairs.
    """
    _check_where("where", where, positive_scores.shape)
    _check_shape("negative_scores", negative_scores, positive_scores.shape)
    return _reduce(
        jax.nn.relu(margin - (_keep(positive_scores, where) - _keep(negative_scores, where))),
        where,
        reduction,
    )


def token_cross_entropy(
    logits: Array, tokens: Array, *, where: Array, reduction: Reduction = "mean"
) -> Array:
    r"""Language-model loss: negative log-likelihood of each token, in nats.

    .. math::
        \ell_t = -\log \frac{\exp(z_{t, y_t})}{\sum_v \exp(z_{t, v})}

    Args:
        logits: [..., T, V], already aligned with the tokens that they predict (the caller shifts by one).
        tokens: int [..., T]; masked ones may hold any number.
        where: bool [..., T], the tokens that are learned.
        reduction: over tokens.
    """
    _check_where("where", where, logits.shape[:-1])
    _check_shape("tokens", tokens, logits.shape[:-1])
    values = optax.losses.softmax_cross_entropy_with_integer_labels(
        _keep(logits, where[..., None]), jnp.where(where, tokens, 0)
    )
    return _reduce(values, where, reduction)


def action_loss(
    log_odds: Array,
    actions: Array,
    *,
    where: Array,
    task_weights: ArrayLike | Sequence[float],
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Array:
    r"""Multi-task loss over actions: masked binary KL (cross entropy where actions are 0 or 1), summed.

    .. math::
        \ell = \sum_t w_t [\text{where}_t] \, KL(a_t \,\|\, \sigma(z_t))

    arXiv 2602.07309, section 4. One item is one entry: the mean is over items with at least one task that
    counts, so that a rare task weighs what it occurs, times its weight, and batches add up.

    Args:
        log_odds: [..., A].
        actions: [..., A], done (1) or not (0), or a teacher's probability.
        where: bool [..., A]; False where an action was not eligible, or is masked as an unsure negative.
        task_weights: [A].
        temperature: as in `binary_kl`.
        reduction: over items [...].
    """
    weights = jnp.asarray(task_weights, wide())
    _check_shape("task_weights", weights, log_odds.shape[-1:])
    values = binary_kl(log_odds, actions, where=where, temperature=temperature, reduction="none")
    return _reduce(
        jnp.einsum("...A,A->...", values, weights, precision="highest"), where.any(axis=-1), reduction
    )


def cosine_distance(x: Array, target: Array, *, where: Array, reduction: Reduction = "mean") -> Array:
    r"""One minus the cosine between two vectors: the hidden-state term of MixLM's self-alignment (arXiv 2512.07846).

    .. math::
        \ell(x, y) = 1 - \frac{\langle x, y \rangle}{\|x\| \, \|y\|}

    Args:
        x: [..., D].
        target: [..., D]; a constant.
        where: bool [...], the vectors that count.
        reduction: over the entries of `where`.

    >>> x, where = jnp.array([[3.0, 0.0], [1.0, 1.0]]), jnp.array([True, True])
    >>> print(f"{cosine_distance(x, jnp.array([[0.0, 2.0], [1.0, 1.0]]), where=where):.4f}")
    0.5000
    """
    _check_where("where", where, x.shape[:-1])
    _check_shape("target", target, x.shape)
    x = _keep(x, where[..., None])
    target = jax.lax.stop_gradient(_keep(target, where[..., None]))
    sizes = jnp.sum(x * x, axis=-1) * jnp.sum(target * target, axis=-1)
    dots = jnp.einsum("...D,...D->...", x, target, precision="highest")
    return _reduce(1 - dots * jax.lax.rsqrt(jnp.maximum(sizes, 1e-24)), where, reduction)


def distillation(
    rel_student: Array,
    rel_teacher_prob: Array,
    eng_student: Array,
    eng_teacher_prob: Array,
    *,
    alpha: float,
    task_weights: ArrayLike | Sequence[float],
    where_rel: Array,
    where_eng: Array,
    temperature: float = 1.0,
) -> Array:
    r"""Multi-teacher distillation of the ranker (arXiv 2602.07309, section 4).

    .. math::
        L = \alpha \, KL(p^{rel} \,\|\, q^{rel}) + (1 - \alpha) \sum_t w_t \, KL(p^{eng}_t \,\|\, q^{eng}_t)

    Each half is a mean over its own items, so that items which only one teacher has scored cost nothing in
    the other half. Its parts are `binary_kl` and `action_loss`: call those for metrics, or where teachers
    need temperatures of their own.

    Args:
        rel_student: [...], relevance log-odds.
        rel_teacher_prob: [...], the relevance teacher's p(yes).
        eng_student: [..., A], action log-odds.
        eng_teacher_prob: [..., A], the engagement teacher's probabilities.
        alpha: weight of relevance, in [0, 1].
        task_weights: [A].
        where_rel: bool [...], items with a relevance teacher's score.
        where_eng: bool [..., A], actions with an engagement teacher's score.
        temperature: of both teachers.

    Returns:
        A scalar.

    Raises:
        ValueError: alpha lies outside [0, 1], the temperature is not above 0, or shapes disagree.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: give a number from 0 (engagement only) to 1 (relevance only)")
    relevance = binary_kl(rel_student, rel_teacher_prob, where=where_rel, temperature=temperature)
    engagement = action_loss(
        eng_student, eng_teacher_prob, where=where_eng, task_weights=task_weights, temperature=temperature
    )
    return alpha * relevance + (1 - alpha) * engagement


def group_advantages(rewards: Array, *, where: Array) -> Array:
    r"""How much better each sample of a prompt did than the prompt's samples on average; a constant.

    .. math::
        A_i = \frac{r_i - \bar r}{\sigma(r) + 10^{-4}}

    Shao et al., "DeepSeekMath" (arXiv 2402.03300, section 4.1: group relative policy optimisation). Samples that all did alike, and one
    alone, have advantage 0.

    Args:
        rewards: [..., G].
        where: bool [..., G], the samples that exist.

    Returns:
        fp32 [..., G].

    >>> rewards = jnp.array([[1.0, 3.0, 9.0]])
    >>> print(group_advantages(rewards, where=jnp.array([[True, True, False]])).round(2))
    [[-1.  1.  0.]]
    """
    _check_where("where", where, rewards.shape)
    rewards = jax.lax.stop_gradient(_keep(rewards, where))
    count = jnp.maximum(jnp.sum(where, axis=-1, keepdims=True), 1)
    centred = _keep(rewards - jnp.sum(rewards, axis=-1, keepdims=True) / count, where)
    deviation = jnp.sqrt(jnp.sum(centred * centred, axis=-1, keepdims=True) / count)
    return centred / (deviation + 1e-4)


def clipped_policy(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    *,
    where: Array,
    clip: float,
    reduction: Reduction = "mean",
) -> Array:
    r"""Policy gradient of sampled tokens, clipped where the policy has moved far from the one that sampled them.

    .. math::
        \ell_t = -\min \left( \rho_t A, \mathrm{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon) A \right),
        \quad \rho_t = \frac{\pi(y_t)}{\pi_{old}(y_t)}

    Schulman et al., "Proximal Policy Optimization" (arXiv 1707.06347), as GRPO uses it (arXiv 2402.03300). A mean over tokens, not over
    texts, so that a token weighs the same in a short text and in a long one.

    Args:
        log_probs: [..., T] of the sampled tokens, now.
        old_log_probs: [..., T], when they were sampled; a constant.
        advantages: [...], of each text; a constant.
        where: bool [..., T], the tokens that were sampled: nothing behind the end token.
        clip: epsilon, above 0.
        reduction: over tokens.

    Raises:
        ValueError: the clip is not above 0, or shapes disagree.
    """
    _check_where("where", where, log_probs.shape)
    _check_shape("old_log_probs", old_log_probs, log_probs.shape)
    _check_shape("advantages", advantages, log_probs.shape[:-1])
    if not clip > 0:
        raise ValueError(f"clip is {clip}: give a number above 0, such as 0.2")
    old = jax.lax.stop_gradient(_keep(old_log_probs, where))
    ratio = jnp.exp(jnp.clip(_keep(log_probs, where) - old, -_FAR, _FAR))
    gain = jax.lax.stop_gradient(advantages)[..., None].astype(ratio.dtype)
    return _reduce(-jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - clip, 1 + clip) * gain), where, reduction)


def reference_kl(
    log_probs: Array, reference_log_probs: Array, *, where: Array, reduction: Reduction = "mean"
) -> Array:
    r"""Estimate of the policy's divergence from a reference model on the policy's own samples; never negative, 0 at the reference.

    .. math::
        \ell_t = \frac{\pi_{ref}(y_t)}{\pi(y_t)} - \log \frac{\pi_{ref}(y_t)}{\pi(y_t)} - 1

    The term of GRPO (arXiv 2402.03300, equation 4).

    Args:
        log_probs: [..., T] of the sampled tokens.
        reference_log_probs: [..., T]; a constant.
        where: bool [..., T], the tokens that were sampled.
        reduction: over tokens.
    """
    _check_where("where", where, log_probs.shape)
    _check_shape("reference_log_probs", reference_log_probs, log_probs.shape)
    apart = jax.lax.stop_gradient(_keep(reference_log_probs, where)) - _keep(log_probs, where)
    apart = jnp.clip(apart, -_FAR, _FAR)
    return _reduce(jnp.expm1(apart) - apart, where, reduction)


def _keep(values: Array, where: Array) -> Array:
    """The values in fp32, 0 where masked; comes before any arithmetic, or padding reaches gradients."""
    return jnp.where(where, values, 0).astype(wide())


def _reduce(values: Array, where: Array, reduction: Reduction) -> Array:
    if reduction == "none":
        return _keep(values, where)
    if reduction == "sum":
        return jnp.sum(_keep(values, where))
    if reduction == "mean":
        return masked_mean(values, where=where)
    raise ValueError(f"reduction is {reduction!r}: use mean, sum or none")


def _check_shape(name: str, value: Array, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} has shape {value.shape}: it must be {shape} to match the other arguments")


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}: give a number above 0 (1 leaves the distributions as they are)"
        )


def _check_where(name: str, where: Array, shape: tuple[int, ...]) -> None:
    _check_shape(name, where, shape)
    if where.dtype != bool:
        raise ValueError(f"{name} has dtype {where.dtype}: give a boolean mask, True for what counts")
