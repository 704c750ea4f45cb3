"""The plan's figures against torch's counters, its command against what it must say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from crt.__main__ import main
from crt.ar.checkpoints import Checkpoints
from crt.ar.engine import deepspeed_engine, deepspeed_session
from crt.ar.memory import Split, stage2_memory
from crt.ar.model import ARTransformer, count_parameters
from crt.ar.sizes import named_sizes, resized
from crt.commands.plan import _time
from crt.distributed import join_world
from crt.flops import ar_flops_per_image, count_flops, tokenizer_flops_per_image
from crt.params import Params, TrainAR, load_params
from crt.plan.cluster import make_cluster
from crt.plan.layouts import layouts
from crt.plan.work import (
    DataSize,
    StageWork,
    _evaluation,
    ar_config,
    ar_flops,
    ar_forward_flops,
    cache_bytes,
    checkpoint_bytes,
    classifier_flops,
    data_size,
    num_views,
    perceptual_flops,
    stage_work,
    tokenizer_flops,
)
from tests.ar.conftest import small_config
from tests.conftest import ROOT, write_params

# The first five are LlamaGen's published counts; the others fix what was chosen here.
COUNTS = {
    "B": 110_888_448,
    "L": 342_910_976,
    "XL": 774_699_520,
    "XXL": 1_410_972_672,
    "3B": 3_096_659_200,
    "52M": 52_094_720,
    "74M": 74_248_064,
    "192M": 191_767_296,
    "517M": 516_729_600,
    "10B": 9_852_723_200,
}
IMAGENET = ROOT / "presets/imagenet256.yaml"
# FLOPs of Inception-v3 for an image.
INCEPTION = 2 * 5.7e9


def with_model(name: str):
    params = load_params(IMAGENET)
    stage2 = params.train_ar.model_copy(update={"model": resized(params.train_ar.model, name)})
    return params.model_copy(update={"train_ar": stage2})


@pytest.mark.parametrize("name", COUNTS)
def test_every_named_size_has_its_parameter_count(name: str) -> None:
    assert count_parameters(ar_config(with_model(name), 1000)) == COUNTS[name]


def test_the_table_is_complete_and_ordered() -> None:
    assert set(named_sizes()) == set(COUNTS)
    assert [COUNTS[name] for name in named_sizes()] == sorted(COUNTS.values())


def test_flops_of_a_step_are_those_that_torch_counts_on_real_tensors() -> None:
    """Oracle: FlopCounterMode over the whole model, forward and backward, with and without recomputation."""
    config = small_config(layers=5, dropout=0.0)
    codes, labels = torch.zeros(1, config.num_tokens, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for checkpointing in (False, True):
        model = ARTransformer(config, checkpointing).train()
        counted = count_flops(lambda model=model: model(codes, labels).mean().backward())
        assert ar_flops(config, checkpointing) == pytest.approx(counted, rel=0.02)
    with torch.no_grad():
        assert ar_forward_flops(config) == pytest.approx(count_flops(lambda: model(codes, labels)), rel=0.02)


def test_flops_of_the_largest_models_need_no_large_model() -> None:
    """Oracle: the counter over all 36 layers of XL."""
    config = ar_config(with_model("XL"), 1000)
    assert ar_flops(config, False) == pytest.approx(ar_flops_per_image(config), rel=1e-6)


def test_stages_follow_the_params() -> None:
    params = load_params(IMAGENET)
    data = data_size(params, None, None)
    assert (data.train, data.val, data.classes) == (1_281_167, 50_000, 1_000)
    config = ar_config(params, data.classes)
    work = {stage.stage: stage for stage in stage_work(params, data, config)}
    # 6 FLOPs per parameter that multiplies and code, and some for attention.
    matrices = count_parameters(config) - (16_384 + 1_001) * 1280
    approximate = 6 * matrices * 256 * params.train_ar.batch_size * params.train_ar.steps
    assert 1.0 < work["train_ar"].flops / approximate < 1.1
    assert num_views(params) == 20
    # LlamaGen's cache holds 10 crops in 26 GB, as int64: a quarter of that as uint16, twice for two resize ranges.
    # 26 GB are of the training images; validation images have their centre only.
    assert cache_bytes(params, data, config) == (20 * data.train + data.val) * 2 * 256
    assert cache_bytes(params, data, config) == pytest.approx(2 * 26e9 / 4, rel=0.02)
    assert work["tokenize"].flops == (20 * data.train + data.val) * tokenizer_flops(params)[0]


@pytest.mark.parametrize(
    ("precision", "zero_stage"),
    [("float32", 0), ("float32", 1), ("float32", 3), ("bf16", 0), ("bf16", 2), ("bf16", 3)],
)
def test_a_checkpoint_takes_what_the_plan_says(tmp_path: Path, precision: str, zero_stage: int) -> None:
    """Oracle: one that is written."""
    changes = {"precision": precision, "zero_stage": zero_stage, "compile": False, "batch_size": 4}
    params = load_params(ROOT / "params.yaml").train_ar.model_copy(update=changes | {"micro_batch_size": None})
    config = small_config(width=128)
    with join_world() as world, deepspeed_session(world), deepspeed_engine(params, config, 0, world) as engine:
        engine.backward(engine(torch.zeros(4, config.num_tokens, dtype=torch.int64), torch.arange(4)).mean())
        engine.step()
        Checkpoints(tmp_path, world, zero_stage, {}, keep=1).save(engine, 1)
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert checkpoint_bytes(config, precision, zero_stage) == pytest.approx(taken, rel=0.05)


@pytest.mark.parametrize(
    ("file", "limit", "sizes"),
    [
        ("params.yaml", 12, (120, 120)),  # as prepare_data packs the digits: set aside, then limited
        ("params.yaml", 100, (1_000, 359)),
        ("presets/imagenet256.yaml", 60, (60_000, 50_000)),
    ],
)
def test_each_split_keeps_the_images_of_a_class_up_to_the_limit(file: str, limit: int, sizes: tuple) -> None:
    params = load_params(ROOT / file)
    limited = params.prepare_data.model_copy(update={"max_images_per_class": limit})
    data = data_size(params.model_copy(update={"prepare_data": limited}), None, None)
    assert (data.train, data.val) == sizes


def changed(params: Params, **sections: dict) -> Params:
    updates = {name: getattr(params, name).model_copy(update=values) for name, values in sections.items()}
    return params.model_copy(update=updates)


@pytest.mark.parametrize("precisions", [("float32", "bf16", "float32", "bf16"), ("bf16", "float32", "bf16", "float32")])
def test_stages_work_in_the_precision_of_their_params(precisions: tuple) -> None:
    """Of float32, convolutions alone run in TF32."""
    names = ("train_tokenizer", "tokenize", "train_ar", "sample")
    sections = {name: {"precision": precision} for name, precision in zip(names, precisions, strict=True)}
    params = changed(load_params(ROOT / "params.yaml"), **sections)
    work = stage_work(params, data_size(params, None, None), ar_config(params, 10))
    first, second, third, fourth = precisions
    in_convolutions = {"float32": "TF32", "bf16": "bf16"}
    assert [(stage.stage, stage.precision) for stage in work] == [
        ("train_tokenizer", in_convolutions[first]),
        ("tokenize", in_convolutions[second]),
        ("train_ar", third),
        ("sample", fourth),
        ("evaluate", "float32"),
    ]


@pytest.mark.parametrize(("lambda_", "checkpointing", "again"), [(0.0, True, ", blocks twice"), (0.5, False, "")])
def test_trainings_cost_their_images(lambda_: float, checkpointing: bool, again: str) -> None:
    """Oracle: the FLOPs of an image by the functions that are held against torch's counter, times the images."""
    stage1, stage2 = {"steps": 100, "batch_size": 8}, {"steps": 30, "batch_size": 4}
    params = load_params(ROOT / "params.yaml").model_copy(update={"lambda_": lambda_})
    params = changed(params, train_tokenizer=stage1, train_ar=stage2 | {"activation_checkpointing": checkpointing})
    config = ar_config(params, 10)
    work = {stage.stage: stage for stage in stage_work(params, data_size(params, None, None), config)}
    step1 = 8 * tokenizer_flops_per_image(params.train_tokenizer, lambda_ > 0)
    step2 = 4 * ar_flops_per_image(config, checkpointing)
    assert work["train_tokenizer"].flops == 100 * step1
    assert work["train_tokenizer"].text == f"100 steps of {step1:.3e}"
    assert work["train_ar"].flops == pytest.approx(30 * step2, rel=1e-6)
    assert work["train_ar"].text == f"30 steps of {step2:.3e}{again}"


