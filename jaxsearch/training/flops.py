"""Matmul FLOPs of a traced function: the bodies of scans times their lengths, of Pallas kernels times their steps."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval


def count_flops(traced: ClosedJaxpr, *, kernels: bool = False) -> float:
    """Return the FLOPs of all matmuls, over all devices, before anything is split.

    What the result does not need is left out, as the compiler leaves it out. A `while` whose length is not known counts once. Every step of
    a Pallas kernel counts as one that computes, also where it finds nothing to do.

    Args:
        kernels: count Pallas kernels alone, of which a compiled program does not tell.
    """
    jaxpr, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return _count(jaxpr, kernels)


def _count(jaxpr: Jaxpr, kernels: bool) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general" and kernels:
            continue
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            avals: list[Any] = [equation.invars[0].aval, equation.outvars[0].aval]
            lhs, out = (aval.shape for aval in avals)
            total += 2.0 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)
            continue
        inner = [_count(part, kernels and name != "pallas_call") for part in _parts(equation.params)]
        if name == "cond":
            total += max(inner, default=0.0)
        else:
            total += sum(inner) * _times(name, equation.params)
    return total


def _times(name: str, params: dict[str, Any]) -> int:
    """How often the inner parts of an operation run, over all devices."""
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":
        return math.prod(params["mesh"].shape.values())
    return params.get("length", 1)


def _parts(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for part in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part
