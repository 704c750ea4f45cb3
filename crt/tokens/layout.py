"""Files of a token cache: what they hold, and how they are written and checked.

A cache is a folder. For each split there is an index file (`train.h5`) and one or more shards beside it
(`train-00000-of-00013.h5`). The index presents all shards as one HDF5 data set, so any HDF5 reader sees
`codes` (rows, views, tokens), `labels` and `source_index` (rows) of the whole split in `train.h5`.

- `codes`: uint16, or uint32 where the codebook has more than 65,536 codes; contiguous and aligned, so that
  it can be memory-mapped. Row r is one image, column v one view of it (named in the attribute `views`).
- `labels`: class of the row, an index into `class_names` (in the index file).
- `source_index`: number of the row's image in the split of the data set that the codes were made from.
- `block_checksums` (shards): SHA-256 of codes, labels and source_index of each `block_rows` rows.
- attributes: the facts of `CacheHeader`, a digest over facts and checksums, and `complete`, set last.

The bytes of every file depend on its content alone: no times, no padding left over from memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from crt.errors import UserError
from crt.files import refuse_unreadable, replacing, sha256_file
from crt.manifest import MANIFEST, read_manifest
from crt.pipeline import canonical_json

FORMAT = "crt-token-cache"
SCHEMA = 1
# Content digest of a tokenizer or data set that is not at hand, in imported caches.
UNKNOWN = "unknown"
# Rows that one checksum covers where nothing asks for another number.
BLOCK_ROWS = 256
# Codes start at, and whole shards of codes are, a multiple of the largest page size in use (64 KiB, some ARM hosts):
# readers map all shards end to end into one range of addresses.
ALIGNMENT = 65536
# Shards: enough of them to occupy many processes, but neither tiny files nor thousands.
_MIN_SHARD_ROWS, _MIN_SHARD_BYTES, _MAX_SHARDS = 4096, 2**21, 512
_DAMAGE = (OSError, KeyError, ValueError, TypeError, RuntimeError)


@dataclass(frozen=True)
class CacheHeader:
    """Facts that every file of one split's cache states."""

    split: str
    rows: int
    views: tuple[str, ...]
    grid: tuple[int, int]
    """Rows and columns of an image's tokens."""
    codebook_size: int
    num_classes: int
    tokenizer_content: str
    """Content digest of the tokenizer that made the codes."""
    data_content: str
    """Content digest of the data set that they were made from."""
    block_rows: int

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def code_type(self) -> np.dtype:
        return np.dtype("<u2" if self.codebook_size <= 2**16 else "<u4")

    @property
    def label_type(self) -> np.dtype:
        return np.dtype("<u2" if self.num_classes <= 2**16 else "<u4")

    @property
    def row_bytes(self) -> int:
        """Bytes of the codes of one row, all its views."""
        return len(self.views) * self.num_tokens * self.code_type.itemsize

    @property
    def rows_per_shard(self) -> int:
        """Rows of every shard but the last: a function of the facts alone, never of who writes."""
        rows = _MIN_SHARD_ROWS
        while (
            rows * self.row_bytes < _MIN_SHARD_BYTES
            or rows * _MAX_SHARDS < self.rows
            or rows * self.row_bytes % ALIGNMENT
        ):
            rows *= 2
        return rows

    @property
    def num_shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    def shard_range(self, index: int) -> range:
        """The rows of one shard."""
        return range(index * self.rows_per_shard, min((index + 1) * self.rows_per_shard, self.rows))

    def blocks(self, index: int) -> list[range]:
        """The rows of each block of one shard."""
        rows = self.shard_range(index)
        return [range(start, min(start + self.block_rows, rows.stop)) for start in rows[:: self.block_rows]]

    def shard_name(self, index: int) -> str:
        return f"{self.split}-{index:05d}-of-{self.num_shards:05d}.h5"

    @property
    def index_name(self) -> str:
        return f"{self.split}.h5"


@dataclass(frozen=True)
class ShardRecord:
    """What the index knows of one shard."""

    rows: int
    file_bytes: int
    codes_offset: int
    digest: str


