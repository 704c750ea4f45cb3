"""Stage 1 against LlamaGen: a training step, encoding and decoding at VQ-16 and 256 px, and the regularizer's FLOPs.

    python benchmarks/stage1.py --llamagen CLONE [--images FOLDER] [--batch 2] [--turns 5] [--precision bf16 float32]
        [--peer-keeps-memory]

Both sides have the same weights' shapes, batch, precision and losses: L2, codebook, commitment and PatchGAN from the
first step, no LPIPS. Ours is the real stage with its data loading and logging, started on the ImageNet preset with
lambda 0; LlamaGen's step is run inside its progress report, in a process of its own (`peer.py`): as it is run. Ratios
are medians over the turns: ours is so many times faster. With `--images` (any folder with pictures below it), weights
imported from LlamaGen's format are held against its own code on them, in float32: codes that differ, and the largest
difference of a decoded pixel. `--preset` measures ours alone as the preset has it, with regularizer and LPIPS (random
weights serve for speed). The last line of the output is one JSON object; on a GPU it also tells images/s, peak memory
(and what `plan` derives), share of the bf16 peak (`--peak-tflops`) and the days that 400,000 steps of 128 would take.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer import Peer, await_gpu, run_as_our_stages, timed, usual_precisions
from PIL import Image
from ruamel.yaml import YAML
from torch import Tensor, nn
from torchvision.models import vgg16
from turn import await_turn

from crt.__main__ import main as crt_main
from crt.data.transforms import center_crop, to_unit_range
from crt.flops import tokenizer_flops_per_image
from crt.params import load_params
from crt.plan.tokenizer_memory import tokenizer_memory
from crt.progress import Progress
from crt.stages import train_tokenizer
from crt.tokenizer.import_llamagen import import_llamagen_tokenizer
from crt.tokenizer.model import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
SIZE, WARMUP, IMAGES = 256, 2, 24
PAPER_STEPS, PAPER_BATCH = 400_000, 128
COMPARED_IMAGES = {"VQ-16": 32, "VQ-8": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llamagen", type=Path, help="clone of LlamaGen's repository")
    parser.add_argument("--preset", action="store_true", help="our step as the ImageNet preset has it, alone")
    parser.add_argument("--images", type=Path, help="pictures on which imported weights are compared")
    parser.add_argument("--batch", type=int, default=2, help="images per step and per call")
    parser.add_argument("--turns", type=int, default=5, help="timed turns of each side")
    parser.add_argument("--precision", nargs="+", choices=("bf16", "float32"), default=usual_precisions())
    parser.add_argument("--compile", action="store_true", help="compile both sides' networks for training")
    parser.add_argument("--peer-keeps-memory", action="store_true", help="LlamaGen keeps freed memory, as ours")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in bf16, for the share of it that is used")
    args = parser.parse_args()
    if args.preset == (args.llamagen is not None):
        parser.error("give --llamagen or --preset")
    if args.llamagen:
        sys.path.insert(0, str(args.llamagen.resolve()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "batch": args.batch, "turns": args.turns, "compile": args.compile,
        "peer_keeps_memory": args.peer_keeps_memory, "flops_overhead": flops_overhead(),
    }  # fmt: skip
    if args.images:
        with tempfile.TemporaryDirectory() as name:
            figures |= compare_imported(Path(name), args.images, device)
    for precision in args.precision:
        with tempfile.TemporaryDirectory() as name:
            found = measure_training(Path(name), args, precision, device)
            if not args.preset:
                found |= measure_inference(Path(name), args, precision, device)
        print(precision, json.dumps(found), flush=True)
        figures[precision] = found
    # The first precision's ratios stand at the top too.
    for key in ("train_ratio", "encode_ratio", "decode_ratio"):
        if not args.preset:
            figures[key] = figures[args.precision[0]][key]
    print(json.dumps(figures))


def flops_overhead() -> float:
    """Share by which the regularizer of the ImageNet preset raises the FLOPs of training, discriminator included."""
    params = load_params(ROOT / "presets/imagenet256.yaml").train_tokenizer
    without, with_regularizer = (tokenizer_flops_per_image(params, regularized) for regularized in (False, True))
    return with_regularizer / without - 1


@torch.no_grad()
def compare_imported(folder: Path, images: Path, device: torch.device) -> dict[str, dict[str, float]]:
    """Both of LlamaGen's tokenizers with random weights: codes and decoded pixels of the two codes, float32."""
    from tokenizer.tokenizer_image.vq_model import VQ_models

    torch.backends.cudnn.allow_tf32 = False  # float32 indeed

    files = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg", ".png", ".webp"))
    figures = {}
    for name, count in COMPARED_IMAGES.items():
        torch.manual_seed(0)
        theirs = VQ_models[name]().eval()
        # Fresh weights make nearly the same latent everywhere: spread them, so that many codes are used.
        theirs.quant_conv.weight.mul_(4)
        import_llamagen_tokenizer({"model": theirs.state_dict()}, folder / name)
        ours, theirs = Tokenizer.load(folder / name, device), theirs.to(device)
        differing, unlike_exact, total, largest, used = 0, 0, 0, 0.0, set()
        for file in files[:: max(1, len(files) // count)][:count]:
            with Image.open(file) as picture:
                pixels = center_crop(np.array(picture.convert("RGB")), SIZE)
            x = to_unit_range(torch.from_numpy(pixels.copy())[None]).to(device)
            quantized, _, (_, _, codes) = theirs.encode(x)
            mine = ours.encode(x)
            other, total = mine.flatten() != codes, total + codes.numel()
            differing += int(other.sum())
            if other.any():  # a tie within somebody's rounding: whose?
                _, _, (_, _, exact) = copy.deepcopy(theirs).double().encode(x.double())
                unlike_exact += int((mine.flatten() != exact)[other].sum())
            used |= set(codes.tolist())
            decoded = ours.decode(codes.view(1, -1))
            largest = max(largest, float((decoded - theirs.decode(quantized)).abs().max()))
        figures[f"imported_{name}"] = {
            "images": total // mine.numel(), "codes": total, "distinct_codes": len(used), "codes_differing": differing,
            "differing_where_float64_gives_llamagens": unlike_exact, "largest_pixel_difference": largest,
        }  # fmt: skip
        print(name, figures[f"imported_{name}"], file=sys.stderr, flush=True)
    torch.backends.cudnn.allow_tf32 = True
    return figures


def measure_training(
    folder: Path, args: argparse.Namespace, precision: str, device: torch.device
) -> dict[str, float | list[float]]:
    """Seconds per step of both sides, in turns."""
    params_file = write_inputs(folder, args, precision)
    ours_seconds: list[float] = []
    their_seconds: list[float] = []

    class Turns(Progress):
        """At the end of each of our steps, one of theirs."""

        def update(self, done: int, **figures: float) -> None:
            await_gpu()
            ours_seconds.append(time.perf_counter() - self.resumed)
            their_seconds.append(0.0 if peer is None else peer.seconds("step"))
            self.resumed = time.perf_counter()
            if done == WARMUP:
                await_turn()
                self.resumed = time.perf_counter()
            print(f"step {done}: ours {ours_seconds[-1]:.3f} s, theirs {their_seconds[-1]:.3f} s", file=sys.stderr)

        resumed = time.perf_counter()

    stage = ["train_tokenizer", "--params", str(params_file), "--data", str(folder / "data")]
    with ExitStack() as stack:
        peer = None
        if not args.preset:
            peer = stack.enter_context(Peer(llamagen_step, args, precision, device, keep_memory=args.peer_keeps_memory))
        stack.enter_context(replaced(train_tokenizer, "Progress", Turns))
        if crt_main([*stage, "--out", str(folder / "tokenizer")]):
            raise SystemExit("train_tokenizer failed")
    ours_seconds, their_seconds = ours_seconds[WARMUP:], their_seconds[WARMUP:]
    step = statistics.median(ours_seconds)
    figures: dict[str, float | list[float]] = {
        "train_seconds": ours_seconds,
        "images_per_second": args.batch / step,
        "days_of_400k_steps": PAPER_STEPS * PAPER_BATCH * step / args.batch / 86400,
    }
    if not args.preset:
        figures |= {
            "train_ratio": statistics.median(their_seconds) / step,
            "train_seconds_llamagen": their_seconds,
        }
    if device.type == "cuda":
        figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        derived = tokenizer_memory(load_params(params_file).train_tokenizer, args.preset, processes=1)
        figures["peak_memory_bytes_by_plan"] = derived.peak
    if args.peak_tflops:
        flops = tokenizer_flops_per_image(load_params(params_file).train_tokenizer, with_regularizer=args.preset)
        figures["share_of_peak"] = flops * args.batch / step / (args.peak_tflops * 1e12)
    return figures


def write_inputs(folder: Path, args: argparse.Namespace, precision: str) -> Path:
    """A packed data set of random pictures, and the ImageNet preset with as many steps as are timed."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        (folder / "images" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        picture.save(folder / "images" / "ab"[number % 2] / f"{number}.png")
    yaml = YAML()
    values = yaml.load((ROOT / "presets/imagenet256.yaml").read_text(encoding="utf-8"))
    loss = values["train_tokenizer"]["loss"]
    if args.preset:
        loss["lpips_weights"] = str(folder / "vgg16.pth")
        torch.save(vgg16(weights=None).state_dict(), loss["lpips_weights"])
    else:
        values["lambda"] = loss["lpips_weight"] = 0.0
    values["prepare_data"] |= {
        "source": "imagefolder", "path": str(folder / "images"), "storage": "pixels", "image_size": SIZE,
        "val_fraction": 0.1,
    }  # fmt: skip
    values["tokenize"]["views"] = ["center"]
    values["train_tokenizer"] |= {
        "steps": WARMUP + args.turns, "batch_size": args.batch, "min_crop": 1.0, "precision": precision,
        "compile": args.compile, "validate_every": 10**6, "checkpoint_every": 10**6,
    }  # fmt: skip
    values["train_tokenizer"]["discriminator"]["start_step"] = 0
    with open(folder / "params.yaml", "w", encoding="utf-8") as file:
        yaml.dump(values, file)
    os.chdir(ROOT)
    if crt_main(["prepare_data", "--params", str(folder / "params.yaml"), "--out", str(folder / "data")]):
        raise SystemExit("prepare_data failed")
    return folder / "params.yaml"


def llamagen_step(args: argparse.Namespace, precision: str, device: torch.device) -> dict[str, Callable[[], None]]:
    """LlamaGen's own networks and loss in the order of its training script, without LPIPS."""
    from tokenizer.tokenizer_image import vq_loss
    from tokenizer.tokenizer_image.vq_model import VQ_models

    class NoPerceptualLoss(nn.Module):
        def forward(self, inputs: Tensor, reconstructions: Tensor) -> Tensor:
            return torch.zeros((), device=inputs.device)

    with replaced(vq_loss, "LPIPS", NoPerceptualLoss):
        criterion = vq_loss.VQLoss(disc_start=0, disc_weight=0.5).to(device).train()
    model = VQ_models["VQ-16"]().to(device).train()
    # Its usage counter is a Parameter that it writes to.
    model.quantize.codebook_used = model.quantize.codebook_used.detach()
    run = torch.compile(model) if args.compile else model
    betas = (0.9, 0.95)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=betas)
    optimizer_disc = torch.optim.Adam(criterion.discriminator.parameters(), lr=1e-4, betas=betas)
    images = random_images(args.batch, device)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(device, precision):
            reconstructions, codebook_loss = run(images)
            loss = criterion(codebook_loss, images, reconstructions, 0, 1, last_layer=model.decoder.last_layer)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer_disc.zero_grad()
        with autocast(device, precision):
            loss_disc = criterion(codebook_loss, images, reconstructions, 1, 1)
        loss_disc.backward()
        torch.nn.utils.clip_grad_norm_(criterion.discriminator.parameters(), 1.0)
        optimizer_disc.step()
        # Its script reads both losses after every step.
        loss.item()
        loss_disc.item()

    return {"step": step}


@torch.no_grad()
def measure_inference(
    folder: Path, args: argparse.Namespace, precision: str, device: torch.device
) -> dict[str, float | list[float]]:
    """Seconds per batch of encoding and decoding with the same weights, in turns."""
    import_llamagen_tokenizer({"model": random_llamagen().state_dict()}, folder / "imported")
    ours = Tokenizer.load(folder / "imported", device)
    images = random_images(args.batch, device)
    codes = ours.encode(images)
    sides: dict[str, Callable[[], object]] = {
        "encode": lambda: ours.encode(images), "decode": lambda: ours.decode(codes)
    }  # fmt: skip
    figures: dict[str, float | list[float]] = {}
    keep = args.peer_keeps_memory
    with Peer(llamagen_inference, args.batch, precision, device, codes.cpu(), ours.grid, keep_memory=keep) as peer:
        for name, work in sides.items():
            seconds: tuple[list[float], list[float]] = ([], [])
            for _ in range(WARMUP + args.turns):
                with autocast(device, precision):
                    seconds[0].append(timed(work))
                seconds[1].append(peer.seconds(name))
            mine_seconds, other_seconds = (times[WARMUP:] for times in seconds)
            figures[f"{name}_ratio"] = statistics.median(other_seconds) / statistics.median(mine_seconds)
            figures[f"{name}_seconds"], figures[f"{name}_seconds_llamagen"] = mine_seconds, other_seconds
    return figures


def random_llamagen() -> Any:
    """LlamaGen's VQ-16, always with the same weights."""
    from tokenizer.tokenizer_image.vq_model import VQ_models

    torch.manual_seed(0)
    return VQ_models["VQ-16"]().eval()


def llamagen_inference(
    batch: int, precision: str, device: torch.device, codes: Tensor, grid: tuple[int, int]
) -> dict[str, Callable[[], None]]:
    """Their encoding and decoding; codes (B, N)."""
    model, images = random_llamagen().to(device), random_images(batch, device)
    codes, shape = codes.to(device), (batch, 8, *grid)

    @torch.no_grad()
    def encode() -> None:
        with autocast(device, precision):
            model.encode(images)

    @torch.no_grad()
    def decode() -> None:
        with autocast(device, precision):
            model.decode_code(codes, shape)

    return {"encode": encode, "decode": decode}


def random_images(count: int, device: torch.device) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, device=device) * 2 - 1


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def replaced(module: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


if __name__ == "__main__":
    run_as_our_stages()
    main()
