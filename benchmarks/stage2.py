"""Stage 2 against LlamaGen: a training step at 256 tokens in the same batch and precision, and equality of logits.

    python benchmarks/stage2.py --llamagen CHECKOUT [--model B] [--batch 8] [--turns 5] [--precision bf16 float32]
        [--peer-keeps-memory]

Ours is the stage's own engine (DeepSpeed, ZeRO 1, clipping, fused AdamW) on the ImageNet preset's params; LlamaGen's
step is that of its training script (autocast, clipping, fused AdamW). The two take turns, each in a process of its own
(`peer.py`): as they are run. A ratio is a median over turns, of neighbouring steps: ours is so many times faster. On a
GPU give a large model and batch, as `--model XL --batch 32 --compile`: tokens/s, peak memory, and MFU against the
matrix rate that is measured there are printed as well; `--side` leaves the other model out of the memory. The last line
of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peer import Peer, run_as_our_stages, timed, usual_precisions
from torch import Tensor
from turn import await_turn

from crt.ar.engine import deepspeed_engine, deepspeed_session, set_learning_rate
from crt.ar.generator import Generator
from crt.ar.import_llamagen import import_llamagen_ar
from crt.ar.model import ARConfig, count_parameters
from crt.ar.sizes import resized
from crt.distributed import join_world
from crt.flops import ar_flops_per_image, matmul_rate
from crt.params import TrainAR, load_params
from crt.plan.work import ar_config

ROOT = Path(__file__).resolve().parent.parent
WARMUP, CLASSES = 2, 1000
# On a GPU the stage looks at its losses this seldom, and runs ahead meanwhile; so many steps are timed together there.
GPU_STEPS = 10
NAMES = ("B", "L", "XL", "XXL", "3B")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llamagen", type=Path, help="clone of LlamaGen's repository")
    parser.add_argument("--side", choices=("both", "ours", "llamagen"), default="both", help="what is measured")
    parser.add_argument("--model", choices=NAMES, default="B")
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--precision", nargs="+", choices=("bf16", "float32"), default=usual_precisions())
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=1)
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing, on our side")
    parser.add_argument("--compile", action="store_true", help="compile both sides' networks")
    parser.add_argument("--peer-keeps-memory", action="store_true", help="LlamaGen keeps freed memory, as ours")
    args = parser.parse_args()
    if args.llamagen is None and args.side != "ours":
        parser.error("give --llamagen CHECKOUT, or --side ours")
    if args.llamagen is not None:
        sys.path.insert(0, str(args.llamagen.resolve()))
    with join_world() as world, deepspeed_session(world):
        device = world.device
        figures: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
            "threads": torch.get_num_threads(), "torch": torch.__version__, "model": args.model, "batch": args.batch,
            "turns": args.turns, "side": args.side, "zero_stage": args.zero_stage, "recompute": args.recompute,
            "compile": args.compile, "peer_keeps_memory": args.peer_keeps_memory,
        }  # fmt: skip
        if args.side == "both":
            figures["largest_logit_difference"] = logit_difference(device)
            print("largest difference of logits, B, float32:", figures["largest_logit_difference"], file=sys.stderr)
        for precision in args.precision:
            figures[precision] = measure(args, precision, world)
            gc.collect()
    if args.side == "both":
        figures["train_ratio"] = figures[args.precision[0]]["train_ratio"]
        for precision in args.precision:
            figures[f"train_{precision}_ratio"] = figures[precision]["train_ratio"]
    print(json.dumps(figures))


def logit_difference(device: torch.device) -> float:
    """Largest absolute difference between a random LlamaGen B and its import, in float32, on codes of all positions."""
    from autoregressive.models.gpt import GPT_models

    torch.manual_seed(0)
    theirs = GPT_models["GPT-B"](vocab_size=16384, block_size=256)
    torch.nn.init.normal_(theirs.output.weight, std=0.02)  # zero as they make it, which would hide everything
    with tempfile.TemporaryDirectory() as folder:
        import_llamagen_ar({"model": theirs.state_dict()}, folder)
        ours = Generator.load(folder, device=device).model
    theirs.to(device)
    # In training mode, which computes all positions; without what is random there.
    theirs.train()
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
        if hasattr(module, "attn_dropout_p"):
            module.attn_dropout_p = 0.0
    theirs.cls_embedding.eval()
    theirs.cls_embedding.dropout_prob = 0.0
    codes, labels = random_batch(2, device)
    with torch.no_grad():
        expected = theirs(idx=codes[:, :-1], cond_idx=labels)[0]
        return (ours.logits(codes, labels) - expected).abs().max().item()


def measure(args: argparse.Namespace, precision: str, world: Any) -> dict[str, Any]:
    """Seconds per step of both sides, in turns."""
    params = load_params(ROOT / "presets/imagenet256.yaml")
    changes = {
        "model": resized(params.train_ar.model, args.model), "batch_size": args.batch, "precision": precision,
        "zero_stage": args.zero_stage, "activation_checkpointing": args.recompute, "compile": args.compile,
    }  # fmt: skip
    stage2: TrainAR = params.train_ar.model_copy(update=changes)
    config = ar_config(params.model_copy(update={"train_ar": stage2}), CLASSES)
    repeats = steps_at_once(world.device)
    seconds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        sides: dict[str, Callable[[], float]] = {}
        if args.side != "llamagen":
            engine = stack.enter_context(deepspeed_engine(stage2, config, 0, world))
            engine.train()
            sides["ours"] = partial(timed, repeated(our_step(engine, stage2, args.batch), repeats))
        if args.side != "ours":
            prepared = llamagen_steps, args, config, stage2, world.device
            peer = stack.enter_context(Peer(*prepared, keep_memory=args.peer_keeps_memory))
            sides["llamagen"] = partial(peer.seconds, "steps")
        for turn in range(WARMUP + args.turns):
            if turn == WARMUP:
                await_turn()
                rate = matmul_rate(world.device, precision, seconds=1.0)
            for name, steps in sides.items():
                seconds.setdefault(name, []).append(steps() / repeats)
            print(
                f"{precision} {turn}: " + ", ".join(f"{n} {s[-1]:.3f} s" for n, s in seconds.items()), file=sys.stderr
            )
    figures: dict[str, Any] = {"parameters": count_parameters(config), "matmul_tflops": rate / 1e12}
    for name, values in seconds.items():
        figures[name] = speed(values[WARMUP:], args.batch, config, rate)
    if args.side == "both":
        ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["llamagen"], strict=True)][WARMUP:]
        figures |= {"train_ratio": statistics.median(ratios), "ratio_spread": [min(ratios), max(ratios)]}
    if world.device.type == "cuda":
        if "ours" in sides:
            figures["ours"]["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        if "llamagen" in sides:
            figures["llamagen"]["peak_memory_bytes"] = peer.peak_memory_bytes
    return figures


def speed(seconds: list[float], batch: int, config: ARConfig, rate: float) -> dict[str, Any]:
    """Of one side: tokens per second, and the share of `rate` that the model's FLOPs make."""
    step = statistics.median(seconds)
    return {
        "seconds": seconds,
        "tokens_per_second": batch * config.num_tokens / step,
        "mfu": ar_flops_per_image(config) * batch / step / rate,
    }


