"""Sampling against LlamaGen: images per second with guidance, by the same weights in the same precision.

    python benchmarks/sampling.py --llamagen CLONE [--precision bf16] [--turns 3] [--peer-keeps-memory]
    python benchmarks/sampling.py --llamagen CLONE --gpu [--sizes B XL 3B] [--batches 1 32 256]

Both sides draw all codes in turns, each in a process of its own (`peer.py`): as they are run. On a CPU: size B, 256
tokens, guidance 2.0, 8 images. On a GPU: ours and LlamaGen's compiled, as its `sample_c2i.py --compile` does, with our
share of what memory bandwidth allows: every weight once per step, and the cache's filled part. Ratios are medians over
the turns: ours is so many times faster. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peer import Peer, run_as_our_stages, timed
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
    parser.add_argument("--peer-keeps-memory", action="store_true", help="LlamaGen keeps freed memory, as ours")
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
        "tokens": NUM_TOKENS, "peer_keeps_memory": args.peer_keeps_memory,
    }  # fmt: skip
    print(json.dumps(figures | (measure_gpu(args) if args.gpu else measure_cpu(args))))


def measure_cpu(args: argparse.Namespace) -> dict[str, Any]:
    """Images per second of both sides."""
    keep_freed_memory()
    ours = our_generator("B", args.precision, torch.device("cpu"))
    with llamagen(args, "B", [CPU_IMAGES]) as theirs:
        ours_seconds, their_seconds = in_turns(ours, theirs, CPU_IMAGES, args.turns)
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
        ours = our_generator(size, args.precision, device)
        with llamagen(args, size, args.batches) as theirs:
            for batch in args.batches:
                step, their_step = (statistics.median(seconds) for seconds in in_turns(ours, theirs, batch, args.turns))
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


def random_llamagen(size: str) -> nn.Module:
    """LlamaGen's model, always with the same weights."""
    from autoregressive.models.gpt import GPT_models

    torch.manual_seed(0)
    model = GPT_models[f"GPT-{size}"](
        vocab_size=CODEBOOK, block_size=NUM_TOKENS, num_classes=CLASSES, cls_token_num=1, model_type="c2i"
    ).eval()
    nn.init.normal_(model.output.weight, std=0.02)  # zero in a new model, which draws from no distribution
    return model


def our_generator(size: str, precision: str, device: torch.device) -> Generator:
    """Ours with those weights; on a GPU its steps are recorded."""
    with tempfile.TemporaryDirectory() as name:
        import_llamagen_ar(random_llamagen(size).state_dict(), Path(name))
        return Generator.load(name, precision, device, compile=device.type == "cuda")


def llamagen(args: argparse.Namespace, size: str, batches: list[int]) -> Peer:
    """Their process, which draws as many images as it is told."""
    return Peer(llamagen_calls, size, args.precision, args.gpu, batches, keep_memory=args.peer_keeps_memory)


def llamagen_calls(size: str, precision: str, gpu: bool, batches: list[int]) -> dict[str, Callable[[], Tensor]]:
    from autoregressive.models.generate import generate

    device = torch.device("cuda" if gpu else "cpu")
    model: Callable[..., Any] = random_llamagen(size).to(device, DTYPES[precision])
    if gpu:
        model = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "sample_logits": True}
    draw = partial(generate, model, max_new_tokens=NUM_TOKENS, cfg_scale=GUIDANCE, cfg_interval=-1, **settings)
    return {str(images): partial(draw, some_labels(images, device)) for images in batches}


def some_labels(images: int, device: torch.device) -> Tensor:
    return (torch.arange(images) % CLASSES).to(device)


def in_turns(ours: Generator, theirs: Peer, images: int, turns: int) -> tuple[list[float], list[float]]:
    """Seconds of each side's calls, after one that is not timed."""
    labels = some_labels(images, ours.model.head.weight.device)
    sides = partial(timed, partial(ours.generate, labels, GUIDANCE)), partial(theirs.seconds, str(images))
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        if turn == 1:
            await_turn()
        for work, times in zip(sides, seconds, strict=True):
            times.append(work())
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
    return 2 * COPIED_BYTES / min(timed(lambda: target.copy_(source)) for _ in range(5))


if __name__ == "__main__":
    run_as_our_stages()
    main()