def test_sampling_costs_what_its_stage_does() -> None:
    """Oracle: the stage. Each scale is drawn and decoded."""
    params = load_params(ROOT / "params.yaml")
    data = data_size(params, None, None)
    config = ar_config(params, data.classes)

    def work(sweep: list[float]) -> StageWork:
        sampling = changed(params, sample={"guidance_sweep": sweep, "num_images": 100})
        return {stage.stage: stage for stage in stage_work(sampling, data, config)}["sample"]

    forward, decode = ar_forward_flops(config), tokenizer_flops(params)[1]
    assert work([]).flops == 100 * (2 * forward + decode)
    assert work([]).text == "100 images, 2 passes each"
    assert work([1.0, 3.0]).flops == 100 * ((2 + 1 + 2) * forward + 3 * decode)
    assert work([1.0, 3.0]).text == "100 images at each of 3 scales, 5 passes in all"


def classifier_of_digits() -> tuple[int, int]:
    """FLOPs of its features of an image, and of a step of its training for one: 16 channels at 16 px, 10 classes."""

    def convolution(kernel: int, inputs: int, outputs: int, side: int) -> int:
        return 2 * kernel**2 * inputs * outputs * side**2

    stem = convolution(3, 3, 16, 16)
    features = stem + 2 * convolution(3, 16, 16, 16)
    for inputs, outputs, side in ((16, 32, 8), (32, 64, 4)):
        features += convolution(3, inputs, outputs, side) + convolution(3, outputs, outputs, side)
        features += convolution(1, inputs, outputs, side)
    # Images have no gradient.
    return features, 3 * (features + 2 * 64 * 10) - stem


