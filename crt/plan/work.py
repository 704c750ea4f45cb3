"""FLOPs and sizes of every stage, from the params alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from crt.ar.model import ARConfig, ARTransformer, count_parameters
from crt.errors import UserError
from crt.evaluation.classifier import ConvClassifier
from crt.flops import ar_flops_per_image, count_flops, tokenizer_flops_per_image
from crt.params import Params, parse_view
from crt.tokenizer.losses import untrained_perceptual_loss
from crt.tokenizer.model import Tokenizer, TokenizerConfig
from crt.tokens.layout import CacheHeader

# (training images, validation images or None where a share is set aside, classes) of the sources that are known.
_SOURCES: dict[str, tuple[int, int | None, int]] = {
    "digits": (1_797, None, 10),
    "cifar10": (50_000, 10_000, 10),
    "imagenet": (1_281_167, 50_000, 1_000),
}
# Images or classes: more have no one, and sizes of networks with them would overflow.
_MOST = 2**40
# Inception-v3 at 299 px: 5.7 billion multiplications and additions per image.
_INCEPTION_FLOPS = 2 * 5.7e9


@dataclass(frozen=True)
class DataSize:
    """Images and classes of the prepared data."""

    train: int
    val: int
    classes: int


@dataclass(frozen=True)
class StageWork:
    """One stage: its FLOPs, in which precision, and what they are made of, in words."""

    stage: str
    flops: float
    precision: str
    text: str
    alone: float = 0.0
    """FLOPs among them of the first process, for which the others wait."""


def data_size(params: Params, images: int | None, classes: int | None) -> DataSize:
    """Images of both splits.

    Args:
        params: all of them.
        images: of the source, where the params do not tell.
        classes: likewise.

    Raises:
        UserError: they are needed, or not greater than 0.
    """
    for option, number in (("--images", images), ("--classes", classes)):
        if number is not None and number < 1:
            raise UserError(f"{option} {number}: must be greater than 0")
        if number is not None and number > _MOST:
            raise UserError(f"{option} {number}: must be at most {_MOST}")
    data = params.prepare_data
    train, val, known_classes = _SOURCES.get(data.source, (images, None, classes))
    train, known_classes = images or train, classes or known_classes
    if train is None or known_classes is None:
        raise UserError(
            f"prepare_data.source {data.source!r} does not say how large it is: give --images and --classes"
        )
    if val is None:
        val = round(train * data.val_fraction)
        train -= val
    if data.max_images_per_class is not None:  # of each split
        most = data.max_images_per_class * known_classes
        train, val = min(train, most), min(val, most)
    return DataSize(train, val, known_classes)


def source_classes(source: str) -> int | None:
    """Classes of a source of images; None where that differs from one to another."""
    return _SOURCES[source][2] if source in _SOURCES else None


def ar_config(params: Params, classes: int) -> ARConfig:
    """The stage-2 model, its codes taken from the tokenizer's params."""
    tokenizer = params.train_tokenizer
    side = tokenizer.image_size // tokenizer.architecture.downsampling
    codebook_size = tokenizer.quantizer.codebook_size
    return ARConfig.from_params(
        params.train_ar.model, codebook_size=codebook_size, grid=(side, side), num_classes=classes
    )


def ar_flops(config: ARConfig, activation_checkpointing: bool) -> int:
    """FLOPs of one training image, what is recomputed included; one and two layers tell, as all are alike."""
    one, two = (ar_flops_per_image(replace(config, layers=layers), activation_checkpointing) for layers in (1, 2))
    return one + (config.layers - 1) * (two - one)


def ar_forward_flops(config: ARConfig) -> int:
    """FLOPs of one image's forward pass."""
    one, two = (_ar_forward_flops(replace(config, layers=layers)) for layers in (1, 2))
    return one + (config.layers - 1) * (two - one)


def _ar_forward_flops(config: ARConfig) -> int:
    with FakeTensorMode(), torch.no_grad():
        model = ARTransformer(config)
        codes = torch.zeros(1, config.num_tokens, dtype=torch.int64)
        return count_flops(partial(model, codes, torch.zeros(1, dtype=torch.int64)))


def tokenizer_flops(params: Params) -> tuple[int, int, int]:
    """(encoder's FLOPs, decoder's FLOPs, both of one image, forward; number of parameters)."""
    with FakeTensorMode(), torch.no_grad():
        model = Tokenizer(TokenizerConfig.from_params(params.train_tokenizer)).eval()
        side = params.train_tokenizer.image_size
        images = torch.zeros(1, 3, side, side)
        values = torch.zeros(1, params.train_tokenizer.quantizer.codebook_dim, *model.grid)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return (
            count_flops(partial(model.nearest_codes, images)),
            count_flops(partial(model.reconstruct, values)),
            parameters,
        )


