"""The compile check: FLOPs and HLO counted by hand, shapes without data against real ones, what it refuses."""

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec
from toy_task import ToyTask, toy_config

import jaxsearch.tasks.ranker
from jaxsearch.aot.check import _needed, bounds, trace_step, weak_scaling
from jaxsearch.aot.hlo import Collective, Work, read_work
from jaxsearch.aot.main import main
from jaxsearch.config import ConfigError, MeshConfig, load_config
from jaxsearch.data.datasets import Dataset
from jaxsearch.data.prompts import PromptConfig, PromptRoom
from jaxsearch.data.tokenizer import CountingTokenizer
from jaxsearch.models.decoder import split_batch
from jaxsearch.training.chips import Chip, find_chip
from jaxsearch.training.flops import count_flops
from jaxsearch.training.loop import Trainer
from jaxsearch.training.sharding import BATCH, make_mesh, put_abstract, put_batch

HLO = """
HloModule jit_f, num_partitions=4

%matmul (p.0: bf16[256,512], p.1: bf16[512,128]) -> bf16[256,128] {
  %p.0 = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[512,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = bf16[256,128]{1,0:T(8,128)(2,1)} convolution(%p.0, %p.1), dim_labels=bf_io->bf
}

%slice (p.2: bf16[6,128,128], p.3: s32[]) -> bf16[1,128,128] {
  %p.2 = bf16[6,128,128]{2,1,0} parameter(0)
  %p.3 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.1 = bf16[1,128,128]{2,1,0:S(1)} dynamic-slice(%p.2, %p.3, %zero, %zero), dynamic_slice_sizes={1,128,128}
}

%all-reduce-scatter.2 (p.4: f32[16,8]) -> f32[4,8] {
  %p.4 = f32[16,8]{1,0} parameter(0)
  ROOT %all-reduce.9 = f32[16,8]{1,0} all-reduce(%p.4), replica_groups=[1,4]<=[4], to_apply=%add
}

%body (carry: (s32[], bf16[256,512], bf16[6,128,128])) -> (s32[], bf16[256,512], bf16[6,128,128]) {
  %carry = (s32[]{:T(128)}, bf16[256,512]{1,0}, bf16[6,128,128]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = bf16[256,512]{1,0} get-tuple-element(%carry), index=1
  %w = bf16[6,128,128]{2,1,0} get-tuple-element(%carry), index=2
  %part = bf16[1,128,128]{2,1,0:S(1)} fusion(%w, %i), kind=kLoop, calls=%slice
  %gathered = bf16[512,128]{1,0:S(1)} all-gather(%part), replica_groups=mesh['a'=4,'b'=1] {'a'}, dimensions={0}
  %y = bf16[256,128]{1,0} fusion(%x, %gathered), kind=kOutput, calls=%matmul
  ROOT %out = (s32[]{:T(128)}, bf16[256,512]{1,0}, /*index=2*/bf16[6,128,128]{2,1,0}) tuple(%i, %x, %w)
}

%condition (carry.1: (s32[], bf16[256,512], bf16[6,128,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %carry.1 = (s32[]{:T(128)}, bf16[256,512]{1,0}, bf16[6,128,128]{2,1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (a: (s32[], bf16[256,512], bf16[6,128,128]), g: f32[16,8]) -> f32[4,8] {
  %a = (s32[]{:T(128)}, bf16[256,512]{1,0}, bf16[6,128,128]{2,1,0}) parameter(0)
  %g = f32[16,8]{1,0} parameter(1)
  %loop = (s32[]{:T(128)}, bf16[256,512]{1,0}, bf16[6,128,128]{2,1,0}) while(%a), condition=%condition, body=%body
  %moved = f32[16,8]{1,0} collective-permute(%g), source_target_pairs={{0,1},{1,0}}
  ROOT %scattered = f32[4,8]{1,0} fusion(%moved), kind=kCustom, calls=%all-reduce-scatter.2
}
"""


