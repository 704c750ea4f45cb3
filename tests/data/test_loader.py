"""Oracle: the batches of one process without workers, and the crops and permutations that they are defined by."""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import crt.data.loader as loader
from crt.data.loader import eval_batches, num_workers, training_batches
from crt.data.packed import PackedImages
from crt.data.sampler import batch_rows
from crt.data.transforms import center_crop
from crt.errors import UserError
from crt.system_errors import NO_SHARED_MEMORY
from tests.test_command_line import on_a_disk_of_its_own

COMMON = {"image_size": 16, "batch_size": 12, "min_crop": 0.7, "horizontal_flip": True, "seed": 3}


@pytest.fixture
def encoded(prepare, make, tmp_path) -> PackedImages:
    root = tmp_path / "images"
    for number in range(25):
        make.write(root / "ab"[number % 2] / f"{number}.png", make.encode(make.noise(number, 10 + number, 40)))
    status, out = prepare(path=root, storage="encoded", image_size=None)
    assert status == 0
    return PackedImages(out, "train")


@pytest.fixture
def pixels(prepare, make, tmp_path) -> PackedImages:
    status, out = prepare(path=make.class_folders(tmp_path / "images", {"a": 24, "b": 24}))
    assert status == 0
    return PackedImages(out, "train")


def batches(images, rank=0, world_size=1, first_step=0, steps=4, **changes) -> torch.Tensor:
    values = {**COMMON, **changes}
    found = list(
        training_batches(images, first_step=first_step, steps=steps, rank=rank, world_size=world_size, **values)
    )
    assert all(batch.dtype == torch.uint8 for batch in found)
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["encoded", "pixels"])
def test_batches_do_not_depend_on_processes_or_on_where_one_starts(kind, request):
    images = request.getfixturevalue(kind)
    whole = batches(images)
    assert whole.shape == (4, 12, 16, 16, 3)
    for world_size in (2, 3):
        parts = [batches(images, rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat(parts, dim=1), whole)
    assert torch.equal(batches(images, first_step=2), whole[2:])
    assert not torch.equal(batches(images, seed=4), whole)


@pytest.mark.parametrize("min_crop", [1.0, 0.9])
def test_large_pixels_are_read_and_cropped_ahead_of_the_step(prepare, make, tmp_path, min_crop):
    """Oracle: the way of small images, in the process that trains."""
    status, out = prepare(path=make.class_folders(tmp_path / "images", {"a": 10, "b": 10}), image_size=160)
    assert status == 0
    images, before = PackedImages(out, "train"), children()
    assert not images.are_small
    sizes = {"image_size": 160, "min_crop": min_crop, "batch_size": 4}
    stream = training_batches(images, first_step=0, steps=3, rank=0, world_size=1, **COMMON | sizes)
    first = next(stream)
    assert children() > before
    found = [first, *stream]
    images.are_small = True
    images._opened.clear()
    assert torch.equal(torch.stack(found), batches(images, steps=3, **sizes))


def test_batches_do_not_depend_on_the_number_of_workers(encoded, monkeypatch):
    found = []
    for count in (1, 2):
        monkeypatch.setattr(loader, "num_workers", lambda world_size, count=count: count)
        found.append(batches(encoded))
    assert torch.equal(*found)


def test_an_image_is_augmented_by_its_epoch_alone(encoded):
    """The same (epoch, image) looks the same in batches of another size, and another in the next epoch."""
    looks: dict[tuple[int, int], torch.Tensor] = {}
    for size in (12, 8):
        steps = 2 * len(encoded) // size
        found = batches(encoded, steps=steps, batch_size=size)
        for step in range(steps):
            for row, epoch, image in zip(*batch_rows(len(encoded), size, step, 3), found[step], strict=True):
                assert torch.equal(looks.setdefault((epoch, row), image), image)
    both = [row for row in range(len(encoded)) if (0, row) in looks and (1, row) in looks]
    assert sum(torch.equal(looks[0, row], looks[1, row]) for row in both) < len(both) / 4


def test_whole_pixels_are_images_or_their_mirrors(pixels):
    found = batches(pixels, min_crop=1.0, steps=8)
    mirrored = 0
    for step in range(8):
        originals = pixels.pixels(batch_rows(len(pixels), 12, step, 3)[0])
        for image, original in zip(found[step].numpy(), originals, strict=True):
            assert np.array_equal(image, original) or np.array_equal(image, original[:, ::-1])
            mirrored += np.array_equal(image, original[:, ::-1])
    assert 25 < mirrored < 71  # 48 of 96 expected, deviation 5
    plain = batches(pixels, min_crop=1.0, horizontal_flip=False)[1].numpy()
    assert np.array_equal(plain, pixels.pixels(batch_rows(len(pixels), 12, 1, 3)[0]))


@pytest.mark.parametrize("min_crop", [1.0, 0.9])
def test_images_of_the_right_size_are_augmented_as_others_are(pixels, min_crop):
    """Oracle: the way of images whose size is not known, which crops each of them."""
    known = batches(pixels, min_crop=min_crop)
    pixels.image_size = None
    assert torch.equal(batches(pixels, min_crop=min_crop), known)
    pixels.image_size = 16
    assert batches(pixels, min_crop=min_crop, image_size=8).shape == (4, 12, 8, 8, 3)


def test_another_seed_mirrors_other_images(pixels):
    mirrored = []
    for seed in (3, 4):
        rows = np.concatenate([batch_rows(len(pixels), 12, step, seed)[0] for step in range(4)])
        found = batches(pixels, min_crop=1.0, seed=seed).flatten(0, 1).numpy()
        differ = (found != pixels.pixels(rows)).any(axis=(1, 2, 3))
        mirrored.append(set(rows[differ].tolist()))
    assert len(mirrored[0] ^ mirrored[1]) > 8  # 24 expected of 48, deviation 3.5


@pytest.mark.parametrize("kind, size", [("encoded", 16), ("pixels", 16), ("pixels", 8)])
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_every_image_once_in_order(kind, size, world_size, request):
    images = request.getfixturevalue(kind)
    seen = []
    for rank in range(world_size):
        for batch, rows in eval_batches(images, size, 7, rank, world_size):
            assert batch.dtype == torch.uint8 and rows.dtype == torch.int64 and len(batch) == len(rows) <= 7
            for image, row in zip(batch, rows.tolist(), strict=True):
                assert np.array_equal(image, center_crop(images.image(row), size))
                seen.append(row)
    assert seen == list(range(len(images)))


def test_a_batch_that_does_not_divide_is_refused(pixels):
    with pytest.raises(UserError, match="batch_size 12 does not divide among 5 processes"):
        batches(pixels, world_size=5)


def children() -> set[str]:
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
        return set(file.read().split())


def test_leaving_early_leaves_no_worker_behind(encoded):
    before = children()
    stream = training_batches(encoded, first_step=0, steps=1000, rank=0, world_size=1, **COMMON)
    next(stream)
    assert children() > before
    stream.close()
    assert children() == before


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_damaged_image_is_one_line_out_of_a_worker_too(encoded, monkeypatch, kind):
    monkeypatch.setattr(loader, "num_workers", lambda world_size: 2)
    shard, file = encoded.folder / "train-00000.h5", encoded.encoded(3)
    data = shard.read_bytes()
    shard.write_bytes(data.replace(file, bytes(len(file))))
    before = children()
    with pytest.raises(UserError) as caught:
        if kind == "training":
            batches(encoded)
        else:
            list(eval_batches(encoded, 16, 7))
    name = encoded.source_id(3)
    assert str(caught.value).startswith(f"{shard}: image 3 ({name}) is damaged (not a JPEG, ")
    assert str(caught.value).endswith(f"): delete {encoded.folder} and run prepare_data again")
    assert children() == before  # though the error is still held
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("noticed", ["at once", "by the next batch"])
def test_a_killed_worker_is_reported_wherever_it_is_noticed(encoded, monkeypatch, noticed):
    monkeypatch.setattr(loader, "num_workers", lambda world_size: 2)
    before = children()
    stream = training_batches(encoded, first_step=0, steps=100_000, rank=0, world_size=1, **COMMON)
    next(stream)
    workers = children() - before
    assert len(workers) == 2
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        if noticed == "by the next batch":
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
        with pytest.raises(UserError, match="a worker process was killed, most likely out of memory: free some"):
            os.kill(int(min(workers)), signal.SIGKILL)
            if noticed == "at once":
                time.sleep(20)
            list(stream)
        stream.close()
        assert not children() & workers
    finally:
        signal.signal(signal.SIGCHLD, handler)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is"), "no room in shared memory"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "a worker process was killed"),
        (ConnectionResetError(104, "Connection reset by peer"), "a worker process was killed"),
        (RuntimeError("CUDA error"), None),
        (EOFError("Caught EOFError in DataLoader worker process 0."), None),
    ],
)
def test_what_pytorch_says_of_a_killed_worker_is_explained_and_nothing_else(error, message, monkeypatch):
    monkeypatch.setattr(loader, "_DYING_SECONDS", 0)
    explained = loader._explained(error)
    assert explained is error if message is None else isinstance(explained, UserError) and message in str(explained)


