"""Parquet files of images, as the Hugging Face Hub serves its data sets, and Arrow files, as its library saves them.

A folder holds the files, below folders or not; a file belongs to the split that its path names
(`data/train-00000-of-00294.parquet`, `train/data-00000-of-00002.arrow`). Images are a column of encoded files, which
the Hub's metadata or its type tells; labels are the column of class labels that the metadata names, else one called
label, labels, cls or class.

Images inside such a file can only be read in groups of hundreds, but a data set is stored by class. So they are
first copied behind each other into one plain file for each, under the stage's working folder, which needs
as much space as they have; a killed run continues behind the last whole file.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crt import interrupt
from crt.data.class_folders import ONE_CLASS
from crt.data.listing import PLACE, Container, first_three, printable
from crt.data.shards import LABEL_NAMES, list_shards, listings_by_label, splits_of_shards
from crt.data.source import Source
from crt.data.synsets import class_names
from crt.errors import UserError
from crt.files import write_json
from crt.progress import Progress

if TYPE_CHECKING:
    from pyarrow import DataType, RecordBatch, Schema
    from pyarrow.parquet import ParquetFile

_BATCH_ROWS = 64
_LFS_POINTER = b"version https://git-lfs"
ARROW = ".arrow"
# How an Arrow file for random access begins, and how a stream ends, which a file that is cut short between two of its
# batches does not.
_ARROW_MAGIC, _ARROW_END = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"
# What the Hugging Face library leaves beside a data set's own Arrow files: results of its map, filter and shuffle.
_ARROW_CACHE = "cache-"


def open_arrow(path: Path, work: Path) -> Source:
    """The images of a folder of Arrow files, or of one; see `open_parquet`."""
    if path.is_file() and path.suffix.lower() != ARROW:
        raise UserError(f"{path}: no {ARROW} file: set prepare_data.path to one, or to the folder of some")
    return open_parquet(path, work, ARROW)


def open_parquet(path: Path, work: Path, ending: str = ".parquet") -> Source:
    """The images of a folder of Parquet files, or of one.

    Args:
        path: the folder or file.
        work: for the copied images; those of whole files that an earlier run left there are used again.
        ending: of the files in a folder.

    Raises:
        UserError: there is none, one is damaged or has no images, files differ, or only some images have labels.
    """
    notes: list[str] = []
    folder, shards = (path.parent, [path.name]) if path.is_file() else (path, list_shards(path, ending, notes))
    cached = [shard for shard in shards if ending == ARROW and posixpath.basename(shard).startswith(_ARROW_CACHE)]
    if 0 < len(cached) < len(shards):
        notes.append(f"{path}: cached results of other steps are left out: {first_three(cached)}")
        shards = [shard for shard in shards if shard not in cached]
    split_of = splits_of_shards(folder, shards, notes)
    used = [shard for shard in shards if split_of[shard]]
    _note_configurations(path, split_of, notes)
    columns = _common_columns(folder, used)
    if len(columns.label_columns) > 1:
        notes.append(f"{path}: labels are those of {columns.label} (there are {', '.join(columns.label_columns)})")
    copies = work / ending.removeprefix(".")
    copies.mkdir(exist_ok=True)
    containers = []
    samples: dict[str, list[tuple[str, str | None]]] = {split: [] for split in sorted(set(split_of.values()) - {""})}
    places: dict[str, list[np.ndarray]] = {split: [] for split in samples}
    without_image = with_path = 0
    progress = Progress("copying images", len(used), "files")
    for number, shard in enumerate(used):
        copy = _copied(folder / shard, copies / f"{number:05d}", columns)
        containers.append(Container(str(copy.path), "tar"))
        present = copy.sizes > 0
        without_image += int((~present).sum())
        with_path += copy.with_path
        rows = np.flatnonzero(present)
        samples[split_of[shard]] += [(f"{shard}/{row:06d}", copy.labels[row]) for row in rows]
        of_shard = np.zeros(len(rows), PLACE)
        of_shard["container"], of_shard["crc"], of_shard["modified"] = number, -1, copy.modified
        of_shard["offset"], of_shard["size"] = (np.cumsum(copy.sizes) - copy.sizes)[rows], copy.sizes[rows]
        places[split_of[shard]].append(of_shard)
        progress.update(number + 1)
    outside = f" ({with_path} only name a file elsewhere: write the files' bytes into the column)" if with_path else ""
    if without_image:
        notes.append(f"{path}: {without_image} rows have no image{outside}: left out")
    for split, found in samples.items():
        if not found:
            which = "files" if split == "all" else f"files of {split}"
            raise UserError(f"{path}: the {which} hold no images{outside}: give other files")
    looked_for = f"column {columns.label}" if columns.label is not None else f"column {' or '.join(LABEL_NAMES)}"
    classes, listings = listings_by_label(folder, samples, places, looked_for, notes)
    names = [columns.names[int(label)] for label in classes] if columns.names and classes != [ONE_CLASS] else classes
    return Source(classes, class_names(names), containers, listings, notes)


def _note_configurations(path: Path, split_of: Mapping[str, str], notes: list[str]) -> None:
    """Note files of one split in several folders: on the Hub those are configurations, often of the same images."""
    folders: dict[str, set[str]] = {}
    for shard, split in split_of.items():
        folders.setdefault(split, set()).add(posixpath.dirname(shard) or ".")
    most = max(folders.values(), key=len)
    if len(most) > 1:
        notes.append(
            f"{path}: files of one split lie in folders {first_three(sorted(most))}, and all are used: if those are "
            "configurations of the same images, set prepare_data.path to one of them"
        )


@dataclass(frozen=True)
class _Columns:
    """Where a file has its images and labels."""

    image: str
    is_struct: bool
    """Whether an image is a struct of its bytes and its path, as the Hub has it, or the bytes alone."""
    label: str | None
    label_columns: list[str]
    """All that could be it."""
    names: list[str]
    """By label: what the metadata calls the class; empty if it says nothing."""


@dataclass(frozen=True)
class _Copy:
    """The images of one file behind each other."""

    path: Path
    modified: int
    """When the file was last changed (ns)."""
    sizes: np.ndarray
    """(rows,) int64: bytes of each image, 0 for none."""
    labels: list[str | None]
    with_path: int
    """Rows that name a file instead of holding it."""


@dataclass(frozen=True)
class _ArrowFile:
    """An open Arrow file, with what is used of `ParquetFile`."""

    schema_arrow: Schema
    batches: Iterator[RecordBatch]

    def iter_batches(self, batch_size: int, columns: Sequence[str]) -> Iterator[RecordBatch]:
        """All rows, so many at once; other columns too, since here that costs nothing.

        Raises:
            ArrowInvalid: a batch is damaged.
        """
        for batch in self.batches:
            batch.validate(full=True)  # pyarrow itself would follow wrong offsets out of its memory
            for start in range(0, len(batch), batch_size):
                yield batch.slice(start, batch_size)


@contextmanager
def _arrow_file(path: Path) -> Iterator[_ArrowFile]:
    """An Arrow file of either kind: a stream, as the Hugging Face library writes, or one for random access."""
    from pyarrow import ArrowInvalid, OSFile, ipc

    with OSFile(str(path)) as file:
        if file.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC:
            reader = ipc.open_file(file)
            yield _ArrowFile(reader.schema, map(reader.get_batch, range(reader.num_record_batches)))
            return
        file.seek(max(file.size() - len(_ARROW_END), 0))
        if file.read() != _ARROW_END:
            raise ArrowInvalid("it has no end")
        file.seek(0)
        reader = ipc.open_stream(file)
        yield _ArrowFile(reader.schema, iter(reader))


@contextmanager
def _opened(path: Path) -> Iterator[ParquetFile | _ArrowFile]:
    """A Parquet file, or an Arrow file by its name; whatever of it cannot be read is a UserError."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    where, is_arrow = printable(str(path)), path.suffix.lower() == ARROW
    try:
        with open(path, "rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise UserError(f"{where}: only a pointer of Git LFS, not the file: fetch it with `git lfs pull`")
        with _arrow_file(path) if is_arrow else ParquetFile(path) as opened:
            yield opened
    except ArrowException as error:
        reason = " ".join(str(error).split())
        kind = "Arrow" if is_arrow else "Parquet"
        raise UserError(f"{where}: no {kind} file, or damaged ({reason}): fetch it again") from None
    except OSError as error:
        if error.errno is None:  # pyarrow says so of pages that end early
            raise UserError(f"{where}: damaged or cut short: fetch it again") from None
        raise UserError(f"{where}: cannot be read ({error.strerror}): fix that and run again") from None


def _common_columns(folder: Path, shards: Sequence[str]) -> _Columns:
    """The columns of all files.

    Raises:
        UserError: a file has none with images, several, or others than the first.
    """
    first: _Columns | None = None
    for shard in shards:
        interrupt.raise_if_stopped()
        with _opened(folder / shard) as parquet:
            columns = _columns(parquet, printable(str(folder / shard)))
        if first is not None and columns != first:
            raise UserError(
                f"{folder}: {printable(shard)} has other columns or class names than {printable(shards[0])}: "
                "set prepare_data.path to the files of one data set"
            )
        first = columns
    assert first is not None
    return first


def _columns(parquet: ParquetFile | _ArrowFile, where: str) -> _Columns:
    schema = parquet.schema_arrow
    features = _hub_features(schema.metadata or {})
    described = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    holds_bytes = {field.name: _holds_bytes(field.type) for field in schema}
    images = [name for name in schema.names if described.get(name) == "Image" and holds_bytes[name]]
    images = images or [name for name in schema.names if holds_bytes[name]]
    if len(images) != 1:
        found = f"several columns of images ({', '.join(images)})" if images else "no column of images"
        raise UserError(f"{where}: has {found}; one is needed, of bytes or of the Hub's type Image: write it with one")
    labels = [name for name in schema.names if described.get(name) == "ClassLabel"]
    labels = labels or [name for name in LABEL_NAMES if name in schema.names]
    label = next((name for name in LABEL_NAMES if name in labels), labels[0] if labels else None)
    if label is not None and not _is_label(schema.field(label).type):
        raise UserError(
            f"{where}: column {label} holds {schema.field(label).type}: labels are integers or text, one per image: "
            "write it with such a column"
        )
    names = features[label].get("names") or [] if label is not None and described.get(label) == "ClassLabel" else []
    return _Columns(images[0], holds_bytes[images[0]] == "struct", label, labels, [str(name) for name in names])


def _hub_features(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """Description of the columns that the Hub's library leaves in a file, or nothing."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _holds_bytes(kind: DataType) -> str:
    """Whether a column may hold image files: "bytes", "struct" of bytes and more, or "" for neither."""
    from pyarrow import types

    def is_bytes(kind: DataType) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    if types.is_struct(kind):
        return "struct" if any(field.name == "bytes" and is_bytes(field.type) for field in kind) else ""
    return "bytes" if is_bytes(kind) else ""


def _is_label(kind: DataType) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind  # as pandas writes categories
    return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)


def _copied(source: Path, target: Path, columns: _Columns) -> _Copy:
    """The images of one file in `target`.images, and what is known of them in `target`.json."""
    images, record = target.with_suffix(".images"), target.with_suffix(".json")
    state = source.stat()
    identity = [str(source), state.st_size, state.st_mtime_ns]
    known = _read_record(record)
    if known is None or known["of"] != identity or not images.exists():
        record.unlink(missing_ok=True)
        sizes, labels, with_path = _copy(source, images, columns)
        known = {"of": identity, "sizes": sizes, "labels": labels, "with_path": with_path}
        write_json(record, known)
    return _Copy(images, state.st_mtime_ns, np.array(known["sizes"], np.int64), known["labels"], known["with_path"])


def _copy(source: Path, target: Path, columns: _Columns) -> tuple[list[int], list[str | None], int]:
    """Write the images of a file behind each other; their sizes in bytes (0 for none), labels, and rows with a path."""
    sizes: list[int] = []
    labels: list[str | None] = []
    with_path = 0
    fields = ("bytes", "path") if columns.is_struct else ()  # one that is not there is none that is read
    wanted = [f"{columns.image}.{field}" for field in fields] or [columns.image]
    wanted += [columns.label] if columns.label is not None else []
    with open(target, "wb") as out:
        for batch in _batches(source, wanted):
            interrupt.raise_if_stopped()
            for image in batch.column(columns.image).to_pylist():
                content = image["bytes"] if columns.is_struct and image is not None else image
                sizes.append(out.write(content or b""))
                with_path += columns.is_struct and image is not None and not content and bool(image.get("path"))
            found = batch.column(columns.label).to_pylist() if columns.label is not None else [None] * len(batch)
            labels += [_label(value, len(columns.names), source) for value in found]
        out.flush()
        os.fsync(out.fileno())
    return sizes, labels, with_path


def _batches(source: Path, columns: list[str]) -> Iterator[RecordBatch]:
    """Rows of a file; a generator of its own, so that errors of whoever writes them are not taken for the file's."""
    with _opened(source) as parquet:
        yield from parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns)


def _label(value: int | str | None, num_names: int, source: Path) -> str | None:
    """A label as text; none where it is missing, for which the Hub has -1.

    Raises:
        UserError: it is beyond the classes that have names.
    """
    if num_names and isinstance(value, int):
        if value >= num_names or value < -1:
            raise UserError(
                f"{printable(str(source))}: label {value}, but {num_names} classes have names: fetch it again"
            )
        return str(value) if value >= 0 else None
    return (str(value).strip() or None) if value is not None else None


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) and {"of", "sizes", "labels", "with_path"} <= set(known) else None
