"""The two passes of prepare_data over all images: checking them, then packing those that are kept into shards.

The first pass keeps a file per chunk under the stage's working folder, the second each shard as soon as it is whole. A
killed run continues behind the last chunk or shard, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crt import interrupt
from crt.data.listing import Container, Listing
from crt.data.packed import SPLITS, create_shard
from crt.data.pool import available_cpus, ordered_map
from crt.data.store import Checked, Chunk, Form, check_images, write_images
from crt.files import NUMPY_ERRORS, flush, replacing, sha256_file, write_json
from crt.progress import Progress

CHUNK_IMAGES = 256


@dataclass(frozen=True)
class PackedSplit:
    """The images of one split as they go into shards."""

    listing: Listing
    digests: np.ndarray
    payload_bytes: np.ndarray
    checksums: np.ndarray

    def select(self, rows: np.ndarray) -> PackedSplit:
        return PackedSplit(
            self.listing.select(rows), self.digests[rows], self.payload_bytes[rows], self.checksums[rows]
        )


@dataclass(frozen=True)
class Shard:
    """One file to write."""

    name: str
    split: str
    content: PackedSplit

    def fingerprint(self, form: Form) -> str:
        """Of everything that its bytes depend on."""
        parts = [repr((self.split, form)), "\0".join(self.content.listing.ids)]
        arrays = [self.content.listing.labels, self.content.digests, self.content.checksums]
        digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape"))
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def check_split(listing: Listing, containers: list[Container], form: Form, work: Path, name: str) -> Checked:
    """First pass over one split; faultless chunks that an earlier, stopped run checked are read back."""
    folder = work / "checked"
    folder.mkdir(exist_ok=True)
    total = len(listing)
    digests, payload_bytes = np.zeros((total, 32), np.uint8), np.zeros(total, np.int64)
    checksums, reasons = np.zeros(total, np.uint32), dict[int, str]()
    starts = range(0, total, CHUNK_IMAGES)
    chunks = [(start, listing.select(np.arange(start, min(start + CHUNK_IMAGES, total)))) for start in starts]
    files = [folder / f"{name}-{_chunk_key(chunk, form)}.npz" for _, chunk in chunks]

    def keep(start: int, result: Checked) -> None:
        end = start + len(result.digests)
        digests[start:end], payload_bytes[start:end] = result.digests, result.payload_bytes
        checksums[start:end] = result.checksums
        reasons.update({start + row: reason for row, reason in result.reasons.items()})

    missing = []
    for (start, chunk), path in zip(chunks, files, strict=True):
        known = _read_checked(path)
        if known is None:
            missing.append((start, chunk, path))
        else:
            keep(start, known)
    done = total - sum(len(chunk) for _, chunk, _ in missing)
    label = "checking images" if name == "all" else f"checking {name} images"
    progress = Progress(label, total, "images", done)
    tasks = (Chunk(containers, chunk.ids, chunk.places, form) for _, chunk, _ in missing)
    with closing(ordered_map(check_images, tasks, _num_workers(len(missing)))) as results:
        for (start, chunk, path), result in zip(missing, results, strict=True):
            if not result.reasons:  # a file that the user mends must be looked at again
                _write_checked(path, result)
            keep(start, result)
            done += len(chunk)
            progress.update(done)
            interrupt.raise_if_stopped()
    return Checked(digests, payload_bytes, checksums, reasons)


def plan_shards(packed: dict[str, PackedSplit], images_per_shard: int) -> list[Shard]:
    """The files of both splits."""
    shards = []
    for split in SPLITS:
        total = len(packed[split].listing)
        for number, start in enumerate(range(0, total, images_per_shard)):
            rows = np.arange(start, min(start + images_per_shard, total))
            shards.append(Shard(f"{split}-{number:05d}.h5", split, packed[split].select(rows)))
    return shards


def pack_shards(shards: list[Shard], containers: list[Container], form: Form, work: Path, staging: Path) -> None:
    """Second pass: write the shards that are not there yet into `staging`, by way of `work`."""
    records = work / "finished"
    records.mkdir(exist_ok=True)
    missing = [shard for shard in shards if not _is_finished(shard, form, staging, records)]
    total = sum(len(shard.content.listing) for shard in shards)
    done = total - sum(len(shard.content.listing) for shard in missing)
    progress = Progress("packing", total, "images", done)
    owners: list[tuple[Shard, bool]] = []  # of each task given out: its shard, and whether it is the shard's last

    def tasks() -> Iterator[tuple[Chunk, np.ndarray, np.ndarray, Path]]:
        for shard in missing:
            content, path = shard.content, work / (shard.name + ".part")
            offsets = create_shard(
                path,
                split=shard.split,
                storage=form.storage,
                image_size=form.image_size,
                labels=content.listing.labels,
                source_ids=content.listing.ids,
                digests=content.digests,
                payload_bytes=content.payload_bytes,
            )
            for start in range(0, len(offsets), CHUNK_IMAGES):
                rows = np.arange(start, min(start + CHUNK_IMAGES, len(offsets)))
                part = content.listing.select(rows)
                owners.append((shard, rows[-1] == len(offsets) - 1))
                yield Chunk(containers, part.ids, part.places, form), content.checksums[rows], offsets[rows], path

    num_chunks = sum(-(-len(shard.content.listing) // CHUNK_IMAGES) for shard in missing)
    with closing(ordered_map(write_images, tasks(), _num_workers(num_chunks))) as results:
        for count, (shard, is_last) in zip(results, owners, strict=False):  # owners grows as tasks are given out
            done += count
            progress.update(done)
            if is_last:
                _finish(shard, form, work, staging)
            interrupt.raise_if_stopped()


def _finish(shard: Shard, form: Form, work: Path, staging: Path) -> None:
    """Give a whole shard its final name, and record what it must look like."""
    part = work / (shard.name + ".part")
    flush(part)
    record = {"fingerprint": shard.fingerprint(form), "sha256": sha256_file(part)}
    os.replace(part, staging / shard.name)
    write_json(work / "finished" / f"{shard.name}.json", record)


def _is_finished(shard: Shard, form: Form, staging: Path, records: Path) -> bool:
    """Whether an earlier run finished this shard and it still is as it was."""
    try:
        record = json.loads((records / f"{shard.name}.json").read_text())
        return record == {"fingerprint": shard.fingerprint(form), "sha256": sha256_file(staging / shard.name)}
    except (OSError, ValueError):
        return False


def _num_workers(num_tasks: int) -> int:
    return max(min(available_cpus(), num_tasks), 1)


def _chunk_key(chunk: Listing, form: Form) -> str:
    """Names a chunk's result by what it was made from, so that a source that has changed is checked anew.

    A folder's files are told by size and time, an archive's members by where they lie and the archive's time.
    """
    digest = hashlib.sha256("\0".join([repr(form), *chunk.ids]).encode("utf-8", "surrogateescape"))
    digest.update(np.ascontiguousarray(chunk.places).tobytes())
    return digest.hexdigest()[:32]


def _write_checked(path: Path, result: Checked) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, digests=result.digests, payload_bytes=result.payload_bytes, checksums=result.checksums)


def _read_checked(path: Path) -> Checked | None:
    """A chunk's result; None if there is none, or if a crash of the machine tore it."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Checked(stored["digests"], stored["payload_bytes"], stored["checksums"], {})
    except (OSError, KeyError, *NUMPY_ERRORS):
        return None
