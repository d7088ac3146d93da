"""Pretrained weights in and out: what Hugging Face folders and GGUF files have in common.

Both store a projection as one matrix [outputs, inputs] per layer, where the decoder has its axes apart and
its layers stacked.
"""

import math
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsearch.errors import InputError
from jaxsearch.models.decoder import Decoder, DecoderConfig, layer_table, outer_table


class Slot(NamedTuple):
    """Where one tensor of a file goes: a parameter of the decoder and, inside layers, the layer."""

    parameter: str
    layer: int | None
    shape: tuple[int, ...]
    """In the decoder, without the layer axis."""

    @property
    def file_shape(self) -> tuple[int, ...]:
        """In the file: vectors and embeddings as they are, projections as [outputs, inputs]."""
        if self.layer is None or len(self.shape) == 1:
            return self.shape
        split = 2 if self.parameter == "o" else 1
        return (math.prod(self.shape[split:]), math.prod(self.shape[:split]))

    def to_file(self, value: np.ndarray) -> np.ndarray:
        """A parameter as the file's tensor."""
        if self.layer is None or value.ndim == 1:
            return value
        return np.ascontiguousarray(value.reshape(self.file_shape[::-1]).T)

    def from_file(self, value: np.ndarray) -> np.ndarray:
        """The file's tensor as a parameter."""
        return value if self.layer is None or value.ndim == 1 else value.T.reshape(self.shape)


def slots(config: DecoderConfig, outer: dict[str, str], inner: dict[str, str]) -> dict[str, Slot]:
    """File tensor -> slot, from the file's names outside the layers and inside them (with {layer} in
    them).
    """
    found = {outer[name]: Slot(name, None, spec.shape) for name, spec in outer_table(config).items()}
    for layer in range(config.layers):
        for name, spec in layer_table(config).items():
            found[inner[name].format(layer=layer)] = Slot(name, layer, spec.shape[1:])
    return found


def check(source: object, expected: dict[str, Slot], shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a file with a tensor too many, too few or of another shape.

    Raises:
        InputError: names the source and the tensor.
    """
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise InputError(f"{source}: tensor {_some(unknown)} is unknown to this architecture")
    if missing := [name for name in expected if name not in shapes]:
        raise InputError(f"{source}: tensor {_some(missing)} is missing")
    for name, slot in expected.items():
        if tuple(shapes[name]) != slot.file_shape:
            raise InputError(
                f"{source}: tensor {name} has shape {tuple(shapes[name])}, "
                f"the architecture needs {slot.file_shape}"
            )


def _some(names: Collection[str]) -> str:
    first = next(iter(names))
    return first if len(names) == 1 else f"{first} (and {len(names) - 1} more)"


def assemble(config: DecoderConfig, expected: dict[str, Slot], read: Callable[[str], np.ndarray]) -> Decoder:
    """A decoder whose parameters are read tensor by tensor; random values are never drawn."""
    arrays = {
        name: np.empty(spec.shape, np.float32)
        for name, spec in (outer_table(config) | layer_table(config)).items()
    }
    for name, slot in expected.items():
        value = slot.from_file(read(name))
        arrays[slot.parameter][... if slot.layer is None else slot.layer] = value
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    for path, parameter in flat:
        parameter.set_value(jnp.asarray(arrays.pop(str(path[-1]))))
    nnx.update(decoder, nnx.from_flat_state(flat))
    return decoder


def tensors(decoder: Decoder, expected: dict[str, Slot]) -> Iterator[tuple[str, np.ndarray]]:
    """The decoder's parameters as a file's tensors, fp32."""
    arrays = {
        str(path[-1]): np.asarray(value[...])
        for path, value in nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    }
    for name, slot in expected.items():
        value = arrays[slot.parameter]
        yield name, slot.to_file(value if slot.layer is None else value[slot.layer])
