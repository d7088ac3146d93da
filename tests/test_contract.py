"""The model contract: what is saved is loaded bit for bit, and whatever does not fit is refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from small_market import STUDENT, TEACHER, dataset, filled, small_tokenizer

from jaxsearch.data.prompts import PromptConfig
from jaxsearch.data.tokenizer import FILE, Tokenizer
from jaxsearch.models import contract as contracts
from jaxsearch.models.contract import (
    CONTRACT_FILE,
    WEIGHTS_FILE,
    Contract,
    ContractError,
    Golden,
    load_model,
    make_module,
    read_contract,
    save_model,
)
from jaxsearch.models.scorer import BiEncoder, Scorer

ACTIONS = ("click", "apply")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def ranker(tokenizer: Tokenizer, **changes: Any) -> Contract:
    data = dataset()
    golden = Golden(data.queries["dev"][0], data.documents[0], (0.5, -0.25, 1e-9, 3.0))
    fields: dict[str, Any] = {
        "kind": "ranker",
        "architecture": STUDENT,
        "prompts": {"pair": PromptConfig("ranker", chat="tiny", features=("near",), searcher=())},
        "labels": {name: tokenizer.label(name) for name in ("Yes", "No")},
        "actions": ACTIONS,
        "calibrators": {
            "click": {"positions": [], "maps": [{"log_odds": [0.0, 1.0], "probability": [0.25, 0.5]}]}
        },
        "training": {"name": "ranker", "seed": 3},
        "golden": (golden,),
    }
    return Contract(**fields | changes)


def new_module(contract: Contract, seed: int) -> Scorer | BiEncoder:
    return filled(lambda rngs: make_module(contract, rngs), seed)


@pytest.fixture(scope="module")
def saved(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "ranker"
    contract = ranker(tokenizer)
    save_model(folder, new_module(contract, 5), contract, tokenizer)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def flat(module: nnx.Module) -> dict[str, np.ndarray]:
    return {
        ".".join(map(str, path)): np.asarray(value[...])
        for path, value in nnx.to_flat_state(nnx.state(module))
    }


def test_everything_survives(tokenizer: Tokenizer, tmp_path: Path) -> None:
    contract = ranker(tokenizer)
    module = new_module(contract, 5)
    digest = save_model(tmp_path / "a" / "b", module, contract, tokenizer)
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == sorted(
        (CONTRACT_FILE, WEIGHTS_FILE, FILE)
    )
    model = load_model(tmp_path / "a" / "b")
    assert model.contract == contract
    assert model.hash == digest
    assert isinstance(model.module, Scorer)
    assert model.module.label_ids == tuple(contract.labels.values())
    before, after = flat(module), flat(model.module)
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(model.module)))
    assert model.module.decoder.layers.q.get_metadata()["axes"] == ("layer", "embed", "heads", "head_dim")
    assert model.tokenizer.encode(["Senior nurse <|end|>"]) == tokenizer.encode(["Senior nurse <|end|>"])


def test_a_copy_of_a_loaded_model_is_the_same_file(saved: Path, tmp_path: Path) -> None:
    model = load_model(saved)
    assert save_model(tmp_path, model.module, model.contract, model.tokenizer) == model.hash
    for name in (CONTRACT_FILE, WEIGHTS_FILE, FILE):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.parametrize("kind", ["base", "judge", "bi_encoder"])
def test_other_kinds(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    parts = {"base": ["pair"], "judge": ["pair"], "bi_encoder": ["query", "document"]}[kind]
    names = [str(grade) for grade in range(5)] if kind == "judge" else []
    prompts = {part: PromptConfig({"pair": "judge"}.get(part, part), chat="tiny") for part in parts}
    contract = Contract(
        kind,
        dataclasses.replace(TEACHER, tied=False),
        prompts,
        {name: tokenizer.label(name) for name in names},
    )
    save_model(tmp_path, new_module(contract, 0), contract, tokenizer)
    model = load_model(tmp_path)
    assert model.contract == contract
    assert isinstance(model.module, BiEncoder if kind == "bi_encoder" else Scorer)
    assert contract.tolerance == 1e-3
    assert (
        dataclasses.replace(
            contract, architecture=dataclasses.replace(TEACHER, compute_dtype="bfloat16")
        ).tolerance
        > 0.1
    )


def test_how_attention_was_computed_stays_out(tokenizer: Tokenizer, saved: Path, tmp_path: Path) -> None:
    contract = ranker(tokenizer, architecture=dataclasses.replace(STUDENT, attention="pallas"))
    save_model(tmp_path, new_module(contract, 5), contract, tokenizer)
    assert read_contract(tmp_path) == read_contract(saved)
    assert (tmp_path / CONTRACT_FILE).read_bytes() == (saved / CONTRACT_FILE).read_bytes()


def test_an_interrupted_save_leaves_no_contract(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = ranker(tokenizer)
    module = new_module(contract, 6)

    def stop(self: Tokenizer, folder: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        save_model(folder, module, contract, tokenizer)
    with pytest.raises(
        ContractError, match=r"holds no contract\.json: give the `model` folder of a finished run"
    ):
        load_model(folder)


def test_nan_is_never_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    contract = ranker(tokenizer, training={"loss": float("nan")})
    with pytest.raises(ValueError, match="JSON compliant"):
        save_model(tmp_path, new_module(contract, 0), contract, tokenizer)
    assert not (tmp_path / CONTRACT_FILE).exists()


# --- refusals ------------------------------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change contract.json; a returned list replaces it."""
    values = json.loads((folder / CONTRACT_FILE).read_text())
    changed = change(values)
    (folder / CONTRACT_FILE).write_text(json.dumps(changed if isinstance(changed, list) else values))


