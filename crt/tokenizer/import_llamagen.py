"""Tokenizers that LlamaGen trained (its pickled VQ-16, VQ-8 or a relative) as this project's tokenizer folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crt.errors import UserError
from crt.foreign import check_floats, find_weights
from crt.model_files import check_shapes
from crt.tokenizer.model import Tokenizer, TokenizerConfig

# What LlamaGen's weights do not show and its code fixes.
_NORM_GROUPS = 32
_IMAGE_SIZE = 256

# Names inside a block or level, theirs to ours; q, k and v are joined separately.
_RENAMED = (
    (r"\.conv_blocks\.(\d+)\.res\.", r".levels.\1.blocks."),
    (r"\.conv_blocks\.(\d+)\.attn\.", r".levels.\1.attentions."),
    (r"\.conv_blocks\.(\d+)\.(?:down|up)sample\.", r".levels.\1.resample."),
    (r"\.mid\.", r".middle."),
    (r"\.nin_shortcut\.", r".shortcut."),
    (r"\.proj_out\.", r".out."),
    (r"^quant_conv\.", r"to_latent."),
    (r"^post_quant_conv\.", r"from_latent."),
    (r"^quantize\.embedding\.weight$", r"quantizer.codebook"),
)
_USAGE_WINDOW = "quantize.codebook_used"


def is_llamagen_tokenizer(state: Mapping[str, Any]) -> bool:
    """Whether a loaded checkpoint is one of LlamaGen's tokenizers."""
    return "quantize.embedding.weight" in _weights(state)


def import_llamagen_tokenizer(state: Mapping[str, Any], folder: str | Path) -> TokenizerConfig:
    """Write a LlamaGen tokenizer as a folder that `Tokenizer.load` reads.

    Codes and pixels are those of the original: the weights are only renamed. Averaged weights ("ema") are
    taken where the checkpoint has them, as LlamaGen's own evaluation does.

    Args:
        state: the checkpoint, as `torch.load(path, map_location="cpu", weights_only=True)` gives it.
        folder: where config.json and model.safetensors go.

    Raises:
        UserError: the checkpoint holds no such tokenizer, or lacks weights.
    """
    if not is_llamagen_tokenizer(state):
        raise UserError("checkpoint: no LlamaGen tokenizer (quantize.embedding.weight is missing)")
    weights = _convert(_weights(state))
    config = _infer_config(weights)
    with torch.device("meta"):
        model = Tokenizer(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    check_shapes("checkpoint", shapes, model.state_dict(), "name one of LlamaGen's files, or download it again")
    model.load_state_dict(weights, strict=True, assign=True)
    model.save(folder)
    return config


def _weights(state: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The weights inside a checkpoint: under one of the keys that LlamaGen's scripts write, or bare."""
    return find_weights(state, ("ema", "model", "state_dict", "module"))


def _convert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names; each attention's separate q, k and v become one convolution."""
    check_floats({theirs: tensor for theirs, tensor in weights.items() if theirs != _USAGE_WINDOW})
    for theirs, tensor in weights.items():
        if not tensor.ndim and theirs != _USAGE_WINDOW:
            raise UserError(f"checkpoint: {theirs!r} holds no weights: download it again")
    converted: dict[str, Tensor] = {}
    for theirs, tensor in weights.items():
        if theirs == _USAGE_WINDOW:
            continue
        ours = theirs
        for pattern, replacement in _RENAMED:
            ours = re.sub(pattern, replacement, ours)
        part = re.fullmatch(r"(.+\.)([qkv])\.(weight|bias)", ours)
        if part is None:
            converted[ours] = tensor.float()
        elif part[2] == "q":
            names = [f"{theirs.removesuffix(f'q.{part[3]}')}{letter}.{part[3]}" for letter in "qkv"]
            missing = [name for name in names if name not in weights]
            if missing:
                raise UserError(f"checkpoint: weight {missing[0]!r} is missing: download it again")
            converted[f"{part[1]}qkv.{part[3]}"] = torch.cat([weights[name].float() for name in names])
    return converted


def _infer_config(weights: Mapping[str, Tensor]) -> TokenizerConfig:
    """Read the sizes off the weights' shapes.

    Raises:
        UserError: a weight that shows a size is missing.
    """

    def count(pattern: str) -> int:
        return len({match[1] for match in (re.match(pattern, name) for name in weights) if match})

    try:
        channels = len(weights["encoder.conv_in.weight"])
        levels = count(r"encoder\.levels\.(\d+)\.")
        widths = [len(weights[f"encoder.levels.{level}.blocks.0.conv1.weight"]) for level in range(levels)]
        codebook_size, codebook_dim = weights["quantizer.codebook"].shape
        return TokenizerConfig(
            image_size=_IMAGE_SIZE,
            encoder_channels=channels,
            decoder_channels=weights["decoder.conv_out.weight"].shape[1] * channels // widths[0],
            channel_multipliers=tuple(width // channels for width in widths),
            encoder_blocks=count(r"encoder\.levels\.0\.blocks\.(\d+)\."),
            decoder_blocks=count(r"decoder\.levels\.0\.blocks\.(\d+)\."),
            attention=any(name.startswith("encoder.middle.1.qkv") for name in weights),
            norm_groups=_NORM_GROUPS,
            z_channels=len(weights["encoder.conv_out.weight"]),
            dropout=0.0,
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            l2_normalize=True,
        )
    except ValueError:
        shape = tuple(weights["quantizer.codebook"].shape)
        raise UserError(
            f"checkpoint: the codebook has shape {shape}, expected (codes, numbers): download it again"
        ) from None
    except (KeyError, IndexError) as error:
        raise UserError(f"checkpoint: weight {error.args[0]!r} is missing: download it again") from None