@dataclass(frozen=True)
class Shard:
    """One shard's file, checked against the header: all but its codes."""

    record: ShardRecord
    labels: np.ndarray
    source_index: np.ndarray
    block_checksums: np.ndarray
    """(blocks, 32) uint8."""


def block_checksum(codes: np.ndarray, labels: np.ndarray, source_index: np.ndarray) -> bytes:
    """SHA-256 of a block, over the bytes as they are stored.

    Args:
        codes: (rows, views, tokens). labels, source_index: (rows,).
    """
    digest = hashlib.sha256()
    for part in (codes, labels, source_index):
        digest.update(np.ascontiguousarray(part).data)
    return digest.digest()


def write_shard(
    folder: Path,
    temporary: Path,
    header: CacheHeader,
    index: int,
    *,
    codes: np.ndarray,
    labels: np.ndarray,
    source_index: np.ndarray,
) -> Path:
    """Write one shard: it appears in `folder` complete, in one rename.

    Args:
        folder: where the cache lies.
        temporary: file on the same file system to write to before the rename.
        header: facts of the cache.
        index: which shard.
        codes: (rows, views, tokens) integers below the codebook's size.
        labels: (rows,) integers.
        source_index: (rows,) integers.

    Returns:
        The shard's path.
    """
    rows = header.shard_range(index)
    if codes.shape != (len(rows), len(header.views), header.num_tokens):
        raise ValueError(f"shard {index} needs codes of {len(rows)} rows, got shape {codes.shape}")
    codes = np.ascontiguousarray(codes, header.code_type)
    labels, source_index = labels.astype(header.label_type), source_index.astype("<u4")
    blocks = [slice(block.start - rows.start, block.stop - rows.start) for block in header.blocks(index)]
    checksums = b"".join(block_checksum(codes[b], labels[b], source_index[b]) for b in blocks)
    facts = _facts(header) | {"kind": "shard", "shard": index, "first_row": rows.start}

    def fill(file: h5py.File) -> None:
        file.create_dataset("labels", data=labels)
        file.create_dataset("source_index", data=source_index)
        file.create_dataset("block_checksums", data=np.frombuffer(checksums, np.uint8).reshape(-1, 32))
        file.create_dataset("codes", data=codes)

    path = folder / header.shard_name(index)
    with replacing(path, temporary):
        temporary.write_bytes(_file_image(facts, _digest(facts, checksums), fill, align=codes.nbytes))
    return path


def read_shard(folder: Path, header: CacheHeader, index: int) -> Shard:
    """Read a shard's header, labels and checksums, and check the header; the codes are not read.

    Raises:
        UserError: the file is missing, damaged, incomplete, or another cache's.
    """
    path = folder / header.shard_name(index)
    rows = header.shard_range(index)
    expected = _facts(header) | {"kind": "shard", "shard": index, "first_row": rows.start}
    try:
        with h5py.File(path, "r", locking=False) as file:
            facts, digest = _read_facts(file, path)
            codes = file["codes"]
            shape, kind, offset = codes.shape, codes.dtype, codes.id.get_offset()
            labels, source_index = file["labels"][()], file["source_index"][()]
            checksums = file["block_checksums"][()]
    except FileNotFoundError:
        raise UserError(f"{path}: shard is missing: {_remedy(folder)}") from None
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    different = [name for name in expected if facts.get(name) != expected[name]]
    if different:
        name = different[0]
        raise UserError(
            f"{path}: belongs to another cache: {name} is {facts.get(name)!r} and not {expected[name]!r}: "
            f"{_remedy(folder)}"
        )
    sizes_agree = (
        shape == (len(rows), len(header.views), header.num_tokens)
        and kind == header.code_type
        and offset is not None
        and labels.shape == source_index.shape == (len(rows),)
        and digest == _digest(facts, checksums.tobytes())
    )
    if not sizes_agree:
        raise _damaged(path, "its sizes or checksums disagree with its header")
    return Shard(ShardRecord(len(rows), path.stat().st_size, offset, digest), labels, source_index, checksums)


