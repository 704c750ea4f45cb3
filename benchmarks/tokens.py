"""Token caches: size on disk, speed of reading, a rehearsal at ImageNet's size, and tokenizing against LlamaGen's loop.

    python benchmarks/tokens.py                                    # size and reading: a minute
    python benchmarks/tokens.py --full --folder DIR                # and the rehearsal: 6.6 GB in DIR, removed after
    python benchmarks/tokens.py --llamagen CLONE --images FOLDER   # and tokenizing; FOLDER: class folders of images

The last line of the output is one JSON object. Whatever is compared is timed in turns (A B A B ...) in one sitting;
rates are medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from turn import await_turn

from crt.data.packed import PackedImages
from crt.data.sampler import batch_rows
from crt.tokens.cache import TokenCache
from crt.tokens.encode import rows_per_block
from crt.tokens.journal import BlockJournal
from crt.tokens.layout import CacheHeader, write_index, write_shard
from crt.tokens.sampler import training_batches
from crt.tokens.verify import verify_split

CODES, GRID, BATCH, TURNS = 16384, (16, 16), 256, 7
IMAGENET_IMAGES, IMAGENET_VIEWS, CLASSES = 1_281_167, 10, 1000
MEMORY_LIMIT = 4 * 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where files are written")
    parser.add_argument("--full", action="store_true", help="rehearse at ImageNet's size")
    parser.add_argument("--only-tokenizing", action="store_true", help="leave out the cache's size and reading")
    parser.add_argument("--llamagen", type=Path, help="clone of LlamaGen's repository")
    parser.add_argument("--images", type=Path, help="class folders of JPEG files, for --llamagen")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of both sides' networks")
    parser.add_argument("--rehearse-in", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rehearse_in:
        print(json.dumps(rehearse(args.rehearse_in)))
        return
    if args.llamagen and not args.images:
        parser.error("--llamagen needs --images")
    figures: dict[str, object] = {"device": device_name(), "torch": torch.__version__, "numpy": np.__version__}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        if not args.only_tokenizing:
            figures |= measure_size(Path(name))
            figures |= measure_reading(Path(name))
        if args.full:
            figures |= measure_rehearsal(Path(name))
        if args.llamagen:
            figures |= measure_tokenizing(args.llamagen, args.images, Path(name), args.precision)
    print(json.dumps(figures))


def device_name() -> str:
    gpu = torch.cuda.is_available()
    return torch.cuda.get_device_name() if gpu else f"CPU, {len(os.sched_getaffinity(0))} cores"


def make_header(rows: int, views: int, tokens: tuple[int, int] = GRID) -> CacheHeader:
    return CacheHeader(
        split="train",
        rows=rows,
        views=tuple(f"ten_crop@1.1/{view}" for view in range(views)),
        grid=tokens,
        codebook_size=CODES,
        num_classes=CLASSES,
        tokenizer_content="0" * 64,
        data_content="0" * 64,
        block_rows=rows_per_block(views, 64),
    )


def synthetic_codes(header: CacheHeader, rows: range) -> np.ndarray:
    content = np.random.default_rng(rows.start).bytes(len(rows) * header.row_bytes)
    codes = np.frombuffer(content, np.uint16) % np.uint16(header.codebook_size)
    return codes.reshape(len(rows), len(header.views), header.num_tokens)


def write_cache(folder: Path, header: CacheHeader) -> float:
    """Write synthetic codes by the stage's own way: block by block, then shard by shard. Returns seconds of writing."""
    seconds = 0.0
    for index in range(header.num_shards):
        rows = header.shard_range(index)
        codes = synthetic_codes(header, rows)
        started = time.perf_counter()
        journal = BlockJournal(folder.parent / "blocks", header, index)
        for block in journal.blocks:
            journal.append(codes[block.start - rows.start : block.stop - rows.start])
        sources = np.array(rows)
        write_shard(
            folder,
            folder.parent / "temporary",
            header,
            index,
            codes=journal.codes(),
            labels=sources % CLASSES,
            source_index=sources,
        )
        journal.path.unlink()
        seconds += time.perf_counter() - started
    started = time.perf_counter()
    write_index(folder, folder.parent / "temporary", header, [f"class {number}" for number in range(CLASSES)])
    return seconds + time.perf_counter() - started