@pytest.mark.parametrize(("features", "inception"), [("inception", INCEPTION), ("classifier", 0)])
def test_evaluation_costs_what_its_stage_does(features: str, inception: float) -> None:
    """Oracle: the stage. Real and drawn images and reconstructions are looked at once, by both networks or by one."""
    params = load_params(ROOT / "params.yaml")
    data = data_size(params, None, None)
    config = ar_config(params, data.classes)
    encode, decode, _ = tokenizer_flops(params)
    classifier, step = classifier_of_digits()
    training = params.evaluate.classifier.steps * params.evaluate.classifier.batch_size * step
    looked, copied = classifier + inception, inception or classifier

    reconstruction = encode + decode
    evaluating = changed(params, evaluate={"features": features}, sample={"num_images": 100, "guidance_sweep": [3.0]})
    (alone,) = [work for work in stage_work(evaluating, data, config) if work.stage == "evaluate"]
    assert alone.alone == training
    assert alone.flops == training + data.val * (reconstruction + copied) + (data.val + 200) * looked

    def added(drawn: int, **evaluate: object) -> float:
        return _evaluation(changed(evaluating, evaluate=evaluate), data, reconstruction, drawn).flops - alone.flops

    assert added(300) == 100 * looked
    assert added(200, generation_reference="train") == data.train * looked
    assert added(200, generation_reference="adm_train") == 10_000 * looked
    compared = [added(200, lpips=True, image_size=side) for side in (None, 32)]
    # VGG-16 sees both images of a pair, and four times the pixels at twice the side.
    assert compared == [data.val * perceptual_flops(16), 4 * data.val * perceptual_flops(16)]
    assert perceptual_flops(224) == pytest.approx(2 * 2 * 15.3e9, rel=0.01)


