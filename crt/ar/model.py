"""The stage-2 model: a class-conditional, Llama-style transformer over the codes of an image in raster order.

Architecture of LlamaGen (arXiv 2406.06525), which the CRT paper (arXiv 2412.16326) builds on: pre-norm blocks,
RMSNorm, SwiGLU, 2D rotary positions, no biases, untied head. The model reads [class, code_0 .. code_{T-2}] and
predicts code_0 .. code_{T-1}; row t of its output sees the class and the codes before t only.

Shapes: B images, T codes per image (grid rows x columns), C width, H heads, D = C / H channels per head,
F hidden width of the feed-forward layer, K codes in the codebook, N classes (row N of the class table is the
null class, which stands for a dropped label).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, cast

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crt import cpu
from crt.errors import UserError
from crt.model_files import CONFIG_FILE, TRANSFORMER, read_config, read_weights, write_model

if TYPE_CHECKING:
    from crt.params import ARModel

# Elements of the residual stream from which kernels are compiled: that takes seconds, as trainings of small models do.
_LEAST_COMPILED = 2**16


@dataclass(frozen=True)
class ARConfig:
    """Everything that fixes the model, and what its codes and classes stand for. Stored as config.json."""

    layers: PositiveInt
    heads: PositiveInt
    width: PositiveInt
    ffn_multiple: PositiveInt
    """The feed-forward layer's hidden width is rounded up to a multiple of this (256 in the paper's models)."""
    norm_eps: PositiveFloat
    rope_base: PositiveFloat
    dropout: Annotated[float, Field(ge=0, le=1)]
    """Of embeddings, attention outputs and feed-forward outputs while training; never of attention weights."""
    init_std: NonNegativeFloat
    codebook_size: PositiveInt
    grid: tuple[PositiveInt, PositiveInt]
    """Rows and columns of codes of one image."""
    num_classes: PositiveInt
    class_names: tuple[str, ...] | None
    tokenizer_content: str | None
    """Digest of the tokenizer's output folder that made the codes; None where unknown (imported models)."""

    @property
    def num_tokens(self) -> int:
        """T, codes per image."""
        return self.grid[0] * self.grid[1]

    @property
    def head_width(self) -> int:
        """D, channels per head."""
        return self.width // self.heads

    @property
    def ffn_width(self) -> int:
        """F: two thirds of 4 C, rounded up to a multiple of `ffn_multiple`."""
        return -(-(8 * self.width // 3) // self.ffn_multiple) * self.ffn_multiple

    @property
    def null_class(self) -> int:
        """The label that stands for no label."""
        return self.num_classes

    @classmethod
    def load(cls, folder: str | Path) -> ARConfig:
        """Read config.json of a `train_ar` output folder.

        Raises:
            UserError: the file is missing, damaged, or describes something else.
        """
        config = read_config(folder, TRANSFORMER, cls)
        if config.width % (4 * config.heads):
            raise UserError(
                f"{Path(folder) / CONFIG_FILE}: width {config.width} is not a multiple of 4 channels for each of "
                f"{config.heads} heads: copy or make the {TRANSFORMER.noun} again"
            )
        return config

    @classmethod
    def from_params(
        cls,
        model: ARModel,
        *,
        codebook_size: int,
        grid: tuple[int, int],
        num_classes: int,
        class_names: tuple[str, ...] | None = None,
        tokenizer_content: str | None = None,
    ) -> ARConfig:
        """The model that section `train_ar.model` describes, for codes of one kind."""
        return cls(
            layers=model.layers,
            heads=model.heads,
            width=model.width,
            ffn_multiple=model.ffn_multiple,
            norm_eps=model.norm_eps,
            rope_base=model.rope_base,
            dropout=model.dropout,
            init_std=model.init_std,
            codebook_size=codebook_size,
            grid=grid,
            num_classes=num_classes,
            class_names=class_names,
            tokenizer_content=tokenizer_content,
        )


class ARTransformer(nn.Module):
    """The transformer. Calling it gives losses; `logits` gives predictions (`crt.ar.decoder`: one after the other).

    Args:
        config: sizes.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: ARConfig, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.class_embedding = Embedding(config.num_classes + 1, config.width, config.init_std)
        self.code_embedding = Embedding(config.codebook_size, config.width, config.init_std)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        # Zero, so that training starts at the uniform distribution: loss ln K.
        self.head = Linear(config.width, config.codebook_size, std=0.0)
        self._rotations: dict[torch.device, Tensor] = {}

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Losses in nats of each code given the class and the codes before it.

        Args:
            codes: (B, T) int64.
            labels: (B,) int64, `null_class` for a dropped label.

        Returns:
            (B, T) float32.
        """
        x = self._features(codes, labels)
        logits, targets = self.head(x).flatten(0, 1), codes.flatten()  # B T, K and B T
        if forms := _compiled_forms(x):
            return cast("Tensor", forms.cross_entropy(logits, targets).view_as(codes))
        return F.cross_entropy(logits.float(), targets, reduction="none").view_as(codes)

    def logits(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Predictions of every code at once: (B, T) and (B,) int64 to (B, T, K); the last code is not read."""
        return cast("Tensor", self.head(self._features(codes, labels)))

    def _features(self, codes: Tensor, labels: Tensor) -> Tensor:
        """(B, T, C): what the head reads."""
        inputs = (self.class_embedding(labels)[:, None], self.code_embedding(codes[:, :-1]))
        x = self.dropout(torch.cat(inputs, dim=1))  # B, T, C
        rotation = self.rotation(x.device)  # T, D/2, 2
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                # The block's dropout is drawn again: the generator's state is put back for the second pass.
                x = checkpoint(block, x, rotation, use_reentrant=False)
            else:
                x = block(x, rotation)
        return cast("Tensor", self.norm(x))

    def rotation(self, device: torch.device) -> Tensor:
        """`rotary_table` on `device`.

        Kept beside the module's state, as a buffer would be cast to bfloat16 along with the weights.
        """
        if device not in self._rotations:
            c = self.config
            with torch.inference_mode(False):  # training after it would refuse a table made in it
                self._rotations[device] = rotary_table(c.grid, c.head_width, c.rope_base).to(device)
        return self._rotations[device]


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: ARConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.ffn(self.ffn_norm(x))


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: ARConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width, config.init_std)
        self.out = Linear(config.width, config.width, config.init_std)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        if (forms := _compiled_forms(x)) and forms.attends(x, self.heads):
            return cast("Tensor", self.dropout(self.out(forms.causal_attention(self.qkv(x), self.heads, rotation))))
        q, k, v = self.project(x, rotation)  # B, H, T, D
        if cpu.is_cpu(x) and x.requires_grad:
            y = cpu.attention(q, k, v, causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dropout(self.out(y.transpose(1, 2).flatten(2)))

    def project(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) to rotated queries, rotated keys and values, each (B, H, T, D)."""
        qk, v = self.qkv(x).unflatten(-1, (3 * self.heads, -1)).split((2 * self.heads, self.heads), dim=2)
        q, k = rotate(qk, rotation).transpose(1, 2).chunk(2, dim=1)
        return q, k, v.transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), with gate and up as one matrix."""

    def __init__(self, config: ARConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.width, 2 * config.ffn_width, config.init_std)
        self.down = Linear(config.ffn_width, config.width, config.init_std)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        if forms := _compiled_forms(x):
            return cast("Tensor", self.dropout(self.down(forms.swiglu(self.gate_up(x)))))
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # B, T, F each
        return self.dropout(self.down(F.silu(gate) * up))


class Dropout(nn.Dropout):
    """Zeroes elements while training, with probability p, and scales up the others."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        if self.training and self.p > 0 and (forms := _compiled_forms(x)):
            return cast("Tensor", forms.dropout(x, self.p))
        return super().forward(x)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        if forms := _compiled_forms(x):
            return cast("Tensor", forms.rms_norm(x, self.weight, self.eps))
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Linear(nn.Linear):
    """Matrix without bias, drawn from N(0, std).

    Drawn while it is made, not afterwards: ZeRO-3 splits each module over the processes as soon as it exists.
    """

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        self.std = std
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return cpu.linear(x, self.weight) if cpu.widens(x) else super().forward(x)

    def reset_parameters(self) -> None:
        _draw(self.weight, self.std)


class Embedding(nn.Embedding):
    """Table of vectors, drawn from N(0, std); see `Linear`."""

    def __init__(self, rows: int, width: int, std: float) -> None:
        self.std = std
        super().__init__(rows, width)

    def reset_parameters(self) -> None:
        _draw(self.weight, self.std)


@torch.no_grad()
def _draw(weight: Tensor, std: float) -> None:
    """Fill with draws from N(0, std): in float32 also where ZeRO-3 makes bfloat16, so that all stages draw the same."""
    weight.copy_(weight.float().normal_(std=std))


def _compiled_forms(residual: Tensor) -> ModuleType | None:
    """`crt.ar.cpu_training` where its kernels serve for a residual stream, (..., C), and are worth compiling."""
    if not cpu.is_cpu(residual) or residual.numel() < _LEAST_COMPILED:
        return None
    from crt.ar import cpu_training

    return cpu_training


def rotary_table(grid: tuple[int, int], head_width: int, base: float) -> Tensor:
    """Cosine and sine by which each position turns each pair of channels: 2D RoPE.

    The first half of the pairs turns by the row of the code, the second half by its column, pair j of a half by
    row (or column) * base^(-4 j / D). Position 0 is the class and position 1 + i the code i, so the code that is
    read at a position sets its angle. At the class cosine and sine are both zero, as in LlamaGen: its query and
    key vanish, and every other position attends to it with score zero.

    Returns:
        (T, D/2, 2) float32.
    """
    rows, columns = grid
    pairs = head_width // 4
    frequency = base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    row_angle = torch.outer(torch.arange(rows, dtype=torch.float64), frequency)  # rows, D/4
    column_angle = torch.outer(torch.arange(columns, dtype=torch.float64), frequency)
    angle = torch.cat(
        (row_angle[:, None].expand(rows, columns, pairs), column_angle[None].expand(rows, columns, pairs)), dim=-1
    ).flatten(0, 1)  # T, D/2
    table = torch.stack((angle.cos(), angle.sin()), dim=-1)
    return torch.cat((torch.zeros_like(table[:1]), table[:-1])).float()


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring pairs of channels: (B, T, heads, D) by (T, D/2, 2), in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # B, T, heads, D/2
    cos, sin = rotation[:, None].unbind(-1)  # T, 1, D/2
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


@cache  # a plan asks for each layout of a cluster
def count_parameters(config: ARConfig) -> int:
    """Number of parameters, without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ARTransformer(config).parameters())


def save_model(weights: Mapping[str, Tensor], config: ARConfig, folder: str | Path) -> None:
    """Write the state of an `ARTransformer`, which must lie on the CPU, and its config into an existing folder."""
    write_model(folder, {"schema": TRANSFORMER.schema, TRANSFORMER.key: TRANSFORMER.name, **asdict(config)}, weights)


def load_model(folder: str | Path, dtype: torch.dtype, device: torch.device) -> ARTransformer:
    """Read a model for inference: evaluation mode, no gradients.

    Raises:
        UserError: files are missing or damaged, or the weights are not those of config.json's model.
    """
    config = ARConfig.load(folder)
    with torch.device("meta"):
        model = ARTransformer(config)
    weights = read_weights(folder, TRANSFORMER, model.state_dict(), lambda tensor: tensor.to(device, dtype))
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()
