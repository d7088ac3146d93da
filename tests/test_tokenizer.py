"""The tokenizer: text stays text, answers are single tokens, files are data."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxsearch.data.tokenizer import FILE, LABELS, TINY_CONTROL, Tokenizer, train
from jaxsearch.errors import InputError

TEXTS = ["Senior nurse in Austin with Excel 2010", "Northwind Works: welder, Boston", "no yes No. 1"] * 3
SMALLEST = 256 + len(TINY_CONTROL) + len(LABELS)
MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "[INST]")


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return train(TEXTS, 300)


def qwen_like() -> tokenizers.Tokenizer:
    """As Qwen3 declares them: the roles are special, the thinking and tool marks are not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    for mark in MARKS:
        inner.add_tokens([AddedToken(mark, special=mark.startswith("<|"), normalized=False)])
    return inner


def test_labels_are_single_different_tokens(tiny: Tokenizer) -> None:
    ids = [tiny.label(text) for text in LABELS]
    assert len(set(ids)) == 7
    assert max(ids) < tiny.vocab_size
    assert min(ids) >= len(TINY_CONTROL)
    assert [tiny.decode([index]) for index in ids] == list(LABELS)
    with pytest.raises(InputError, match=r"label is 'Maybe so': it is [2-9] tokens"):
        tiny.label("Maybe so")
    with pytest.raises(InputError, match="it is 0 tokens"):
        tiny.label("")


def test_digits_stand_alone_and_labels_are_whole_words(tiny: Tokenizer) -> None:
    (number,) = tiny.encode(["Excel 2010"])
    assert [tiny.decode([index]) for index in number[-4:]] == list("2010")
    no = tiny.label("No")
    (in_word,), (alone,) = tiny.encode(["Northwind"]), tiny.encode(["No. 1"])
    assert no not in in_word
    assert alone[0] == no


def test_a_word_is_the_same_token_wherever_it_stands(tiny: Tokenizer) -> None:
    (first,), (inside,), (padded,) = (
        tiny.encode(["welder"]),
        tiny.encode(["Austin Welder"]),
        tiny.encode(["  welder"]),
    )
    assert first == padded == inside[-len(first) :]


def test_controls_have_the_first_ids(tiny: Tokenizer) -> None:
    assert [tiny.control(token) for token in TINY_CONTROL] == [0, 1, 2, 3]
    with pytest.raises(
        InputError, match=r"'<\|im_start\|>': this tokenizer has none; choose the chat format"
    ):
        tiny.control("<|im_start|>")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([*TINY_CONTROL, "<|USER|>", "<|", "|>", "user", "\x00", "Yes", " "]),
            st.text(st.characters(codec="utf-8"), max_size=4),
        ),
        max_size=8,
    )
)
def test_text_never_becomes_a_control_token(parts: list[str]) -> None:
    tokenizer = _tiny()
    text = "".join(parts)
    (ids,) = tokenizer.encode([text])
    assert not {0, 1, 2, 3} & set(ids)
    # Nothing is lost but capitals and spaces; decoding marks is no way round either.
    assert letters(tokenizer.decode(ids)) == letters(text)


def letters(text: str) -> str:
    return "".join(text.split()).casefold()


_kept: list[Tokenizer] = []


def _tiny() -> Tokenizer:
    if not _kept:
        _kept.append(train(TEXTS, 300))
    return _kept[0]


@pytest.mark.parametrize("mark", MARKS)
def test_marks_of_checkpoints_are_text_too(mark: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(qwen_like())
    index = tokenizer.control(mark)
    (ids,) = tokenizer.encode([f"a{mark}b {mark}"])
    assert index not in ids
    assert len(ids) == 3 + 2 * len(mark)  # letter by letter
    assert tokenizer.decode([*ids, index]) == f"a{mark}b {mark}"
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.control(mark) == index
    assert again.encode([f"a{mark}b {mark}"]) == [ids]
    assert again.vocab_size == tokenizer.vocab_size == 256 + len(MARKS)


def test_encode_many_at_once(tiny: Tokenizer) -> None:
    texts = ["nurse", "", "welder in Boston", "☃\u0000"]
    assert tiny.encode(texts) == [tiny.encode([text])[0] for text in texts]
    assert tiny.encode([]) == []
    assert tiny.encode([""]) == [[]]


def test_padding_and_truncation_of_the_file_do_not_apply() -> None:
    inner = qwen_like()
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    assert [len(ids) for ids in Tokenizer(inner).encode(["abc", "abcdef"])] == [3, 6]


def test_same_texts_same_tokenizer(tiny: Tokenizer, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    train(TEXTS, 300).save(tmp_path / "a")
    tiny.save(tmp_path / "b")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == [FILE]
    assert Tokenizer.load(tmp_path / "a").encode(TEXTS) == tiny.encode(TEXTS)


def test_vocabulary_size(tiny: Tokenizer) -> None:
    assert SMALLEST <= tiny.vocab_size <= 300
    assert train(["a"], SMALLEST).vocab_size <= SMALLEST
    with pytest.raises(InputError, match=f"vocab_size is {SMALLEST - 1}: use at least {SMALLEST}"):
        train(TEXTS, SMALLEST - 1)


def test_ids_with_gaps_are_below_the_vocabulary_size() -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 900}, unk_token="a"))
    assert Tokenizer(inner).vocab_size == 901


@pytest.mark.parametrize("content", [None, "", "{}", '{"version": "1.0"}', "[" * 300])
def test_bad_files(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(InputError, match="no tokenizer there" if content is None else "is damaged"):
        Tokenizer.load(tmp_path)


def test_nothing_but_json_is_saved(tiny: Tokenizer, tmp_path: Path) -> None:
    tiny.save(tmp_path)
    assert json.loads((tmp_path / FILE).read_text())["model"]["type"] == "BPE"
