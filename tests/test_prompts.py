"""The prompt room: who may influence which part, what is cut, and that text stays text."""

import dataclasses
from importlib import resources

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxsearch.data import prompts as prompts_module
from jaxsearch.data.prompts import FEATURES, FORMATS, KINDS, Control, PromptConfig, PromptRoom
from jaxsearch.data.records import Document, Query
from jaxsearch.data.tokenizer import LABELS, Tokenizer, train
from jaxsearch.errors import InputError

CONTROLS = sorted(
    {
        str(piece)
        for form in FORMATS.values()
        for piece in (*form.system, *form.user, *form.answer, form.end)
        if isinstance(piece, Control)
    }
)
QUERY = Query(
    "q1", "nurse in Austin", searcher={"headline": "Head Nurse", "location": "Austin", "wanted_salary": "60"}
)
POSTING = Document(
    "d1", {"title": "Senior Nurse", "pay_range": "50k"}, attributes={"city": "austin"},
    numeric={"company_ctr": 0.256, "age_days": 3.0, "salary": 60.0},
)  # fmt: skip


def every_letter() -> Tokenizer:
    """Bytes, all control tokens of all chat formats, and nothing merged: a token is a letter."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    inner.add_tokens(
        [AddedToken(token, special="think" not in token, normalized=False) for token in CONTROLS]
    )
    return Tokenizer(inner)


LETTERS = every_letter()
CONTROL_IDS = {LETTERS.control(token): token for token in CONTROLS}


def spell(ids: list[int]) -> str:
    """The prompt with its control tokens visible, as «name»."""
    out, text = "", []
    for index in ids:
        if index in CONTROL_IDS:
            out, text = out + LETTERS.decode(text) + f"«{CONTROL_IDS[index]}»", []
        else:
            text.append(index)
    return out + LETTERS.decode(text)


def room(kind: str, **changes: object) -> PromptRoom:
    return PromptRoom(LETTERS, PromptConfig(kind, **changes))  # type: ignore[arg-type]


def whole(kind: str, **changes: object) -> str:
    prompts = room(kind, **changes)
    (prefix,), (document,) = prompts.prefixes([QUERY]), prompts.documents([POSTING])
    pair = prompts.pairs([prompts.pair_text(QUERY, POSTING)])[0]
    return spell(prefix + document.ids + pair + prompts.suffix)


def test_a_ranker_prompt_in_full() -> None:
    assert whole("ranker", features=tuple(FEATURES)) == (
        "«<|im_start|>»system\nYou decide whether a job posting is relevant to a search. Answer Yes or No."
        "«<|im_end|>»\n«<|im_start|>»user\nSearch: nurse in Austin\nSearcher's headline: Head Nurse\n"
        "Searcher's location: Austin\nTitle: Senior Nurse\nPay range: 50k\nPosition on the page: 1\n"
        "Company click rate: 0.26\nDays since posting: 3\nPays what the searcher wants: True\n"
        "In the searcher's city: True\nIs it relevant?«<|im_end|>»\n«<|im_start|>»assistant\n"
    )


def test_qwen3_answers_after_closed_thinking() -> None:
    assert whole("ranker", chat="qwen3").endswith(
        "\nIs it relevant?«<|im_end|>»\n«<|im_start|>»assistant\n«<think>»\n\n«</think>»\n\n"
    )


def test_a_judge_prompt_holds_the_policy_word_for_word() -> None:
    policy = resources.files("jaxsearch.data.job_market").joinpath("policy_jobs.md").read_text("utf-8")
    text = whole("judge")
    assert policy in text
    assert "from 0 to 4" in text
    assert text.index(policy) < text.index("Search: nurse in Austin")
    assert "Grade?" in text


def test_short_prompts_close_query_and_document_with_the_end_token() -> None:
    short = {"style": "short", "chat": "tiny"}
    assert whole("ranker", **short, features=("company_ctr", "near"), searcher=("headline",)) == (
        "«<|user|>»nurse in Austin; Head Nurse«<|end|>»Senior Nurse; 50k rate0.26 near True«<|end|>»«<|assistant|>»"
    )
    assert whole("judge", **short, searcher=()) == (
        "«<|user|>»nurse in Austin«<|end|>»Senior Nurse; 50k«<|end|>»«<|assistant|>»"
    )
    query, document = room("query", **short), room("document", **short)
    assert spell(query.prefixes([QUERY])[0]) == "nurse in Austin; Head Nurse; Austin«<|end|>»"
    assert spell(document.documents([POSTING])[0].ids) == "Senior Nurse; 50k«<|end|>»"


def test_towers_end_with_the_end_token() -> None:
    (query,) = room("query").prefixes([QUERY])
    assert spell(query) == (
        "Instruct: Given a search, find the job postings that answer it.\nQuery: nurse in Austin\n"
        "Searcher's headline: Head Nurse\nSearcher's location: Austin«<|im_end|>»"
    )
    document = room("document", chat="qwen3").documents([POSTING])[0]
    assert spell(document.ids) == "Title: Senior Nurse\nPay range: 50k«<|endoftext|>»"


def test_verticals_have_their_own_words_and_filters_are_told() -> None:
    prompts = room("ranker")
    people = dataclasses.replace(QUERY, vertical="people", searcher={}, filters={"work_place": "remote"})
    jobs, other = prompts.prefixes([QUERY, people])
    assert "a job posting is" in spell(jobs)
    assert "a member profile is" in spell(other)
    assert spell(other).endswith("Search: nurse in Austin\nRequired work place: remote\n")
    text = spell(room("judge").prefixes([people])[0])
    assert (
        resources.files("jaxsearch.data.job_market").joinpath("policy_people.md").read_text("utf-8") in text
    )
    with pytest.raises(InputError, match=r"vertical is 'birds': there is no grading policy policy_birds\.md"):
        prompts_module._policy("birds")


def test_people_are_told_how_near_and_how_active_they_are() -> None:
    prompts = room("ranker", features=tuple(FEATURES))
    searcher = {"headline": "Nurse", "location": "Boston", "connections": "m1 m2"}
    query = Query("q", "nurse", "people", searcher=searcher)
    member = Document(
        "m9", {"headline": "Nurse"}, "people", attributes={"city": "Austin", "connections": "m2 m3"},
        numeric={"connect_rate": 0.256, "active_days": 3.0},
    )  # fmt: skip
    assert prompts.pair_text(query, member, 4) == (
        "\nPosition on the page: 4\nIn the searcher's city: False\nNetwork distance: 2\nMutual connections: 1"
        "\nConnect rate: 0.26\nDays since active: 3"
    )
    assert "m1" not in spell(prompts.prefixes([query])[0])
    assert "m2" not in spell(prompts.documents([member])[0].ids)


WILD = st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(
    [*CONTROLS, "\nSearch: ", "Yes", "{x}"]
)


@settings(max_examples=40, deadline=None)
@given(st.lists(WILD, min_size=1, max_size=5), st.sampled_from(KINDS), st.sampled_from(sorted(FORMATS)))
def test_text_of_users_and_documents_holds_no_control_token(parts: list[str], kind: str, chat: str) -> None:
    """Whatever they write, the control tokens of a prompt are those of its template, in their places."""
    text = "".join(parts)
    query = Query("q", "x" + text, searcher={"headline": text, "location": text}, filters={"a": text})
    document = Document("d", {"title": "x" + text, text or "a": text}, attributes={"city": text})
    prompts = room(kind, chat=chat, features=("near",), max_query_tokens=2000, max_document_tokens=2000)
    calm = Query("q", "x", searcher={"headline": "y", "location": "z"}, filters={"a": "b"})

    def marks(ids: list[int]) -> list[int]:
        return [i for i in ids if i in CONTROL_IDS]

    if kind != "document":
        assert marks(prompts.prefixes([query])[0]) == marks(prompts.prefixes([calm])[0])
    tail = prompts.suffix if kind == "document" else []
    assert marks(prompts.documents([document])[0].ids) == marks(tail)
    assert not marks(prompts.pairs([prompts.pair_text(query, document)])[0])


def test_the_prefix_knows_nothing_of_the_document_and_the_document_nothing_of_the_query() -> None:
    prompts = room("ranker", features=("near", "pays"))
    other_query = Query("q2", "welder", searcher={"headline": "x", "location": "Boston"})
    other_posting = Document("d2", {"title": "Welder"}, attributes={"city": "Boston"})
    alone = [prompts.documents([item])[0] for item in (POSTING, other_posting)]
    assert prompts.documents([POSTING, other_posting]) == alone
    assert prompts.prefixes([QUERY, other_query]) == [prompts.prefixes([q])[0] for q in (QUERY, other_query)]
    # Pairs alone see both.
    texts = [prompts.pair_text(q, d) for q in (QUERY, other_query) for d in (POSTING, other_posting)]
    near = "\nIn the searcher's city: "
    pays = "\nPays what the searcher wants: True"
    assert texts == [f"{near}True{pays}", f"{near}False", f"{near}False", f"{near}True"]


def test_only_documents_are_cut_and_it_is_reported() -> None:
    text = "Title: Senior Nurse\nPay range: 50k"
    for limit, cut in ((len(text), 0), (len(text) + 1, 0), (10, len(text) - 10), (1, len(text) - 1)):
        for kind, tail in (("ranker", ""), ("document", "«<|im_end|>»")):
            part = room(kind, max_document_tokens=limit).documents([POSTING])[0]
            assert spell(part.ids) == text[:limit] + tail
            assert part.truncated == cut
    with pytest.raises(InputError, match=r"query 'q1' .* has 84 tokens, max_query_tokens is 83: shorten it"):
        room("ranker", max_query_tokens=83).prefixes([QUERY])
    assert len(room("ranker", max_query_tokens=84).prefixes([QUERY])) == 1


@pytest.mark.parametrize(
    ("style", "expected"),
    [("short", "a long text; Nurse; Austin"), ("full", "Body: a long text\nTitle: Nurse\nPlace: Austin")],
)
def test_the_longest_field_may_come_first(style: str, expected: str) -> None:
    document = Document("d", {"title": "Nurse", "body": "a long text", "place": "Austin"})
    changed = room("document", style=style, longest_first=True)
    assert changed.document_text(document) == expected
    assert room("document", style=style).document_text(document) != expected


def test_empty_queries_are_refused_by_name() -> None:
    assert room("ranker").prefixes([]) == []
    with pytest.raises(InputError, match="query 'q7' is empty"):
        room("ranker").prefixes([QUERY, Query("q7", " \n")])


@pytest.mark.parametrize(
    ("query", "document", "expected"),
    [
        (QUERY, POSTING, " position4 rate0.26 age3 pays True near True"),
        (QUERY, dataclasses.replace(POSTING, numeric={"salary": 59.9}), " position4 pays False near True"),
        (
            QUERY,
            dataclasses.replace(POSTING, attributes={"city": "Boston"}, numeric={}),
            " position4 near False",
        ),
        (Query("q", "x", searcher={"wanted_salary": "much"}), POSTING, " position4 rate0.26 age3"),
        (Query("q", "x"), Document("d", {"t": "x"}), " position4"),
    ],
)
def test_features_that_are_unknown_are_left_out(query: Query, document: Document, expected: str) -> None:
    prompts = room("ranker", style="short", chat="tiny", features=tuple(FEATURES))
    assert prompts.pair_text(query, document, 4) == expected
    assert prompts.pair_text(query, document) == expected.replace("position4", "position1")


def test_pairs_are_kept_and_equal_to_fresh_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = room("ranker")
    texts = [" age3", "", " age4", " age3"]
    first = prompts.pairs(texts)
    assert first == LETTERS.encode(texts)
    monkeypatch.setattr(LETTERS, "encode", lambda texts: pytest.fail("encoded again"))
    assert prompts.pairs(texts) == first


def test_the_store_of_pairs_is_bounded() -> None:
    prompts = room("ranker")
    prompts._pairs |= {f"old {i}": [i] for i in range(199_998)}
    assert prompts.pairs(["a", "bc"]) == LETTERS.encode(["a", "bc"])
    assert len(prompts._pairs) == 3
    assert prompts.pairs(["old 1", "", "a"]) == LETTERS.encode(["old 1", "", "a"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "poet"}, "prompt.kind is 'poet': use one of judge, ranker, query, document"),
        ({"style": "long"}, "prompt.style"),
        ({"chat": "llama"}, "prompt.chat is 'llama': use one of tiny, chatml, qwen3"),
        ({"features": ("luck",)}, "prompt.features has 'luck': known are position"),
        ({"features": "position"}, "prompt.features is 'position': give a tuple"),
        ({"searcher": "headline"}, "prompt.searcher is 'headline': give a tuple"),
        ({"searcher": (1,)}, "prompt.searcher"),
        ({"max_query_tokens": 0}, "prompt.max_query_tokens is 0"),
        ({"max_document_tokens": 1.5}, "prompt.max_document_tokens is 1.5"),
        ({"max_document_tokens": True}, "prompt.max_document_tokens is True"),
        ({"serving_position": "1"}, "prompt.serving_position is '1'"),
    ],
)
def test_bad_templates(changes: dict, words: str) -> None:
    with pytest.raises(InputError) as caught:
        PromptConfig(**{"kind": "ranker", **changes})
    assert words in str(caught.value)


def test_a_tokenizer_without_the_control_tokens_is_refused() -> None:
    with pytest.raises(InputError, match=r"<\|im_end\|>.*this tokenizer has none"):
        PromptRoom(train(["nurse"], 300), PromptConfig("ranker"))


@pytest.mark.parametrize("chat", sorted(FORMATS))
def test_answers_follow_the_suffix_as_single_tokens(chat: str) -> None:
    # The suffix ends with a control token or a line break, so that no answer can merge with it.
    last = PromptRoom(LETTERS, PromptConfig("judge", chat=chat)).suffix[-1]
    assert last in CONTROL_IDS or LETTERS.decode([last]) == "\n"
    tiny = train(["nurse"], 300)
    assert len({tiny.label(text) for text in LABELS}) == len(LABELS)
