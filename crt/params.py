"""params.yaml as typed, checked values: every scientific value of the pipeline, one section per stage.

The models below carry no defaults: params.yaml states each value, once. Loading forbids unknown
keys and wrong types, checks combinations, and imports no torch, so a typo is refused in well under
a second, before any stage runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from crt.yaml_files import Section, checked, in_yaml, read_yaml

# What arrays and files can count.
MAX_INT = 2**63
# Of networks, where no memory holds more: torch and NumPy meet larger numbers with errors of their own.
Size = Annotated[int, Field(gt=0, le=2**16)]
BatchSize = Annotated[int, Field(gt=0, le=2**31)]
PositiveInt = Annotated[int, Field(gt=0, lt=MAX_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=MAX_INT)]
# Networks compute in float32: what they make of larger numbers overflows.
MAX_FLOAT = 1e30
PositiveFloat = Annotated[float, Field(gt=0, le=MAX_FLOAT, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=MAX_FLOAT, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
MAX_CODEBOOK = 2**31
# LPIPS halves the image four times, and needs a pixel after that.
LPIPS_MIN_SIDE = 16
# MS-SSIM halves the image four times, and needs a whole window of 11 pixels after that.
MS_SSIM_MIN_SIDE = 176
# Beyond these, logits overflow.
MOST_GUIDANCE, LEAST_TEMPERATURE = 1e6, 1e-6
GuidanceScale = Annotated[float, Field(ge=1, le=MOST_GUIDANCE, allow_inf_nan=False)]
Betas = Annotated[list[Fraction], Field(min_length=2, max_length=2)]
RegularizerContext = Literal["latents", "codes"]


def _possible_path(text: str) -> str:
    """Refuse what no file can be called.

    Raises:
        ValueError: the text is empty, or holds what no path may.
    """
    if not text:
        raise ValueError("is empty: give a path, or null for none")
    try:
        possible = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise ValueError(f"{text!r} holds a character that no path may: correct it")
    return text


def _possible_stage(value: Any) -> Any:
    """Refuse what is no stage of ZeRO; a Literal alone would take true for 1, and 3.0 for 3.

    Raises:
        ValueError: it is none.
    """
    if type(value) is not int or value not in range(4):
        raise ValueError(f"must be 0, 1, 2 or 3, got {in_yaml(value)}")
    return value


def _possible_view(name: str) -> str:
    parse_view(name)
    return name


PathText = Annotated[str, AfterValidator(_possible_path)]
ZeroStage = Annotated[Literal[0, 1, 2, 3], BeforeValidator(_possible_stage)]
ViewName = Annotated[str, AfterValidator(_possible_view)]


class PrepareData(Section):
    """Where the images come from and how they are stored."""

    source: Literal[
        "digits", "cifar10", "imagefolder", "imagenet", "webdataset", "tfrecord", "parquet", "arrow", "lmdb", "arrays"
    ]
    path: PathText | None
    storage: Literal["pixels", "encoded"]
    image_size: PositiveInt | None
    resize_filter: Literal["bilinear", "bicubic", "lanczos", "box"]
    val_fraction: Fraction
    max_images_per_class: PositiveInt | None
    max_rejected_fraction: Probability
    images_per_shard: PositiveInt

    @model_validator(mode="after")
    def _check(self) -> PrepareData:
        if self.source not in ("digits", "cifar10") and self.path is None:
            raise ValueError(
                f"path is null, but source {self.source!r} needs a folder or archive: set prepare_data.path"
            )
        if self.source == "digits" and self.path is not None:
            raise ValueError("path is set, but source 'digits' comes with scikit-learn: set prepare_data.path to null")
        if self.storage == "pixels" and self.image_size is None:
            raise ValueError("storage 'pixels' stores images of one size: set prepare_data.image_size to a number")
        return self


class Architecture(Section):
    """Encoder and decoder of the tokenizer."""

    encoder_channels: Size
    decoder_channels: Size
    channel_multipliers: Annotated[list[Size], Field(min_length=1)]
    encoder_blocks: Size
    decoder_blocks: Size
    attention: bool
    norm_groups: PositiveInt
    z_channels: Size
    dropout: Fraction

    @property
    def downsampling(self) -> int:
        """Pixels per latent along each side: every level but the last halves the resolution."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @model_validator(mode="after")
    def _check(self) -> Architecture:
        for name in ("encoder_channels", "decoder_channels"):
            channels = getattr(self, name)
            for width in {channels, *(channels * multiplier for multiplier in self.channel_multipliers)}:
                if width % self.norm_groups:
                    raise ValueError(
                        f"norm_groups {self.norm_groups} does not divide a width of {width} channels: "
                        f"choose {name} as a multiple of norm_groups"
                    )
        return self


