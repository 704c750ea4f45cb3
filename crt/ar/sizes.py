"""Named sizes of the stage-2 model; the table itself is `sizes.yaml`."""

from __future__ import annotations

from pathlib import Path

from crt.errors import UserError
from crt.params import ARModel
from crt.yaml_files import read_yaml

# As in all of LlamaGen's and the paper's models.
FFN_MULTIPLE = 256


def named_sizes() -> dict[str, dict[str, int]]:
    """Layers, heads, width and ffn_multiple by name, smallest first."""
    sizes = read_yaml(Path(__file__).with_name("sizes.yaml"))
    return {name: {**size, "ffn_multiple": FFN_MULTIPLE} for name, size in sizes.items()}


def resized(model: ARModel, name: str) -> ARModel:
    """The section `train_ar.model` with the sizes of a named one; everything else stays.

    Raises:
        UserError: no size has that name.
    """
    sizes = named_sizes()
    if name not in sizes:
        raise UserError(f"--model {name}: no such size: use one of {', '.join(sizes)}")
    return ARModel.model_validate({**model.model_dump(), **sizes[name]})
