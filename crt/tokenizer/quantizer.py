"""Vector quantization: each latent becomes the nearest code of the codebook (van den Oord et al. 2017, eq. 1 to 3).

    latents (B, D, h, w)    D = codebook_dim
    codes   (B, h, w)       int64 in [0, K)
    values  (B, D, h, w)    the codes' vectors

With `l2_normalize`, latents and codes lie on the unit sphere (Yu et al. 2022), which also fixes the scale
that the causal regularizer sees. Everything here runs in float32 at least, also under autocast: in bf16
near codes cannot be told apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crt.distributed import mean_over_ranks, sum_over_ranks, world_size
from crt.randomness import torch_generator

# Distances computed at once: a 131k codebook against a whole batch would need gigabytes.
_CPU_CHUNK, _GPU_CHUNK = 2**22, 2**26
_EMA_EPSILON = 1e-5
# Below this average use per step a code that nothing chooses stays where it is: its average would fade to zero.
_EMA_FADED = 1e-3


class Quantized(NamedTuple):
    """Result of quantizing one batch."""

    values: Tensor
    """(B, D, h, w) vectors of the codes; gradients pass straight through to the latents."""
    codes: Tensor
    """(B, h, w) int64."""
    codebook_loss: Tensor
    """Mean squared distance of codes from (fixed) latents: moves the codebook."""
    commitment_loss: Tensor
    """Mean squared distance of latents from (fixed) codes: moves the encoder."""


class VectorQuantizer(nn.Module):
    """A codebook of K vectors of D numbers.

    Args:
        codebook_size: K.
        codebook_dim: D.
        l2_normalize: compare directions only.
    """

    def __init__(self, codebook_size: int, codebook_dim: int, l2_normalize: bool) -> None:
        super().__init__()
        self.l2_normalize = l2_normalize
        vectors = torch.empty(codebook_size, codebook_dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        self.codebook = nn.Parameter(F.normalize(vectors, dim=1) if l2_normalize else vectors)

    def forward(self, latents: Tensor, codes: Tensor | None = None) -> Quantized:
        """Quantize latents that `project` gave.

        Args:
            latents: (B, D, h, w).
            codes: (B, h, w), to use these instead of the nearest ones.
        """
        with torch.autocast(latents.device.type, enabled=False):
            if codes is None:
                codes = self.nearest(latents)
            values = self.lookup(codes)
            codebook_loss = (values - latents.detach()).square().mean()
            commitment_loss = (latents - values.detach()).square().mean()
            # The value is the code's, the gradient goes to the latent as if nothing had been quantized.
            passed = latents + (values - latents).detach()
        return Quantized(passed, codes, codebook_loss, commitment_loss)

    def project(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) in any precision to the same in full precision, of unit length where normalised."""
        latents = full_precision(latents)
        return F.normalize(latents, dim=1) if self.l2_normalize else latents

    def vectors(self) -> Tensor:
        """(K, D): the codes' vectors, of unit length where normalised."""
        codebook = full_precision(self.codebook)
        return F.normalize(codebook, dim=1) if self.l2_normalize else codebook

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) projected latents to the (B, h, w) codes at the smallest distance."""
        batch, dim, *grid = latents.shape
        rows = latents.movedim(1, -1).reshape(-1, dim)
        with torch.autocast(latents.device.type, enabled=False):
            return nearest_rows(rows, self.vectors()).view(batch, *grid)

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, h, w) codes to their (B, D, h, w) vectors; the codebook receives gradients."""
        vectors = full_precision(F.embedding(codes, self.codebook))
        if self.l2_normalize:
            vectors = F.normalize(vectors, dim=-1)
        return vectors.movedim(-1, 1)

    def entropy_loss(self, latents: Tensor, temperature: float) -> Tensor:
        """Mean entropy of each latent's soft assignment, less the entropy of the mean assignment (Yu et al. 2024).

        Small when every latent is near one code and all codes are used alike. Assignments are a softmax of the
        negative squared distances over `temperature`. Each chunk is computed anew in the backward pass, so the
        memory does not grow with the codebook.

        Args:
            latents: (B, D, h, w), projected.
            temperature: of the softmax.

        Returns:
            Scalar in nats.
        """
        with torch.autocast(latents.device.type, enabled=False):
            rows = latents.movedim(1, -1).flatten(0, -2)
            vectors = self.vectors()
            own_entropies, probabilities = rows.new_zeros(()), rows.new_zeros(len(vectors))
            for part in rows.split(_rows_per_chunk(rows, len(vectors))):
                entropies, total = checkpoint(_soft_assignment, part, vectors, temperature, use_reentrant=False)
                own_entropies, probabilities = own_entropies + entropies, probabilities + total
            mean = mean_over_ranks(probabilities / len(rows))
            # The floor keeps the gradient finite at codes whose probability underflows to 0.
            mean_entropy = -(mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()
            return own_entropies / len(rows) - mean_entropy


@torch.no_grad()
def nearest_rows(latents: Tensor, vectors: Tensor) -> Tensor:
    """Index of the nearest vector for each latent, the lowest where several are equally near.

    Squared distances are compared, |z|^2 + |e|^2 - 2 z.e without |z|^2, which is the same for all codes.

    Args:
        latents: (M, D).
        vectors: (K, D).

    Returns:
        (M,) int64.
    """
    codes = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    squares, transposed = vectors.square().sum(1), vectors.t()
    size = _rows_per_chunk(latents, len(vectors))
    for part, chosen in zip(latents.split(size), codes.split(size), strict=True):
        torch.argmin(torch.addmm(squares, part, transposed, alpha=-2), dim=1, out=chosen)
    return codes


class CodebookUpkeep:
    """What happens to the codebook between steps, other than gradient descent: moving averages and revival.

    It holds training state only; the finished tokenizer has none of it.

    Args:
        quantizer: whose codebook to keep.
        ema_decay: None: the codebook learns by gradient; else it is the moving average of the latents that chose
            each code, with this decay (van den Oord et al. 2017, appendix A.1).
        revive_after_steps: a code that no latent chose for so many steps becomes a random latent of the batch;
            None: never.
        seed: of the choice of latents.
    """

    def __init__(
        self, quantizer: VectorQuantizer, ema_decay: float | None, revive_after_steps: int | None, seed: int
    ) -> None:
        self.quantizer, self.ema_decay = quantizer, ema_decay
        self.revive_after_steps, self.seed = revive_after_steps, seed
        codebook = quantizer.codebook
        codebook.requires_grad_(ema_decay is None)
        self.unused_steps = torch.zeros(len(codebook), dtype=torch.int64, device=codebook.device)
        # As if each code had been chosen once, by a latent equal to it.
        self.sizes = torch.ones(len(codebook), device=codebook.device)
        self.sums = quantizer.vectors().detach().clone()

    @torch.no_grad()
    def update(self, step: int, latents: Tensor, codes: Tensor, counts: Tensor) -> Tensor:
        """After one training step.

        Args:
            step: its number; with the seed it determines which latents revive codes.
            latents: (B, D, h, w), projected; this process's share.
            codes: (B, h, w) that they chose.
            counts: (K,) how often each code was chosen, in all processes.

        Returns:
            (R,) int64: the codes that were revived.
        """
        rows, flat = latents.detach().movedim(1, -1).flatten(0, -2), codes.flatten()
        self.unused_steps = torch.where(counts > 0, 0, self.unused_steps + 1)
        if self.ema_decay is not None:
            self._average(rows, flat, counts)
        if self.revive_after_steps is None:
            return flat.new_empty(0)
        dead = (self.unused_steps >= self.revive_after_steps).nonzero().flatten()
        if len(dead):
            self._revive(dead, step, rows)
        return dead

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that must survive an interruption."""
        return {"unused_steps": self.unused_steps, "sizes": self.sizes, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state_dict`."""
        device = self.sizes.device
        self.unused_steps, self.sizes, self.sums = (
            state[name].to(device) for name in ("unused_steps", "sizes", "sums")
        )

    def _average(self, rows: Tensor, codes: Tensor, counts: Tensor) -> None:
        assert self.ema_decay is not None
        # One-hot products rather than scattered additions, whose order on a GPU is not fixed.
        sums, size = torch.zeros_like(self.sums), _rows_per_chunk(rows, len(self.sums))
        every_code = torch.arange(len(sums), device=rows.device)
        for code_part, row_part in zip(codes.split(size), rows.split(size), strict=True):
            sums += (every_code[:, None] == code_part).to(rows.dtype) @ row_part
        # A faded code keeps its sums and size, so its vector too.
        weight = torch.where((counts == 0) & (self.sizes < _EMA_FADED), 0.0, 1 - self.ema_decay)
        self.sizes.lerp_(counts.to(self.sizes.dtype), weight)
        self.sums.lerp_(sum_over_ranks(sums), weight[:, None])
        total = self.sizes.sum()
        # Laplace smoothing keeps a code that is hardly chosen finite.
        smoothed = (self.sizes + _EMA_EPSILON) / (total + len(self.sizes) * _EMA_EPSILON) * total
        self.quantizer.codebook.copy_(self.sums / smoothed[:, None])

    def _revive(self, dead: Tensor, step: int, rows: Tensor) -> None:
        num_rows = len(rows) * world_size()
        generator = torch_generator(self.seed, "revive", step)
        chosen = torch.randint(num_rows, (len(dead),), generator=generator).to(rows.device)
        # A rank adds the rows that lie in its own share of the global batch.
        rank = torch.distributed.get_rank() if world_size() > 1 else 0
        local = chosen - rank * len(rows)
        mine = (local >= 0) & (local < len(rows))
        vectors = rows[local.clamp(0, len(rows) - 1)] * mine[:, None]
        vectors = sum_over_ranks(vectors)
        self.quantizer.codebook[dead] = vectors
        self.sizes[dead], self.sums[dead], self.unused_steps[dead] = 1.0, vectors, 0


def full_precision(x: Tensor) -> Tensor:
    """Half-precision tensors in float32, others as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _rows_per_chunk(rows: Tensor, codebook_size: int) -> int:
    return max(1, (_GPU_CHUNK if rows.is_cuda else _CPU_CHUNK) // codebook_size)


def _soft_assignment(rows: Tensor, vectors: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sum of the rows' entropies, and (K,) sum of their probabilities."""
    distances = torch.addmm(vectors.square().sum(1), rows, vectors.t(), alpha=-2)
    log_probabilities = F.log_softmax(-distances / temperature, dim=1)
    probabilities = log_probabilities.exp()
    return -(probabilities * log_probabilities).sum(), probabilities.sum(0)
