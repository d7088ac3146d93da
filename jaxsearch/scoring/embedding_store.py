"""Embeddings of a corpus, made offline by a MixLM encoder and read a candidate list at a time (paper section 6).

A store lies on local disk or in a bucket (`gs://...`, `s3://...`), through TensorStore:

- `embeddings/`: one array [rows, S, W], sharded Zarr, to which rows are only ever appended;
- `index-N.npz`: which row belongs to which document, and to which text of it;
- `store.json`: whose embeddings these are, and which index holds. It is replaced last: a reader sees the old documents or the new ones;
- `building/`: what an unfinished job has done, so that the next one goes on from there, and which rows it claimed before it wrote them:
  two jobs at once never write the same rows, and all but one of them fail.

Rows of documents that changed or went, or of a part that was interrupted, are not used again; a store built anew has none.

Axes: n documents, S embeddings per document, W width.
"""

import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from jaxsearch.data.records import Document, content_hash, unique_ids
from jaxsearch.data.store_kinds import other_kind
from jaxsearch.errors import InputError
from jaxsearch.models.contract import ContractError, MixLMPart, Model
from jaxsearch.scoring.mixed import Fetch, encoder_golden_error, make_document_embedder

FORMAT = 1
META, ARRAY, BUILDING = "store.json", "embeddings/", "building/"
SCHEMES = ("file", "gs", "s3")
"""Of URLs: a machine's own disk, and buckets."""
SHARD = 1024
"""Rows per file."""
PART = 1024
"""Documents encoded between two notes of what is done: what an interruption costs at most."""


class EmbeddingStoreError(InputError):
    """A store that cannot be used; the message names what differs and what to do."""


@dataclass(frozen=True)
class EmbeddingMeta:
    """What `store.json` says."""

    encoder: str
    """Contract hash."""
    tokens: int
    """S."""
    width: int
    """W."""
    dtype: str
    """"float32" or "bfloat16"."""
    index: str = ""
    """File of the index; empty: the first job is not finished."""
    sha256: str = ""
    """Of the index."""
    documents: int = 0
    rows: int = 0
    """Rows written, those of gone documents included."""
    format: int = FORMAT


class Entry(NamedTuple):
    """Where a document's embeddings are, and of what text they are."""

    content: bytes
    """`content_hash` of the document."""
    row: int
    size: int
    """Embeddings; S, or fewer of a short document."""


@dataclass(frozen=True)
class EncodeReport:
    """What one run of the job did."""

    documents: int
    encoded: int
    resumed: int
    """Encoded by an earlier run that was interrupted."""
    dropped: int
    """Documents that were in the store and are no more."""