def measure_size(folder: Path) -> dict[str, object]:
    """All bytes of a cache of 20,000 rows, ten views and 256 tokens."""
    tokens = folder / "size"
    tokens.mkdir()
    header = make_header(20_000, IMAGENET_VIEWS)
    write_cache(tokens, header)
    size = sum(path.stat().st_size for path in tokens.iterdir())
    shutil.rmtree(tokens)
    return {"bytes_per_token": size / (header.rows * IMAGENET_VIEWS * header.num_tokens)}


def measure_reading(folder: Path, rows: int = 100_000) -> dict[str, object]:
    """Shuffled batches of int64 codes and labels: our sampler, one .npy per image, and a plain memory map.

    One view, so that the peer's files are as small as they can be. Everything lies in the page cache.
    """
    header = make_header(rows, 1)
    tokens, singles = folder / "reading", folder / "singles"
    tokens.mkdir()
    singles.mkdir()
    write_cache(tokens, header)
    cache = TokenCache(tokens, "train")
    flat = np.lib.format.open_memmap(folder / "flat.npy", "w+", np.uint16, (rows, header.num_tokens))
    flat[:] = cache.array[:, 0]
    flat.flush()
    for row in range(rows):
        np.save(singles / f"{row}.npy", flat[row].astype(np.int64))
    flat = np.load(folder / "flat.npy", mmap_mode="r")
    labels = cache.labels

    def ours(first: int, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return training_batches(cache, batch_size=BATCH, seed=0, first_step=first, steps=first + steps)

    def memmap(first: int, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for step in range(first, first + steps):
            chosen, _ = batch_rows(rows, BATCH, step, 0)
            yield torch.from_numpy(flat[chosen].astype(np.int64)), torch.from_numpy(labels[chosen])

    def npy(first: int, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for step in range(first, first + steps):
            chosen, _ = batch_rows(rows, BATCH, step, 0)
            codes = np.stack([np.load(singles / f"{row}.npy") for row in chosen])
            yield torch.from_numpy(codes), torch.from_numpy(labels[chosen])

    for (a, _), (b, _), (c, _) in zip(ours(0, 3), memmap(0, 3), npy(0, 3), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    ways = {"cache": (ours, 2000), "memmap": (memmap, 2000), "npy": (npy, 60)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS):
        for name, (read, steps) in ways.items():
            started = time.perf_counter()
            for _ in read(turn * 100, steps):
                pass
            rates[name].append(steps * BATCH / (time.perf_counter() - started))
    for path in (tokens, singles):
        shutil.rmtree(path)
    pairs = list(zip(rates["cache"], rates["memmap"], rates["npy"], strict=True))
    return {
        **{f"{name}_rows_per_s": statistics.median(values) for name, values in rates.items()},
        "npy_ratio": statistics.median(ours / npy for ours, _, npy in pairs),
        "npy_ratio_range": [min(ours / npy for ours, _, npy in pairs), max(ours / npy for ours, _, npy in pairs)],
        "memmap_ratio": statistics.median(plain / ours for ours, plain, _ in pairs),
        "memmap_ratio_range": [min(b / a for a, b, _ in pairs), max(b / a for a, b, _ in pairs)],
    }


def measure_rehearsal(folder: Path) -> dict[str, object]:
    """The rehearsal in a process of its own, held to 4 GiB by the kernel where it lets us, page cache included."""
    command = [sys.executable, __file__, "--rehearse-in", str(folder)]
    with memory_group(MEMORY_LIMIT) as group:
        enter = (lambda: (group / "cgroup.procs").write_text(str(os.getpid()))) if group else None
        result = subprocess.run(command, preexec_fn=enter, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1]) | {"full_memory_limit_gib": 4 if group else None}


@contextmanager
def memory_group(limit: int) -> Iterator[Path | None]:
    """A control group with a memory limit, or None where none can be made."""
    for root, key in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / f"tokens-{os.getpid()}"
        try:
            group.mkdir()
            (group / key).write_text(str(limit))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        try:
            yield group
        finally:
            group.rmdir()
        return
    yield None


def rehearse(folder: Path) -> dict[str, object]:
    """Write, verify and read through a cache of ImageNet's size; also the disk's own rates."""
    tokens = folder / "full"
    tokens.mkdir()
    header = make_header(IMAGENET_IMAGES, IMAGENET_VIEWS)
    disk = disk_rates(folder / "plain")
    say(f"disk: {disk}")
    write_seconds = write_cache(tokens, header)
    size = sum(path.stat().st_size for path in tokens.iterdir())
    say(f"written: {size / 1e9:.2f} GB in {write_seconds:.0f} s")

    forget(tokens)
    started = time.perf_counter()
    wrong = [line for _, lines in verify_split(tokens, "train") for line in lines]
    verify_seconds = time.perf_counter() - started
    assert not wrong, wrong
    say(f"verified in {verify_seconds:.0f} s")

    forget(tokens)
    started = time.perf_counter()
    cache = TokenCache(tokens, "train")
    open_seconds = time.perf_counter() - started
    steps, seen = -(-header.rows // BATCH), np.zeros(header.rows, bool)
    started = time.perf_counter()
    for step, (codes, labels) in enumerate(
        training_batches(cache, batch_size=BATCH, seed=0, first_step=0, steps=steps)
    ):
        assert codes.shape == (BATCH, header.num_tokens)
        rows, epochs = batch_rows(header.rows, BATCH, step, 0)
        assert torch.equal(labels, torch.from_numpy(rows % CLASSES))
        seen[rows[epochs == 0]] = True
        if step % 500 == 0:
            say(f"epoch: step {step} of {steps}, {step * BATCH / (time.perf_counter() - started):.0f} rows/s")
    epoch_seconds = time.perf_counter() - started
    assert seen.all()
    figures = {
        "full_gb": size / 1e9,
        "full_bytes_per_token": size / (header.rows * IMAGENET_VIEWS * header.num_tokens),
        "full_shards": header.num_shards,
        "full_write_mb_per_s": size / 1e6 / write_seconds,
        "full_write_rows_per_s": header.rows / write_seconds,
        "full_verify_mb_per_s": size / 1e6 / verify_seconds,
        "full_open_s": open_seconds,
        "full_epoch_rows_per_s": steps * BATCH / epoch_seconds,
        "full_epoch_mb_per_s": steps * BATCH * header.num_tokens * 2 / 1e6 / epoch_seconds,
        "full_peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        **{f"full_{name}": value for name, value in disk.items()},
    }
    shutil.rmtree(tokens)
    return figures


def disk_rates(path: Path, size: int = 2**31) -> dict[str, float]:
    """The disk's own sequential rates in MB/s, with a flush after writing and without the page cache when reading."""
    block = np.random.default_rng(0).bytes(2**23)
    started = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    write_seconds = time.perf_counter() - started
    forget(path.parent)
    started = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.read(len(block)):
            pass
    read_seconds = time.perf_counter() - started
    path.unlink()
    return {"disk_write_mb_per_s": size / 1e6 / write_seconds, "disk_read_mb_per_s": size / 1e6 / read_seconds}


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache, so that they are read from the disk."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_tokenizing(llamagen: Path, images: Path, folder: Path, precision: str, turns: int = 3) -> dict[str, object]:
    """Ten crops of each image through VQ-16 at 256 px: our stage's machinery against LlamaGen's loop.

    Untrained weights, the same in both. LlamaGen's loop: batch size 1, the image decoded and cropped in the loop,
    its ten crops in one pass through the model. It works in float32; in bf16, autocast is put around its encoder.
    """
    peer, tokenizer, packed = prepare_tokenizing(llamagen, images, folder)
    # On a GPU enough rows for the start of the decoding processes not to count: the same images again and again.
    count = 384 if torch.cuda.is_available() else min(len(packed), 4)
    packed = Repeated(packed)
    ways: dict[str, Callable[[], np.ndarray]] = {
        "llamagen": lambda: tokenize_like_llamagen(peer, llamagen, packed, count, precision),
        "crt": lambda: tokenize_like_the_stage(tokenizer, packed, count, precision),
    }
    for way in ways.values():  # first calls pay for set-up
        way()
    await_turn()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    codes = {}
    for _ in range(turns):
        for name, way in ways.items():
            started = time.perf_counter()
            codes[name] = way()
            rates[name].append(count * IMAGENET_VIEWS / (time.perf_counter() - started))
            say(f"{name}: {rates[name][-1]:.3f} crops/s")
    ratios = [ours / theirs for ours, theirs in zip(rates["crt"], rates["llamagen"], strict=True)]
    return {
        **{f"tokenize_{name}_crops_per_s": statistics.median(values) for name, values in rates.items()},
        "tokenize_ratio": statistics.median(ratios),
        "tokenize_ratio_range": [min(ratios), max(ratios)],
        "tokenize_precision": precision,
        "tokenize_same_codes": float((codes["crt"] == codes["llamagen"]).mean()),
    }


class Repeated:
    """A split of encoded images whose rows start over at its end."""

    def __init__(self, images: PackedImages) -> None:
        self.images, self.storage = images, images.storage

    def image(self, row: int) -> np.ndarray:
        return self.images.image(row % len(self.images))

    def encoded(self, row: int) -> bytes:
        return self.images.encoded(row % len(self.images))


def prepare_tokenizing(llamagen: Path, images: Path, folder: Path):
    """(LlamaGen's VQ-16, ours with the same weights, the images as an encoded data set)."""
    from ruamel.yaml import YAML

    from crt.__main__ import main as crt
    from crt.tokenizer.import_llamagen import import_llamagen_tokenizer
    from crt.tokenizer.model import Tokenizer

    sys.path.insert(0, str(llamagen))
    from tokenizer.tokenizer_image.vq_model import VQ_models

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer = VQ_models["VQ-16"](codebook_size=CODES, codebook_embed_dim=8).eval().to(device)
    import_llamagen_tokenizer(peer.state_dict(), folder / "tokenizer")
    yaml = YAML()
    params = yaml.load(Path("presets/imagenet256.yaml").read_text(encoding="utf-8"))
    params["prepare_data"].update(source="imagefolder", path=str(images), val_fraction=0.02)
    yaml.dump(params, folder / "params.yaml")
    assert crt(["prepare_data", "--params", str(folder / "params.yaml"), "--out", str(folder / "data")]) == 0
    return peer, Tokenizer.load(folder / "tokenizer", device), PackedImages(folder / "data", "train")


def tokenize_like_llamagen(peer, llamagen: Path, packed, count: int, precision: str) -> np.ndarray:
    """Codes (count, 10, 256) the way extract_codes_c2i.py makes them."""
    import io

    from dataset.augmentation import center_crop_arr
    from PIL import Image
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.Lambda(lambda image: center_crop_arr(image, int(256 * 1.1))),
            transforms.TenCrop(256),
            transforms.Lambda(lambda crops: torch.stack([transforms.ToTensor()(crop) for crop in crops])),
            transforms.Normalize(mean=[0.5] * 3, std=[0.5] * 3, inplace=True),
        ]
    )
    device, codes = next(peer.parameters()).device, []
    for row in range(count):
        crops = transform(Image.open(io.BytesIO(packed.encoded(row))).convert("RGB"))
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            _, _, (_, _, indices) = peer.encode(crops.to(device))
        codes.append(indices.reshape(IMAGENET_VIEWS, -1).cpu().numpy())
    return np.stack(codes)


def tokenize_like_the_stage(tokenizer, packed, count: int, precision: str) -> np.ndarray:
    """Codes (count, 10, 256) the way stage `tokenize` makes them."""
    from crt.tokens.encode import Encoder, unit_pixels, units
    from crt.tokens.views import view_names

    batch_size = 320 if torch.cuda.is_available() else 20
    names = view_names(["ten_crop@1.1"])
    rows = units(range(count), len(names), batch_size)
    with Encoder(tokenizer, precision, batch_size) as encode:
        codes = [encode(pixels) for pixels in unit_pixels(packed, rows, names, tokenizer.image_size)]
        return torch.cat(codes).reshape(count, len(names), -1).cpu().numpy()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
