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
number of processes and threads: batches and every draw are functions of (seed, step). (On GPUs attention's backward
pass, which the regularizer has too, may add in varying order: there a continued run agrees with an uninterrupted one to
rounding.)

Cost: the default digits run takes about a minute on two cores and ends near 25 dB; the paper's ImageNet tokenizer
took 3 days on 8 A100 for 400,000 steps of 128 images.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from crt.data.loader import training_batches
from crt.data.packed import PackedImages
from crt.data.sampler import rank_slice
from crt.data.transforms import to_unit_range
from crt.distributed import (
    World,
    barrier,
    gpu_memory,
    join_world,
    mean_over_ranks,
    reported_once,
    said_by_main,
    stop_signal,
    sum_over_ranks,
)
from crt.errors import LocalError, UserError
from crt.files import replacing
from crt.flops import tokenizer_training_flops
from crt.history import History, read_history
from crt.interrupt import Stopped
from crt.live import Live, live_folder
from crt.params import TrainTokenizer
from crt.pictures import save_png
from crt.precision import announce_precision
from crt.progress import Progress
from crt.randomness import seed_torch, torch_generator
from crt.schedules import learning_rate_factor
from crt.stage import StageRun, check_inputs
from crt.tokenizer.losses import PerceptualLoss
from crt.tokenizer.objective import Objective
from crt.tokenizer.regularizer import annealed_lambda
from crt.tokenizer.state import TrainingState
from crt.tokenizer.validation import reconstruction_picture, validate

# train.csv keeps about so many rows.
_HISTORY_ROWS = 10_000


def run(run: StageRun) -> None:
    """Train the tokenizer of section train_tokenizer.

    Raises:
        UserError: a batch that does not divide, weights to begin with that do not fit, missing LPIPS, a loss that is
            not finite, too little GPU memory.
        Stopped: a signal arrived at any process; the state is saved.
    """
    run.refuse_own_output("train_tokenizer.init_from", run.params.train_tokenizer.init_from)
    remedy = "lower train_tokenizer.batch_size, use more processes, or set precision to bf16"
    with join_world() as world, reported_once(world), gpu_memory(run.name, remedy):
        _train(run, world)


def _train(run: StageRun, world: World) -> None:
    params = run.params.train_tokenizer
    rank_slice(params.batch_size, world.rank, world.size)  # a batch that does not divide must not wait for anything
    train_images, val_images = (PackedImages(run.inputs["data"], split) for split in ("train", "val"))
    announce_precision(run.name, world.device, params.precision)
    # A continued run must choose the same kernels as an uninterrupted one.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

    # Without a step the regularizer would stay untrained, and its figure say nothing.
    lambda_ = run.params.lambda_ if params.steps else 0.0
    state = TrainingState(params, lambda_, run.params.seed, world.device)
    perceptual = None
    if params.loss.lpips_weight > 0:
        perceptual = PerceptualLoss(params.loss.lpips_weights).to(world.device)
    objective = Objective(
        params,
        state.model,
        state.regularizer,
        state.discriminator,
        perceptual=perceptual,
        device=world.device,
    )
    checkpoint = run.work / "checkpoint.pt"
    first_step = state.load(checkpoint)
    check_same_step(first_step, checkpoint, world)
    if params.compile:
        state.compile()
        if perceptual is not None:
            perceptual.compile()

    log = _Log(run, world, first_step, regularized=state.regularizer is not None)
    progress = Progress("train_tokenizer", params.steps, "steps", done=first_step)
    batches = training_batches(
        train_images,
        image_size=params.image_size,
        batch_size=params.batch_size,
        min_crop=params.min_crop,
        horizontal_flip=params.horizontal_flip,
        seed=run.params.seed,
        first_step=first_step,
        steps=params.steps,
        rank=world.rank,
        world_size=world.size,
    )
    validated = log.has_validated(first_step)  # a stop may have come before its end
    signum = 0
    for step in range(first_step, params.steps + 1):  # `step` updates are done
        last, fresh = step == params.steps, step > first_step
        due = last or (step > 0 and step % params.validate_every == 0)
        if due and not signum and (fresh or not validated):
            size = params.batch_size // world.size
            validation = validate(state.averaged, state.regularizer, val_images, size, world)
            if validation is None:
                signum = stop_signal(world)
            else:
                if world.is_main:
                    log.picture(step, reconstruction_picture(state.averaged, val_images, world.device))
                log.validation(step, validation)

        if world.is_main and fresh and (last or signum or step % params.checkpoint_every == 0):
            check_inputs(run)
            state.save(checkpoint, step)
        if signum:
            barrier()  # nobody leaves before rank 0 has saved; for other collectives of NCCL the host does not wait
            raise Stopped(signum)
        if last:
            break

        images = to_unit_range(next(batches).to(world.device, non_blocking=True))
        figures, settings = _update(step, images, state, objective, run=run, world=world)
        log.training(step + 1, figures, settings)
        signum = stop_signal(world)
        progress.update(step + 1, loss=log.last["loss"], pixel=log.last["pixel"], code_usage=log.last["code_usage"])

    if world.is_main:
        state.averaged.save(run.staging)
        run.summary.update(log.summary())
        log.close()
        run.summary.update(
            parameters=sum(parameter.numel() for parameter in state.model.parameters()),
            grid=list(state.model.grid),
            codebook_size=state.model.codebook_size,
            training_flops=tokenizer_training_flops(params, run.params.lambda_ > 0),
        )


