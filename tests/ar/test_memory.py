"""The derived memory against what real tensors take, in one process and in two."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from crt import cpu
from crt.ar.deepspeed_config import bucket_elements, max_live_elements
from crt.ar.memory import Memory, Split, activation_bytes, held_bytes, saved_bytes, stage2_memory
from crt.ar.model import ARTransformer, count_parameters
from crt.ar.sizes import resized
from crt.params import load_params
from crt.plan.live_bytes import LiveBytes
from crt.plan.work import ar_config
from tests.ar.conftest import SMALL, small_config
from tests.ar.test_processes import torchrun
from tests.conftest import ROOT, write_params

WIDTH = 256  # wide enough that weights outweigh everything else
KEYS = ("precision", "zero_stage", "micro_batch_size", "steps")
RUNS = [*(("bf16", stage, micro, 10) for stage in range(4) for micro in (None, 4))]
RUNS += [("float32", stage, 4, 10) for stage in (0, 1, 3)]
# Of released weights that are only validated.
RUNS += [*(("bf16", stage, None, 0) for stage in range(4)), *(("float32", stage, None, 0) for stage in (0, 1, 3))]


def test_two_processes_hold_what_the_arithmetic_says(tmp_path: Path) -> None:
    """Oracle: the bytes of all tensors alive between backward pass and update, if any, on each of two processes."""
    jobs = []
    for index, run in enumerate(RUNS):
        changes = {f"train_ar.{key}": value for key, value in zip(KEYS, run, strict=True)}
        changes["train_ar.init_from"] = None if changes["train_ar.steps"] else "weights"
        jobs.append(str(write_params(tmp_path / f"{index}.yaml", SMALL | changes | {"train_ar.model.width": WIDTH})))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [*torchrun(2), "-m", "tests.ar.state_ranks", str(tmp_path / "jobs.json"), str(tmp_path / "results.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    parameters = count_parameters(small_config(width=WIDTH))
    totals = {}
    for run, *by_rank in zip(RUNS, *json.loads((tmp_path / "results.json").read_text()), strict=True):
        precision, stage, micro, steps = run
        split = Split(2, precision, stage, "none", False, micro is not None, trains=steps > 0)
        derived = sum(held_bytes(parameters, split))
        assert by_rank == pytest.approx([derived] * 2, rel=0.05), run
        totals[run] = max(by_rank)
    # Memory falls with the stage; ZeRO 3 adds one buffer, which for a model of this size is as large as the model.
    zero, one, two, three = (totals["bf16", stage, 4, 10] for stage in range(4))
    assert zero > one > two > three - 2 * bucket_elements(parameters)
    zero, one, three = (totals["float32", stage, 4, 10] for stage in (0, 1, 3))
    assert zero > one > three - 4 * bucket_elements(parameters)


@pytest.fixture
def general_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's operations as on a GPU, whose memory is derived."""
    monkeypatch.setattr(cpu, "is_cpu", lambda x: False)


@pytest.mark.usefixtures("general_forms")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_activations_are_what_autograd_keeps(precision: str) -> None:
    """Oracle: the storages that autograd saves of a real model of more layers, and of more images."""
    config, images = small_config(layers=5), 3
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = ARTransformer(config).to(dtype).train()
    codes, labels = torch.zeros(images, config.num_tokens, dtype=torch.int64), torch.zeros(images, dtype=torch.int64)
    kept = saved_bytes(lambda: model(codes, labels), model)
    assert images * activation_bytes(config, precision, False, "cpu")[0] == pytest.approx(kept, rel=0.02)