def rehash(folder: Path) -> None:
    """Make the contract's hashes those of the files, as somebody who means harm would."""
    edit(
        folder,
        lambda v: v.update(sha256={name: contracts._digest(folder / name) for name in (WEIGHTS_FILE, FILE)}),
    )


def change_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", [WEIGHTS_FILE, FILE])
def test_files_other_than_the_contract_was_written_for(folder: Path, name: str) -> None:
    change_bytes(folder / name)
    with pytest.raises(
        ContractError, match=rf"{name} is missing or is not the file .*: copy the whole folder"
    ):
        load_model(folder)
    (folder / name).unlink()
    with pytest.raises(ContractError, match=f"{name} is missing"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: [v], "'list' object"),
        (lambda v: v.update(format=2), "format is 2, this version reads 1"),
        (lambda v: v.pop("format"), "format is None"),
        (lambda v: v.update(kind="poet"), "kind is 'poet', not one of base, judge, ranker, bi_encoder"),
        (lambda v: v.update(kind="bi_encoder"), "labels are Yes, No, a bi_encoder has none"),
        (lambda v: v.update(kind="judge"), "labels are Yes, No, a judge has 0, 1, 2, 3, 4"),
        (lambda v: v.pop("sha256"), "sha256"),
        (lambda v: v.update(sha256={}), "sha256 is {}"),
        (lambda v: v["sha256"].update({"../../etc/passwd": "0"}), "sha256 is"),
        (
            lambda v: v.update(labels={"No": v["labels"]["No"], "Yes": v["labels"]["Yes"]}),
            "labels are No, Yes",
        ),
        (lambda v: v["labels"].pop("No"), "labels are Yes, a ranker has Yes, No"),
        (lambda v: v.update(labels=None), "NoneType"),
        (lambda v: v.update(actions="click"), "actions are 'click', not a list"),
        (lambda v: v.update(actions=[1]), "actions are [1]"),
        (lambda v: v.update(prompts={}), "prompts.pair is missing"),
        (lambda v: v.update(calibrators=["x"]), "calibrators is ['x'], not an object"),
        (
            lambda v: v["prompts"]["pair"].update(kind="judge"),
            "prompts.pair is missing or not of kind 'ranker'",
        ),
        (lambda v: v["prompts"]["pair"].update(features=["luck"]), "prompt.features has 'luck'"),
        (lambda v: v["prompts"]["pair"].update(features="near"), "prompt.features is 'near'"),
        (lambda v: v["prompts"]["pair"].update(searcher="headline"), "prompt.searcher is 'headline'"),
        (
            lambda v: v["prompts"]["pair"].update(max_document_tokens="96"),
            "prompt.max_document_tokens is '96'",
        ),
        (lambda v: v["prompts"]["pair"].update(colour="red"), "colour"),
        (lambda v: v["architecture"].pop("rope_theta"), "rope_theta"),
        (lambda v: v["architecture"].update(rope_theta=-1.0), "DecoderConfig.rope_theta is -1.0"),
        (lambda v: v["architecture"].update(layers="1"), "DecoderConfig.layers is '1'"),
        (lambda v: v["golden"][0].update(scores=[1.0]), "golden scores (1.0,) are not 4 finite numbers"),
        (lambda v: v["golden"][0].update(scores=[1.0, 1.0, 1.0, float("nan")]), "not 4 finite numbers"),
        (lambda v: v["golden"][0].update(scores="much"), "could not convert"),
        (lambda v: v["golden"][0]["query"].update(text=""), "Query.text is ''"),
        (lambda v: v["golden"][0]["document"].update(fields={}), "Document.fields is {}"),
        (lambda v: v.pop("golden") and None, "golden"),
    ],
)
def test_contracts_that_do_not_make_sense(folder: Path, change: Any, words: str) -> None:
    edit(folder, change)
    with pytest.raises(ContractError, match=r"contract\.json cannot be used") as caught:
        load_model(folder)
    assert words in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 200_000])