def _update(
    step: int, images: Tensor, state: TrainingState, objective: Objective, *, run: StageRun, world: World
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Step number `step`, counted from 0, of all networks on this process's images. A collective call.

    Returns:
        Figures of this process's share, scalars on the device; and what the step was set to.
    """
    params, seed = run.params.train_tokenizer, run.params.seed
    if params.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    if params.architecture.dropout:
        seed_torch(seed, "dropout", step, world.rank)
    state.set_learning_rates(_rate_factor(step, params))
    now_lambda = annealed_lambda(step, run.params.lambda_, params.regularizer.anneal_steps)
    adversarial = objective.is_adversarial(step)
    shape = (params.batch_size, state.model.num_tokens)
    uniforms = torch.rand(shape, generator=torch_generator(seed, "codes", step))
    share = rank_slice(params.batch_size, world.rank, world.size)

    clip_norm = params.optimizer.clip_norm
    made = objective.tokenizer_loss(images, uniforms[share].to(world.device), now_lambda, adversarial)
    made.total.backward()
    figures = made.figures | {"grad_norm": state.descend("tokenizer", clip_norm)}
    if state.regularizer is not None:
        figures["regularizer_grad_norm"] = state.descend("regularizer", clip_norm)
    if adversarial:
        figures["discriminator"] = objective.discriminator_loss(images, made.reconstructions)
        figures["discriminator"].backward()
        figures["discriminator_grad_norm"] = state.descend("discriminator", clip_norm)

    counts = sum_over_ranks(torch.bincount(made.codes.flatten(), minlength=state.model.codebook_size))
    replaced = state.upkeep.update(step, made.latents, made.codes, counts)
    state.average_weights(step, replaced)
    figures["code_usage"] = (counts > 0).float().mean()
    return figures, {"lambda": now_lambda, "learning_rate": state.learning_rate}


def check_same_step(step: int, path: Path, world: World) -> None:
    """Make sure that all processes continue from the state that rank 0 has found. A collective call.

    Raises:
        LocalError: this process has found another one, or none: nodes may see a shared file system differently for a
            while after a change.
    """
    of_main = said_by_main(step, world)
    if of_main != step:
        raise LocalError(
            f"{path}: process {world.rank} finds the state after {step} steps there, the first one that after "
            f"{of_main}: check the shared file system, or wait a minute, and run the same command again"
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

    def __init__(self, run: StageRun, world: World, first_step: int, regularized: bool) -> None:
        self.world = world
        params: TrainTokenizer = run.params.train_tokenizer
        self.keep_every, self.folder = math.ceil(params.steps / _HISTORY_ROWS), run.staging
        self.batch_size, self.steps_since, self.since = params.batch_size, 0, time.monotonic()
        self.last: dict[str, float] = {}
        adversarial = params.discriminator.kind != "none"
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

    def has_validated(self, step: int) -> bool:
        """Whether the validation after `step` steps is recorded. A collective call."""
        return bool(said_by_main(self.world.is_main and self.validated.has(step), self.world))

    def validation(self, step: int, figures: dict[str, float]) -> None:
        """Record a validation."""
        if self.world.is_main:
            self.validated.append(step, figures)
            self.live.log(step, {f"validation/{name}": value for name, value in figures.items()})
        self.steps_since, self.since = 0, time.monotonic()

    def picture(self, step: int, reconstructions: Image.Image) -> None:
        """Keep the picture of a validation, the last one in the result too. Rank 0 only."""
        path: Path = self.folder / "reconstructions.png"
        with replacing(path) as temporary:
            save_png(reconstructions, temporary)
        self.live.picture(step, "reconstructions", reconstructions)

    def close(self) -> None:
        """Finish the curves. Rank 0 only."""
        self.live.close()

    def summary(self) -> dict[str, float]:
        """The last validation's figures, for the manifest. Rank 0 only."""
        row = read_history(self.validated.path)[-1]
        return {f"val_{name}" if name == "psnr" else name: value for name, value in row.items() if name != "step"}