def test_the_classifier_sees_no_more_images_in_a_step_than_there_are() -> None:
    params = load_params(ROOT / "params.yaml")
    whole, few = (classifier_flops(params, DataSize(train, 10, 10))[0] for train in (128, 32))
    assert whole == 4 * few


def test_what_fits_grows_with_memory_and_is_a_divisor() -> None:
    params = load_params(IMAGENET).train_ar
    config = ar_config(load_params(IMAGENET), 1000)
    largest = []
    for memory in (8, 24, 80):
        ways = list(layouts(params, config, make_cluster("h100", 8, memory, None, 4.0)))
        assert sum(way.chosen for way in ways) == 1
        for way in ways:
            assert way.largest == 0 or 32 % way.largest == 0
            if way.largest == 32:
                assert way.memory.peak(32) <= (memory - 4) * 1e9 or way.split.accumulating
        largest.append([way.largest for way in ways])
    assert all(a <= b <= c for a, b, c in zip(*largest, strict=True))
    assert largest[0] != largest[1] != largest[2]


def test_the_chosen_way_is_that_of_the_params() -> None:
    changes = {"batch_size": 64, "micro_batch_size": 8, "zero_stage": 2, "activation_checkpointing": True}
    params = load_params(ROOT / "params.yaml").train_ar.model_copy(update=changes)
    (way,) = [way for way in layouts(params, small_config(), make_cluster("h100", 4, 80, None, 4.0)) if way.chosen]
    assert way.split == Split(4, params.precision, 2, params.offload, True, accumulating=True, trains=True)
    assert way.micro_batch == 8


def test_the_largest_micro_batch_of_each_way_is_the_last_divisor_that_fits() -> None:
    """Oracle: the derived peak of every divisor of a process's share; less than the whole share accumulates."""
    params, config = load_params(ROOT / "params.yaml").train_ar, small_config()
    share = params.batch_size // 4
    peaks: dict[Split, dict[int, int]] = {}
    found = set()
    for megabytes in (0.42, 0.583, 3.0):
        cluster = make_cluster("h100", 4, megabytes / 1000, None, 0.0)
        for way in layouts(params, config, cluster):
            if way.split not in peaks:
                whole, parts = (stage2_memory(config, replace(way.split, accumulating=some)) for some in (False, True))
                peaks[way.split] = {size: parts.peak(size) for size in (1, 2, 4, 8)} | {share: whole.peak(share)}
            fit = [size for size, peak in peaks[way.split].items() if peak <= cluster.available_bytes]
            assert way.largest == max(fit, default=0)
            found.add(way.largest)
    assert len(found) > 3


def test_all_ways_that_the_params_allow_are_compared_and_no_others() -> None:
    """Oracle: crt.params, which refuses the others."""
    params = load_params(ROOT / "params.yaml").train_ar
    ways = layouts(params, small_config(), make_cluster("h100", 1, None, None, 4.0))
    compared = {(way.split.zero_stage, way.split.offload) for way in ways}

    def is_allowed(stage: int, offload: str) -> bool:
        try:
            TrainAR.model_validate(params.model_dump() | {"zero_stage": stage, "offload": offload, "compile": False})
        except ValidationError:
            return False
        return True

    offloads = ("none", "optimizer", "optimizer_and_parameters")
    assert compared == {(stage, kind) for stage in range(4) for kind in offloads if is_allowed(stage, kind)}


