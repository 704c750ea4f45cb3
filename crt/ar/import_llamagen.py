"""Released LlamaGen class-conditional models as this project's config.json and model.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crt.ar.model import ARConfig, save_model
from crt.errors import UserError

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


def is_llamagen_ar(state: Mapping[str, Any]) -> bool:
    """Whether a loaded checkpoint is one of LlamaGen's class-conditional transformers."""
    return "cls_embedding.embedding_table.weight" in _weights(state)


def import_llamagen_ar(state: Mapping[str, Any], folder: str | Path, grid: tuple[int, int] = (16, 16)) -> ARConfig:
    """Write a LlamaGen checkpoint as a folder that `Generator.load` reads, its weights in float32.

    Args:
        state: the checkpoint, as `torch.load(path, map_location="cpu", weights_only=True)` gives it.
        folder: an existing folder.
        grid: rows and columns of codes, which the checkpoint does not hold: (16, 16) for LlamaGen's 256 px models,
            (24, 24) for those of 384 px.

    Raises:
        UserError: the checkpoint is not one of LlamaGen's class-conditional transformers, or lacks weights.
    """
    weights = dict(_weights(state))
    if not is_llamagen_ar(weights):
        raise UserError("checkpoint: no class-conditional LlamaGen transformer (cls_embedding is missing)")
    try:
        codebook_size, width = weights["tok_embeddings.weight"].shape
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
            num_classes=len(weights["cls_embedding.embedding_table.weight"]) - 1,
            class_names=None,
            tokenizer_content=None,
        )
        converted = {name: tensor.float() for name, tensor in _convert(weights, layers).items()}
    except KeyError as error:
        raise UserError(f"checkpoint: weight {error.args[0]!r} is missing: download it again") from None
    rest = [name for name in weights if name != "freqs_cis"]
    if rest:
        raise UserError(f"checkpoint: weight {rest[0]!r} belongs to no class-conditional LlamaGen transformer")
    ffn_width = converted["blocks.0.ffn.down.weight"].shape[1]
    if ffn_width != config.ffn_width:
        raise UserError(f"checkpoint: feed-forward width {ffn_width} instead of {config.ffn_width}: no LlamaGen model")
    save_model(converted, config, folder)
    return config


def _weights(state: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The weights inside a checkpoint: under "model", "module" or "state_dict" depending on the trainer, or bare."""
    for key in ("model", "module", "state_dict"):
        if isinstance(state.get(key), Mapping):
            return state[key]
    return state


def _heads(layers: int, width: int) -> int:
    if (layers, width) not in _HEADS:
        raise UserError(f"checkpoint: {layers} layers of width {width} are none of LlamaGen's sizes")
    return _HEADS[layers, width]


def _convert(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Take each of LlamaGen's tensors out of `weights`, under our name."""
    take = weights.pop
    converted = {
        "class_embedding.weight": take("cls_embedding.embedding_table.weight"),
        "code_embedding.weight": take("tok_embeddings.weight"),
        "norm.weight": take("norm.weight"),
        "head.weight": take("output.weight"),
    }
    for layer in range(layers):
        theirs, ours = f"layers.{layer}", f"blocks.{layer}"
        converted |= {
            f"{ours}.attention_norm.weight": take(f"{theirs}.attention_norm.weight"),
            f"{ours}.attention.qkv.weight": take(f"{theirs}.attention.wqkv.weight"),
            f"{ours}.attention.out.weight": take(f"{theirs}.attention.wo.weight"),
            f"{ours}.ffn_norm.weight": take(f"{theirs}.ffn_norm.weight"),
            f"{ours}.ffn.gate_up.weight": torch.cat(
                (take(f"{theirs}.feed_forward.w1.weight"), take(f"{theirs}.feed_forward.w3.weight"))
            ),
            f"{ours}.ffn.down.weight": take(f"{theirs}.feed_forward.w2.weight"),
        }
    return converted
