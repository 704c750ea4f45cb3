"""Weights of another tokenizer to begin training with: `train_tokenizer.init_from`."""

from __future__ import annotations

import os
from pathlib import Path

from crt.model_files import check_same_config
from crt.params import TrainTokenizer
from crt.tokenizer.model import Tokenizer

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


def load_initial_weights(model: Tokenizer, params: TrainTokenizer) -> None:
    """Give a tokenizer the weights in the folder that the params name, if they do.

    Raises:
        UserError: the folder holds no tokenizer, or another one than the params describe.
    """
    if params.init_from is None:
        return
    folder = Path(os.path.expanduser(params.init_from))
    other = Tokenizer.load(folder)
    check_same_config("train_tokenizer.init_from", folder, other.config, model.config, _KEYS)
    model.load_state_dict(other.state_dict())
