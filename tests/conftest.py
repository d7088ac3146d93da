"""Every test runs on eight CPU devices, also where there is a GPU, and refuses silent rank promotion.

`JAX_PLATFORMS=cuda JAX_DEFAULT_MATMUL_PRECISION=highest` runs them on a GPU; those of meshes then lack devices.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import pytest

if TYPE_CHECKING:
    from small_market import Funnel

    from jaxsearch.data.datasets import Dataset
    from jaxsearch.models.contract import Model
    from jaxsearch.serving.bundle import Bundle

if not os.environ.get("JAX_PLATFORMS"):
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def funnel(tmp_path_factory: pytest.TempPathFactory) -> "Funnel":
    """Every stage, trained for three steps on a very small data set; read only."""
    from small_market import train_funnel

    return train_funnel(tmp_path_factory.mktemp("funnel"))


@pytest.fixture(scope="session")
def bundle_folder(funnel: "Funnel", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of that funnel; read only, copy it to change it."""
    from small_market import build_small_bundle

    return build_small_bundle(funnel, tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="module")
def bundle(bundle_folder: Path) -> "Bundle":
    """That bundle, opened."""
    from jaxsearch.serving.bundle import Bundle

    return Bundle.open(bundle_folder)


@pytest.fixture
def world() -> Iterator["Dataset"]:
    """Tasks see the very small data set, and presets are very small."""
    from small_market import small_world

    with small_world() as data:
        yield data


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of a judge that was never trained; read only."""
    from small_models import small_judge

    folder = tmp_path_factory.mktemp("judge")
    small_judge(folder)
    return folder


@pytest.fixture(scope="module")
def judge(judge_folder: Path) -> "Model":
    """That judge, loaded."""
    from jaxsearch.models.contract import load_model

    return load_model(judge_folder)