def test_a_loop_counts_as_often_as_it_runs() -> None:
    work = read_work(HLO)
    assert work.flops == 6 * 2 * 256 * 512 * 128
    assert work.collectives == {
        # Three of four parts of 512 x 128 bf16 come from others.
        "all-gather": Collective(6, 6 * 3 / 4 * 512 * 128 * 2),
        "collective-permute": Collective(1, 16 * 8 * 4),
        "reduce-scatter": Collective(1, 3 / 4 * 16 * 8 * 4),
    }


def test_memory_traffic_counts_slices_and_leaves_out_what_stays_on_the_chip() -> None:
    # In the loop: one slice of the weights, x and y; gathered and part lie in VMEM. The slice's index is 4 bytes.
    loop = 6 * (128 * 128 * 2 + 4 + 256 * 512 * 2 + 256 * 128 * 2)
    others = 2 * 16 * 8 * 4 + 16 * 8 * 4 + 4 * 8 * 4
    assert read_work(HLO).bytes == loop + others


def test_a_batched_matmul_is_a_convolution_with_a_dilated_window() -> None:
    text = """
ENTRY %main (a: bf16[8,32,64], b: bf16[8,64,16]) -> bf16[8,32,16] {
  %a = bf16[8,32,64]{2,1,0} parameter(0)
  %b = bf16[8,64,16]{2,1,0} parameter(1)
  ROOT %c = bf16[8,32,16]{2,1,0} convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf
}
"""
    assert read_work(text).flops == 2 * 8 * 32 * 64 * 16


def test_loops_over_unsigned_counters_count_too() -> None:
    text = HLO.replace("%limit = s32[]", "%limit = u32[]").replace("constant(6)", "constant(3)")
    assert read_work(text).flops == 3 * 2 * 256 * 512 * 128


def test_a_kernel_whose_metadata_have_lines_of_their_own() -> None:
    kernel = """  %k = bf16[256,512]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="jit(f)/pallas_call"}
"""
    place = "  %part = bf16[1,128,128]"
    plain, found = read_work(HLO), read_work(HLO.replace(place, kernel + place))
    assert (found.flops, found.collectives) == (plain.flops, plain.collectives)
    assert found.bytes == plain.bytes + 6 * 2 * 256 * 512 * 2


def test_text_that_is_no_program() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        read_work("nothing")


def test_flops_of_a_kernel_count_its_steps_on_every_device() -> None:
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    spec = PartitionSpec("data", "tensor")

    def square(x: jax.Array) -> jax.Array:
        def kernel(x: Any, out: Any) -> None:
            out[...] = x[...] @ x[...]

        block = pl.BlockSpec((16, 16), lambda i: (i, 0))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, shape, grid=(3,), in_specs=[block], out_specs=block)(x)

    def f(x: jax.Array) -> jax.Array:
        y = jax.shard_map(square, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)
        return y @ y.T

    traced = jax.jit(f).trace(jnp.zeros((4 * 48, 2 * 16))).jaxpr
    kernels = 8 * 3 * 2 * 16**3
    assert count_flops(traced, kernels=True) == kernels
    assert count_flops(traced) == kernels + 2 * 192 * 192 * 32


def test_flops_of_scans_recomputation_and_dead_code() -> None:
    w, x = jnp.zeros((5, 8, 8)), jnp.zeros((4, 8))

    def forward(w: jax.Array, x: jax.Array) -> jax.Array:
        step = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))
        return jax.lax.scan(lambda x, w: (step(x, w), None), x, w)[0].sum()

    one = 2 * 4 * 8 * 8
    assert count_flops(jax.jit(forward).trace(w, x).jaxpr) == 5 * one
    # Forward, again forward, and one matmul for each of the two gradients.
    gradient = jax.grad(forward, argnums=(0, 1))
    assert count_flops(jax.jit(gradient).trace(w, x).jaxpr) == 5 * 4 * one

    def unused(x: jax.Array) -> jax.Array:
        forward(w, x)
        return x

    assert count_flops(jax.jit(unused).trace(x).jaxpr) == 0


def test_bounds_by_hand() -> None:
    chip = Chip(100.0, 1, 10.0, 5.0, ())
    work = Work(200.0, 30.0, {"all-gather": Collective(1, 5.0), "all-reduce": Collective(1, 15.0)})
    assert bounds(work, chip) == {"compute": 2, "memory": 3, "interconnect": 4, "step": 4}


