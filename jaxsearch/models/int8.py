"""Weights of eight bits for inference.

Only the matrices of the layers become int8, one scale per output channel (symmetric, by the largest weight); embeddings,
norms and label rows stay as they are, and activations are never rounded. What is saved is memory and its traffic, which
bounds short calls.
"""

from typing import Any

from flax import nnx

from jaxsearch.errors import InputError

INPUT_AXES = {"q": (1,), "k": (1,), "v": (1,), "o": (1, 2), "gate": (1,), "up": (1,), "down": (1,)}
"""Matrix -> the axes [layer, ...] that are summed over, and share a scale."""


def int8_weights(state: nnx.State) -> nnx.State:
    """A decoder's or scorer's state with the layers' matrices as `qwix.QArray` (int8 values, fp32 scales).

    Raises:
        InputError: qwix is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise InputError("int8 weights need the package qwix: pip install 'jaxsearch[int8]'") from error

    def convert(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        if "layers" not in path or path[-1] not in INPUT_AXES:
            return variable
        array = variable.get_value()
        apart = [axis for axis in range(array.ndim) if axis not in INPUT_AXES[path[-1]]]
        return variable.replace(qwix.quantize(array, "int8", channelwise_axes=apart))

    return nnx.from_flat_state([(path, convert(path, value)) for path, value in nnx.to_flat_state(state)])
