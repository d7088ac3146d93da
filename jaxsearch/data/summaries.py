"""Summaries of documents on disk: made offline, read in the place of the text wherever a prompt holds a document (paper section 5).

A store is a folder:

- `summaries-N.jsonl`: a line for each document: its id, the hash of the text that was summarised, and the summary;
- `store.json`: whose summaries these are, and which file holds. It is replaced last: a reader sees the old summaries or the new ones;
- `building/`: what an unfinished job has done, so that the next one goes on from there.

A summary is fresh while neither its document's text nor its summariser has changed. A document without a fresh one is read in full.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxsearch.data.datasets import Dataset
from jaxsearch.data.jsonl import BadRow, read_rows, write_lines
from jaxsearch.data.records import Document, content_hash, unique_ids
from jaxsearch.data.store_kinds import other_kind
from jaxsearch.errors import InputError

log = logging.getLogger(__name__)

FORMAT = 1
META, BUILDING = "store.json", "building"
_FILE = re.compile(r"summaries-(\d{6})\.jsonl")
FIELD = "summary"
"""The one text field of a document that is read by its summary."""
PART = 256
"""Documents summarised between two notes of what is done: what an interruption costs at most."""


class SummaryStoreError(InputError):
    """A store that cannot be used; the message names what differs and what to do."""


class Summariser(Protocol):
    """What makes summaries."""

    @property
    def hash(self) -> str:
        """Contract hash, or hash of all settings: another one makes other summaries."""

    @property
    def method(self) -> str:
        """What it is, in a word."""

    def __call__(self, documents: Sequence[Document]) -> list[str]:
        """One summary per document; "" where there is nothing to say, and the document is read in full."""


@dataclass(frozen=True)
class SummaryMeta:
    """What `store.json` says."""

    summariser: str
    """Hash."""
    method: str
    file: str
    sha256: str
    """Of the file."""
    documents: int
    format: int = FORMAT


class Entry(NamedTuple):
    """A summary, and what it is a summary of."""

    content: str
    """`content_hash` of the document, in hex."""
    text: str


@dataclass(frozen=True)
class SummaryReport:
    """What one run of the job did."""

    documents: int
    made: int
    resumed: int
    """Made by an earlier run that was interrupted."""
    dropped: int
    """Documents that were in the store and are no more."""
    empty: int
    """Documents without a summary, which are read in full."""
    replaced: str
    """Hash of the summariser whose summaries were all made anew; empty: it is the same one, or there were none."""


class SummaryStore:
    """A finished store. Make it with `open`."""

    def __init__(self, folder: Path, meta: SummaryMeta, entries: Mapping[str, Entry]):
        self.folder, self.meta, self._entries = folder, meta, entries

    @classmethod
    def open(cls, folder: str | os.PathLike[str], summariser: str = "") -> "SummaryStore":
        """A store by its folder.

        Args:
          folder: of the store.
          summariser: the hash that its summaries must be of; empty: any.

        Raises:
          SummaryStoreError: no finished store there, damaged, or of another summariser.
        """
        root = Path(folder)
        meta = _read_meta(root)
        if meta is None:
            raise SummaryStoreError(
                f"{root} holds no finished store of summaries ({META}): run `serve.py summarise` first"
            )
        if summariser and meta.summariser != summariser:
            raise SummaryStoreError(
                f"{root} holds summaries of summariser {meta.summariser[:12]} ({meta.method}), needed are those of {summariser[:12]}: "
                "run `serve.py summarise` with that one"
            )
        return cls(root, meta, _read_file(root / meta.file, meta.sha256))

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, document: Document) -> str:
        """The document's fresh summary, "" without one."""
        found = self._entries.get(document.id)
        return found.text if found is not None and found.content == content_hash(document).hex() else ""


class Shown(NamedTuple):
    """A corpus as a model reads it."""

    documents: list[Document]
    """Each with its summary for text, or as it was where it has no fresh one."""
    summariser: str
    """Hash; empty: nothing was replaced."""
    full: int
    """Documents that are read in full."""