def test_weak_scaling_by_hand() -> None:
    # Four devices receive 3/4 of what there is in 3 s: 256 of them 255/256 of it.
    seconds = {"compute": 6.0, "memory": 9.0, "interconnect": 3.0}
    assert weak_scaling(seconds, 4, 4) == (6 / 9, 1.0)
    least, most = weak_scaling(seconds | {"interconnect": 12.0}, 4, 256)
    assert (least, most) == pytest.approx((6 / (6 + 15.9375), 6 / 15.9375))
    assert weak_scaling(seconds | {"interconnect": 0.0}, 4, 8) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Ran out of memory in memory space hbm. Used 33.50G of 15.75G hbm. Exceeded", 33.5 * 2**30),
        ("the total memory required for HLO temporaries (512.00M) exceeds available HBM", 2**29),
        ("something else", -1),
    ],
)
def test_memory_out_of_the_compilers_message(message: str, expected: float) -> None:
    assert _needed(message) == expected


def test_topologies() -> None:
    assert find_chip("v5e:4x4").hbm_bytes == 16 * 2**30
    with pytest.raises(ConfigError, match="v5e:4x4, v5e:4x8"):
        find_chip("v5e:3x5")
    with pytest.raises(ConfigError, match="v4:2x2x1"):
        find_chip("h100")