class EmbeddingStore:
    """A finished store, open for reading. Make it with `open`."""

    def __init__(self, path: str, meta: EmbeddingMeta, entries: Mapping[str, Entry], array: Any):
        self.path, self.meta = path, meta
        self._entries, self._array = entries, array
        self._memory: NDArray | None = None

    @classmethod
    def open(cls, path: str | Path, ranker: MixLMPart | None = None) -> "EmbeddingStore":
        """A store by its folder or URL.

        Args:
          path: local folder, or URL of a bucket.
          ranker: what the contract of a MixLM ranker says of its encoder; the store must be of that one.

        Raises:
          EmbeddingStoreError: no store there, unfinished, damaged, or of another encoder.
        """
        kv, where = _kvstore(path), str(path)
        meta = _read_meta(kv, where)
        if meta is None:
            raise EmbeddingStoreError(
                f"{where} holds no embedding store ({META}): run `serve.py encode` first"
            )
        if ranker is not None:
            wanted = {"encoder": ranker.encoder, "tokens": ranker.tokens, "width": ranker.width}
            _refuse_difference(where, meta, wanted, "make a store with the ranker's own encoder")
        if not meta.index:
            raise EmbeddingStoreError(
                f"{where} is unfinished: run the same `serve.py encode` again, it resumes"
            )
        return cls(where, meta, _read_index(kv, where, meta), _open_array(kv, where, meta))

    def __len__(self) -> int:
        return len(self._entries)

    def preload(self) -> None:
        """Hold all embeddings in memory (4 S W bytes a row, in bf16 half of it); `fetch` then reads no more.

        Raises:
          EmbeddingStoreError: rows are lost or damaged.
        """
        values = self._read(np.arange(self.meta.rows))
        self._check_rows(values[[entry.row for entry in self._entries.values()]])
        self._memory = values

    def fresh(self, documents: Sequence[Document]) -> NDArray[np.bool_]:
        """bool [n], the documents whose text is the one that was encoded."""
        return np.array([self._entry(document) is not None for document in documents], bool)

    def require(self, documents: Sequence[Document]) -> None:
        """Raise `EmbeddingStoreError`, which names some, unless every document is fresh."""
        stale = [d.id for d, good in zip(documents, self.fresh(documents), strict=True) if not good]
        if stale:
            raise EmbeddingStoreError(
                f"{self.path} has no fresh embedding of {len(stale)} of {len(documents)} documents ({', '.join(stale[:3])}): "
                "run `serve.py encode` again"
            )

    def fetch(self, documents: Sequence[Document]) -> list[NDArray | None]:
        """The embeddings [<= S, W] of each document, in one read; None where there is no fresh one.

        Raises:
          EmbeddingStoreError: rows are lost or damaged.
        """
        return self._fetch([self._entry(document) for document in documents])

    def fetcher(self, documents: Sequence[Document]) -> Fetch:
        """`fetch` by row, for `MixedScorer`; what is fresh is looked up once, now."""
        entries = [self._entry(document) for document in documents]
        return lambda rows: self._fetch([entries[row] for row in rows.tolist()])

    def _entry(self, document: Document) -> Entry | None:
        found = self._entries.get(document.id)
        return found if found is not None and found.content == content_hash(document) else None

    def _fetch(self, entries: Sequence[Entry | None]) -> list[NDArray | None]:
        there = [entry for entry in entries if entry is not None]
        if not there:
            return [None] * len(entries)
        values = self._read(np.array([entry.row for entry in there], np.int64))
        self._check_rows(values)
        found = iter(values)
        return [None if entry is None else next(found)[: entry.size] for entry in entries]

    def _check_rows(self, values: NDArray) -> None:
        """Refuse rows [n, S, W] that were never written: they read as 0."""
        if not values[:, 0].any(axis=-1).all():
            raise EmbeddingStoreError(f"{self.path} has lost rows of its array: delete it and build it anew")

    def _read(self, rows: NDArray) -> NDArray:
        """[n, S, W]."""
        if self._memory is not None:
            return self._memory[rows]
        try:
            return self._array[rows].read().result()
        except (ValueError, OSError) as error:
            raise EmbeddingStoreError(
                f"{self.path} is damaged ({error}): delete it and build it anew"
            ) from error


def encode_documents(
    encoder: Model,
    documents: Sequence[Document],
    path: str | Path,
    *,
    part: int = PART,
    progress: Callable[[int], None] | None = None,
) -> EncodeReport:
    """Bring a store up to date with a corpus: only new and changed documents are encoded, and afterwards it holds these documents alone.

    Readers see what was there before until all is done. A run that is interrupted is continued by the next one. One job at a time: of two
    that overlap at most one ends well, the other one is refused when it meets what the first has claimed or published.

    Args:
      encoder: model of kind "encoder".
      documents: the whole corpus.
      path: local folder, or URL of a bucket.
      part: documents encoded between two notes of what is done.
      progress: called with the number of documents done since the last call.

    Raises:
      ContractError: the model encodes no documents.
      RecordError: a bad document, or two with one id.
      EmbeddingStoreError: there is no document, the place holds something else, an embedding is not finite, the encoder does not reproduce
        its golden embeddings here, or another job is at work.
    """
    embed, mixlm = make_document_embedder(encoder), encoder.contract.mixlm
    if mixlm is None:
        raise ContractError("the encoder's contract says nothing of its embeddings: export it anew")
    if not documents or part < 1:
        raise EmbeddingStoreError(f"{len(documents)} documents in parts of {part}: give at least one of each")
    for document in documents:
        document.validate()
    unique_ids(documents)
    deviation = encoder_golden_error(encoder)
    if not deviation <= encoder.contract.tolerance:
        raise EmbeddingStoreError(
            f"the encoder misses its golden embeddings by {deviation:.3g} of their length (allowed {encoder.contract.tolerance}): "
            "this machine or backend computes it wrongly"
        )
    kv, where = _kvstore(path), str(path)
    fresh = EmbeddingMeta(
        encoder.hash, mixlm.tokens, mixlm.width, encoder.contract.architecture.compute_dtype
    )
    meta = _begin(kv, where, fresh)
    known = _read_index(kv, where, meta) if meta.index else {}
    journal = _read_journal(kv, where)
    before, resumed = (
        set(known),
        {name: entry for part_done in journal.values() for name, entry in part_done.items()},
    )
    known = {**known, **resumed}
    contents = [content_hash(document) for document in documents]
    todo = [i for i, d in enumerate(documents) if d.id not in known or known[d.id].content != contents[i]]
    if progress is not None:
        progress(len(documents) - len(todo))
    claims = _read_claims(kv, where)
    row = max([meta.rows, *(entry.row + 1 for entry in resumed.values()), *claims.values()])
    number = max([-1, *journal, *claims]) + 1
    array = _open_array(kv, where, meta)
    for start in range(0, len(todo), part):
        chosen = todo[start : start + part]
        made = embed([documents[i] for i in chosen])
        for i, values in zip(chosen, made, strict=True):
            if not np.isfinite(values.astype(np.float32)).all() or not values[0].any():
                raise EmbeddingStoreError(
                    f"the embedding of document {documents[i].id!r} is not finite or all 0: look at the encoder's weights"
                )
        _claim(kv, where, number, row + len(chosen))
        _refuse_other_state(kv, where, meta)
        array = _append(array, row, made)
        entries = {
            documents[i].id: Entry(contents[i], row + place, len(values))
            for place, (i, values) in enumerate(zip(chosen, made, strict=True))
        }
        kv.write(f"{BUILDING}{number:06d}.npz", _pack(entries)).result()
        known |= entries
        row, number = row + len(chosen), number + 1
        if progress is not None:
            progress(len(chosen))
    index = {document.id: known[document.id] for document in documents}
    _refuse_other_state(kv, where, meta)
    if todo or journal or set(index) != before:
        _publish(kv, meta, index, row)
    used = sum(documents[i].id in resumed for i in set(range(len(documents))) - set(todo))
    return EncodeReport(len(documents), len(todo), used, len(before - set(index)))


