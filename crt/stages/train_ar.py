"""Stage `train_ar`: a class-conditional transformer over the codes, trained under DeepSpeed.

Reads the token cache. Writes the model (`config.json`, `model.safetensors` in float32, read by
`crt.Generator.load`), `train.csv` (loss, gradient norm and learning rate by step), `validation.csv` (mean loss over
the whole validation split) and `loss_per_position.csv` (the same for each code of the raster, at the last
validation). Losses are in nats per code; the untrained model starts at ln(codebook size). To watch: `out/ar.live` has
curves for TensorBoard and DVCLive, speed and share of the machine's matrix rate among them, and a picture of samples
at each validation.

Runs in one process or many (torchrun, srun). Stopped at any moment it continues from its last checkpoint, bit for
bit at the same number of processes: batches, dropped labels and dropout are functions of (seed, step), and the rest
is in the checkpoint. (On GPUs the attention's backward pass adds in varying order: there a continued run agrees with
an uninterrupted one to rounding.) With another number of processes it goes on with the same global batches; only the
dropout differs, whose draws belong to the process.

Cost: about 6 x parameters FLOPs per code. The default digits run takes one to two minutes on two cores; the paper's
775M model took 3.5 days on 8 A100 for 375,000 steps of 256 images.
"""

from __future__ import annotations

import csv
import math
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from crt.ar.checkpoints import Checkpoints
from crt.ar.deepspeed_config import micro_batches
from crt.ar.engine import (
    deepspeed_engine,
    deepspeed_session,
    gather_weights,
    gradient_norm,
    set_learning_rate,
)
from crt.ar.initial_weights import initial_weights
from crt.ar.model import ARConfig, count_parameters, save_model
from crt.ar.sample_grid import SampleGrid
from crt.distributed import World, gpu_memory, join_world, reported_once, said_by_main, stop_signal
from crt.errors import UserError
from crt.files import replacing
from crt.flops import ar_flops_per_image, matmul_rate
from crt.history import History, read_history
from crt.interrupt import Stopped, stop_requested
from crt.live import Live, live_folder
from crt.params import TrainAR
from crt.precision import announce_precision
from crt.progress import Progress
from crt.randomness import numpy_generator, seed_torch
from crt.schedules import learning_rate_factor
from crt.stage import StageRun, check_inputs
from crt.tokens.cache import TokenCache
from crt.tokens.sampler import training_batches

# On a GPU the host runs ahead of the device; looking at a loss makes it wait, so it looks this seldom: after so many
# steps, or sooner where they take longer than this. Who asks to stop waits as long.
_GPU_REPORT_STEPS, _REPORT_SECONDS = 20, 5.0
# train.csv keeps about so many rows.
_HISTORY_ROWS = 10_000


def run(run: StageRun) -> None:
    """Train the model of `train_ar.model`.

    Raises:
        UserError: a batch that does not divide, weights to begin with that do not fit, a damaged cache, a loss that is
            not finite, too little GPU memory.
        Stopped: a signal arrived at any process; the state is saved.
    """
    run.refuse_own_output("train_ar.init_from", run.params.train_ar.init_from)
    remedy = "lower train_ar.micro_batch_size, turn on activation_checkpointing, raise zero_stage, or set offload"
    with join_world() as world, deepspeed_session(world), reported_once(world), gpu_memory(run.name, remedy):
        train_codes = TokenCache(run.inputs["tokens"], "train")
        val_codes = TokenCache(run.inputs["tokens"], "val")
        micro_batches(run.params.train_ar, world.size)
        _train(run, world, train_codes, val_codes)


def config_of(params: TrainAR, codes: TokenCache) -> ARConfig:
    """The model of the params, for the codes of a cache."""
    return ARConfig.from_params(
        params.model,
        codebook_size=codes.codebook_size,
        grid=codes.grid,
        num_classes=codes.num_classes,
        class_names=tuple(codes.class_names),
        tokenizer_content=codes.known_tokenizer,
    )


