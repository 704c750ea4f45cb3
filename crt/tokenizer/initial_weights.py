"""Weights of another tokenizer to begin training with: `train_tokenizer.init_from`."""

from __future__ import annotations

import os
from pathlib import Path

from crt.model_files import TOKENIZER, check_same_config, named_by, read_config
from crt.params import TrainTokenizer
from crt.tokenizer.model import Tokenizer, TokenizerConfig

_KEY = "train_tokenizer.init_from"
# Params keys of what must agree. Images may have another size, and dropout has no weights.
_KEYS = {
    **{
        name: f"architecture.{name}"
        for name in (
            *("encoder_channels", "decoder_channels", "channel_multipliers", "encoder_blocks", "decoder_blocks"),
            *("attention", "norm_groups", "z_channels"),
        )
    },
    **{name: f"quantizer.{name}" for name in ("codebook_size", "codebook_dim", "l2_normalize")},
}


def check_initial_config(params: TrainTokenizer) -> Path | None:
    """The folder of the tokenizer that the params name to begin with; its weights are not looked at.

    Raises:
        UserError: it holds no tokenizer, or another one than the params describe.
    """
    if params.init_from is None:
        return None
    folder = Path(os.path.expanduser(params.init_from))
    with named_by(_KEY):
        found = read_config(folder, TOKENIZER, TokenizerConfig)
    check_same_config(_KEY, folder, found, TokenizerConfig.from_params(params), _KEYS)
    return folder


def load_initial_weights(model: Tokenizer, params: TrainTokenizer) -> None:
    """Give a tokenizer the weights in the folder that the params name, if they do.

    Raises:
        UserError: as `check_initial_config`, or the weights are damaged.
    """
    folder = check_initial_config(params)
    if folder is not None:
        model.load_state_dict(Tokenizer.load(folder).state_dict())