def test_contracts_that_are_no_json(folder: Path, content: bytes) -> None:
    (folder / CONTRACT_FILE).write_bytes(content)
    with pytest.raises(ContractError, match="cannot be used"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["labels"].update(Yes=v["labels"]["Yes"] + 1), r"label 'Yes' is token \d+, the tokenizer says \d+"),
        (lambda v: v["architecture"].update(vocab_size=20), r"vocab_size is 20, the tokenizer has \d+ tokens"),
        (lambda v: v["architecture"].update(layers=2), "more parameters than"),
        (lambda v: v["architecture"].update(layers=10**9, width=10**6), "more parameters than"),
        (lambda v: v["architecture"].update(mlp_width=8), r"weights: .* is float32 \(1, .*the architecture needs"),
        (lambda v: v["architecture"].update(qk_norm=False), r"unknown tensors decoder\.layers\.k_norm, decoder\.layers\.q_norm"),
        (lambda v: v["architecture"].update(heads=1, kv_heads=1, head_dim=8), "weights: .* has|weights: .* is float32"),
    ],
)  # fmt: skip
def test_contracts_of_other_weights_or_tokenizers(folder: Path, change: Any, words: str) -> None:
    edit(folder, change)
    with pytest.raises(ContractError, match=words):
        load_model(folder)


def test_one_action_more_or_less(folder: Path) -> None:
    def fewer(values: dict[str, Any]) -> None:
        values["actions"] = ["click"]
        values["golden"] = []

    edit(folder, fewer)
    with pytest.raises(
        ContractError,
        match=r"weights: action_head is float32 \(2, 8\), the architecture needs float32 \(1, 8\)",
    ):
        load_model(folder)


@pytest.mark.parametrize("damage", ["cut", "text", "half", "integers", "missing", "extra"])
def test_weights_that_are_rehashed_but_wrong(folder: Path, damage: str) -> None:
    path = folder / WEIGHTS_FILE
    tensors = load_file(path)
    words = "is damaged"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "text":
        path.write_bytes(b"weights" * 10_000)
    elif damage in ("half", "integers"):
        dtype = np.float16 if damage == "half" else np.int64
        save_file({name: value.astype(dtype) for name, value in tensors.items()}, path)
        words = "more parameters than" if damage == "half" else "is int64"
    elif damage == "missing":
        del tensors["decoder.final_norm"]
        save_file(tensors | {"x": np.zeros(100, np.float32)}, path)
        words = "weights: unknown tensors x"
    else:
        save_file(tensors | {"decoder.layers.bias": np.zeros(3, np.float32)}, path)
        words = "unknown tensors decoder.layers.bias; this is another architecture"
    rehash(folder)
    with pytest.raises(ContractError) as caught:
        load_model(folder)
    assert words in str(caught.value)


def test_a_tokenizer_in_which_answers_are_other_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    from jaxsearch.data.tokenizer import train

    train(["an entirely different text, which gives fewer merges"], 290).save(folder)
    rehash(folder)
    with pytest.raises(ContractError, match="label 'Yes' is token"):
        load_model(folder)
    (folder / FILE).write_text("{}")
    rehash(folder)
    with pytest.raises(ValueError, match="is damaged"):
        load_model(folder)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_no_model_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(ContractError, match="holds no contract"):
        load_model(tmp_path / name)
