"""Released LlamaGen class-conditional models as this project's config.json and model.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crt.ar.model import ARConfig, ARTransformer, save_model
from crt.errors import UserError
from crt.foreign import check_floats, find_weights

# Heads cannot be read off the weights: LlamaGen's sizes by (layers, width).
_HEADS = {
    (12, 768): 12,  # B
    (24, 1024): 16,  # L
    (36, 1280): 20,  # XL
    (48, 1536): 24,  # XXL
    (48, 2560): 40,  # XXXL
    (22, 2048): 32,  # 1B
    (24, 3200): 32,  # 3B
    (32, 4096): 32,  # 7B
}
_ROTATIONS = "freqs_cis"  # a table that the sizes determine


def is_llamagen_ar(state: Mapping[str, Any]) -> bool:
    """Whether a loaded checkpoint is one of LlamaGen's class-conditional transformers."""
    return "cls_embedding.embedding_table.weight" in _weights(state)


def is_text_conditional(state: Mapping[str, Any]) -> bool:
    """Whether it is one of LlamaGen's that draw by a text, which this project has no counterpart of."""
    return any(name.startswith("cls_embedding.cap_proj.") for name in _weights(state))


def import_llamagen_ar(state: Mapping[str, Any], folder: str | Path, grid: tuple[int, int] = (16, 16)) -> ARConfig:
    """Write a LlamaGen checkpoint as a folder that `Generator.load` reads, its weights in float32.

    Args:
        state: the checkpoint, as `torch.load(path, map_location="cpu", weights_only=True)` gives it.
        folder: an existing folder.
        grid: rows and columns of codes, which the checkpoint does not hold: (16, 16) for LlamaGen's 256 px models,
            (24, 24) for those of 384 px.

    Raises:
        UserError: the checkpoint is not one of LlamaGen's class-conditional transformers, lacks weights, or has some of
            another shape.
    """
    weights = _weights(state)
    if not is_llamagen_ar(weights):
        raise UserError("checkpoint: no class-conditional LlamaGen transformer (cls_embedding is missing)")
    check_floats({name: value for name, value in weights.items() if name != _ROTATIONS})
    try:
        codebook_size, width = _table_size(weights, "tok_embeddings.weight")
        layers = sum(name.endswith("attention.wqkv.weight") for name in weights)
        config = ARConfig(
            layers=layers,
            heads=_heads(layers, width),
            width=width,
            ffn_multiple=256,
            norm_eps=1e-5,
            rope_base=10000.0,
            dropout=0.1,
            init_std=0.02,
            codebook_size=codebook_size,
            grid=grid,
            num_classes=_table_size(weights, "cls_embedding.embedding_table.weight")[0] - 1,
            class_names=None,
            tokenizer_content=None,
        )
        converted = _convert(weights, config)
    except KeyError as error:
        raise UserError(f"checkpoint: weight {error.args[0]!r} is missing: download it again") from None
    rest = [name for name in weights if name != _ROTATIONS]
    if rest:
        raise UserError(f"checkpoint: weight {rest[0]!r} belongs to no class-conditional LlamaGen transformer")
    save_model(converted, config, folder)
    return config


def _weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights inside a checkpoint: under a key that depends on the trainer, or bare."""
    return find_weights(state, ("model", "module", "state_dict", "ema"))


def _heads(layers: int, width: int) -> int:
    if (layers, width) not in _HEADS:
        raise UserError(f"checkpoint: {layers} layers of width {width} are none of LlamaGen's sizes: download it again")
    return _HEADS[layers, width]


def _table_size(weights: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Rows and columns of an embedding, of which the sizes of the model are read."""
    shape = tuple(weights[name].shape)
    if len(shape) != 2 or shape[0] < 2:
        raise UserError(f"checkpoint: weight {name!r} has shape {shape}, expected a table of two rows or more")
    return shape


def _convert(weights: dict[str, Tensor], config: ARConfig) -> dict[str, Tensor]:
    """Take each of LlamaGen's tensors out of `weights`, under our name and in float32.

    Raises:
        KeyError: one is missing.
        UserError: one has another shape than a model of these sizes.
    """
    with torch.device("meta"):
        expected = ARTransformer(config).state_dict()
    converted = {}
    for ours, theirs in _names(config.layers).items():
        parts = []
        for name, part in zip(theirs, expected[ours].chunk(len(theirs)), strict=True):
            tensor = weights.pop(name)
            if tensor.shape != part.shape:
                raise UserError(
                    f"checkpoint: weight {name!r} has shape {tuple(tensor.shape)}, expected {tuple(part.shape)}: "
                    "no LlamaGen model, or damaged: download it again"
                )
            parts.append(tensor.float())
        converted[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]  # a copy only where it must be
    return converted


def _names(layers: int) -> dict[str, tuple[str, ...]]:
    """LlamaGen's names of the tensors that make up each of ours, one below the other."""
    names: dict[str, tuple[str, ...]] = {
        "class_embedding.weight": ("cls_embedding.embedding_table.weight",),
        "code_embedding.weight": ("tok_embeddings.weight",),
        "norm.weight": ("norm.weight",),
        "head.weight": ("output.weight",),
    }
    for layer in range(layers):
        theirs, ours = f"layers.{layer}", f"blocks.{layer}"
        names |= {
            f"{ours}.attention_norm.weight": (f"{theirs}.attention_norm.weight",),
            f"{ours}.attention.qkv.weight": (f"{theirs}.attention.wqkv.weight",),
            f"{ours}.attention.out.weight": (f"{theirs}.attention.wo.weight",),
            f"{ours}.ffn_norm.weight": (f"{theirs}.ffn_norm.weight",),
            f"{ours}.ffn.gate_up.weight": (f"{theirs}.feed_forward.w1.weight", f"{theirs}.feed_forward.w3.weight"),
            f"{ours}.ffn.down.weight": (f"{theirs}.feed_forward.w2.weight",),
        }
    return names
