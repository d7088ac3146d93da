"""The table of facts that the project carries, and its rebuilding from a release."""

from pathlib import Path

import pytest

from jaxsearch.data import facts
from jaxsearch.data.facts import MAX_TECHNOLOGIES, MAX_TITLES, occupations


def test_the_table_holds_what_the_generator_needs() -> None:
    table = occupations()
    codes = [item.code for item in table]
    assert len(table) == 923  # occupations with task statements
    assert codes == sorted(set(codes))
    known = set(codes)
    for item in table:
        assert item.title
        assert len(item.alternate_titles) <= MAX_TITLES
        assert len(item.technologies) <= MAX_TECHNOLOGIES
        assert len(item.related) == 3
        related = [code for tier in item.related for code in tier]
        assert known.issuperset(related)
        assert item.code not in related
        assert len(set(related)) == len(related)


def test_titles_are_facts_and_belong_to_one_occupation() -> None:
    owners: dict[str, str] = {}
    for item in occupations():
        for title in item.alternate_titles:
            assert owners.setdefault(title.lower(), item.code) == item.code
            assert len(title) <= 40  # names, not sentences
        assert all(len(name) <= 32 for name in item.technologies)
    assert not {item.title.lower() for item in occupations()} & set(owners)
    assert len(owners) > 10_000


RELEASE = {
    "Task Statements.txt": "O*NET-SOC Code\tTask\n1\tDo.\n2\tDo.\n3\tDo.\n",
    "Occupation Data.txt": "O*NET-SOC Code\tTitle\tDescription\n1\tCook\tSecret words\n2\tBaker\tx\n3\tWaiter\tx\n4\tIdle\tx\n",
    "Alternate Titles.txt": "O*NET-SOC Code\tAlternate Title\n1\tGrill Chef\n1\tBaker\n1\tShared Hand\n2\tShared Hand\n2\tBread Maker\n"
    "2\t(odd) title!\n3\tServer, Head\n",
    "Technology Skills.txt": "O*NET-SOC Code\tExample\tHot Technology\n1\tZ oven\tY\n1\tA oven\tN\n1\t" + "x" * 33 + "\tY\n",
    "Related Occupations.txt": "O*NET-SOC Code\tRelated O*NET-SOC Code\tRelatedness Tier\n"
    "1\t3\tSupplemental\n1\t2\tPrimary-Short\n1\t4\tPrimary-Long\n",
}  # fmt: skip


def test_rebuilt_from_a_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in RELEASE.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(facts, "TABLE", tmp_path / "table.jsonl.gz")
    occupations.cache_clear()
    try:
        facts.main(str(tmp_path))
        first = (tmp_path / "table.jsonl.gz").read_bytes()
        facts.main(str(tmp_path))
        assert (tmp_path / "table.jsonl.gz").read_bytes() == first
        table = {item.code: item for item in occupations()}
    finally:
        occupations.cache_clear()
    assert "3 occupations" in capsys.readouterr().out
    assert list(table) == ["1", "2", "3"]  # 4 has no tasks
    # "Baker" is another occupation's title, "Shared Hand" belongs to two, and the odd ones are no plain names.
    assert [table[code].alternate_titles for code in "123"] == [("Grill Chef",), ("Bread Maker",), ()]
    assert table["1"].technologies == ("Z oven", "A oven")  # hot ones first, long names left out
    assert table["1"].related == (("2",), (), ("3",))
    assert b"Secret" not in first
