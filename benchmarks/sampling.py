"""Sampling against LlamaGen: images per second with guidance, by the same weights in the same precision.

    python benchmarks/sampling.py --llamagen CLONE [--precision bf16] [--turns 3]
    python benchmarks/sampling.py --llamagen CLONE --gpu [--sizes B XL 3B] [--batches 1 32 256]

On a CPU: size B, 256 tokens, guidance 2.0, 8 images; both sides draw all codes in turns in one process. On a GPU: ours
and LlamaGen's compiled, as its `sample_c2i.py --compile` does, with our share of what memory bandwidth allows: every
weight once per step, and the cache's filled part. Ratios are medians over the turns: ours is so many times faster. The
last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from turn import await_turn

from crt.ar.generator import DTYPES, Generator
from crt.ar.import_llamagen import import_llamagen_ar
from crt.launch import keep_freed_memory

NUM_TOKENS, CODEBOOK, CLASSES = 256, 16384, 1000
CPU_IMAGES, GUIDANCE = 8, 2.0
# Bytes that are copied to measure the memory's bandwidth.
COPIED_BYTES = 4 * 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llamagen", type=Path, required=True, help="clone of LlamaGen's repository")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--turns", type=int, default=3, help="timed turns of each side")
    parser.add_argument("--gpu", action="store_true", help="measure sizes and batches on a GPU instead")
    parser.add_argument("--sizes", nargs="+", default=["B", "XL", "3B"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 256])
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        raise SystemExit("error: --gpu: torch sees no GPU here: leave the option out, or run it where one is")
    sys.path.insert(0, str(args.llamagen.resolve()))
    figures = {
        "device": torch.cuda.get_device_name() if args.gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "precision": args.precision, "turns": args.turns, "guidance": GUIDANCE,
        "tokens": NUM_TOKENS,
    }  # fmt: skip
    print(json.dumps(figures | (measure_gpu(args) if args.gpu else measure_cpu(args))))


def measure_cpu(args: argparse.Namespace) -> dict[str, Any]:
    """Images per second of both sides, in turns; with freed memory kept, as our stages have it, which serves both."""
    keep_freed_memory()
    ours, theirs = both_sides("B", args.precision, torch.device("cpu"), compiled=False)
    labels = torch.arange(CPU_IMAGES)
    ours_seconds, their_seconds = in_turns(
        lambda: ours.generate(labels, guidance=GUIDANCE),
        lambda: their_generate(theirs, labels),
        args.turns,
    )
    return {
        "size": "B", "images": CPU_IMAGES,
        "images_per_second": CPU_IMAGES / statistics.median(ours_seconds),
        "images_per_second_llamagen": CPU_IMAGES / statistics.median(their_seconds),
        "images_per_second_ratio": statistics.median(their_seconds) / statistics.median(ours_seconds),
        "pairwise_ratios": [b / a for a, b in zip(ours_seconds, their_seconds, strict=True)],
        "seconds": ours_seconds, "seconds_llamagen": their_seconds,
    }  # fmt: skip


def measure_gpu(args: argparse.Namespace) -> dict[str, Any]:
    """Every size at every batch, ours beside theirs and beside the limit."""
    device, found = torch.device("cuda"), {}
    for size in args.sizes:
        ours, theirs = both_sides(size, args.precision, device, compiled=True)
        for batch in args.batches:
            labels = (torch.arange(batch) % CLASSES).to(device)
            ours_seconds, their_seconds = in_turns(
                partial(ours.generate, labels, GUIDANCE),
                partial(their_generate, theirs, labels),
                args.turns,
            )
            step, their_step = (statistics.median(s) for s in (ours_seconds, their_seconds))
            bandwidth = copy_bandwidth(device)
            figures = {
                "images_per_second": batch / step,
                "images_per_second_llamagen": batch / their_step,
                "images_per_second_ratio": their_step / step,
                "share_of_bandwidth_limit_ratio": bytes_read(ours, 2 * batch) / bandwidth / step,
                "copy_bandwidth_bytes_per_second": bandwidth,
            }
            found[f"{size}_batch_{batch}"] = figures
            print(size, batch, json.dumps(figures), flush=True)
    return found


def both_sides(size: str, precision: str, device: torch.device, compiled: bool) -> tuple[Generator, nn.Module]:
    """Our generator and LlamaGen's model, with the same random weights."""
    from autoregressive.models.gpt import GPT_models

    torch.manual_seed(0)
    theirs = GPT_models[f"GPT-{size}"](
        vocab_size=CODEBOOK, block_size=NUM_TOKENS, num_classes=CLASSES, cls_token_num=1, model_type="c2i"
    ).eval()
    nn.init.normal_(theirs.output.weight, std=0.02)  # zero in a new model, which draws from no distribution
    with tempfile.TemporaryDirectory() as name:
        import_llamagen_ar(theirs.state_dict(), Path(name))
        ours = Generator.load(name, precision, device, compile=compiled)
    theirs = theirs.to(device, DTYPES[precision])
    if compiled:
        theirs = torch.compile(theirs, mode="reduce-overhead", fullgraph=True)
    return ours, theirs


def their_generate(model: nn.Module, labels: Tensor) -> Tensor:
    from autoregressive.models.generate import generate

    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "sample_logits": True}
    return generate(model, labels, NUM_TOKENS, cfg_scale=GUIDANCE, cfg_interval=-1, **settings)


def in_turns(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], turns: int) -> tuple[list[float], list[float]]:
    """Seconds of each call, after one that is not timed."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        if turn == 1:
            await_turn()
        for work, times in zip((ours, theirs), seconds, strict=True):
            started = time.perf_counter()
            work().cpu()  # waits for the GPU
            times.append(time.perf_counter() - started)
        print(f"turn {turn}: ours {seconds[0][-1]:.3f} s, theirs {seconds[1][-1]:.3f} s", file=sys.stderr, flush=True)
    return seconds[0][1:], seconds[1][1:]


def bytes_read(generator: Generator, sequences: int) -> float:
    """Least traffic of drawing a batch: at each step all weights but the tables, and the cache's filled part."""
    config, size = generator.config, generator.model.head.weight.element_size()
    tables = ("class_embedding.weight", "code_embedding.weight")
    weights = sum(tensor.numel() for name, tensor in generator.model.state_dict().items() if name not in tables)
    cache = 2 * config.layers * sequences * config.width * (NUM_TOKENS + 1) / 2
    return NUM_TOKENS * size * (weights + cache)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second while one large tensor is copied."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * COPIED_BYTES / best


if __name__ == "__main__":
    main()