class Quantizer(Section):
    """Codebook and how it learns."""

    codebook_size: Annotated[int, Field(ge=2, le=MAX_CODEBOOK)]
    codebook_dim: Size
    l2_normalize: bool
    update: Literal["gradient", "ema"]
    ema_decay: Fraction
    revive_after_steps: PositiveInt | None

    @model_validator(mode="after")
    def _check(self) -> Quantizer:
        if self.l2_normalize and self.codebook_dim == 1:
            raise ValueError(
                "codebook_dim 1 with l2_normalize leaves two codes, 1 and -1: raise codebook_dim, "
                "or set l2_normalize to false"
            )
        return self


class Loss(Section):
    """Terms of the tokenizer's loss other than the adversarial one and the regularizer's."""

    pixel: Literal["l2", "l1"]
    pixel_weight: NonNegativeFloat
    lpips_weight: NonNegativeFloat
    lpips_weights: PathText | None
    codebook_weight: NonNegativeFloat
    commitment_weight: NonNegativeFloat
    entropy_weight: NonNegativeFloat
    entropy_temperature: PositiveFloat


class Discriminator(Section):
    """Adversary of the decoder."""

    kind: Literal["none", "patchgan", "stylegan"]
    channels: Size
    layers: PositiveInt
    weight: NonNegativeFloat
    adaptive_weight: bool
    start_step: NonNegativeInt
    learning_rate: PositiveFloat


class Regularizer(Section):
    """The causal regularizer; its weight is the top-level lambda."""

    kind: Literal["none", "l2", "cross_entropy", "larp"]
    context: RegularizerContext
    layers: Annotated[int, Field(ge=0, le=12)]
    width: Size
    heads: PositiveInt
    anneal_steps: NonNegativeInt
    learning_rate: PositiveFloat
    betas: Betas
    weight_decay: NonNegativeFloat
    temperature: PositiveFloat

    @model_validator(mode="after")
    def _check(self) -> Regularizer:
        _check_heads(self.width, self.heads, divisor=1)
        return self


class Optimizer(Section):
    """AdamW, its clipping and its learning-rate schedule."""

    learning_rate: PositiveFloat
    betas: Betas
    weight_decay: NonNegativeFloat
    clip_norm: PositiveFloat
    schedule: Literal["constant", "cosine", "linear"]
    warmup_steps: NonNegativeInt
    final_fraction: Probability


def _check_steps(section: TrainTokenizer | TrainAR) -> None:
    if not section.steps and section.init_from is None:
        raise ValueError(
            "steps is 0, which takes the weights of init_from as they are, and it is null: set one of them"
        )