def our_step(engine: Any, params: TrainAR, batch: int) -> Callable[[], None]:
    """What the stage does for a step; on a GPU the losses are read later."""
    codes, labels = random_batch(batch, engine.device)
    set_learning_rate(engine, params.optimizer.learning_rate)

    def step() -> None:
        loss = engine(codes, labels).mean()
        engine.backward(loss)
        engine.step()
        if engine.device.type == "cpu":
            loss.item()

    return step


def steps_at_once(device: torch.device) -> int:
    return GPU_STEPS if device.type == "cuda" else 1


def repeated(step: Callable[[], None], times: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def llamagen_steps(
    args: argparse.Namespace, config: ARConfig, params: TrainAR, device: torch.device
) -> dict[str, Callable[[], None]]:
    """Some steps of LlamaGen's model, in the order of its training script."""
    from autoregressive.models.gpt import GPT_models

    model = GPT_models[f"GPT-{args.model}"](
        vocab_size=config.codebook_size,
        block_size=config.num_tokens,
        num_classes=CLASSES,
        resid_dropout_p=config.dropout,
        ffn_dropout_p=config.dropout,
        token_dropout_p=config.dropout,
        drop_path_rate=0.0,
    )
    model.to(device).train()
    network = torch.compile(model) if args.compile else model
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": params.optimizer.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (params.optimizer.betas[0], params.optimizer.betas[1])
    optimizer = torch.optim.AdamW(groups, lr=params.optimizer.learning_rate, betas=betas, fused=True)
    codes, labels = random_batch(args.batch, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=params.precision == "bf16"):
            _, loss = network(cond_idx=labels, idx=codes[:, :-1], targets=codes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), params.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # as its script does after each step

    return {"steps": repeated(step, steps_at_once(device))}


def random_batch(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16384, (size, 256), generator=generator)
    return codes.to(device), torch.randint(CLASSES, (size,), generator=generator).to(device)


if __name__ == "__main__":
    run_as_our_stages()
    main()