def show_documents(
    documents: Sequence[Document], folder: str | os.PathLike[str] = "", summariser: str = ""
) -> Shown:
    """The documents as a model reads them.

    Args:
      documents: any, in full.
      folder: store of summaries; empty: the text itself.
      summariser: hash of the summariser whose summaries the model was trained on; empty: on full text.

    Raises:
      SummaryStoreError: a store that cannot be read or is of another summariser, or none where the model needs one.
    """
    if not str(folder):
        if summariser:
            raise SummaryStoreError(
                f"the model was trained on the summaries of summariser {summariser[:12]}: name a store of them (--summaries)"
            )
        return Shown(list(documents), "", len(documents))
    store = SummaryStore.open(folder, summariser)
    shown = [with_summary(document, store.get(document)) for document in documents]
    full = sum(new is old for new, old in zip(shown, documents, strict=True))
    if full:
        log.warning(
            "%s has no fresh summary of %d of %d documents: they are read in full",
            folder, full, len(documents),
        )  # fmt: skip
    return Shown(shown, store.meta.summariser, full)


def with_summary(document: Document, summary: str) -> Document:
    """The document with this text alone; the very same one where there is none."""
    return dataclasses.replace(document, fields={FIELD: summary}) if summary.strip() else document


def show_data(data: Dataset, folder: str | os.PathLike[str] = "", summariser: str = "") -> Dataset:
    """A data set whose documents are as a model reads them, for scoring of given pairs; its fingerprint stays, its name tells the store.

    Not for retrieval, which reads the full text.

    Raises:
      SummaryStoreError: as `show_documents`.
    """
    shown = show_documents(data.documents, folder, summariser)
    if not shown.summariser:
        return data
    other = dataclasses.replace(data, documents=shown.documents, name=f"{data.name}+{shown.summariser[:12]}")
    vars(other)["fingerprint"] = data.fingerprint
    return other


def summarise_documents(
    summariser: Summariser,
    documents: Sequence[Document],
    folder: str | os.PathLike[str],
    *,
    part: int = PART,
    progress: Callable[[int], None] | None = None,
) -> SummaryReport:
    """Bring a store up to date with a corpus: only new and changed documents are summarised, all of them where the summariser is another
    one, and afterwards it holds these documents alone.

    Readers see what was there before until all is done. A run that is interrupted is continued by the next one. One job at a time.

    Args:
      summariser: what makes the summaries.
      documents: the whole corpus.
      folder: of the store.
      part: documents summarised between two notes of what is done.
      progress: called with the number of documents done since the last call.

    Raises:
      RecordError: a bad document, or two with one id.
      SummaryStoreError: there is no document, or the folder holds something else.
    """
    if not documents or part < 1:
        raise SummaryStoreError(f"{len(documents)} documents in parts of {part}: give at least one of each")
    for document in documents:
        document.validate()
    unique_ids(documents)
    root = Path(folder)
    before = _begin(root)
    same = before is not None and before.summariser == summariser.hash
    known = _read_file(root / before.file, before.sha256) if before is not None else {}
    gone = set(known) - {document.id for document in documents}
    journal, number = _read_journal(root, summariser.hash)
    kept = {**(known if same else {}), **journal}
    contents = [content_hash(document).hex() for document in documents]
    pairs = list(zip(documents, contents, strict=True))
    todo = [(d, content) for d, content in pairs if d.id not in kept or kept[d.id].content != content]
    resumed = sum(d.id in journal and journal[d.id].content == content for d, content in pairs)
    if progress is not None:
        progress(len(documents) - len(todo))
    for start in range(0, len(todo), part):
        some = todo[start : start + part]
        texts = summariser([document for document, _ in some])
        made = {d.id: Entry(content, text.strip()) for (d, content), text in zip(some, texts, strict=True)}
        _write_part(root, number, summariser.hash, made)
        kept |= made
        number += 1
        if progress is not None:
            progress(len(some))
    entries = {document.id: kept[document.id] for document in documents}
    if before is None or not same or todo or journal or gone:
        _publish(root, before, summariser, entries)
    return SummaryReport(
        len(documents),
        len(todo),
        resumed,
        len(gone),
        sum(not entry.text for entry in entries.values()),
        before.summariser if before is not None and not same else "",
    )