def test_rates_are_those_of_the_data_sheet_or_ones_own() -> None:
    """H100 SXM: dense, 989 TFLOPS in bfloat16, half of that in TF32, 67 in float32."""
    assert make_cluster("h100", 1, None, None, 4.0).peak_flops == {"bf16": 989e12, "TF32": 494.5e12, "float32": 67e12}
    assert set(make_cluster("h100", 1, None, 500, 4.0).peak_flops.values()) == {500e12}
    assert make_cluster("h100", 1, 40, None, 4.0).available_bytes == 36e9


def test_own_numbers_of_images_and_classes_come_before_the_known_ones() -> None:
    data = data_size(load_params(IMAGENET), 1000, 7)
    assert (data.train, data.val, data.classes) == (1000, 50_000, 7)


def test_command_tells_that_all_fits(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--params", str(IMAGENET), "--gpu", "h100", "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    fits = "fits: train_tokenizer, train_ar and sample as the params have them"
    for part in ("774,699,520 parameters", "71,883,403 parameters", "20 views", fits):
        assert part in text
    for stage in ("prepare_data", "train_tokenizer", "tokenize", "train_ar", "sample", "evaluate"):
        assert any(line.startswith(stage) for line in text.splitlines())


@pytest.mark.parametrize(
    ("options", "compiled", "remedy"),
    [
        (["--gpu", "l40s", "--gpu-memory", "12.5"], True, "zero_stage to 2, offload to optimizer, "),
        (["--gpu-memory", "15"], True, "zero_stage to 3, compile to false, offload to none, "),
        (["--gpu-memory", "15"], False, "zero_stage to 3, offload to none, "),
        (["--gpu-memory", "4.2"], True, "use more or larger GPUs"),
    ],
)
def test_command_tells_what_does_not_fit_and_what_would(
    capsys: pytest.CaptureFixture, tmp_path: Path, options: list[str], compiled: bool, remedy: str
) -> None:
    # A small tokenizer, whose FLOPs are counted sooner.
    blocks = {"train_tokenizer.architecture.encoder_blocks": 1, "train_tokenizer.architecture.decoder_blocks": 1}
    params = write_params(tmp_path / "params.yaml", blocks | {"train_ar.compile": compiled}, base=IMAGENET)
    assert main(["plan", "--params", str(params), "--model", "3B", *options]) == 1
    printed = capsys.readouterr().out
    assert "does not fit" in printed.splitlines()[-1]
    assert remedy in printed.splitlines()[-1]
    # Oracle: crt.params, which refuses the two together.
    assert ("ZeRO 3 needs train_ar.compile: false" in printed) == compiled


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        (1.47e-07, "under 1 s"),
        (1 / 3600, "1 s"),
        (29.4 / 3600, "29 s"),
        (0.0130, "0.013"),
        (10.9, "10.9"),
        (190.2, "190"),
        (1033.4, "1,030"),
        (12.3456e6, "12,300,000"),
    ],
)
def test_times_are_hours_or_seconds_that_say_so(hours: float, text: str) -> None:
    assert _time(hours) == text


def test_hours_follow_from_flops_rate_and_gpus(capsys: pytest.CaptureFixture) -> None:
    """Oracle: the printed FLOPs; the classifier's training, of which there is a closed form, is one GPU's."""
    rates = ["--peak", "0.0001", "--mfu", "0.4", "--mfu-tokenizer", "0.3", "--mfu-sample", "0.1"]
    assert main(["plan", "--gpus", "4", "--images-per-second", "0.1", *rates]) == 0
    rows = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()]
    (prepared,) = [float(row[3]) for row in rows if row[:2] == ["prepare_data", "-"]]
    assert prepared == pytest.approx(1797 / 0.1 / 3600, rel=0.01)
    shares = {"train_tokenizer": 0.3, "tokenize": 0.3, "train_ar": 0.4, "sample": 0.1, "evaluate": 0.3}
    table = {row[0]: (float(row[1]), float(row[4]), float(row[5])) for row in rows if row[2:3] and row[2].endswith("%")}
    assert list(table) == list(shares)
    classifier = load_params(ROOT / "params.yaml").evaluate.classifier
    alone = classifier.steps * classifier.batch_size * classifier_of_digits()[1]
    for stage, (flops, hours, gpu_hours) in table.items():
        one = alone if stage == "evaluate" else 0
        assert hours == pytest.approx(((flops - one) / 4 + one) / (1e8 * shares[stage]) / 3600, rel=0.01)
        assert gpu_hours == pytest.approx(4 * hours, rel=0.01)
    (total,) = [row for row in rows if row[:1] == ["all"]]
    assert float(total[1]) == pytest.approx(prepared + sum(hours for _, hours, _ in table.values()), rel=0.01)
    assert float(total[2]) == pytest.approx(sum(gpu_hours for *_, gpu_hours in table.values()), rel=0.01)