def copy_embeddings(store: EmbeddingStore, documents: Sequence[Document], path: str | Path) -> int:
    """Write the fresh embeddings of these documents into a new store, which holds nothing else.

    Args:
      store: where they are.
      documents: in the order that the new store has.
      path: new local folder, or URL of a bucket.

    Returns:
      How many of the documents have no fresh embedding.

    Raises:
      EmbeddingStoreError: none has one, the place is not empty, or rows of the store are lost or damaged.
    """
    fresh = [document for document, good in zip(documents, store.fresh(documents), strict=True) if good]
    if not fresh:
        raise EmbeddingStoreError(
            f"{store.path} has no fresh embedding of any of {len(documents)} documents: run `serve.py encode` on them"
        )
    kv, where = _kvstore(path), str(path)
    if _keys(kv, where):
        raise EmbeddingStoreError(f"{where} is not empty: give a new place")
    meta = _begin(kv, where, dataclasses.replace(store.meta, index="", sha256="", documents=0, rows=0))
    array, index = _open_array(kv, where, meta), {}
    for start in range(0, len(fresh), PART):
        some = fresh[start : start + PART]
        found = [values for values in store.fetch(some) if values is not None]
        array = _append(array, start, found)
        for place, (document, values) in enumerate(zip(some, found, strict=True), start):
            index[document.id] = Entry(content_hash(document), place, len(values))
    _publish(kv, meta, index, len(fresh))
    return len(documents) - len(fresh)


# --- files -----------------------------------------------------------------------------------------------------------


def _append(array: Any, row: int, made: Sequence[NDArray]) -> Any:
    """The array with the embeddings [<= S, W] of each document from this row on."""
    block = np.zeros((len(made), *array.shape[1:]), array.dtype.numpy_dtype)
    for place, values in enumerate(made):
        block[place, : len(values)] = values
    if array.shape[0] < row + len(made):
        array = array.resize(exclusive_max=[row + len(made), *array.shape[1:]]).result()
    array[row : row + len(made)].write(block).result()
    return array


def _kvstore(path: str | Path) -> Any:
    """A folder of a key-value store."""
    text = str(path)
    spec: Any = text.rstrip("/") + "/"
    scheme, told, _ = text.partition("://")
    if not told:
        spec = {"driver": "file", "path": f"{Path(text).resolve()}/"}
    elif scheme not in SCHEMES:
        raise EmbeddingStoreError(
            f"{text} is no place for a store: give a folder or {', '.join(f'{name}://' for name in SCHEMES)}"
        )
    try:
        return ts.KvStore.open(spec).result()
    except ValueError as error:
        raise EmbeddingStoreError(
            f"{text} is no place for a store ({error}): give a folder or gs://, s3://"
        ) from error


