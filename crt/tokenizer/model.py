"""The tokenizer: images to codes and back.

    from crt import Tokenizer
    tokenizer = Tokenizer.load(folder)              # or Tokenizer.from_pretrained("user/name") from the Hub
    codes = tokenizer.encode(images)                # (B, 3, H, W) float in [-1, 1] to (B, N) int64, raster order
    images = tokenizer.decode(codes)                # and back

A folder holds config.json (sizes, schema) and model.safetensors (float32 weights).
"""

from __future__ import annotations

import math
import operator
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from crt.errors import UserError
from crt.files import make_folder
from crt.model_files import CONFIG_FILE, TOKENIZER, WEIGHTS_FILE, read_config, read_weights, usable_device, write_model
from crt.params import TrainTokenizer
from crt.tokenizer.autoencoder import Decoder, Encoder
from crt.tokenizer.quantizer import Quantized, VectorQuantizer, full_precision

# Convolutions of this width and more are faster with channels last, narrower ones are not.
_CHANNELS_LAST_WIDTH = 128
# Bicubic resampling leaves [-1, 1], up to 1.9 at most; pixels normalised by ImageNet's deviation reach beyond 2.1.
_FARTHEST = 2.0


@dataclass(frozen=True)
class TokenizerConfig:
    """Everything that determines the shapes of the weights and what the codes mean."""

    image_size: PositiveInt
    """Side of the images that it was trained on; it takes any multiple of `downsampling`."""
    encoder_channels: PositiveInt
    decoder_channels: PositiveInt
    channel_multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    encoder_blocks: PositiveInt
    decoder_blocks: PositiveInt
    attention: bool
    norm_groups: PositiveInt
    z_channels: PositiveInt
    dropout: Annotated[float, Field(ge=0, le=1)]
    codebook_size: PositiveInt
    codebook_dim: PositiveInt
    l2_normalize: bool

    @property
    def downsampling(self) -> int:
        """Pixels per code along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @classmethod
    def from_params(cls, params: TrainTokenizer) -> TokenizerConfig:
        """The config of the tokenizer that section train_tokenizer describes."""
        architecture = params.architecture.model_dump()
        architecture["channel_multipliers"] = tuple(architecture["channel_multipliers"])
        quantizer = {
            name: getattr(params.quantizer, name) for name in ("codebook_size", "codebook_dim", "l2_normalize")
        }
        return cls(image_size=params.image_size, **architecture, **quantizer)


class Tokenizer(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="crt",
    tags=["image-tokenizer", "vqgan", "causally-regularized-tokenization"],
    paper_url="https://arxiv.org/abs/2412.16326",
):
    """Encoder, vector quantizer and decoder.

    Args:
        config: its sizes. Weights are drawn from torch's global generator.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        shared: dict[str, Any] = {
            "channel_multipliers": config.channel_multipliers,
            "attention": config.attention,
            "norm_groups": config.norm_groups,
            "z_channels": config.z_channels,
            "dropout": config.dropout,
        }
        self.encoder = Encoder(channels=config.encoder_channels, num_blocks=config.encoder_blocks, **shared)
        self.to_latent = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.quantizer = VectorQuantizer(config.codebook_size, config.codebook_dim, config.l2_normalize)
        self.from_latent = nn.Conv2d(config.codebook_dim, config.z_channels, 1)
        self.decoder = Decoder(channels=config.decoder_channels, num_blocks=config.decoder_blocks, **shared)

    @property
    def codebook_size(self) -> int:
        """Number of codes K."""
        return self.config.codebook_size

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.to_latent.weight.device

    @property
    def image_size(self) -> int:
        """Side of the images that it was trained on, in pixels."""
        return self.config.image_size

    @property
    def downsampling(self) -> int:
        """Pixels per code along each side."""
        return self.config.downsampling

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes of one image of `image_size`."""
        side = self.image_size // self.downsampling
        return side, side

    @property
    def num_tokens(self) -> int:
        """Codes per image of `image_size`."""
        return self.grid[0] * self.grid[1]

    def latents(self, images: Tensor) -> Tensor:
        """What the quantizer and the causal regularizer see: continuous latents, of unit length where normalised.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            (B, codebook_dim, H / downsampling, W / downsampling) in full precision, also under autocast.
        """
        features = self.encoder(images)
        weight, bias = self.to_latent.weight, self.to_latent.bias
        assert bias is not None
        with torch.autocast(images.device.type, enabled=False):
            features, weight, bias = (full_precision(tensor) for tensor in (features, weight, bias))
            return self.quantizer.project(F.conv2d(features, weight, bias))

    def reconstruct(self, values: Tensor) -> Tensor:
        """The decoder's (B, 3, H, W) images of (B, codebook_dim, h, w) vectors of codes."""
        return self.decoder(self.from_latent(values.to(self.from_latent.weight.dtype)))

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """Reconstructions (B, 3, H, W) of images in [-1, 1], and how they were quantized."""
        quantized = self.quantizer(self.latents(images))
        return self.reconstruct(quantized.values), quantized

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes of images.

        Args:
            images: (B, 3, H, W) floats in [-1, 1], of any precision and on any device; H and W multiples of
                `downsampling`. What overshoots a little, as resampling does, is taken as it is.

        Returns:
            (B, H * W / downsampling ** 2) int64 in raster order, on the tokenizer's device.

        Raises:
            ValueError: another type, shape or range, or NaN.
        """
        if not isinstance(images, Tensor):
            raise ValueError(f"images of type {type(images).__name__}: expected a tensor: use torch.from_numpy(images)")
        if not images.is_floating_point():
            raise ValueError(
                f"images of type {images.dtype}: expected floats in [-1, 1]: use images / 127.5 - 1 for 0 to 255"
            )
        if images.ndim != 4 or images.shape[1] != 3:
            grey = images.ndim == 4 and images.shape[1] == 1
            remedy = (
                "images.expand(-1, 3, -1, -1) for grey ones"
                if grey
                else "images.permute(0, 3, 1, 2) where channels come last, images[None] for a single one"
            )
            raise ValueError(f"images of shape {tuple(images.shape)}: expected (B, 3, H, W): use {remedy}")
        if any(side % self.downsampling or not side for side in images.shape[2:]):
            raise ValueError(
                f"images of shape {tuple(images.shape)}: expected H and W divisible by {self.downsampling}: "
                "resize or crop them"
            )
        images = images.to(self.device, self.to_latent.weight.dtype)
        if images.numel():
            low, high = torch.stack(images.aminmax()).tolist()
            if math.isnan(low):
                raise ValueError("images contain NaN: expected floats in [-1, 1]: leave out or fix what is not finite")
            if max(-low, high) > _FARTHEST:
                raise ValueError(
                    f"images reach from {low:.4g} to {high:.4g}: expected floats in [-1, 1]: use "
                    "images / 127.5 - 1 for 0 to 255, images.clamp(-1, 1) for what overshoots"
                )
        return self.nearest_codes(images)

    @torch.no_grad()
    def nearest_codes(self, images: Tensor) -> Tensor:
        """`encode` without its checks: what is in the tokenizer's own precision and range, without a wait for a GPU."""
        return self.quantizer.nearest(self.latents(images)).flatten(1)

    @torch.no_grad()
    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Images of codes.

        Args:
            codes: (B, N) integers in raster order, on any device.
            grid: rows and columns, for images of another size than the tokenizer was trained on; None: `self.grid`.

        Returns:
            (B, 3, H, W), about in [-1, 1]; not clamped; on the tokenizer's device.

        Raises:
            ValueError: no integers, or the codes do not fill the grid, or one is none of the codebook's.
        """
        try:
            rows, columns = (operator.index(side) for side in (self.grid if grid is None else grid))
        except (TypeError, ValueError):
            rows = columns = 0
        if rows < 1 or columns < 1:
            raise ValueError(f"grid {grid!r}: expected two integers of 1 or more: pass (rows, columns)")
        if not isinstance(codes, Tensor):
            raise ValueError(f"codes of type {type(codes).__name__}: expected a tensor: use torch.as_tensor(codes)")
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes of type {codes.dtype}: expected integers: pass what encode or generate gave")
        if codes.ndim != 2:
            raise ValueError(
                f"codes of shape {tuple(codes.shape)}: expected (B, N): use codes.reshape(-1, {rows * columns})"
            )
        if codes.shape[1] != rows * columns:
            raise ValueError(
                f"codes of shape {tuple(codes.shape)}: expected (B, {rows * columns}) for a grid of "
                f"{rows} x {columns}: pass the grid that they belong to"
            )
        codes = codes.to(self.device, torch.int64)
        if codes.numel():
            low, high = torch.stack(codes.aminmax()).tolist()
            if low < 0 or high >= self.codebook_size:
                raise ValueError(
                    f"codes from {low} to {high} reach outside 0 to {self.codebook_size - 1}: they belong to another "
                    "tokenizer: decode them with that one"
                )
        return self.reconstruct(self.quantizer.lookup(codes.unflatten(1, (rows, columns))))

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`, which is made if needed.

        Raises:
            UserError: no folder can be there.
        """
        folder = Path(folder)
        make_folder(folder)
        config = {TOKENIZER.key: TOKENIZER.name, "schema": TOKENIZER.schema, **asdict(self.config)}
        weights = {name: tensor.float().cpu() for name, tensor in self.state_dict().items()}
        write_model(folder, config, weights, metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Tokenizer:
        """Read a folder that `save`, train_tokenizer or import_llamagen wrote; the result is in evaluation mode.

        Raises:
            UserError: files are missing, damaged, of another kind, or do not belong together; or no such device.
        """
        device = usable_device(device)
        config = read_config(folder, TOKENIZER, TokenizerConfig)
        try:
            with torch.device("meta"):
                model = cls(config)
        except (ValueError, RuntimeError) as error:  # values that do not go together
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{Path(folder) / CONFIG_FILE}: describes no possible tokenizer ({reason}): copy or make it again"
            ) from None
        weights = read_weights(folder, TOKENIZER, model.state_dict(), Tensor.float)
        model.load_state_dict(weights, strict=True, assign=True)
        if min(config.encoder_channels, config.decoder_channels) >= _CHANNELS_LAST_WIDTH:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.requires_grad_(True).eval().to(device)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        map_location: str | torch.device = "cpu",
    ) -> Tokenizer:
        """`load` a folder, or what the Hub has under "user/name".

        Raises:
            UserError: as `load`; or neither a folder nor to be had from the Hub.
        """
        name = str(pretrained_model_name_or_path)
        if os.path.exists(name):  # the mixin would read config.json itself, and fail by its own words
            return cls.load(name, map_location)
        try:
            return super().from_pretrained(
                name,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                map_location=map_location,
            )
        except HFValidationError:
            raise UserError(
                f"{name}: not found: name the folder of a tokenizer, or one on the Hub as user/name"
            ) from None
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{name}: no folder here, and the Hub does not give it ({reason}): check name and connection"
            ) from error
        except ValueError as error:  # from the mixin's reading
            raise UserError(f"{name}: {CONFIG_FILE} on the Hub is damaged ({error}): upload it again") from None

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls, *, model_id: str, map_location: str | torch.device, config: object = None, **download: Any
    ) -> Tokenizer:
        """What the mixin calls, with what it read of config.json, which `load` reads and checks."""
        folder = snapshot_download(model_id, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE], **download)
        return cls.load(folder, map_location)
