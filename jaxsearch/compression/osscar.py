"""Which units a linear map can do without, and the best weights of the rest (OSSCAR, arXiv 2403.12983; paper section 5).

A map X W, X [n, F] the outputs of F hidden neurons and W [F, D], shall keep some units S. Minimised is ||X W - X_S V||^2 over S and
V; all that need be known of X is the Gram matrix X^T X. A unit is one neuron, or the neighbouring columns of a group of heads.

Notation: H the damped Gram matrix, U units of s columns each (F = U s), K units kept. In fp64 on the host: 1,536 neurons to 768 with D
576 are about 30 GFLOP of matrix products with the swaps; the work grows with F^3 and F^2 D.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from jaxsearch.errors import InputError

METHODS = ("osscar", "random", "magnitude", "activation")
BLOCK = 32
"""Units removed between two updates of the whole inverse."""
POOL = 128
"""Among so many of the cheapest units a block is chosen one by one; fewer units than this are all compared."""

Matrix = NDArray[np.float64]


class Kept(NamedTuple):
    """What stays of a map."""

    units: NDArray[np.int64]
    """[K], ascending."""
    weights: Matrix
    """[K s, D], in the order of `units`."""


def reduce_map(
    gram: np.ndarray,
    weights: np.ndarray,
    keep: int,
    *,
    size: int = 1,
    method: str = "osscar",
    refit: bool = False,
    damping: float = 1e-3,
    swaps: int = 10,
    seed: int = 0,
) -> Kept:
    """The map with `keep` of its units.

    Args:
        gram: X^T X [F, F].
        weights: W [F, D].
        keep: K, from 1 to U.
        size: s, columns of a unit.
        method: "osscar"; "random"; "magnitude", the largest ||W_u||; "activation", the largest sum of ||X_j||^2 ||W_j||^2 over the unit's
            columns (the score of Wanda, arXiv 2306.11695, summed over a unit).
        refit: the three baselines get the best weights for their units, too; as published they keep the old ones.
        damping: added to the diagonal of the Gram matrix, as a share of its mean: what calibration data cannot tell stays as it was.
        swaps: most rounds of exchanging removed units for kept ones ("osscar").
        seed: of "random".

    Raises:
        InputError: an argument is out of range, shapes do not fit, or the Gram matrix is not finite.
    """
    weights = np.asarray(weights, np.float64)
    units = _check(gram, weights, keep, size, method, damping, swaps)
    if keep == units:
        return Kept(np.arange(units), weights)
    hessian = damped(gram, damping)
    if method == "osscar":
        state = _State.whole(hessian, weights, size)
        while len(state.units) > keep:
            state = state.without(state.cheapest(min(BLOCK, len(state.units) - keep)))
        chosen, refit = _swap(state, swaps).units, True
    else:
        rows = np.einsum("fd,fd->f", weights, weights)
        scores = {
            "random": lambda: np.random.default_rng(seed).random(units),
            "magnitude": lambda: rows.reshape(units, size).sum(axis=1),
            "activation": lambda: (rows * np.diag(gram)).reshape(units, size).sum(axis=1),
        }[method]()
        chosen = np.argsort(-scores, kind="stable")[:keep]
    chosen = np.sort(chosen)
    return Kept(
        chosen, best_weights(hessian, weights, chosen, size) if refit else weights[columns(chosen, size)]
    )


def _check(
    gram: np.ndarray, weights: np.ndarray, keep: int, size: int, method: str, damping: float, swaps: int
) -> int:
    """How many units there are."""
    rows = len(weights)
    if weights.ndim != 2 or gram.shape != (rows, rows):
        raise InputError(f"gram has shape {gram.shape}, weights {weights.shape}: give [F, F] and [F, D]")
    if size < 1 or rows % size:
        raise InputError(f"size is {size}: give a divisor of the {rows} columns")
    if not 1 <= keep <= rows // size:
        raise InputError(f"keep is {keep}: give 1 to {rows // size}")
    if method not in METHODS:
        raise InputError(f"method is {method!r}: use one of {', '.join(METHODS)}")
    if not 0 < damping < np.inf:
        raise InputError(f"damping is {damping}: give a positive number, such as 0.001")
    if swaps < 0:
        raise InputError(f"swaps is {swaps}: give 0 or more")
    if not (np.isfinite(gram).all() and np.isfinite(weights).all()):
        raise InputError("gram or weights hold NaN or infinite values: the model that made them is broken")
    return rows // size


def damped(gram: np.ndarray, damping: float) -> Matrix:
    """H: the Gram matrix with `damping` of its mean diagonal added to it; the unit matrix where nothing is ever active."""
    hessian = np.array(gram, np.float64)
    hessian = (hessian + hessian.T) / 2
    mean = np.trace(hessian) / len(hessian)
    hessian[np.diag_indices_from(hessian)] += damping * mean if mean > 0 else 1.0
    return hessian


def columns(units: np.ndarray, size: int) -> NDArray[np.int64]:
    """The columns of these units, in their order [len(units) s]."""
    return (np.asarray(units, np.int64)[:, None] * size + np.arange(size)[None]).reshape(-1)


def best_weights(hessian: Matrix, weights: Matrix, units: np.ndarray, size: int) -> Matrix:
    """The V of these units that comes closest to the whole map [K s, D], in closed form."""
    kept = columns(units, size)
    return cho_solve(cho_factor(hessian[np.ix_(kept, kept)]), hessian[kept] @ weights)


def relative_error(gram: np.ndarray, weights: np.ndarray, kept: Kept, size: int = 1) -> float:
    """||X W - X_S V||^2 / ||X W||^2; 0 where both are 0."""
    difference = np.array(weights, np.float64)
    whole = np.vdot(difference, gram @ difference)
    difference[columns(kept.units, size)] -= kept.weights
    error = max(float(np.vdot(difference, gram @ difference)), 0.0)
    return error / float(whole) if whole > 0 else error


class _State(NamedTuple):
    """Kept units with the inverse of their part of H and their best weights; a change makes another state."""

    hessian: Matrix
    target: Matrix
    """H W [F, D]."""
    size: int
    units: NDArray[np.int64]
    """[K], in the order of the rows of the other two."""
    inverse: Matrix
    """[K s, K s]."""
    weights: Matrix
    """[K s, D]."""

    @classmethod
    def whole(cls, hessian: Matrix, weights: Matrix, size: int) -> "_State":
        """All units."""
        inverse = cho_solve(cho_factor(hessian), np.eye(len(hessian)))
        return cls(hessian, hessian @ weights, size, np.arange(len(weights) // size), inverse, weights)

    def explained(self) -> float:
        """What the best weights explain: the (damped) error is a constant less this."""
        return float(np.vdot(self.weights, self.target[columns(self.units, self.size)]))

    def cheapest(self, count: int) -> NDArray[np.int64]:
        """`count` places in `units`, greedily: each costs least once those before it are gone.

        Removing a unit g costs tr(V_g^T (M_gg)^-1 V_g), with M the inverse. The pool's parts of M and of V V^T are enough to know the
        costs after each removal, so that a neuron and its copy are never both taken for free.
        """
        s = self.size
        rows = self.weights.reshape(len(self.units), s, -1)
        costs = _costs(_diagonal_blocks(self.inverse, s), rows @ np.swapaxes(rows, 1, 2))
        pool = np.argsort(costs, kind="stable")[: max(POOL, 2 * count)]
        inside = columns(pool, s)
        inverse = self.inverse[np.ix_(inside, inside)]
        products = self.weights[inside] @ self.weights[inside].T
        alive = np.ones(len(pool), bool)
        chosen = []
        for _ in range(count):
            left = np.flatnonzero(alive)
            costs = _costs(_diagonal_blocks(inverse, s)[left], _diagonal_blocks(products, s)[left])
            place = left[np.argmin(costs)]
            alive[place] = False
            chosen.append(pool[place])
            gone = slice(place * s, (place + 1) * s)
            step = np.linalg.solve(inverse[gone, gone], inverse[gone]).T
            inverse -= step @ inverse[gone]
            products -= step @ products[gone]
            products -= products[:, gone] @ step.T
        return np.array(chosen)

    def without(self, places: np.ndarray) -> "_State":
        """The best of what is left: one elimination of a block from the inverse."""
        left = np.delete(np.arange(len(self.units)), places)
        gone, rest = columns(places, self.size), columns(left, self.size)
        across = self.inverse[np.ix_(rest, gone)]
        step = cho_solve(cho_factor(self.inverse[np.ix_(gone, gone)]), across.T).T
        return self._replace(
            units=self.units[left],
            inverse=self.inverse[np.ix_(rest, rest)] - step @ across.T,
            weights=self.weights[rest] - step @ self.weights[gone],
        )

    def removed(self) -> NDArray[np.int64]:
        """Units that are not kept."""
        return np.setdiff1d(np.arange(len(self.hessian) // self.size), self.units)

    def gains(self) -> NDArray[np.float64]:
        """How much the error falls when one removed unit comes back, for each of `removed()`."""
        s, removed = self.size, self.removed()
        kept, gone = columns(self.units, s), columns(removed, s)
        across = self.hessian[np.ix_(gone, kept)]
        missing = (self.target[gone] - across @ self.weights).reshape(len(removed), s, -1)
        reached = (across @ self.inverse).reshape(len(removed), s, -1)
        explained = reached @ np.swapaxes(across.reshape(reached.shape), 1, 2)
        schur = _diagonal_blocks(self.hessian, s)[removed] - explained
        return _costs(schur, missing @ np.swapaxes(missing, 1, 2))

    def with_units(self, units: np.ndarray) -> "_State":
        """The best with these removed units back, by bordering the inverse; they come last."""
        kept, back = columns(self.units, self.size), columns(units, self.size)
        across = self.hessian[np.ix_(kept, back)]
        step = self.inverse @ across
        corner = self.hessian[np.ix_(back, back)] - across.T @ step
        corner = cho_solve(cho_factor(corner), np.eye(len(corner)))
        new = corner @ (self.target[back] - across.T @ self.weights)
        side = -step @ corner
        return self._replace(
            units=np.concatenate([self.units, units]),
            inverse=np.block([[self.inverse - side @ step.T, side], [side.T, corner]]),
            weights=np.concatenate([self.weights - step @ new, new]),
        )


def _diagonal_blocks(matrix: Matrix, size: int) -> Matrix:
    """The blocks on the diagonal [U, s, s] of [U s, U s]."""
    units = len(matrix) // size
    place = np.arange(units)
    return matrix.reshape(units, size, units, size)[place, :, place, :]


def _costs(blocks: Matrix, products: Matrix) -> NDArray[np.float64]:
    """The trace of each block's inverse times its product [U] (both [U, s, s])."""
    if blocks.shape[1] == 1:
        return (products / blocks)[:, 0, 0]
    return np.trace(np.linalg.solve(blocks, products), axis1=1, axis2=2)


def _swap(state: _State, rounds: int) -> _State:
    """Exchange removed units for kept ones while the error falls; never to a larger error.

    A round brings back the units that gain most and removes as many of the cheapest; where that is no gain, half as many are tried.
    """
    keep, total = len(state.units), len(state.hessian) // state.size
    count, best = min(max(keep // 16, 1), total - keep), state.explained()
    for _ in range(rounds):
        order = np.argsort(-state.gains(), kind="stable")[:count]
        trial = state.with_units(state.removed()[order])
        trial = trial.without(trial.cheapest(count))
        found = trial.explained()
        if found > best * (1 + 1e-12):
            state, best = trial, found
        elif count == 1:
            break
        else:
            count //= 2
    return state
