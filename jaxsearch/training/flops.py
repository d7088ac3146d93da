"""Matmul FLOPs of a traced function, the bodies of scans times their lengths."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval


def count_flops(traced: ClosedJaxpr) -> float:
    """Return the FLOPs of all matmuls, over all devices, before anything is split.

    What the result does not need is left out, as the compiler leaves it out. A `while` whose length is not known counts once.
    """
    jaxpr, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return _count(jaxpr)


def _count(jaxpr: Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            avals: list[Any] = [equation.invars[0].aval, equation.outvars[0].aval]
            lhs, out = (aval.shape for aval in avals)
            total += 2.0 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)
            continue
        inner = [_count(part) for part in _parts(equation.params)]
        if equation.primitive.name == "cond":
            total += max(inner, default=0.0)
        else:
            total += sum(inner) * equation.params.get("length", 1)
    return total


def _parts(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for part in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part