def _read(kv: Any, key: str, where: str) -> bytes | None:
    try:
        found = kv.read(key).result()
    except (
        ValueError,
        OSError,
        NotImplementedError,
    ) as error:  # what a bucket says that is not there, or not ours
        raise EmbeddingStoreError(f"{where}/{key} cannot be read ({error}): look at the place") from error
    return found.value if found.state == "value" else None


def _keys(kv: Any, where: str) -> list[str]:
    """Names of all that is there."""
    try:
        return [name.decode() for name in kv.list().result()]
    except (ValueError, OSError, NotImplementedError) as error:
        raise EmbeddingStoreError(f"{where} cannot be listed ({error}): look at the place") from error


def _read_meta(kv: Any, where: str) -> EmbeddingMeta | None:
    text = _read(kv, META, where)
    if text is None:
        return None
    try:
        values = json.loads(text)
        if other := other_kind(where, values, "embeddings"):
            raise EmbeddingStoreError(other)
        if values.get("format") != FORMAT:
            raise ValueError(f"format is {values.get('format')!r}, this version reads {FORMAT}")
        meta = EmbeddingMeta(**values)
        for name, value in dataclasses.asdict(meta).items():
            if type(value) is not type(dataclasses.asdict(_EXAMPLE)[name]):
                raise ValueError(f"{name} is {value!r}")
        if meta.dtype not in ("float32", "bfloat16") or min(meta.tokens, meta.width) < 1 or meta.rows < 0:
            raise ValueError(
                f"dtype is {meta.dtype}, tokens {meta.tokens}, width {meta.width}, rows {meta.rows}"
            )
    except EmbeddingStoreError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise EmbeddingStoreError(
            f"{where}/{META} is damaged ({error}): delete the store and build it anew"
        ) from error
    return meta


_EXAMPLE = EmbeddingMeta("", 1, 1, "")


def _refuse_difference(where: str, there: EmbeddingMeta, wanted: Mapping[str, object], fix: str) -> None:
    has = dataclasses.asdict(there)
    if names := [name for name, value in wanted.items() if has[name] != value]:
        shown = ", ".join(f"{name} {str(has[name])[:12]} (not {str(wanted[name])[:12]})" for name in names)
        raise EmbeddingStoreError(f"{where} holds embeddings with {shown}: {fix}")


def _begin(kv: Any, where: str, fresh: EmbeddingMeta) -> EmbeddingMeta:
    """The store's own meta, which must be of the same encoder; a new store is begun."""
    meta = _read_meta(kv, where)
    if meta is None:
        if _keys(kv, where):
            raise EmbeddingStoreError(f"{where} is not empty and holds no embedding store: give a new place")
        kv.write(META, json.dumps(dataclasses.asdict(fresh), indent=1).encode()).result()
        return fresh
    names = ("encoder", "tokens", "width", "dtype")
    wanted = {name: getattr(fresh, name) for name in names}
    _refuse_difference(where, meta, wanted, "give another --output, or delete this one")
    return meta