class TrainTokenizer(Section):
    """Stage 1."""

    image_size: PositiveInt
    architecture: Architecture
    quantizer: Quantizer
    loss: Loss
    discriminator: Discriminator
    regularizer: Regularizer
    optimizer: Optimizer
    init_from: PathText | None
    steps: NonNegativeInt
    batch_size: BatchSize
    # Images are enlarged so far that such a share is a crop.
    min_crop: Annotated[float, Field(ge=0.01, le=1)]
    horizontal_flip: bool
    weight_ema_decay: Fraction
    precision: Literal["float32", "bf16"]
    channels_last: bool
    compile: bool
    validate_every: PositiveInt
    checkpoint_every: PositiveInt

    @model_validator(mode="after")
    def _check(self) -> TrainTokenizer:
        _check_steps(self)
        factor = self.architecture.downsampling
        if self.image_size % factor:
            raise ValueError(
                f"image_size {self.image_size} is not divisible by the downsampling {factor} "
                f"of {len(self.architecture.channel_multipliers)} channel_multipliers"
            )
        self._check_lowest_level()
        if self.loss.lpips_weight > 0 and self.image_size < LPIPS_MIN_SIDE:
            raise ValueError(
                f"loss.lpips_weight {self.loss.lpips_weight:g} needs images of {LPIPS_MIN_SIDE} px at least, "
                f"image_size is {self.image_size}: set lpips_weight to 0"
            )
        self._check_discriminator()
        return self

    def _check_lowest_level(self) -> None:
        sizes = self.architecture
        if self.image_size > sizes.downsampling:
            return
        # The encoder comes to it with the width of the level above.
        multipliers = [1, *sizes.channel_multipliers]
        for name, lowest in (("encoder_channels", multipliers[-2:]), ("decoder_channels", multipliers[-1:])):
            if any(getattr(sizes, name) * multiplier == sizes.norm_groups for multiplier in lowest):
                raise ValueError(
                    f"architecture.norm_groups {sizes.norm_groups} leave one value for each group at the lowest level, "
                    f"which is a single pixel, and normalising makes it 0: lower norm_groups, or raise {name}"
                )

    def _check_discriminator(self) -> None:
        kind, layers = self.discriminator.kind, self.discriminator.layers
        if kind == "none" or not self.steps:
            return
        if self.discriminator.start_step >= self.steps:
            raise ValueError(
                f"discriminator.start_step {self.discriminator.start_step} is not before the end, "
                f"steps is {self.steps}: lower it, or set discriminator.kind to none"
            )
        # Beyond that many halvings no image is left.
        factor = 2 ** min(layers, 32)
        # After its halvings PatchGAN still has two 4x4 convolutions, each of which takes a pixel off.
        if kind == "patchgan" and self.image_size // factor < 3:
            raise ValueError(
                f"discriminator.layers {layers} leave no patch of an image of {self.image_size} px: "
                "lower train_tokenizer.discriminator.layers"
            )
        if kind == "stylegan" and self.image_size % factor:
            raise ValueError(
                f"discriminator.layers {layers} halve the image's {self.image_size} px to a fraction: "
                "lower train_tokenizer.discriminator.layers"
            )


class Tokenize(Section):
    """The token cache."""

    views: Annotated[list[ViewName], Field(min_length=1)]
    batch_size: BatchSize
    precision: Literal["float32", "bf16"]

    @model_validator(mode="after")
    def _check(self) -> Tokenize:
        # As the cache will name them: 1.1 and 1.10 are one view.
        names = {f"{kind}@{resize_range:g}" for kind, resize_range in map(parse_view, self.views)}
        if len(names) != len(self.views):
            raise ValueError(f"views {self.views} names a view twice: name each once")
        return self


def parse_view(view: str) -> tuple[str, float]:
    """Split a view's name into its kind and resize range.

    'center' and 'flip' are the centre crop and its mirror image; 'ten_crop@1.1' stands for the ten crops
    (four corners, centre, and their mirror images) of the image resized so that its shorter side is 1.1
    times the crop.

    Returns:
        (kind, resize_range).

    Raises:
        ValueError: the name is none of these.
    """
    kind, at, resize_range = view.partition("@")
    if kind in ("center", "flip") and not at:
        return kind, 1.0
    if kind == "ten_crop" and at:
        try:
            value = float(resize_range)
        except ValueError:
            value = 0.0
        if 1.0 <= value <= 4.0:
            return kind, value
    raise ValueError(f"unknown view {view!r}: use 'center', 'flip' or 'ten_crop@RANGE' with RANGE from 1 to 4")


