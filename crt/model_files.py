"""The folder of a model: config.json, which says of what kind it is, and its weights in model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crt.errors import UserError
from crt.files import refuse_unreadable, replacing, write_json
from crt.manifest import MANIFEST

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

Config = TypeVar("Config", bound="DataclassInstance")


@dataclass(frozen=True)
class Kind:
    """One kind of model, as its config.json names it and as messages do."""

    key: str
    name: str
    schema: int
    noun: str
    loader: str


TOKENIZER = Kind("format", "crt-tokenizer", 1, "tokenizer", "crt.Tokenizer.load")
TRANSFORMER = Kind("kind", "crt_ar", 1, "transformer of stage 2", "crt.Generator.load")


def usable_device(device: str | torch.device) -> torch.device:
    """A device by its name.

    Raises:
        UserError: torch knows none of that name, or there is none here.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)  # the first use tells whether it is there
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"device {device}: cannot be used here ({reason}): name another, such as cpu") from None
    return found


def write_model(
    folder: str | Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write config.json and model.safetensors, each complete or not at all.

    Args:
        folder: an existing folder.
        config: content of config.json: kind, schema and the values of the config's dataclass.
        weights: the model's state, on the CPU.
        metadata: of the file with the weights.
    """
    folder = Path(folder)
    with replacing(folder / WEIGHTS_FILE) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary, metadata)
    write_json(folder / CONFIG_FILE, config)


def read_config(folder: str | Path, kind: Kind, config_class: type[Config]) -> Config:
    """The checked content of a model's config.json.

    Args:
        folder: of the model.
        kind: that it must be of.
        config_class: a dataclass; its annotations say which values there may be.

    Raises:
        UserError: there is none, or it is damaged, of another kind or schema, or has a key or value that it may not.
    """
    path = Path(folder) / CONFIG_FILE
    remedy = f"name the folder of a trained or imported {kind.noun}"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("no mapping")
    except FileNotFoundError:
        stage = _stage_of(path.parent)
        found = f"{path.parent}: holds what {stage} made, no model" if stage else f"{path}: not found"
        raise UserError(f"{found}: {remedy}") from None
    except NotADirectoryError:
        raise UserError(f"{folder}: is a file: {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        refuse_unreadable(path, error)
        raise UserError(f"{path}: damaged ({error}): copy or make the {kind.noun} again") from None
    for other in (TOKENIZER, TRANSFORMER):
        if other is not kind and values.get(other.key) == other.name:
            raise UserError(f"{folder}: holds a {other.noun}, for {other.loader}: {remedy}")
    found_kind, schema = (values.pop(key, None) for key in (kind.key, "schema"))
    if found_kind != kind.name:
        raise UserError(f"{path}: describes no {kind.noun} ({kind.key} {found_kind!r}, not {kind.name!r}): {remedy}")
    if schema != kind.schema:
        raise UserError(f"{path}: has schema {schema}, this version reads {kind.schema}: use the version that wrote it")
    names = {field.name for field in fields(config_class)}
    for name in sorted(names ^ values.keys()):
        state = "is missing" if name in names else "is unknown"
        raise UserError(f"{path}: key {name!r} {state}: copy or make the {kind.noun} again")
    try:
        return TypeAdapter(config_class).validate_json(json.dumps(values), strict=True)  # JSON's lists are tuples
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(
            f"{path}: key {str(first['loc'][0])!r} is {values[str(first['loc'][0])]!r} ({first['msg']}): "
            f"copy or make the {kind.noun} again"
        ) from None


def read_weights(
    folder: str | Path, kind: Kind, expected: Mapping[str, Tensor], convert: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The weights of a model, each converted as soon as it is read.

    Args:
        folder: of the model.
        kind: for messages.
        expected: the model's own state; only the shapes are looked at.
        convert: to another type or device.

    Raises:
        UserError: the file is missing or damaged, or its weights are another model's.
    """
    path = Path(folder) / WEIGHTS_FILE
    again = f"copy or make the {kind.noun} again"
    try:
        open(path, "rb").close()  # safetensors calls a file not found that it may not read
        with safe_open(path, framework="pt") as file:
            check_shapes(path, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, expected)  # noqa: SIM118
            weights = {}
            for name in expected:
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point():
                    raise UserError(f"{path}: weight {name!r} is of type {tensor.dtype}, expected floats: {again}")
                weights[name] = convert(tensor)
            return weights
    except FileNotFoundError:
        raise UserError(f"{path}: not found: {again}") from None
    except (OSError, SafetensorError) as error:
        refuse_unreadable(path, error)
        raise UserError(f"{path}: truncated or damaged ({error}): {again}") from None


@contextmanager
def named_by(key: str) -> Iterator[None]:
    """Let messages about a model say which params key names its folder."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def check_same_config(key: str, folder: str | Path, found: object, wanted: object, keys: Mapping[str, str]) -> None:
    """Refuse a model to begin with that is another than the params describe.

    Args:
        key: params key that names its folder.
        folder: of the model.
        found: its config.
        wanted: the config of the params.
        keys: params key by name of the config's fields that must agree.

    Raises:
        UserError: naming all that differ.
    """
    differing = [
        f"{where} ({_listed(getattr(found, name))}, in the params {_listed(getattr(wanted, name))})"
        for name, where in keys.items()
        if getattr(found, name) != getattr(wanted, name)
    ]
    if differing:
        raise UserError(
            f"{key}: {folder} has another {', '.join(differing)}: set it in the params to what the folder has, "
            f"or {key} to null"
        )


def _listed(value: Any) -> Any:
    """A value as params files write it."""
    return list(value) if isinstance(value, tuple) else value


def check_shapes(
    source: str | Path,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, Tensor],
    remedy: str = "use the file's own config",
) -> None:
    """Compare the shapes of stored weights with those of a model.

    Args:
        source: for messages, as is `remedy`.
        found: what is stored.
        expected: the model's own state.
        remedy: what to do where they differ.

    Raises:
        UserError: naming the first weight, in the model's order, that is missing, left over or of another shape.
    """
    for name, tensor in expected.items():
        if name not in found:
            raise UserError(f"{source}: of another architecture: weight {name!r} is missing: {remedy}")
        if tuple(found[name]) != tuple(tensor.shape):
            raise UserError(
                f"{source}: of another architecture: weight {name!r} has shape {tuple(found[name])}, "
                f"expected {tuple(tensor.shape)}: {remedy}"
            )
    for name in found:
        if name not in expected:
            raise UserError(f"{source}: of another architecture: weight {name!r} is left over: {remedy}")


def _stage_of(folder: Path) -> str | None:
    """The stage whose output a folder without a model is."""
    try:
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["stage"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
