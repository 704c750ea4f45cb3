"""Stage `tokenize`: the data set as codes, in HDF5.

Reads the packed data set and the tokenizer. Writes `train.h5` and `val.h5` with their shards (layout:
`crt.tokens.layout`): of every training image the codes of all `tokenize.views`, of every validation image
those of its centre. Processes take shards in turn; the files are the same bytes for any number of them, and
whether or not the run was stopped. Work is safe on disk after every block of some hundred rows.

Cost: the encoder's forward pass over images x views, and 2 bytes per token (ImageNet, ten crops, 256 tokens:
6.6 GB). The summary says how many codes are in use: a small share of the codebook, or an entropy far below
log2(codebook size), means a collapsed tokenizer, which generates badly whatever follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from crt.data.packed import PackedImages
from crt.distributed import (
    World,
    all_reduce,
    failing_together,
    gpu_memory,
    join_world,
    raise_if_any_stopped,
    reported_once,
    sum_over_ranks,
)
from crt.errors import UserError
from crt.precision import announce_precision
from crt.progress import Progress, logger
from crt.stage import StageRun
from crt.tokenizer.model import Tokenizer
from crt.tokens.cache import SPLITS, TokenCache
from crt.tokens.encode import Encoder, rows_per_block, unit_pixels, units
from crt.tokens.journal import BlockJournal
from crt.tokens.layout import CacheHeader, read_shard, write_index, write_shard
from crt.tokens.statistics import CodebookUse
from crt.tokens.verify import damaged_blocks
from crt.tokens.views import view_names


@dataclass
class _ShardWork:
    """One shard that this process has to make."""

    images: PackedImages
    header: CacheHeader
    index: int
    journal: BlockJournal
    counts: np.ndarray
    """(codebook_size,) uses of each code of the split, to which the finished shard's are added."""


def run(run: StageRun) -> None:
    """Make both splits' codes.

    Raises:
        UserError: a split has no images, or too little GPU memory.
        Stopped: a signal arrived at any process; finished blocks are kept.
    """
    remedy = "lower tokenize.batch_size, or set tokenize.precision to bf16"
    with join_world() as world, gpu_memory(run.name, remedy):
        with reported_once(world):
            tokenizer = Tokenizer.load(run.inputs["tokenizer"], world.device)
            images = {split: PackedImages(run.inputs["data"], split) for split in SPLITS}
            headers = {split: _header(run, images[split], tokenizer) for split in SPLITS}
        announce_precision(run.name, world.device, run.params.tokenize.precision)
        counts = {split: np.zeros(tokenizer.codebook_size, np.int64) for split in SPLITS}
        works = [work for work in _own_shards(run, world, images, headers, counts) if not _is_made(run, work)]
        total = sum(len(images[split]) * len(headers[split].views) for split in SPLITS)
        _make_shards(run, world, tokenizer, works, total)
        train_counts = sum_over_ranks(torch.from_numpy(counts["train"]).to(world.device)).cpu().numpy()
        if world.is_main:
            for split in SPLITS:
                write_index(run.staging, run.work / "index.tmp", headers[split], images[split].class_names)
            run.summary.update(_summary(run, train_counts))


def _make_shards(run: StageRun, world: World, tokenizer: Tokenizer, works: list[_ShardWork], total: int) -> None:
    """Make this process's shards, block by block; `total`: images of all processes, finished ones included.

    Raises:
        Stopped: a signal arrived at any process.
    """
    params, tasks = run.params.tokenize, [task for work in works for task in _tasks(work)]
    pixels = _pixels(tasks, tokenizer.image_size, params.batch_size)
    remaining = sum(len(block) * len(work.header.views) for work, block in tasks)
    progress = Progress("tokenize", total, "images", done=total - all_reduce(remaining, world))
    with Encoder(tokenizer, params.precision, params.batch_size) as encode:
        # All processes go round equally often, so that they can agree to leave together.
        for turn in range(all_reduce(len(tasks), world, dist.ReduceOp.MAX)):
            with failing_together(world):
                for images_done in _make_block(run, *tasks[turn], encode, pixels) if turn < len(tasks) else ():
                    remaining -= images_done
                    if world.size == 1:
                        progress.update(total - remaining)
            if world.size > 1:
                progress.update(total - all_reduce(remaining, world))
            raise_if_any_stopped(world)