def _train(run: StageRun, world: World, train_codes: TokenCache, val_codes: TokenCache) -> None:
    params, seed = run.params.train_ar, run.params.seed
    announce_precision(run.name, world.device, params.precision)
    config = config_of(params, train_codes)
    micro, _ = micro_batches(params, world.size)
    share = params.batch_size // world.size

    checkpoints = Checkpoints(
        run.work / "checkpoints", world, params.zero_stage, asdict(config), params.keep_checkpoints
    )
    checkpoint = checkpoints.latest()
    universal = checkpoint is not None and checkpoints.needs_conversion(checkpoint)
    if checkpoint is not None and universal:
        checkpoints.convert(checkpoint)
    initial = initial_weights(params, config)
    with deepspeed_engine(params, config, seed, world, initial=initial, universal=universal) as engine:
        if checkpoint is not None:
            checkpoints.restore(engine, checkpoint)
        first_step = checkpoint.step if checkpoint is not None else 0

        log = _Log(run, world, first_step, ar_flops_per_image(config) * params.batch_size)
        grid = SampleGrid(run, params.sample_images, train_codes.class_names, world)
        progress = Progress("train_ar", params.steps, "steps", done=first_step)
        batches = training_batches(
            train_codes,
            batch_size=params.batch_size,
            seed=seed,
            first_step=first_step,
            steps=params.steps,
            rank=world.rank,
            world_size=world.size,
        )
        validated = log.has_validated(first_step)  # a stop may have come before its end
        engine.train()
        for step in range(first_step, params.steps + 1):  # `step` updates are done
            last, fresh = step == params.steps, step > first_step
            due = last or (step > 0 and step % params.validate_every == 0)
            if due and not log.stop_signal and (fresh or not validated):
                losses = validate(engine, val_codes, micro, world)
                if losses is None:
                    log.stop_signal = stop_signal(world)
                else:
                    log.validation(step, losses)
                    if grid.enabled:
                        log.picture(step, grid.draw(engine.module))
                engine.train()

            if fresh and (last or log.stop_signal or step % params.checkpoint_every == 0):
                if world.is_main:
                    check_inputs(run)
                checkpoints.save(engine, step)
            if log.stop_signal:
                raise Stopped(log.stop_signal)
            if last:
                break

            codes, labels = next(batches)
            dropped = _dropped_labels(seed, step, params.batch_size, params.model.label_dropout)
            labels[dropped[world.rank * share : (world.rank + 1) * share]] = config.null_class
            codes, labels = codes.to(world.device, non_blocking=True), labels.to(world.device, non_blocking=True)
            rate = _learning_rate(step, params)
            set_learning_rate(engine, rate)
            loss = _update(engine, step, codes, labels, run=run, world=world)

            done = step + 1
            log.training(done, loss, gradient_norm(engine), rate)
            if log.is_time_to_look or _is_due(done, params):
                log.flush()
                speed = log.speed(params.batch_size * config.num_tokens)
                log.live_figures(done, speed)
                progress.update(done, loss=log.last_loss, grad_norm=log.last_norm, **speed)

        # Without a step they are the given ones, not what the precision of training makes of them.
        weights = gather_weights(engine, world) if params.steps else initial
        if world.is_main:
            save_model(weights, config, run.staging)
            run.summary.update(log.summary())
            log.close()
            run.summary["parameters"] = count_parameters(config)
            run.summary["training_flops"] = ar_flops_per_image(config) * params.batch_size * params.steps
            run.summary["tokens_seen"] = params.steps * params.batch_size * config.num_tokens


def _update(engine: Any, step: int, codes: Tensor, labels: Tensor, *, run: StageRun, world: World) -> Tensor:
    """Step number `step`, counted from 0, on this process's (B, T) codes and (B,) labels. A collective call.

    Returns:
        Mean loss of this process's share, a scalar on the device.
    """
    micro, accumulation = micro_batches(run.params.train_ar, world.size)
    step_loss = torch.zeros((), device=world.device)
    for index in range(accumulation):
        rows = slice(index * micro, (index + 1) * micro)
        seed_torch(run.params.seed, "dropout", step, index, world.rank)
        loss = engine(codes[rows], labels[rows]).mean()
        engine.backward(loss)
        engine.step()
        step_loss += loss.detach() / accumulation
    return step_loss