@pytest.mark.usefixtures("general_forms")
@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_recomputation_keeps_one_input_per_block(precision: str, dtype: torch.dtype) -> None:
    config = small_config(layers=40)
    (kept, block), (recomputed, _) = (
        activation_bytes(config, precision, checkpointing, "cpu") for checkpointing in (False, True)
    )
    model = ARTransformer(config, activation_checkpointing=True).to(dtype).train()
    codes, labels = torch.zeros(1, config.num_tokens, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    assert recomputed == pytest.approx(saved_bytes(lambda: model(codes, labels), model), rel=0.02)
    assert block == (kept - activation_bytes(small_config(layers=20), precision, False, "cpu")[0]) / 20
    assert recomputed < kept / 5


def test_gradients_that_accumulate_stand_beside_the_activations() -> None:
    one, several = (
        stage2_memory(small_config(), Split(4, "float32", 2, "none", False, accumulating))
        for accumulating in (False, True)
    )
    assert several.backward_start - one.backward_start == several.gradients > 0


@pytest.mark.parametrize(
    ("zero_stage", "offload"),
    [
        *((stage, "none") for stage in range(4)),
        *((stage, "optimizer") for stage in (1, 2, 3)),
        (3, "optimizer_and_parameters"),
    ],
)
def test_the_fullest_moments_of_bfloat16_on_four_processes(zero_stage: int, offload: str) -> None:
    """Oracle: the module's text, in bytes of p parameters that travel in buckets of b."""
    config = small_config(width=WIDTH)
    p = count_parameters(config)
    b, gathered = bucket_elements(p), min(max_live_elements(p), p) + bucket_elements(p)
    here = offload == "none"
    state = here * 12 * p / (4 if zero_stage else 1)
    gradients = here * 2 * p / (4 if zero_stage else 1)
    weights = (offload != "optimizer_and_parameters") * 2 * p / (4 if zero_stage == 3 else 1)
    held = state + weights + (2 * b if zero_stage == 3 else 0)
    travelling = [0, 2 * b, 2 * 2 * b, 2 * gathered][zero_stage]
    complete = 2 * p if zero_stage <= 1 else gradients
    copies = here * [4 * p, p, p, 4 * b][zero_stage]
    memory = stage2_memory(config, Split(4, "bf16", zero_stage, offload, False, accumulating=False))
    assert memory.backward_start == pytest.approx(held + travelling)
    assert memory.backward_end == pytest.approx(held + travelling + complete)
    assert memory.update == pytest.approx(held + gradients + copies)


def test_one_process_needs_no_buffer_unless_gradients_accumulate_in_float32() -> None:
    """Oracle: `crt/ar/one_process.py`, which leaves those to DeepSpeed; in bytes of p parameters and a bucket of b."""
    config = small_config(width=WIDTH)
    p = count_parameters(config)
    b = bucket_elements(p)
    once, several = (stage2_memory(config, Split(1, "bf16", 1, "none", False, some)) for some in (False, True))
    assert (once.backward_start, once.backward_end) == (14 * p, 14 * p + 2 * p)
    # A process's share and the sums over micro-batches, both whole.
    assert several.backward_start == several.backward_end == 14 * p + 2 * b + 8 * p


@pytest.mark.parametrize("zero_stage", range(4))
@pytest.mark.parametrize("accumulating", [False, True])
def test_without_a_step_nothing_is_fuller_than_a_validation(zero_stage: int, accumulating: bool) -> None:
    config = small_config(width=WIDTH)
    p = count_parameters(config)
    gathered = 2 * (min(max_live_elements(p), p) + bucket_elements(p)) if zero_stage == 3 else 0
    split = Split(4, "bf16", zero_stage, "none", False, accumulating, trains=False)
    memory = stage2_memory(config, split)
    held = sum(held_bytes(p, split)) + gathered
    assert (memory.backward_start, memory.backward_end) == (held, held)
    assert memory.peak(3) == held + 3 * memory.activations_per_image


@pytest.mark.usefixtures("general_forms")
@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize(("codebook_size", "bounds"), [(16, (1.0, 1.5)), (4096, (0.99, 1.01))])
def test_a_validation_needs_what_its_losses_or_a_block_do(
    precision: str, dtype: torch.dtype, codebook_size: int, bounds: tuple[float, float]
) -> None:
    """Oracle: the tensors of a forward pass without gradients; a block keeps somewhat more than it needs at once."""
    config, images = small_config(codebook_size=codebook_size, ffn_multiple=256), 4
    codes, labels = torch.zeros(images, config.num_tokens, dtype=torch.int64), torch.zeros(images, dtype=torch.int64)
    with torch.no_grad(), LiveBytes() as live:
        model = ARTransformer(config).to(dtype).eval()
        before = live.now
        live.restart()
        model(codes, labels)
    split = Split(1, precision, 1, "none", False, False, trains=False)
    derived = images * stage2_memory(config, split).activations_per_image
    assert bounds[0] < derived / (live.peak - before) < bounds[1]


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    """Oracle: the peak of each size."""
    sizes = {"weights": 0, "gradients": 0, "optimizer": 0, "buffers": 0, "host": 0, "activations_per_image": 7}
    for start, end, update in ((50, 80, 60), (50, 60, 80), (50, 40, 40)):
        memory = Memory(**sizes, backward_start=start, backward_end=end, update=update)
        for available in range(0, 200, 3):
            fits = [size for size in range(1, 40) if memory.peak(size) <= available]
            assert memory.largest_micro_batch(available) == max(fits, default=0)


@pytest.mark.parametrize(("offload", "each"), [("none", 0), ("optimizer", 16), ("optimizer_and_parameters", 18)])
def test_the_host_holds_what_a_process_offloads(offload: str, each: int) -> None:
    """Float32 master weights, two moments and the gradient; the bfloat16 weights if they are offloaded."""
    config = small_config(width=WIDTH)
    host = stage2_memory(config, Split(4, "bf16", 3, offload, False, False)).host
    assert host == each * count_parameters(config) // 4


@pytest.mark.parametrize(
    ("size", "images", "checkpointing", "measured"),
    [
        ("B", 16, False, 4.081),
        ("B", 32, False, 6.540),
        ("B", 32, True, 3.413),
        ("L", 16, False, 10.132),
        ("L", 16, True, 6.098),
    ],
)
def test_peaks_are_those_of_a_gpu(size: str, images: int, checkpointing: bool, measured: float) -> None:
    """Oracle: GB that PyTorch allocated at most in a step on an H200, benchmarks/stage2.md."""
    params = load_params(ROOT / "presets/imagenet256.yaml")
    model = resized(params.train_ar.model, size)
    config = ar_config(
        params.model_copy(update={"train_ar": params.train_ar.model_copy(update={"model": model})}), 1000
    )
    split = Split(1, "bf16", 1, "none", checkpointing, accumulating=False)
    assert stage2_memory(config, split).peak(images) / 1e9 == pytest.approx(measured, rel=0.05)