def _header(run: StageRun, images: PackedImages, tokenizer: Tokenizer) -> CacheHeader:
    views = view_names(run.params.tokenize.views) if images.split == "train" else ("center",)
    return CacheHeader(
        split=images.split,
        rows=len(images),
        views=views,
        grid=tokenizer.grid,
        codebook_size=tokenizer.codebook_size,
        num_classes=images.num_classes,
        tokenizer_content=run.manifests["train_tokenizer"].content,
        data_content=run.manifests["prepare_data"].content,
        block_rows=rows_per_block(len(views), run.params.tokenize.batch_size),
    )


def _own_shards(
    run: StageRun,
    world: World,
    images: dict[str, PackedImages],
    headers: dict[str, CacheHeader],
    counts: dict[str, np.ndarray],
) -> Iterator[_ShardWork]:
    """Every world.size-th shard, and the blocks of it that an earlier run left."""
    shards = [(split, index) for split in SPLITS for index in range(headers[split].num_shards)]
    folder = run.work / "blocks"
    folder.mkdir(parents=True, exist_ok=True)
    for split, index in shards[world.rank :: world.size]:
        journal = BlockJournal(folder / f"{split}-{index:05d}.blocks", headers[split], index)
        yield _ShardWork(images[split], headers[split], index, journal, counts[split])


def _tasks(work: _ShardWork) -> list[tuple[_ShardWork, range]]:
    """The blocks that are still to be made; an empty one if only the file is, after a kill between block and file."""
    rest = work.journal.blocks[work.journal.done :]
    return [(work, block) for block in rest] or [(work, range(0))]


def _is_made(run: StageRun, work: _ShardWork) -> bool:
    """Whether an earlier run made the shard; its codes are then counted."""
    path = run.staging / work.header.shard_name(work.index)
    if not path.exists():
        return False
    uses = np.zeros_like(work.counts)
    try:
        shard = read_shard(run.staging, work.header, work.index)
        damage = damaged_blocks(run.staging, work.header, work.index, shard, uses)
    except UserError as error:
        damage = [str(error)]
    if damage:
        logger.warning("%s: is made again", damage[0])
        path.unlink()
        return False
    work.counts += uses
    return True


def _pixels(tasks: list[tuple[_ShardWork, range]], size: int, batch_size: int) -> Iterator[torch.Tensor]:
    """The pixels of all units of all blocks, in order."""
    for split in SPLITS:
        works = [(work, block) for work, block in tasks if work.header.split == split]
        if works:
            header = works[0][0].header
            rows = [unit for _, block in works for unit in units(block, len(header.views), batch_size)]
            yield from unit_pixels(works[0][0].images, rows, header.views, size)


def _make_block(
    run: StageRun, work: _ShardWork, block: range, encode: Encoder, pixels: Iterator[torch.Tensor]
) -> Iterator[int]:
    """Encode a block and put it on disk, with the shard's file if it was the last; yields images done, unit by unit."""
    num_views, parts = len(work.header.views), []
    for _ in units(block, num_views, run.params.tokenize.batch_size):
        parts.append(encode(next(pixels)))
        yield len(parts[-1])
    if parts:
        work.journal.append(torch.cat(parts).cpu().numpy().reshape(len(block), num_views, -1))
    if work.journal.complete:
        _finish(run, work)


def _finish(run: StageRun, work: _ShardWork) -> None:
    """Turn a complete journal into the shard's file, and count its codes."""
    rows = work.header.shard_range(work.index)
    codes = work.journal.codes()
    source_index = np.arange(rows.start, rows.stop)
    write_shard(
        run.staging,
        work.journal.path.with_suffix(".tmp"),
        work.header,
        work.index,
        codes=codes,
        labels=work.images.labels[source_index],
        source_index=source_index,
    )
    work.counts += np.bincount(codes.reshape(-1), minlength=len(work.counts))
    work.journal.path.unlink()


def _summary(run: StageRun, counts: np.ndarray) -> dict[str, object]:
    """Figures for the manifest; `counts`: uses of each code in the training split."""
    caches = [TokenCache(run.staging, split) for split in SPLITS]
    use = CodebookUse(counts)
    tokens = sum(len(cache) * cache.num_views * cache.num_tokens for cache in caches)
    return {
        **{f"{cache.split}_rows": len(cache) for cache in caches},
        "views": list(caches[0].views),
        "tokens_per_image": caches[0].num_tokens,
        "codebook_usage": use.share,
        "code_entropy_bits": use.entropy,
        "bytes_per_token": sum(cache.file_bytes for cache in caches) / tokens,
    }