def _learning_rate(step: int, params: TrainAR) -> float:
    optimizer = params.optimizer
    factor = learning_rate_factor(
        step, params.steps, optimizer.schedule, optimizer.warmup_steps, optimizer.final_fraction
    )
    return optimizer.learning_rate * factor


def _is_due(step: int, params: TrainAR) -> bool:
    """Whether a validation or checkpoint follows, before which the losses so far must be looked at."""
    return step == params.steps or step % params.validate_every == 0 or step % params.checkpoint_every == 0


def _dropped_labels(seed: int, step: int, batch_size: int, probability: float) -> Tensor:
    """Which rows of the global batch train without their label: (B,) bool, the same for any number of processes."""
    return torch.from_numpy(numpy_generator(seed, "label_dropout", step).random(batch_size) < probability)


def steps_to_look_after(seconds_per_step: float) -> int:
    """How many steps a GPU makes before the host looks at their losses."""
    return max(1, min(_GPU_REPORT_STEPS, int(_REPORT_SECONDS / max(seconds_per_step, 1e-9))))


@torch.no_grad()
def validate(engine: Any, codes: TokenCache, batch_size: int, world: World) -> np.ndarray | None:
    """Mean loss of each code of the raster over a whole split, each image in its first view. A collective call.

    Args:
        engine: the model; left in evaluation mode.
        codes: the split.
        batch_size: images per process and forward pass.
        world: the processes that share the work.

    Returns:
        (T,) float64, nats; None where a process was asked to stop meanwhile.
    """
    engine.eval()
    total = torch.zeros(codes.num_tokens, dtype=torch.float64, device=world.device)
    # All processes make equally many passes of one size, as ZeRO-3 needs; rows beyond the end count nothing.
    for start in range(0, len(codes), batch_size * world.size):
        if stop_signal(world):
            return None
        rows = start + world.rank * batch_size + np.arange(batch_size)
        inside = torch.from_numpy(rows < len(codes)).to(world.device)
        rows = np.minimum(rows, len(codes) - 1)
        batch = torch.from_numpy(codes.codes(rows, 0)).to(world.device)
        labels = torch.from_numpy(codes.labels[rows]).to(world.device)
        total += (engine(batch, labels).double() * inside[:, None]).sum(0)
    dist.all_reduce(total)
    return (total / len(codes)).cpu().numpy()