# --- files -----------------------------------------------------------------------------------------------------------


def _read_meta(root: Path) -> SummaryMeta | None:
    path = root / META
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if other := other_kind(root, values, "summaries"):
            raise SummaryStoreError(other)
        if values.get("format") != FORMAT:
            raise ValueError(f"format is {values.get('format')!r}, this version reads {FORMAT}")
        meta = SummaryMeta(**values)
        for name, value in dataclasses.asdict(meta).items():
            if type(value) is not (int if name in ("documents", "format") else str):
                raise ValueError(f"{name} is {value!r}")
        if not _FILE.fullmatch(meta.file):
            raise ValueError(f"file is {meta.file!r}")
    except SummaryStoreError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SummaryStoreError(f"{path} is damaged ({error}): delete the store and make it anew") from error
    return meta


def _begin(root: Path) -> SummaryMeta | None:
    """What is there already."""
    meta = _read_meta(root)
    if meta is None and root.exists():
        own = (BUILDING, "summaries-", META)  # of a job that was interrupted before there was a store
        if not root.is_dir() or not all(path.name.startswith(own) for path in root.iterdir()):
            raise SummaryStoreError(f"{root} is not empty and holds no store of summaries: give a new folder")
    return meta


def _rows(entries: Mapping[str, Entry]) -> Iterator[dict[str, Any]]:
    for name, entry in entries.items():
        yield {"id": name, "content": entry.content, FIELD: entry.text}


def _read_entries(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The entries of a file, and its first line where that is a head of another shape."""
    entries: dict[str, Entry] = {}
    head: dict[str, Any] = {}
    try:
        for number, row in read_rows(path):
            if isinstance(row, BadRow) or not isinstance(row, dict):
                raise ValueError(f"line {number}: {row}")
            if number == 1 and set(row) == {"summariser"}:
                head = row
                continue
            if set(row) != {"id", "content", FIELD} or not all(isinstance(v, str) for v in row.values()):
                raise ValueError(f"line {number} has not id, content and {FIELD} as strings")
            row[FIELD].encode()  # half a character is in no text
            entries[row["id"]] = Entry(row["content"], row[FIELD])
    except (ValueError, OSError) as error:
        raise SummaryStoreError(f"{path} is damaged ({error}): delete the store and make it anew") from error
    return entries, head


def _read_file(path: Path, sha256: str) -> dict[str, Entry]:
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise SummaryStoreError(f"{path} is missing or damaged: delete the store and make it anew")
    return _read_entries(path)[0]


def _write_part(root: Path, number: int, summariser: str, entries: Mapping[str, Entry]) -> None:
    (root / BUILDING).mkdir(parents=True, exist_ok=True)
    write_lines(root / BUILDING / f"{number:06d}.jsonl", [{"summariser": summariser}, *_rows(entries)])


def _read_journal(root: Path, summariser: str) -> tuple[dict[str, Entry], int]:
    """What an unfinished job of this summariser has made, and the number of the next part; parts of another one are passed over."""
    found: dict[str, Entry] = {}
    number = 0
    for path in sorted((root / BUILDING).glob("*.jsonl")):
        entries, head = _read_entries(path)
        number += 1
        if head.get("summariser") == summariser:
            found |= entries
    return found, number


def _publish(
    root: Path, before: SummaryMeta | None, summariser: Summariser, entries: Mapping[str, Entry]
) -> None:
    """Make these the store's summaries, in one replacement; then tidy up."""
    found = _FILE.fullmatch(before.file) if before is not None else None
    number = int(found[1]) + 1 if found else 0
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"summaries-{number:06d}.jsonl"
    write_lines(path, _rows(entries))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    meta = SummaryMeta(summariser.hash, summariser.method, path.name, digest, len(entries))
    temporary = root / (META + ".tmp")
    temporary.write_text(json.dumps(dataclasses.asdict(meta), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, root / META)
    shutil.rmtree(root / BUILDING, ignore_errors=True)
    for old in root.glob("summaries-*.jsonl"):
        # The file before this one stays: a reader may just have read its name.
        if old.name != path.name and (before is None or old.name != before.file):
            old.unlink()
