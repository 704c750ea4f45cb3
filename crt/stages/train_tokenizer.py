"""Stage train_tokenizer: a VQGAN with the causal regularizer.

Reads the packed data set. Writes the tokenizer (`config.json`, `model.safetensors`, read by `crt.Tokenizer.load`;
averaged weights where `weight_ema_decay` is set), `train.csv` (loss terms, gradient norms, share of codes in use
by step), `validation.csv` (reconstruction, code usage and predictability over the whole validation split) and
`reconstructions.png` (validation images above what the tokenizer makes of them). To watch: `out/tokenizer.live` has
curves for TensorBoard and DVCLive, and that picture of each validation.

Raising `lambda` makes the codes easier to predict, at the cost of reconstruction: `regularizer` and
`code_entropy` fall, `mse` rises. Watch `codebook_usage`: where it collapses, lower lambda or set
`quantizer.revive_after_steps`. With lambda 0 the regularizer is not built and costs nothing.

Runs in one process or many (torchrun, srun), which agree to rounding at the same global batch (dropout apart, whose
draws belong to the process). Stopped at any moment it continues from its last checkpoint, bit for bit at the same
number of processes and threads: batches and every draw are functions of (seed, step).

Cost: the default digits run takes about a minute on two cores and ends near 25 dB; the paper's ImageNet tokenizer
took 3 days on 8 A100 for 400,000 steps of 128 images.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from crt.data.loader import training_batches
from crt.data.packed import PackedImages
from crt.data.sampler import rank_slice
from crt.data.transforms import to_unit_range
from crt.distributed import World, join_world, reported_once, stop_signal
from crt.errors import LocalError, UserError
from crt.evaluation.grids import save_png
from crt.flops import tokenizer_training_flops
from crt.history import History, read_history
from crt.interrupt import Stopped
from crt.live import Live, live_folder
from crt.params import TrainTokenizer
from crt.progress import Progress
from crt.randomness import seed_torch, torch_generator
from crt.schedules import learning_rate_factor
from crt.stage import StageRun
from crt.tokenizer.collectives import mean_over_ranks, sum_over_ranks
from crt.tokenizer.losses import (
    PerceptualLoss,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    pixel_loss,
)
from crt.tokenizer.regularizer import annealed_lambda, scale_gradient
from crt.tokenizer.state import TrainingState
from crt.tokenizer.validation import reconstruction_picture, validate

# train.csv keeps about so many rows.
_HISTORY_ROWS = 10_000


def run(run: StageRun) -> None:
    """Train the tokenizer of section train_tokenizer.

    Raises:
        UserError: a batch that does not divide, missing LPIPS, a loss that is not finite, too little GPU memory.
        Stopped: a signal arrived at any process; the state is saved.
    """
    with join_world() as world:
        try:
            with reported_once(world):
                _train(run, world)
        except torch.OutOfMemoryError:
            raise UserError(
                "train_tokenizer: out of GPU memory: lower train_tokenizer.batch_size, "
                "use more processes, or set precision to bf16"
            ) from None


def _train(run: StageRun, world: World) -> None:
    params, lambda_, seed = run.params.train_tokenizer, run.params.lambda_, run.params.seed
    share = rank_slice(params.batch_size, world.rank, world.size)
    train_images, val_images = (PackedImages(run.inputs["data"], split) for split in ("train", "val"))
    # A continued run must choose the same kernels as an uninterrupted one.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

    state = TrainingState(params, lambda_, seed, world.device)
    model, regularizer, discriminator = state.model, state.regularizer, state.discriminator
    perceptual = None
    if params.loss.lpips_weight > 0:
        perceptual = PerceptualLoss(params.loss.lpips_weights).to(world.device)
    first_step = state.load(run.work / "checkpoint.pt")
    check_same_step(first_step, run.work / "checkpoint.pt", world)
    if params.compile:
        state.compile()

    log = _Log(run, world, first_step)
    progress = Progress("train_tokenizer", params.steps, "steps", done=first_step)
    batches = training_batches(
        train_images,
        image_size=params.image_size,
        batch_size=params.batch_size,
        min_crop=params.min_crop,
        horizontal_flip=params.horizontal_flip,
        seed=seed,
        first_step=first_step,
        steps=params.steps,
        rank=world.rank,
        world_size=world.size,
    )
    signum = 0
    for step in range(first_step, params.steps + 1):  # `step` updates are done
        last, fresh = step == params.steps, step > first_step
        if fresh and (last or step % params.validate_every == 0):
            size = params.batch_size // world.size
            log.validation(step, validate(state.averaged, regularizer, val_images, size, world))
            if world.is_main:
                log.picture(step, reconstruction_picture(state.averaged, val_images, world.device))

        if world.is_main and fresh and (last or signum or step % params.checkpoint_every == 0):
            state.save(run.work / "checkpoint.pt", step)
        if signum:
            sum_over_ranks(torch.zeros(1, device=world.device))  # nobody leaves before rank 0 has saved
            raise Stopped(signum)
        if last:
            break

        images = to_unit_range(next(batches).to(world.device, non_blocking=True))
        if params.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if params.architecture.dropout:
            seed_torch(seed, "dropout", step, world.rank)
        state.set_learning_rates(_rate_factor(step, params))
        now_lambda = annealed_lambda(step, lambda_, params.regularizer.anneal_steps)
        adversarial = discriminator is not None and step >= params.discriminator.start_step
        autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=params.precision == "bf16")

        with autocast:
            latents = model.latents(images)  # B, D, h, w
            raster = latents.flatten(2).transpose(1, 2)  # B, N, D
            drawn = None
            if regularizer is not None:
                uniforms = torch.rand(
                    (params.batch_size, model.num_tokens), generator=torch_generator(seed, "codes", step)
                )[share]
                drawn = regularizer.draw_codes(raster, model.quantizer.vectors(), uniforms.to(world.device))
            quantized = model.quantizer(latents, None if drawn is None else drawn.view(-1, *latents.shape[2:]))
            reconstructions = model.reconstruct(quantized.values)

            figures = {"pixel": pixel_loss(reconstructions, images, params.loss.pixel)}
            loss = params.loss.pixel_weight * figures["pixel"]
            if perceptual is not None:
                figures["lpips"] = perceptual(reconstructions, images)
                loss = loss + params.loss.lpips_weight * figures["lpips"]
            if adversarial:
                assert discriminator is not None
                # Only the decoder learns from this pass.
                discriminator.requires_grad_(False)
                figures["adversarial"] = hinge_generator_loss(discriminator(reconstructions))
                discriminator.requires_grad_(True)
                weight: Tensor | float = params.discriminator.weight
                if params.discriminator.adaptive_weight:
                    last_layer = model.decoder.conv_out.weight
                    weight = weight * adaptive_weight(loss, figures["adversarial"], last_layer)
                    figures["adaptive_weight"] = torch.as_tensor(weight)
                loss = loss + weight * figures["adversarial"]
            figures["codebook"], figures["commitment"] = quantized.codebook_loss, quantized.commitment_loss
            if params.quantizer.update == "gradient":
                loss = loss + params.loss.codebook_weight * quantized.codebook_loss
            loss = loss + params.loss.commitment_weight * quantized.commitment_loss
            if params.loss.entropy_weight > 0:
                figures["entropy"] = model.quantizer.entropy_loss(latents, params.loss.entropy_temperature)
                loss = loss + params.loss.entropy_weight * figures["entropy"]

            total = loss
            if regularizer is not None:
                # The encoder's gradient is scaled by lambda, the regularizer's own is not.
                scaled = scale_gradient(raster, now_lambda)
                figures["regularizer"] = regularizer(scaled, quantized.codes.flatten(1), model.quantizer.vectors())
                total = loss + figures["regularizer"]
                loss = loss.detach() + now_lambda * figures["regularizer"].detach()

        total.backward()
        figures["grad_norm"] = state.descend("tokenizer", params.optimizer.clip_norm)
        if regularizer is not None:
            figures["regularizer_grad_norm"] = state.descend("regularizer", params.optimizer.clip_norm)
        if adversarial:
            assert discriminator is not None
            with autocast:
                real_logits, fake_logits = discriminator(images), discriminator(reconstructions.detach())
                figures["discriminator"] = hinge_discriminator_loss(real_logits, fake_logits)
            figures["discriminator"].backward()
            figures["discriminator_grad_norm"] = state.descend("discriminator", params.optimizer.clip_norm)

        counts = sum_over_ranks(torch.bincount(quantized.codes.flatten(), minlength=model.codebook_size))
        replaced = state.upkeep.update(step, latents, quantized.codes, counts)
        state.average_weights(step, replaced)
        figures |= {"loss": loss, "code_usage": (counts > 0).float().mean()}
        log.training(step + 1, figures, {"lambda": now_lambda, "learning_rate": state.learning_rate})
        signum = stop_signal(world)
        progress.update(step + 1, loss=log.last["loss"], pixel=log.last["pixel"], code_usage=log.last["code_usage"])

    if world.is_main:
        state.averaged.save(run.staging)
        run.summary.update(log.summary())
        log.close()
        run.summary.update(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            grid=list(model.grid),
            codebook_size=model.codebook_size,
            training_flops=tokenizer_training_flops(params, lambda_ > 0),
        )


def check_same_step(step: int, path: Path, world: World) -> None:
    """Make sure that all processes continue from the state that rank 0 has found. A collective call.

    Raises:
        LocalError: this process has found another one, or none: nodes may see a shared file system differently for a
            while after a change.
    """
    of_main = torch.tensor([step], device=world.device)
    if world.size > 1:
        dist.broadcast(of_main, 0)
    if int(of_main) != step:
        raise LocalError(
            f"{path}: process {world.rank} finds the state after {step} steps there, the first one that after "
            f"{int(of_main)}: see to the shared file system, or wait a minute, and run the same command again"
        )


def _rate_factor(step: int, params: TrainTokenizer) -> float:
    optimizer = params.optimizer
    return learning_rate_factor(
        step, params.steps, optimizer.schedule, optimizer.warmup_steps, optimizer.final_fraction
    )


class _Log:
    """The CSV files and curves of rank 0, and the check that all figures are finite.

    Columns depend on the params alone: a term that is switched off has none. Before the discriminator's start
    step its columns hold 0.
    """

    def __init__(self, run: StageRun, world: World, first_step: int) -> None:
        self.world = world
        params: TrainTokenizer = run.params.train_tokenizer
        self.keep_every, self.folder = math.ceil(params.steps / _HISTORY_ROWS), run.staging
        self.batch_size, self.steps_since, self.since = params.batch_size, 0, time.monotonic()
        self.last: dict[str, float] = {}
        regularized, adversarial = run.params.lambda_ > 0, params.discriminator.kind != "none"
        self.columns = ["loss", "pixel", "codebook", "commitment"]
        self.columns += ["lpips"] * (params.loss.lpips_weight > 0) + ["entropy"] * (params.loss.entropy_weight > 0)
        self.columns += ["grad_norm", "code_usage"]
        if regularized:
            self.columns += ["regularizer", "regularizer_grad_norm"]
        if adversarial:
            self.columns += ["adversarial", "discriminator", "discriminator_grad_norm"]
            self.columns += ["adaptive_weight"] * params.discriminator.adaptive_weight
        if world.is_main:
            own = ["lambda"] * regularized + ["learning_rate"]
            self.train = History(run.staging / "train.csv", [*self.columns, *own], first_step)
            names = ["mse", "psnr", "codebook_usage", "perplexity", "code_entropy", *["regularizer"] * regularized]
            self.validated = History(run.staging / "validation.csv", names, first_step)
            self.live = Live(live_folder(run), params.steps, first_step)

    def training(self, step: int, figures: dict[str, Tensor], settings: dict[str, Any]) -> None:
        """Record the figures of one step, averaged over the processes. A collective call.

        Raises:
            UserError: one of them is not finite.
        """
        zero = torch.zeros((), device=self.world.device)
        stacked = torch.stack([figures.get(name, zero).detach().float() for name in self.columns])
        self.last = dict(zip(self.columns, mean_over_ranks(stacked).tolist(), strict=True))
        for name, value in self.last.items():
            if not math.isfinite(value):
                raise UserError(
                    f"train_tokenizer: step {step}: {name} is {value}: the run diverged: lower "
                    "train_tokenizer.optimizer.learning_rate, raise its warmup_steps, or set precision to float32"
                )
        self.steps_since += 1
        if self.world.is_main:
            row = self.last | {name: value for name, value in settings.items() if name in self.train.columns}
            if step % self.keep_every == 0:
                self.train.append(step, row)
            seconds = max(time.monotonic() - self.since, 1e-9)  # since the last validation
            speed = self.steps_since * self.batch_size / seconds
            self.live.training(step, row | {"images_per_second": speed})

    def validation(self, step: int, figures: dict[str, float]) -> None:
        """Record a validation."""
        if self.world.is_main:
            self.validated.append(step, figures)
            self.live.log(step, {f"validation/{name}": value for name, value in figures.items()})

    def picture(self, step: int, reconstructions: Image.Image) -> None:
        """Keep the picture of a validation, the last one in the result too. Rank 0 only."""
        path: Path = self.folder / "reconstructions.png"
        temporary = path.with_suffix(".tmp")
        save_png(reconstructions, temporary)
        temporary.replace(path)
        self.live.picture(step, "reconstructions", reconstructions)
        self.steps_since, self.since = 0, time.monotonic()

    def close(self) -> None:
        """Finish the curves. Rank 0 only."""
        self.live.close()

    def summary(self) -> dict[str, float]:
        """The last validation's figures, for the manifest. Rank 0 only."""
        row = read_history(self.validated.path)[-1]
        return {f"val_{name}" if name == "psnr" else name: value for name, value in row.items() if name != "step"}
