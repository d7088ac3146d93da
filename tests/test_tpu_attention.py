"""The TPU kernel compiled for real chips, on a machine without one (needs libtpu: `pip install -e .[tpu]`)."""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed", allow_module_level=True)
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from jax.experimental import topologies

from jaxsearch.models.tpu_attention import attend_packed
from jaxsearch.models.tpu_causal import attend_causal

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("sizes", "heads"), [((1, 4, 900, 60), (16, 8, 128)), ((2, 8, 128, 2000), (9, 3, 64))]
)
def test_the_kernel_compiles(chip, dtype, sizes, heads):
    b, r, t, p = sizes
    n, k, h = heads
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    spec = functools.partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))
    arrays = [spec((b, r, t, heads, h), dtype) for heads in (n, k, k)]
    arrays += [spec((b, p, k, h), dtype) for _ in range(2)]
    arrays += [spec((b, p), bool), spec((b, r, t), jnp.int32)]
    compiled = jax.jit(attend_packed).lower(*arrays).compile()
    assert "custom_call" in compiled.as_text() or "custom-call" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 30


@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize(("length", "keys", "heads"), [(1025, 1025, (16, 8, 128)), (60, 200, (9, 3, 64))])
def test_the_causal_kernel_compiles_with_gradients_and_keeps_no_scores(chip, length, keys, heads):
    n, k, h = heads
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    spec = functools.partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))
    rows = 16
    arrays = [spec((rows, t, heads, h), jnp.bfloat16) for t, heads in ((length, n), (keys, k), (keys, k))]
    step = jax.grad(lambda q, k, v, where: attend_causal(q, k, v, where).astype(jnp.float32).sum(), (0, 1, 2))
    compiled = jax.jit(step).lower(*arrays, spec((rows, keys), bool)).compile()
    scores = 4 * rows * n * length * keys
    assert compiled.memory_analysis().temp_size_in_bytes < max(scores, 1 << 28)
