"""Checkpoints of other projects: read without running code of theirs, and where the weights lie in them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crt.errors import UserError

# What DistributedDataParallel and torch.compile put before every name.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a file of torch.save or of safetensors holds.

    Raises:
        UserError: it is missing, a folder, damaged, or holds objects that only code of its own could make.
    """
    again = "name one of LlamaGen's files, or download it again"
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # LlamaGen's training checkpoints carry their command line, a plain record.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: not found: download LlamaGen's checkpoint first") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder: name the checkpoint's file in it") from None
    except PermissionError:
        raise UserError(f"{path}: permission denied: make it readable") from None
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or damaged ({error}): {again}") from None
    except Exception as error:  # bytes that are no checkpoint fail in the unpickler in every possible way
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if found:
            raise UserError(
                f"{path}: holds {found[1]} beside its weights, which is not made here, as that may run any code: save "
                "the weights alone, torch.save(state_dict, FILE), where you trust the file"
            ) from None
        # torch's own words advise to run what is in the file.
        raise UserError(f"{path}: no readable checkpoint: {again}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds {type(state).__name__}, not a checkpoint: name one of LlamaGen's files")
    return state


def find_weights(state: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The weights inside a checkpoint, under their plain names.

    Args:
        state: the checkpoint.
        keys: under which weights may lie, the first that is there counts; else the checkpoint is the weights.
    """
    held = next((state[key] for key in keys if isinstance(state.get(key), Mapping) and state[key]), state)
    return {_WRAPPERS.sub("", str(name)): value for name, value in held.items()}


def check_floats(weights: Mapping[str, Any]) -> None:
    """Refuse what cannot be weights.

    Raises:
        UserError: naming the first that is no tensor of floats.
    """
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(f"checkpoint: {name!r} is {type(value).__name__}, no tensor: download it again")
        if not value.is_floating_point() or value.is_meta:
            what = "no values" if value.is_meta else f"{value.dtype}".removeprefix("torch.")
            raise UserError(f"checkpoint: {name!r} holds {what}, expected floats: take one with full weights")