def write_index(folder: Path, temporary: Path, header: CacheHeader, class_names: Sequence[str]) -> Path:
    """Write the index of shards that all lie in `folder`.

    Args:
        folder: where the shards lie.
        temporary: file on the same file system to write to before the rename.
        header: facts of the cache.
        class_names: one per class.

    Returns:
        The index's path.

    Raises:
        UserError: a shard is missing or damaged.
    """
    records = [read_shard(folder, header, index).record for index in range(header.num_shards)]
    facts = _facts(header) | {"kind": "index", "num_shards": header.num_shards}
    names = [name.encode() for name in class_names]
    longest = max(map(len, names))

    def fill(file: h5py.File) -> None:
        file.create_dataset("class_names", data=np.array(names, h5py.string_dtype("utf-8", longest)))
        for column in ("rows", "file_bytes", "codes_offset"):
            values = np.array([getattr(record, column) for record in records], "<i8")
            file.create_dataset(f"shard_{column}", data=values)
        digests = np.frombuffer(b"".join(bytes.fromhex(record.digest) for record in records), np.uint8)
        file.create_dataset("shard_digests", data=digests.reshape(-1, 32))
        tokens = (len(header.views), header.num_tokens)
        _create_virtual(file, "codes", header, header.code_type, tokens)
        _create_virtual(file, "labels", header, header.label_type, ())
        _create_virtual(file, "source_index", header, np.dtype("<u4"), ())

    path = folder / header.index_name
    digest = _digest(facts, _index_content(class_names, records))
    with replacing(path, temporary):
        temporary.write_bytes(_file_image(facts, digest, fill))
    return path


def read_index(path: Path) -> tuple[CacheHeader, list[str], list[ShardRecord]]:
    """Read and check an index: header, class names, and what it knows of each shard.

    Raises:
        UserError: the file is missing, damaged, incomplete, of another schema, or no index.
    """
    if not path.is_file():
        # No advice to delete a folder that may hold something else.
        raise UserError(f"{path}: not found: give the tokenize stage's output folder, or run that stage again")
    try:
        with h5py.File(path, "r", locking=False) as file:
            facts, digest = _read_facts(file, path)
            if facts["kind"] != "index":
                raise UserError(f"{path}: is a {facts['kind']} of a cache: name its index {facts['split']}.h5")
            header = _header(facts)
            class_names = [name.decode() for name in file["class_names"][()]]
            columns = [file[f"shard_{name}"][()].tolist() for name in ("rows", "file_bytes", "codes_offset")]
            digests = [row.tobytes().hex() for row in file["shard_digests"][()]]
        records = [ShardRecord(*row) for row in zip(*columns, digests, strict=True)]
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    if digest != _digest(facts, _index_content(class_names, records)) or len(records) != header.num_shards:
        raise _damaged(path, "its digest disagrees with its content")
    return header, class_names, records


def check_size(path: Path, record: ShardRecord) -> None:
    """Compare a shard's size with what the index recorded.

    Raises:
        UserError: the file is missing or has another size.
    """
    try:
        size = path.stat().st_size
    except OSError:
        raise UserError(f"{path}: shard is missing: {_remedy(path.parent)}") from None
    if size != record.file_bytes:
        raise UserError(f"{path}: has {size} bytes instead of {record.file_bytes}: {_remedy(path.parent)}")


def _facts(header: CacheHeader) -> dict[str, Any]:
    facts = asdict(header)
    return {"format": FORMAT, "schema": SCHEMA} | facts | {"views": list(header.views), "grid": list(header.grid)}


def _header(facts: dict[str, Any]) -> CacheHeader:
    values = {name: facts[name] for name in CacheHeader.__dataclass_fields__}
    return CacheHeader(**values | {"views": tuple(facts["views"]), "grid": tuple(facts["grid"])})


def _digest(facts: dict[str, Any], content: bytes) -> str:
    return hashlib.sha256(canonical_json(facts).encode() + b"\0" + content).hexdigest()