def test_the_plan_of_small_params_has_no_powers_of_ten_among_its_times(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--params", str(ROOT / "params.yaml"), "--gpus", "1"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tokenize ")]
    assert line.endswith("20% TF32      under 1 s  under 1 s  1,438 images in 1 view, 359 in 1")


def test_models_are_printed_as_blocks_to_copy(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--params", str(IMAGENET), "--models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("XL ") and "774,699,520" in line and "layers: 36" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "h300"], "--gpu h300: unknown"),
        (["--gpus", "0"], "--gpus 0: must be from 1 to 1e+09\n"),
        (["--gpus", "7"], "does not divide among 7 processes"),
        (["--gpus", "256"], "train_tokenizer.batch_size 128 does not divide among 256 processes"),
        (["--gpu-memory", "-1"], "--gpu-memory -1"),
        (["--gpu-memory", "inf"], "--gpu-memory inf: must be from 1e-06 to 1e+09\n"),
        (["--gpu-memory", "nan"], "--gpu-memory nan"),
        (["--gpu-memory", "1e300"], "--gpu-memory 1e+300: must be"),
        (["--peak", "inf"], "--peak inf: must be from"),
        (["--peak", "1e-310"], "--peak 1e-310: must be from 1e-06"),
        (["--reserve", "inf"], "--reserve inf"),
        (["--images-per-second", "inf"], "--images-per-second inf: must be from 1e-06 to 1e+09\n"),
        (["--mfu", "1.5"], "--mfu 1.5: must be from 1e-06 to 1\n"),
        (["--mfu-tokenizer", "nan"], "--mfu-tokenizer nan: must be from 1e-06 to 1\n"),
        (["--mfu-sample", "0"], "--mfu-sample 0.0: must be from 1e-06 to 1\n"),
        (["--images", "-5"], "--images -5: must be greater than 0"),
        (["--images", "0"], "--images 0"),
        (["--classes", "-3"], "--classes -3: must be greater than 0"),
        (["--classes", "0", "--models"], "--classes 0"),
        (["--classes", str(2**63)], f"--classes {2**63}: must be at most {2**40}"),
        (["--images", str(2**70)], f"--images {2**70}: must be at most {2**40}"),
        (["--reserve", "90"], "--reserve 90"),
        (["--batch-size", "0"], "--batch-size 0: must be greater than 0"),
        (["--model", "huge"], "--model huge: no such size"),
    ],
)
def test_bad_options_are_refused(capsys: pytest.CaptureFixture, options: list[str], message: str) -> None:
    assert main(["plan", "--params", str(IMAGENET), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_data_set_needs_its_size(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    changes = {"prepare_data.source": "imagefolder", "prepare_data.path": "somewhere"}
    params = str(write_params(tmp_path / "params.yaml", changes))
    assert main(["plan", "--params", params]) == 2
    assert "give --images and --classes" in capsys.readouterr().err
    assert main(["plan", "--params", params, "--images", "1000", "--classes", "3"]) == 0
    assert "800 images in 1 view, 200 in 1" in capsys.readouterr().out