class ARModel(Section):
    """Llama-style transformer of stage 2; codebook, grid and classes come from the token cache."""

    layers: Size
    heads: PositiveInt
    width: Size
    ffn_multiple: Size
    norm_eps: PositiveFloat
    rope_base: PositiveFloat
    dropout: Fraction
    label_dropout: Fraction
    init_std: PositiveFloat

    @model_validator(mode="after")
    def _check(self) -> ARModel:
        # 2D RoPE rotates pairs of channels, half of them by row and half by column.
        _check_heads(self.width, self.heads, divisor=4)
        return self


class TrainAR(Section):
    """Stage 2."""

    model: ARModel
    optimizer: Optimizer
    init_from: PathText | None
    steps: NonNegativeInt
    batch_size: BatchSize
    micro_batch_size: PositiveInt | None
    precision: Literal["float32", "bf16"]
    zero_stage: ZeroStage
    offload: Literal["none", "optimizer", "optimizer_and_parameters"]
    activation_checkpointing: bool
    compile: bool
    validate_every: PositiveInt
    checkpoint_every: PositiveInt
    keep_checkpoints: PositiveInt
    # Drawn all at once.
    sample_images: Annotated[int, Field(ge=0, le=2**16)]

    @model_validator(mode="after")
    def _check(self) -> TrainAR:
        _check_steps(self)
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}: "
                "choose a divisor, or null for one micro-batch per process"
            )
        if self.offload == "optimizer_and_parameters" and self.zero_stage != 3:
            raise ValueError("offload 'optimizer_and_parameters' needs zero_stage 3")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload 'optimizer' needs zero_stage 1, 2 or 3")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile needs zero_stage 0, 1 or 2: ZeRO 3 gathers weights within what it compiles")
        return self


class Sample(Section):
    """Images to draw."""

    num_images: PositiveInt
    labels: Annotated[list[NonNegativeInt], Field(min_length=1)] | None
    guidance_scale: GuidanceScale
    guidance_schedule: Literal["constant", "linear", "cosine"]
    guidance_interval: Annotated[list[Probability], Field(min_length=2, max_length=2)]
    guidance_sweep: list[GuidanceScale]
    temperature: Annotated[float, Field(ge=LEAST_TEMPERATURE, le=MAX_FLOAT, allow_inf_nan=False)]
    top_k: NonNegativeInt
    top_p: Annotated[float, Field(gt=0, le=1)]
    batch_size: BatchSize
    precision: Literal["float32", "bf16"]
    compile: bool
    export: list[Literal["png", "npz"]]

    @model_validator(mode="after")
    def _check(self) -> Sample:
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval {self.guidance_interval} must ascend: swap its ends")
        if len(set(self.export)) != len(self.export):
            raise ValueError(f"export {self.export} names a format twice: name each once")
        if len(set(self.scales)) != len(self.scales):
            raise ValueError(
                f"guidance_sweep {self.guidance_sweep} names a scale twice, or guidance_scale {self.guidance_scale:g} "
                "again: name every other scale once"
            )
        return self

    @property
    def scales(self) -> list[float]:
        """Every guidance scale that is drawn, the main one first."""
        return [float(scale) for scale in (self.guidance_scale, *self.guidance_sweep)]


class Classifier(Section):
    """Small classifier trained on the prepared data: features offline, and judge of class agreement."""

    channels: Size
    steps: PositiveInt
    batch_size: BatchSize
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat
    max_shift: Fraction


class Evaluate(Section):
    """Metrics."""

    features: Literal["classifier", "inception"]
    inception_weights: PathText | None
    inception_resize: Literal["clean", "legacy_tensorflow"]
    image_size: PositiveInt | None
    generation_reference: Literal["val", "train", "adm_train"]
    adm_reference: PathText | None
    classifier: Classifier
    neighbours: PositiveInt
    kernel_subsets: PositiveInt
    kernel_subset_size: Annotated[int, Field(ge=2, lt=MAX_INT)]
    pairwise_images: PositiveInt
    inception_score_splits: PositiveInt
    lpips: bool
    lpips_weights: PathText | None
    batch_size: BatchSize
    grid_classes: PositiveInt
    grid_images_per_class: PositiveInt
    grid_reconstructions: PositiveInt

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        if self.generation_reference == "adm_train" and self.adm_reference is None:
            raise ValueError("generation_reference 'adm_train' needs the ADM batch file: set evaluate.adm_reference")
        if self.generation_reference == "adm_train" and self.features != "inception":
            raise ValueError("generation_reference 'adm_train' needs evaluate.features 'inception'")
        if self.image_size is not None and self.features != "inception":
            raise ValueError(
                "image_size is for features 'inception': the classifier is trained at the images' own: set null"
            )
        return self