def _index_content(class_names: Sequence[str], records: Sequence[ShardRecord]) -> bytes:
    return canonical_json([list(class_names), [asdict(record) for record in records]]).encode()


def _file_image(
    facts: dict[str, Any], digest: str, fill: Callable[[h5py.File], None], align: int | None = None
) -> bytes:
    """The bytes of an HDF5 file, made in memory: only whole files meet the disk, and its errors stay plain.

    Args:
        facts: attributes, written in this order.
        digest: attribute that guards the others.
        fill: creates the data sets.
        align: objects of so many bytes and more start at a multiple of ALIGNMENT.
    """
    alignment = {} if align is None else {"alignment_threshold": align, "alignment_interval": ALIGNMENT}
    with h5py.File("image", "w", driver="core", backing_store=False, libver=("v110", "v110"), **alignment) as file:
        for name, value in facts.items():
            file.attrs[name] = _stored(value)
        fill(file)
        file.attrs["digest"] = _stored(digest)
        file.attrs["complete"] = True
        file.flush()
        return file.id.get_file_image()


def _create_virtual(file: h5py.File, name: str, header: CacheHeader, kind: np.dtype, tail: tuple[int, ...]) -> None:
    """Data set `name` of all shards, end to end. (h5py's own VirtualLayout would record the time.)"""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)
    # HDF5 shows this value where a shard is missing: one that rarely passes for data.
    properties.set_fill_value(np.array(np.iinfo(kind).max, kind))
    space = h5py.h5s.create_simple((header.rows, *tail))
    for index in range(header.num_shards):
        rows = header.shard_range(index)
        shape = (len(rows), *tail)
        space.select_hyperslab((rows.start, *(0 for _ in tail)), shape)
        properties.set_virtual(space, header.shard_name(index).encode(), name.encode(), h5py.h5s.create_simple(shape))
    space.select_all()
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(kind), space, properties)


def _read_facts(file: h5py.File, path: Path) -> tuple[dict[str, Any], str]:
    """Attributes of a cache's file as plain values, and the digest, after the first checks."""
    if _plain(file.attrs.get("format")) != FORMAT:
        raise UserError(f"{path}: is not a token cache: give the output of the tokenize stage")
    schema = int(file.attrs["schema"])
    if schema != SCHEMA:
        raise UserError(f"{path}: has schema {schema}, this version reads {SCHEMA}: {_remedy(path.parent)}")
    if not file.attrs.get("complete", False):
        raise UserError(f"{path}: incomplete: {_remedy(path.parent)}")
    facts = {name: _plain(value) for name, value in file.attrs.items() if name not in ("digest", "complete")}
    for name in ("views", "grid"):
        facts[name] = json.loads(facts[name])
    return facts, str(_plain(file.attrs["digest"]))


def _stored(value: Any) -> Any:
    """An attribute's value: numbers as they are, text and lists (as JSON) as text of fixed length.

    HDF5 keeps text of variable length in a heap without checksums, and damage there can trap its reader in an
    endless loop; text of fixed length lies within the checksummed header.
    """
    if isinstance(value, list):
        value = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        return value
    content = value.encode()
    return np.array(content, h5py.string_dtype("utf-8", max(1, len(content))))


def _plain(value: Any) -> Any:
    """The Python value of a stored attribute."""
    value = value.item() if isinstance(value, np.generic | np.ndarray) else value
    return value.decode() if isinstance(value, bytes) else value


def _remedy(folder: Path) -> str:
    return f"delete {folder} and make it again with the tokenize stage"


def _damaged(path: Path, reason: object) -> UserError:
    if isinstance(reason, Exception):
        refuse_unreadable(path, reason)
    text = " ".join(str(reason).split())
    return UserError(f"{path}: damaged ({text}): {_remedy(path.parent)}")


def content_of(folder: Path) -> str:
    """Content digest of a stage's output folder, or, where it has no manifest, of its files.

    Raises:
        UserError: the folder is missing or damaged.
    """
    if (folder / MANIFEST).exists():
        return read_manifest(folder).content
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()