@pytest.mark.parametrize("size", ["4k", "64k"])
def test_no_room_in_shared_memory_is_one_line_and_no_hang(encoded, tmp_path, size):
    """Room for no semaphore of the workers, or for their start and not for a batch."""
    (tmp_path / "read.py").write_text(f"""
from crt.data.loader import training_batches
from crt.data.packed import PackedImages
from crt.launch import leave
from crt.system_errors import system_message
images = PackedImages({str(encoded.folder)!r}, "train")
try:
    list(training_batches(images, first_step=0, steps=5, rank=0, world_size=1, **{COMMON | {"image_size": 64}}))
except Exception as error:
    print(system_message(error, None) or error)
    leave(2)
""")
    run = f"PYTHONPATH=. timeout 100 {sys.executable} {tmp_path}/read.py"
    said = on_a_disk_of_its_own(f"mount -t tmpfs -o size={size} none /dev/shm || exit 99; {run}", tmp_path / "own")
    reasons = {"4k": "/dev/shm: No space left on device: free some space", "64k": NO_SHARED_MEMORY}
    assert said == f"{reasons[size]} and run the same command again; finished work is kept\n"


def test_workers_share_the_cpus_of_a_node(monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("crt.data.pool._cpu_quota", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert num_workers(1) == 16 and num_workers(8) == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert num_workers(32) == 15
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    assert num_workers(64) == 11
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert num_workers(1) == 1