class Params(Section):
    """The whole file."""

    # 'lambda' is a Python keyword: the attribute is lambda_, the key in the file is lambda.
    lambda_: Annotated[float, Field(ge=0, le=MAX_FLOAT, allow_inf_nan=False, alias="lambda")]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    prepare_data: PrepareData
    train_tokenizer: TrainTokenizer
    tokenize: Tokenize
    train_ar: TrainAR
    sample: Sample
    evaluate: Evaluate

    @model_validator(mode="after")
    def _check(self) -> Params:
        data, tokenizer = self.prepare_data, self.train_tokenizer
        if data.storage == "pixels" and data.image_size != tokenizer.image_size:
            raise ValueError(
                f"train_tokenizer.image_size {tokenizer.image_size} differs from prepare_data.image_size "
                f"{data.image_size}: with storage 'pixels' both must be equal"
            )
        if data.image_size is not None and data.image_size < tokenizer.image_size:
            raise ValueError(
                f"prepare_data.image_size {data.image_size} is smaller than the crop "
                f"train_tokenizer.image_size {tokenizer.image_size}: raise it"
            )
        if data.storage == "pixels" and any(parse_view(view)[1] > 1 for view in self.tokenize.views):
            raise ValueError(
                "tokenize.views with ten_crop need images larger than the crop: set prepare_data.storage to 'encoded'"
            )
        if self.sample.top_k > tokenizer.quantizer.codebook_size:
            raise ValueError(
                f"sample.top_k {self.sample.top_k} exceeds "
                f"train_tokenizer.quantizer.codebook_size {tokenizer.quantizer.codebook_size}"
            )
        if self.train_ar.model.label_dropout == 0 and max(self.sample.scales) > 1:
            raise ValueError(
                "train_ar.model.label_dropout is 0, so the model learns no unconditional prediction for the guidance "
                f"scale {max(self.sample.scales):g}: set sample.guidance_scale to 1 and guidance_sweep to [], "
                "or label_dropout to 0.1"
            )
        if self.evaluate.lpips and tokenizer.image_size < LPIPS_MIN_SIDE:
            raise ValueError(
                f"evaluate.lpips needs images of {LPIPS_MIN_SIDE} px at least, train_tokenizer.image_size is "
                f"{tokenizer.image_size}: set it to false"
            )
        if self.lambda_ > 0 and tokenizer.regularizer.kind == "none":
            raise ValueError(
                f"lambda is {self.lambda_:g}, but train_tokenizer.regularizer.kind is 'none': "
                "set lambda to 0 or choose a regularizer"
            )
        return self


def load_params(path: str | Path) -> Params:
    """Read and check a params file.

    Raises:
        UserError: the file is missing or not YAML, or a key is unknown, missing, of the wrong type,
            out of range or in an impossible combination. The message has one line per key.
    """
    return validate_params(read_yaml(path), path)


def validate_params(values: Mapping[str, Any], name: str | Path) -> Params:
    """Check already parsed params. `name` stands for the file in error messages."""
    return checked(Params, values, name, "see the presets folder for complete files")


def _check_heads(width: int, heads: int, divisor: int) -> None:
    if width % heads:
        raise ValueError(f"width {width} is not divisible by heads {heads}")
    if (width // heads) % divisor:
        raise ValueError(f"width / heads is {width // heads}, which is not a multiple of {divisor}: 2D RoPE needs one")