def _pack(entries: Mapping[str, Entry]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(
        file,
        ids=np.frombuffer(json.dumps(list(entries)).encode(), np.uint8),
        contents=np.frombuffer(b"".join(e.content for e in entries.values()), np.uint8).reshape(-1, 16),
        rows=np.array([e.row for e in entries.values()], np.int64),
        counts=np.array([e.size for e in entries.values()], np.int32),
    )
    return file.getvalue()


def _unpack(data: bytes, name: str, meta: EmbeddingMeta | None = None) -> dict[str, Entry]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as part:
            ids = json.loads(part["ids"].tobytes())
            contents, rows, counts = part["contents"], part["rows"], part["counts"]
        found = {
            name: Entry(content.tobytes(), int(row), int(count))
            for name, content, row, count in zip(ids, contents, rows, counts, strict=True)
        }
        if meta is not None and any(
            not 0 <= e.row < meta.rows or not 1 <= e.size <= meta.tokens for e in found.values()
        ):
            raise ValueError("rows or counts are out of range")
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise EmbeddingStoreError(
            f"{name} is damaged ({error}): delete the store and build it anew"
        ) from error
    return found


def _read_index(kv: Any, where: str, meta: EmbeddingMeta) -> dict[str, Entry]:
    data = _read(kv, meta.index, where)
    if data is None or hashlib.sha256(data).hexdigest() != meta.sha256:
        raise EmbeddingStoreError(
            f"{where}/{meta.index} is missing or damaged: delete the store and build it anew"
        )
    return _unpack(data, f"{where}/{meta.index}", meta)


_OTHER_JOB = (
    "another job writes to {where}: let it end, then run this one again, which encodes what is missing"
)


def _building(kv: Any, where: str, end: str) -> list[str]:
    """Keys of what is under way, those that end so."""
    return sorted(name for name in _keys(kv, where) if name.startswith(BUILDING) and name.endswith(end))


def _read_claims(kv: Any, where: str) -> dict[int, int]:
    """The end of the rows that each part has claimed, of jobs that were interrupted or are at work."""
    found = {}
    for name in _building(kv, where, ".claim"):
        data = _read(kv, name, where)
        number = name[len(BUILDING) : -len(".claim")]
        if data is not None and number.isdigit():
            if not data.isdigit():
                raise EmbeddingStoreError(f"{where}/{name} is damaged: delete the store and build it anew")
            found[int(number)] = int(data)
    return found


def _claim(kv: Any, where: str, number: int, end: int) -> None:
    """Make a part, and the rows up to `end`, this job's own, before anything is written to them; one job alone succeeds."""
    key = f"{BUILDING}{number:06d}.claim"
    there = kv.read(key).result()
    if (
        there.state == "value"
        or not kv.write(key, str(end).encode(), if_equal=there.stamp.generation).result().generation
    ):
        raise EmbeddingStoreError(_OTHER_JOB.format(where=where))


def _refuse_other_state(kv: Any, where: str, meta: EmbeddingMeta) -> None:
    """Raise where another job has published since this one began: its tidying took the claims away, and rows may be used twice."""
    if _read_meta(kv, where) != meta:
        raise EmbeddingStoreError(_OTHER_JOB.format(where=where))


def _read_journal(kv: Any, where: str) -> dict[int, dict[str, Entry]]:
    """What an unfinished job has encoded, part by part."""
    found = {}
    for name in _building(kv, where, ".npz"):
        data = _read(kv, name, where)
        number = name[len(BUILDING) : -len(".npz")]
        if data is not None and number.isdigit():
            found[int(number)] = _unpack(data, f"{where}/{name}")
    return found


def _publish(kv: Any, meta: EmbeddingMeta, entries: Mapping[str, Entry], rows: int) -> None:
    """Make these the store's documents, in one replacement; then tidy up."""
    data = _pack(entries)
    number = int(meta.index[len("index-") : -len(".npz")]) + 1 if meta.index else 0
    name = f"index-{number:06d}.npz"
    kv.write(name, data).result()
    new = dataclasses.replace(
        meta, index=name, sha256=hashlib.sha256(data).hexdigest(), documents=len(entries), rows=rows
    )
    kv.write(META, json.dumps(dataclasses.asdict(new), indent=1).encode()).result()
    for key in kv.list().result():
        text = key.decode()
        # The index before this one stays: a reader may just have read its name.
        old = text.startswith("index-") and text not in (name, meta.index)
        if old or text.startswith(BUILDING):
            kv.write(key, None).result()


def _open_array(kv: Any, where: str, meta: EmbeddingMeta) -> Any:
    """The array [rows, S, W]; a row is a chunk of its own, so that a candidate costs its own bytes and no more."""
    inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": [1, meta.tokens, meta.width],
        "codecs": inner,
        "index_codecs": inner,
    }
    metadata = {
        "shape": [0, meta.tokens, meta.width],
        "data_type": meta.dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [SHARD, meta.tokens, meta.width]},
        },
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    spec = {"driver": "zarr3", "kvstore": (kv / ARRAY).spec().to_json()}
    try:
        begun = _read(kv, f"{ARRAY}zarr.json", where) is not None
        array = ts.open(spec if begun else {**spec, "metadata": metadata, "create": True}).result()
    except (ValueError, OSError) as error:
        raise EmbeddingStoreError(
            f"{where}/{ARRAY} is damaged ({error}): delete the store and build it anew"
        ) from error
    if array.shape[0] < meta.rows or array.shape[1:] != (meta.tokens, meta.width):
        raise EmbeddingStoreError(
            f"{where}/{ARRAY} has shape {array.shape}: delete the store and build it anew"
        )
    return array