def classifier_flops(params: Params, data: DataSize) -> tuple[int, int]:
    """(FLOPs of training evaluate's classifier, of its features of one image)."""
    settings, side = params.evaluate.classifier, params.train_tokenizer.image_size
    with FakeTensorMode():
        network = ConvClassifier(settings.channels, data.classes, side)
        images = torch.zeros(2, side, side, 3, dtype=torch.uint8)  # of one alone there may be nothing to normalise
        step = count_flops(lambda: network(images).sum().backward())
        with torch.no_grad():
            features = count_flops(partial(network.features, images))
    return settings.steps * min(settings.batch_size, data.train) * step // 2, features // 2


def perceptual_flops(side: int) -> int:
    """FLOPs of LPIPS of one image of that side in pixels, forward."""
    with FakeTensorMode(), torch.no_grad():
        images = torch.zeros(1, 3, side, side)
        return count_flops(partial(untrained_perceptual_loss(), images, images))


def num_views(params: Params) -> int:
    """Views of each training image in the token cache; of a validation image there is one."""
    return sum(10 if parse_view(view)[0] == "ten_crop" else 1 for view in params.tokenize.views)


def views_text(params: Params) -> str:
    """How many those are, for people."""
    return f"{num_views(params)} view{'s' * (num_views(params) > 1)}"


def cache_bytes(params: Params, data: DataSize, config: ARConfig) -> int:
    """Codes of all views of both splits, as `crt.tokens.layout` stores them."""
    header = CacheHeader(
        split="train",
        rows=data.train,
        views=("",),
        grid=config.grid,
        codebook_size=config.codebook_size,
        num_classes=config.num_classes,
        tokenizer_content="",
        data_content="",
        block_rows=1,
    )
    return _views_of_all(params, data) * header.row_bytes


def _views_of_all(params: Params, data: DataSize) -> int:
    return data.train * num_views(params) + data.val


def _of_convolutions(precision: str) -> str:
    """The rate at which a GPU runs them: see `crt.plan.cluster`."""
    return {"float32": "TF32"}.get(precision, precision)


def checkpoint_bytes(config: ARConfig, precision: str, zero_stage: int) -> int:
    """One resume state on disk: the weights, and the optimizer's float32 state with its master weights if any.

    ZeRO 3 saves the master weights alone.
    """
    weights = 0 if zero_stage == 3 else 2 if precision == "bf16" else 4
    master = 4 if precision == "bf16" or zero_stage > 0 else 0
    return (weights + master + 8) * count_parameters(config)


def stage_work(params: Params, data: DataSize, config: ARConfig) -> list[StageWork]:
    """FLOPs of every stage that computes; prepare_data, which decodes images on the CPUs, is not among them."""
    stage1, stage2, sample = params.train_tokenizer, params.train_ar, params.sample
    encode, decode, _ = tokenizer_flops(params)
    per_image = tokenizer_flops_per_image(stage1, params.lambda_ > 0)
    train_image, forward = ar_flops(config, stage2.activation_checkpointing), ar_forward_flops(config)
    # Guidance of 1 needs no pass without a class.
    passes = [2 if scale != 1 else 1 for scale in sample.scales]
    again = ", blocks twice" if stage2.activation_checkpointing else ""
    return [
        StageWork(
            "train_tokenizer",
            per_image * stage1.batch_size * stage1.steps,
            _of_convolutions(stage1.precision),
            f"{stage1.steps:,} steps of {stage1.batch_size * per_image:.3e}",
        ),
        StageWork(
            "tokenize",
            encode * _views_of_all(params, data),
            _of_convolutions(params.tokenize.precision),
            f"{data.train:,} images in {views_text(params)}, {data.val:,} in 1",
        ),
        StageWork(
            "train_ar",
            train_image * stage2.batch_size * stage2.steps,
            stage2.precision,
            f"{stage2.steps:,} steps of {stage2.batch_size * train_image:.3e}{again}",
        ),
        StageWork(
            "sample",
            (forward * sum(passes) + decode * len(passes)) * sample.num_images,
            sample.precision,
            f"{sample.num_images:,} images, {passes[0]} passes each"
            if len(passes) == 1
            else f"{sample.num_images:,} images at each of {len(passes)} scales, {sum(passes)} passes in all",
        ),
        _evaluation(params, data, encode + decode, sample.num_images * len(passes)),
    ]


def _evaluation(params: Params, data: DataSize, reconstruction: int, drawn: int) -> StageWork:
    """Work of `evaluate`, at so many FLOPs for a reconstruction, on so many drawn images."""
    evaluate, references = params.evaluate, {"val": 0, "train": data.train, "adm_train": 10_000}
    training, classified = classifier_flops(params, data)
    # The classifier sees all but reconstructions, also where distances are of other features.
    features, seen = _INCEPTION_FLOPS, _INCEPTION_FLOPS + classified
    if evaluate.features == "classifier":
        features = seen = classified
    compared = perceptual_flops(evaluate.image_size or params.train_tokenizer.image_size) if evaluate.lpips else 0
    # The images of val are seen in any case, beside their reconstructions.
    shared = data.val * (reconstruction + features + compared)
    shared += seen * (data.val + references[evaluate.generation_reference] + drawn)
    text = "reconstructions and features; one GPU trains the classifier"
    return StageWork("evaluate", shared + training, "float32", text, alone=training)