class _Log:
    """The run's figures: what has not been looked at yet, and the files of rank 0.

    `flush` brings the losses of all steps since the last one to the host, with one collective for all of them and
    for the question whether any process was asked to stop.
    """

    def __init__(self, run: StageRun, world: World, first_step: int, flops_per_step: int) -> None:
        self.world, self.folder = world, run.staging
        self.flops_per_step = flops_per_step
        # All processes measure at once, as they will compute at once.
        self.peak_flops = matmul_rate(world.device, run.params.train_ar.precision) * world.size
        self.keep_every = math.ceil(run.params.train_ar.steps / _HISTORY_ROWS)
        self.pending: list[tuple[int, Tensor, Tensor, float]] = []
        self.look_steps, self.looked, self.seconds_per_step = 1, time.monotonic(), math.inf
        self.stop_signal: int | None = None
        self.last_loss = self.last_norm = self.last_rate = math.nan
        self.steps_since, self.since = 0, time.monotonic()
        if world.is_main:
            self.train = History(self.folder / "train.csv", ["loss", "grad_norm", "learning_rate"], first_step)
            self.val = History(self.folder / "validation.csv", ["loss"], first_step)
            self.live = Live(live_folder(run), run.params.train_ar.steps, first_step)

    def training(self, step: int, loss: Tensor, grad_norm: Tensor, learning_rate: float) -> None:
        """Note the figures of one step, still on the device."""
        self.pending.append((step, loss, grad_norm, learning_rate))

    @property
    def is_time_to_look(self) -> bool:
        """Whether to `flush`; the same on all processes."""
        return len(self.pending) >= self.look_steps

    def flush(self) -> None:
        """Look at the steps noted since the last call. A collective call.

        Raises:
            UserError: a loss or gradient is not finite.
        """
        steps, losses, norms, rates = zip(*self.pending, strict=True)
        own_signal = stop_requested()
        told = torch.tensor([self.seconds_per_step, float(own_signal is not None)], device=self.world.device)
        sums = torch.cat((torch.stack(losses) / self.world.size, told))
        dist.all_reduce(sums)
        *mean_losses, total_seconds, num_asked = sums.tolist()
        grad_norms = torch.stack(norms).tolist()
        if num_asked:
            self.stop_signal = own_signal or signal.SIGTERM
        self._check_finite(steps, mean_losses, grad_norms)
        if self.world.is_main:
            for step, loss, norm, rate in zip(steps, mean_losses, grad_norms, rates, strict=True):
                if step % self.keep_every == 0:
                    self.train.append(step, {"loss": loss, "grad_norm": norm, "learning_rate": rate})
        self.last_loss, self.last_norm, self.last_rate = mean_losses[-1], grad_norms[-1], rates[-1]
        self.steps_since += len(steps)
        self.pending.clear()
        if self.world.device.type == "cuda":
            # Of the steps before these, which all processes know.
            self.look_steps = steps_to_look_after(total_seconds / self.world.size)
        before, self.looked = self.looked, time.monotonic()
        self.seconds_per_step = (self.looked - before) / len(steps)

    def speed(self, tokens_per_step: int) -> dict[str, float]:
        """Since the last validation: codes trained on per second, and the share of the matrix rate (MFU).

        MFU counts the FLOPs of the model, not what is recomputed, against the rate measured at the start.
        """
        steps_per_second = self.steps_since / max(time.monotonic() - self.since, 1e-9)
        return {
            "tokens_per_second": steps_per_second * tokens_per_step,
            "mfu": steps_per_second * self.flops_per_step / self.peak_flops,
        }

    def live_figures(self, step: int, speed: dict[str, float]) -> None:
        """Add the last step to the curves."""
        if self.world.is_main:
            figures = {"loss": self.last_loss, "grad_norm": self.last_norm, "learning_rate": self.last_rate}
            self.live.training(step, figures | speed)

    def picture(self, step: int, samples: Image.Image | None) -> None:
        """Show samples; rank 0 has them."""
        if samples is not None:
            self.live.picture(step, "samples", samples)
        self.steps_since, self.since = 0, time.monotonic()

    def close(self) -> None:
        """Finish the curves. Rank 0 only."""
        self.live.close()

    def has_validated(self, step: int) -> bool:
        """Whether the validation after `step` steps is recorded. A collective call."""
        return bool(said_by_main(self.world.is_main and self.val.has(step), self.world))

    def validation(self, step: int, loss_per_position: np.ndarray) -> None:
        """Record a validation."""
        if self.world.is_main:
            _write_positions(self.folder / "loss_per_position.csv", loss_per_position)
            self.val.append(step, {"loss": float(loss_per_position.mean())})
            self.live.log(step, {"validation/loss": float(loss_per_position.mean())})
            self.live.positions(step, loss_per_position)
        self.steps_since, self.since = 0, time.monotonic()

    def summary(self) -> dict[str, float]:
        """Validation losses for the manifest: the last, and the best with its step. Rank 0 only."""
        rows = read_history(self.val.path)
        best = min(rows, key=lambda row: row["loss"])
        return {
            "val_loss": rows[-1]["loss"],
            "best_val_loss": best["loss"],
            "best_val_step": int(best["step"]),
        }

    def _check_finite(self, steps: tuple[int, ...], losses: list[float], grad_norms: list[float]) -> None:
        for step, loss, norm in zip(steps, losses, grad_norms, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise UserError(
                    f"train_ar: step {step}: loss {loss:g}, gradient norm {norm:g}: the run diverged: "
                    "lower train_ar.optimizer.learning_rate, or raise warmup_steps, and run again"
                )


def _write_positions(path: Path, losses: np.ndarray) -> None:
    """CSV of the mean loss at each position of the raster, complete or not at all."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["position", "loss"])
        writer.writerows((position, float(loss)) for position, loss in enumerate(losses))