def fake_store(folder: str, data: Dataset, actions: tuple[str, ...] = ("relevance",)) -> dict:
    return {
        (pairs.query, int(row)): np.zeros(len(actions), np.float32)
        for pairs in data.pairs
        for row in pairs.documents
    }


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("judge.py:tiny", ()),
        ("judge.py:tiny_grade_first", ()),
        ("retriever.py:tiny", ()),
        ("relevance_teacher.py:tiny", ()),
        ("engagement_teacher.py:tiny", ()),
        ("relevance_teacher.py:tiny", ("--task.label-form", "ordinal", "--task.prompt.kind", "judge")),
        ("ranker.py:tiny", ("--task.relevance-teachers", "x")),
        ("mixlm.py:tiny", ("--task.relevance-teachers", "x", "--task.unique-documents", "4")),
        ("ranker.py:tiny", ("--task.relevance-teachers", "x", "--task.engagement-teachers", "y")),
        (
            "ranker.py:tiny",
            ("--task.relevance-teachers", "x", "--task.engagement-teachers", "y", "--task.truth-weight", "1"),
        ),
    ],
)
def test_batches_without_data_are_real_ones_at_full_length(
    config: str, options: tuple[str, ...], world: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stored_relevance", "stored_actions"):
        monkeypatch.setattr(jaxsearch.tasks.ranker, name, fake_store)
    loaded = load_config(f"configs/{config}", ["--task.model.vocab-size", "300", *options])
    task = loaded.task
    real_task = task.build(loaded)
    real = real_task.batch(np.arange(4), [np.random.default_rng(i) for i in range(4)])
    abstract = task.build_abstract().batch_shape(4)
    assert jax.tree.structure(real) == jax.tree.structure(abstract)

    def check(real: np.ndarray, abstract: jax.ShapeDtypeStruct) -> None:
        assert real.dtype == abstract.dtype
        assert real.shape[0] == abstract.shape[0]
        assert len(real.shape) == len(abstract.shape)
        assert all(a <= b for a, b in zip(real.shape, abstract.shape, strict=True))

    jax.tree.map(check, real, abstract)


def test_longest_prompt_is_as_long_as_its_limits() -> None:
    room = PromptRoom(
        CountingTokenizer(100), PromptConfig("ranker", max_document_tokens=50, features=("pays",))
    )
    longest = room.longest()
    assert longest.document == 50
    assert longest.item == 50 + len(room.suffix) + len(
        room.pairs(["\nPays what the searcher wants: 99.99"])[0]
    )
    opening = len(room._opening("people"))
    assert longest.prefix == max(opening, len(room._opening("jobs"))) + 128 + 1


@pytest.mark.parametrize(
    ("text", "tokens"), [("", 0), ("a", 1), ("abcdefg", 2), ("abcdefgh", 3), ("2024 abc", 6)]
)
def test_counting_tokenizer(text: str, tokens: int) -> None:
    assert len(CountingTokenizer(10).encode([text])[0]) == tokens


def test_a_program_compiled_without_weights_is_the_trainers() -> None:
    config = toy_config(mesh=MeshConfig(fsdp=4))
    task, mesh = ToyTask(config.task), make_mesh(config.mesh)  # type: ignore[arg-type]
    batch = put_batch(task.batch(np.arange(8), [np.random.default_rng(i) for i in range(8)]), mesh)
    shapes = put_abstract(batch, NamedSharding(mesh, BATCH))
    abstract = Trainer(config, task, mesh, abstract=True)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract.state))
    abstract.compile(shapes)
    compiled = abstract.trace(shapes).lower().compile()

    trainer = Trainer(config, task, mesh)
    trainer.compile(batch)
    found = compiled(*jax.tree.map(jnp.copy, trainer.arguments(batch)))
    trainer.step(batch)
    for one, other in zip(jax.tree.leaves(found.params), jax.tree.leaves(trainer.state.params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_teachers_in_the_step_are_counted_by_their_presets() -> None:
    def traced(*options: str) -> tuple[float, set[str]]:
        options = ("--task.relevance-teachers", "tiny", "--task.engagement-teachers", "tiny", *options)
        config = load_config(
            "configs/ranker.py:tiny", ["--task.model.vocab-size", "300", "--batch-size", "2", *options]
        )
        step, inputs, _ = trace_step(
            config, config.task.build_abstract(), make_mesh(MeshConfig(), jax.devices()[:1])
        )
        assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(inputs))
        return count_flops(step.jaxpr), set(inputs[-1] if isinstance(inputs[-1], dict) else inputs[1])

    alone, stored = traced()
    together, online = traced("--task.teachers", "online")
    assert online - stored == {"teachers"}
    assert stored - online == {"relevance_0", "engagement_0"}
    # Two forward passes of models four times as large, beside one student's forward, recomputation and backward passes.
    assert 2.2 < together / alone < 3.5
    with pytest.raises(ConfigError, match="programs of their own"):
        traced("--task.teachers", "async")


def test_activations_stay_split_over_the_batch() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    table = jax.device_put(jnp.ones((16, 8)), NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    tokens = jax.device_put(jnp.zeros((8, 3), jnp.int32), NamedSharding(mesh, BATCH))

    def look_up(keep: Callable[[jax.Array], jax.Array]) -> PartitionSpec:
        def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return keep(jnp.take(table, tokens, axis=0))

        return jax.jit(embed)(table, tokens).sharding.spec

    assert look_up(split_batch) == PartitionSpec(("data", "fsdp"))
    x = jnp.ones((3, 2))
    assert split_batch(x) is x


def test_command_line_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--topology", "v9:4x4", "--config", "configs/ranker.py:tiny"]) == 2
    assert "topology is 'v9:4x4': known are v4:" in capsys.readouterr().err
    assert main(["--topology", "v5e:2x2", "--config", "configs/base.py:tiny"]) == 2
    assert "LanguageModelConfig cannot be compiled without its data" in capsys.readouterr().err
    assert (
        main(["--topology", "v5e:2x2", "--config", "configs/ranker.py:tiny", "--task.model.init-from", "x"])
        == 2
    )
    assert "leave init_from out" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="there is a TPU compiler")
def test_without_a_compiler_it_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--topology", "v5e:2x2", "--config", "configs/ranker.py:tiny"]) == 2
    assert "pip install -c constraints.txt -e '.[tpu]'" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_scoring_compiles_for_a_tpu(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--topology", "v5e:2x2", "--config", "configs/ranker.py:tiny", "--scoring", "--json"]
    assert main(options) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"]
    assert report["device_flops"] == pytest.approx(report["flops"])
    assert report["peak_bytes"] < report["hbm_bytes"] == 16 * 2**30
