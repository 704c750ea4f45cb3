"""HDF5 files laid out in memory. Oracle: HDF5 itself, writing straight to the disk."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from crt.data import packed
from crt.hdf5_frame import hdf5_frame
from tests.test_command_line import on_a_disk_of_its_own

IMAGES = 1500


def create(path: Path) -> None:
    """A shard whose images are still missing, 71 kB of columns around them."""
    packed.create_shard(
        path,
        split="train",
        storage="encoded",
        image_size=None,
        labels=np.arange(IMAGES) % 10,
        source_ids=[f"{index:04d}" for index in range(IMAGES)],
        digests=np.random.default_rng(0).integers(0, 256, (IMAGES, 32), np.uint8),
        payload_bytes=np.full(IMAGES, 100),
    )


@pytest.mark.parametrize("piece", [2**24, 10_000])
def test_a_frame_has_the_bytes_that_hdf5_writes(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("crt.hdf5_frame._PIECE_BYTES", piece)
    create(tmp_path / "frame.h5")
    monkeypatch.setattr(packed, "hdf5_frame", lambda path, least_bytes, **options: h5py.File(path, "w", **options))
    create(tmp_path / "plain.h5")
    assert (tmp_path / "frame.h5").read_bytes() == (tmp_path / "plain.h5").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="files in memory are Linux's")
def test_large_arrays_take_neither_memory_nor_disk(tmp_path):
    with hdf5_frame(tmp_path / "large.h5", 2**42) as file:
        images = file.create_dataset("images", (2**42,), np.uint8)
        images[0] = 1
        offset = images.id.get_offset()
    status = (tmp_path / "large.h5").stat()
    assert status.st_size >= offset + 2**42 and status.st_blocks * 512 < 2**20


def test_a_limit_of_sizes_is_met_before_hdf5_meets_it(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            create(tmp_path / "shard.h5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_moment_at_which_a_disk_fills_crashes_the_process_or_is_missed(tmp_path):
    """HDF5 itself died of a signal here, or wrote tracebacks."""
    disk = tmp_path / "disk"
    text = on_a_disk_of_its_own(
        f"""mount -t tmpfs -o size=4k none {disk} || exit 99
        {sys.executable} -m tests.test_hdf5_frame {disk}; echo "status $?" """,
        disk,
    )
    *numbers, whole, status = text.splitlines()
    assert (whole, status) == ("whole", "status 0")
    assert len(numbers) > 10 and set(numbers) == {str(errno.ENOSPC)}


if __name__ == "__main__":
    shard = Path(sys.argv[1]) / "shard.h5"
    for pages in range(1, 25):
        subprocess.run(["mount", "-o", f"remount,size={4 * pages}k", shard.parent], check=True)
        try:
            create(shard)
        except OSError as error:
            print(error.errno, flush=True)
            shard.unlink()
        else:
            print("whole")
            break
