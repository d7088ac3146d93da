"""README: its tree names every file and no other, its commands exist, its example records are valid."""

import fnmatch
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from jaxsearch.config import load_config
from jaxsearch.data.jsonl import read_records
from jaxsearch.data.records import Document, Query
from jaxsearch.serving.main import _parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "tpu_setup/README.md", "docs/results.md", "docs/tpu.md")


def blocks(text: str, kind: str) -> list[str]:
    """The fenced blocks of one kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def parse_tree(text: str) -> tuple[set[str], set[str]]:
    """Files, and folders that one line stands for, of a tree indented by two spaces; every file has a description."""
    files, folders, path = set(), set(), []
    lines = [line for line in text.splitlines() if line.strip()]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, about = line.strip().partition(" ")
        assert depth <= len(path), f"{line!r} is indented too far"
        path = [*path[:depth], name]
        opened = (len(following) - len(following.lstrip())) // 2 > depth
        full = "".join(path)
        assert about.strip() or opened, f"{full} has no description"
        assert not opened or name.endswith("/"), f"{full} has lines below it, but no / at its end"
        if not opened:
            (folders if name.endswith("/") else files).add(full)
    return files, folders


def problems(files: set[str], folders: set[str], present: set[str]) -> list[str]:
    """What a tree misses and what it should not have."""
    covered = {path for path in present if any(path.startswith(folder) for folder in folders)}
    empty = {folder for folder in folders if not any(path.startswith(folder) for path in present)}
    return [
        *(f"{path} is missing from the tree" for path in sorted(present - covered - files)),
        *(f"{path} is in the tree, but no file" for path in sorted(files - present)),
        *(f"{path} is in the tree, but has no files" for path in sorted(empty)),
        *(f"{path} has a line of its own and its folder has one for it" for path in sorted(files & covered)),
    ]


def walk(root: Path, folder: str = "") -> set[str]:
    """Files below `root` that .gitignore does not name, without git."""
    lines = (root / ".gitignore").read_text().split()
    found = set()
    for path in (root / folder).iterdir():
        name = folder + path.name
        if path.name == ".git" or any(fnmatch.fnmatch(path.name, line.rstrip("/")) for line in lines):
            continue
        found |= walk(root, name + "/") if path.is_dir() else {name}
    return found


def repository_files() -> set[str]:
    """Tracked files and new ones that are not ignored; in an unpacked archive, all that are not ignored."""
    if not (ROOT / ".git").exists():
        return walk(ROOT)
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return {path for path in listed if path and (ROOT / path).is_file()}


def test_tree_names_every_file() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The tree")[2]
    files, folders = parse_tree(blocks(text, "text")[0])
    assert not problems(files, folders, repository_files())


def test_tree_notices_missing_stale_and_doubled_lines() -> None:
    files, folders = parse_tree("a.py  one\ndata/  all of it\nsub/\n  b.py  two\n  deep/\n    c.py  three\n")
    assert files == {"a.py", "sub/b.py", "sub/deep/c.py"}
    assert folders == {"data/"}
    present = {"a.py", "data/x.txt", "data/y.txt", "sub/b.py", "sub/deep/c.py"}
    assert problems(files, folders, present) == []
    assert problems(files, folders, present | {"sub/new.py"}) == ["sub/new.py is missing from the tree"]
    assert problems(files, folders, present - {"sub/b.py"}) == ["sub/b.py is in the tree, but no file"]
    assert problems(files, {"data/", "gone/"}, present) == ["gone/ is in the tree, but has no files"]
    assert "data/x.txt has a line of its own" in problems(files | {"data/x.txt"}, folders, present)[0]
    with pytest.raises(AssertionError, match="has no description"):
        parse_tree("a.py\n")


def test_walk_leaves_out_what_is_ignored(tmp_path: Path) -> None:
    for name in (".gitignore", "a.py", "sub/b.py", "sub/__pycache__/b.pyc", "x.egg-info/PKG", ".git/config"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("__pycache__/\n*.egg-info/\n" if name == ".gitignore" else "")
    assert walk(tmp_path) == {".gitignore", "a.py", "sub/b.py"}


def commands(text: str) -> list[list[str]]:
    """Shell commands, continued lines joined, comments left out."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def page_commands(page: str) -> list[list[str]]:
    """Those of a page, in its blocks and in its running text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    quoted = re.findall(r"`((?:python|make) [^`]+)`", text)
    return commands(text) + [shlex.split(line) for line in quoted if "NAME" not in line and " | " not in line]


ALL = [command for page in PAGES for command in page_commands(page)]


def test_there_are_commands_to_check() -> None:
    scripts = [words[1] for words in ALL if words[0] == "python"]
    assert scripts.count("train.py") >= 12
    assert scripts.count("serve.py") >= 6
    assert [words for words in ALL if words[:2] == ["make", "demo"]]


@pytest.mark.parametrize(
    "words", [words for words in ALL if words[:2] == ["python", "train.py"]], ids=" ".join
)
def test_train_commands_name_configs_variants_and_options(words: list[str]) -> None:
    assert words[2] == "--config"
    overrides = [word for word in words[4:] if word != "--help"]
    if "--workdir" in overrides:
        place = overrides.index("--workdir")
        del overrides[place : place + 2]
    config = load_config(str(ROOT / words[3]), overrides)
    assert config.name == Path(words[3].partition(":")[0]).stem


@pytest.mark.parametrize(
    "words", [words for words in ALL if words[:2] == ["python", "serve.py"]], ids=" ".join
)
def test_serve_commands_parse(words: list[str]) -> None:
    assert _parser().parse_args(words[2:]).command == words[2]


def test_other_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in ALL:
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile, words
        elif words[0] == "python" and words[1].startswith("benchmarks/"):
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            # What follows --set is train.py's.
            own = words[2 : words.index("--set") + 1] if "--set" in words else words[2:]
            options = [word for word in own if word.startswith("--")]
            assert not [option for option in options if f'"{option}"' not in source], words


def test_example_records_are_valid(tmp_path: Path) -> None:
    examples = [json.loads(block) for block in blocks((ROOT / "README.md").read_text(), "json")]
    document, query, ranking = examples
    for kind, example in ((Document, document), (Query, query)):
        (tmp_path / "one.jsonl").write_text(json.dumps(example) + "\n")
        assert read_records(tmp_path / "one.jsonl", kind)[0].id == example["id"]
    assert ranking["query_id"] == query["id"]
    assert ranking["results"][0]["document_id"] == document["id"]


def test_links_lead_somewhere() -> None:
    for page in (*PAGES, "LOG.md", "CHANGELOG.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        targets = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
        assert not [link for link in targets if not (ROOT / page).parent.joinpath(link).exists()], page
