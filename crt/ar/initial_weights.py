"""Weights of another transformer to begin training with: `train_ar.init_from`."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from crt.ar.model import ARConfig, ARTransformer
from crt.errors import UserError
from crt.model_files import TRANSFORMER, check_same_config, named_by, read_weights
from crt.params import TrainAR
from crt.progress import logger

_KEY = "train_ar.init_from"
_CLASSES = "class_embedding.weight"
# Params keys of what must agree. The grid may differ: positions have no weights.
_KEYS = {
    **{name: f"model.{name}" for name in ("layers", "heads", "width", "norm_eps", "rope_base")},
    "ffn_width": "width of the FFN, from model.ffn_multiple",
}


def check_initial_config(params: TrainAR, wanted: ARConfig) -> tuple[Path, ARConfig] | None:
    """The folder of the transformer that the params name to begin with, and its sizes; its weights are not looked at.

    Args:
        params: section train_ar.
        wanted: the model to train; its grid and classes are not looked at.

    Raises:
        UserError: the folder holds no transformer, or another one than the params describe, or one for codes of another
            codebook.
    """
    if params.init_from is None:
        return None
    folder = Path(os.path.expanduser(params.init_from))
    with named_by(_KEY):
        found = ARConfig.load(folder)
    check_same_config(_KEY, folder, found, wanted, _KEYS)
    if found.codebook_size != wanted.codebook_size:
        raise UserError(
            f"{_KEY}: {folder} draws codes of {found.codebook_size}, the tokenizer has {wanted.codebook_size}: use the "
            f"tokenizer that it was trained with, or set {_KEY} to null"
        )
    return folder, found


def initial_weights(params: TrainAR, config: ARConfig) -> dict[str, Tensor]:
    """The float32 weights in the folder that the params name; empty where they name none.

    Where the folder's transformer draws other classes, the table of their embeddings is left out. Classes without
    names, as imported ones are, count as the same if they are as many.

    Args:
        params: section train_ar.
        config: the model to train.

    Raises:
        UserError: as `check_initial_config`, or the weights are damaged, or without a step classes differ.
    """
    known = check_initial_config(params, config)
    if known is None:
        return {}
    folder, other = known
    tokenizers = (other.tokenizer_content, config.tokenizer_content)
    if None not in tokenizers and tokenizers[0] != tokenizers[1]:
        logger.warning(
            "%s: %s was trained on the codes of another tokenizer, which mean something else: it has to unlearn them",
            *(_KEY, folder),
        )
    with torch.device("meta"):
        expected = ARTransformer(other).state_dict()
    weights = read_weights(folder, TRANSFORMER, expected, Tensor.float)
    if not _same_classes(other, config):
        if not params.steps:
            raise UserError(
                f"{_KEY}: {folder} draws other classes than the images have, which steps 0 leaves untrained: prepare "
                "the images that it was trained on, or raise train_ar.steps"
            )
        logger.info("train_ar: %s draws other classes than the images have: their embeddings begin anew", folder)
        del weights[_CLASSES]
    return weights


def _same_classes(a: ARConfig, b: ARConfig) -> bool:
    named = a.class_names is not None and b.class_names is not None
    return a.num_classes == b.num_classes and (not named or a.class_names == b.class_names)
