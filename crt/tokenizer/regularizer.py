"""The causal regularizer: what makes a tokenizer's codes easy to predict (Ramanujan et al. 2025, arXiv 2412.16326).

    L_stage1 = L_vqgan + lambda(t) * mean_i || z_i - f(z_<i) ||^2

z_1 .. z_N are an image's latents before quantization in raster order, as the quantizer sees them (of unit
length where it normalises, without which the encoder could shrink them to lower this term for free), and f is
a small causal transformer. The gradient reaches the encoder through the targets z_i and the contexts z_<i
alike, scaled by lambda(t). f itself always descends the unscaled error with an optimizer of its own, so it
is a good predictor from the first step on, whatever lambda is.

f may read codes instead of latents (`context`). The encoder sees the whole image, so it can write what comes next
into digits of a latent that the quantizer then rounds away: f finds them and its error vanishes, but the generator,
which sees codes alone, gains nothing (measured: dev/LOG.md, "below the quantizer's resolution"). The vectors of
the codes hold what the generator will see; their gradient passes straight through to the latents.

    latents      (B, N, D)   float32
    codes        (B, N)      int64
    vectors      (K, D)      of the codebook

Besides the paper's L2 on latents, its two alternatives stand behind the same interface (`Regularizer`):
cross-entropy on codes, and a stochastic quantizer with cross-entropy like LARP's (Wang et al. 2024).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crt.params import Regularizer as RegularizerParams
from crt.params import RegularizerContext
from crt.tokenizer.attention import attend
from crt.tokenizer.quantizer import full_precision

_INIT_STD = 0.02


class CausalTransformer(nn.Module):
    """f: a decoder-only transformer whose output i is a function of the inputs before i.

    The input at place i is latent i - 1, and a learned start vector at the first place, so that every latent
    is predicted. Pre-norm blocks, learned positions. With 0 layers it is a linear map of the previous latent.

    Args:
        latent_dim: D.
        num_positions: N.
        output_dim: numbers per output.
        layers: 0 for the linear map, for which width and heads mean nothing.
        width: of the transformer.
        heads: must divide the width.
    """

    def __init__(
        self, latent_dim: int, num_positions: int, output_dim: int, *, layers: int, width: int, heads: int
    ) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(latent_dim))
        self.blocks = nn.ModuleList(CausalBlock(width, heads) for _ in range(layers))
        if layers:
            self.embed = nn.Linear(latent_dim, width)
            self.positions = nn.Parameter(torch.empty(num_positions, width).normal_(std=_INIT_STD))
            self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width if layers else latent_dim, output_dim)
        nn.init.normal_(self.head.weight, std=_INIT_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, N, D) latents to (B, N, output_dim); output i has seen latents 0 to i - 1."""
        start = self.start.expand(len(latents), 1, -1).to(latents.dtype)
        x = torch.cat((start, latents[:, :-1]), dim=1)
        if len(self.blocks):
            x = self.embed(x) + self.positions
            for block in self.blocks:
                x = block(x)
            x = self.norm(x)
        return self.head(x)


class CausalBlock(nn.Module):
    """Pre-norm transformer block: causal self-attention, then a feed-forward network of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) to the same."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, width / heads) each
        attended = attend(q, k, v, causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.ffn(self.ffn_norm(x))


class Regularizer(nn.Module, ABC):
    """How predictable the latents are. `forward` is the term that lambda multiplies."""

    def draw_codes(self, latents: Tensor, vectors: Tensor, uniforms: Tensor) -> Tensor | None:
        """Codes that training is to use instead of the nearest ones: (B, N), or None.

        Args:
            latents: (B, N, D).
            vectors: (K, D).
            uniforms: (B, N) independent random numbers in [0, 1).
        """
        return None

    @abstractmethod
    def forward(self, latents: Tensor, codes: Tensor, vectors: Tensor) -> Tensor:
        """Mean over images and places of the prediction's error.

        Args:
            latents: (B, N, D) with gradient, in raster order.
            codes: (B, N) that the quantizer chose, or that `draw_codes` drew.
            vectors: (K, D).
        """


class NextLatentL2(Regularizer):
    """The paper's: mean_i || z_i - f(z_<i) ||^2, in squared units of the latents, summed over their D numbers.

    Args:
        latent_dim: D.
        num_positions: N.
        context: what f reads, "latents" (the paper's) or "codes"; likewise below.
        sizes: layers, width and heads of `CausalTransformer`; likewise below.
    """

    def __init__(
        self, latent_dim: int, num_positions: int, context: RegularizerContext = "latents", **sizes: int
    ) -> None:
        super().__init__()
        self.context = context
        self.predictor = CausalTransformer(latent_dim, num_positions, latent_dim, **sizes)

    def forward(self, latents: Tensor, codes: Tensor, vectors: Tensor) -> Tensor:
        """As in `Regularizer`; codes and vectors play a part only as context."""
        predictions = full_precision(self.predictor(_known(self.context, latents, codes, vectors)))
        return (latents - predictions).square().sum(-1).mean()


class NextCodeCrossEntropy(Regularizer):
    """Cross-entropy of the next code given the latents or codes before it, in nats per token.

    A code is a fixed target: the gradient reaches the encoder through the context alone.
    """

    def __init__(
        self,
        latent_dim: int,
        num_positions: int,
        codebook_size: int,
        context: RegularizerContext = "latents",
        **sizes: int,
    ) -> None:
        super().__init__()
        self.context = context
        self.predictor = CausalTransformer(latent_dim, num_positions, codebook_size, **sizes)

    def forward(self, latents: Tensor, codes: Tensor, vectors: Tensor) -> Tensor:
        """As in `Regularizer`; vectors play a part only as context."""
        logits = full_precision(self.predictor(_known(self.context, latents, codes, vectors)))
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


class StochasticCrossEntropy(Regularizer):
    """A stochastic quantizer with a prior on its codes, after LARP (Wang et al. 2024).

    In training each code is drawn from q_i(k) = softmax_k(-|z_i - e_k|^2 / (2 temperature)), which for unit
    vectors is a softmax of cosine similarities over the temperature; the decoder sees the drawn codes too. The
    prior reads the drawn codes' vectors and its term is -log p(code_i | before), in nats per token. Drawing
    passes gradients straight through to q: a code's vector counts as e_code + (sum_k q_k e_k - its value), and
    its one-hot target as onehot + (q - its value). Outside training the nearest code is taken as always. The
    codebook itself receives no gradient from this term.
    """

    def __init__(
        self, latent_dim: int, num_positions: int, codebook_size: int, temperature: float, **sizes: int
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.predictor = CausalTransformer(latent_dim, num_positions, codebook_size, **sizes)

    @torch.no_grad()
    def draw_codes(self, latents: Tensor, vectors: Tensor, uniforms: Tensor) -> Tensor:
        """(B, N) codes, by inverting the cumulative sum of each q_i at its uniform number."""
        cumulative = self._log_assignment(latents, vectors).exp().cumsum(-1)
        targets = uniforms.to(cumulative) * cumulative[..., -1]
        codes = torch.searchsorted(cumulative, targets[..., None], right=True)[..., 0]
        return codes.clamp_(max=len(vectors) - 1)

    def forward(self, latents: Tensor, codes: Tensor, vectors: Tensor) -> Tensor:
        """As in `Regularizer`."""
        vectors = vectors.detach()
        assignment = self._log_assignment(latents, vectors).exp()  # (B, N, K)
        soft = assignment @ vectors
        context = F.embedding(codes, vectors) + (soft - soft.detach())
        log_prior = F.log_softmax(full_precision(self.predictor(context)), dim=-1)
        drawn = log_prior.gather(-1, codes[..., None])[..., 0]
        through_target = ((assignment - assignment.detach()) * log_prior).sum(-1)
        return -(drawn + through_target).mean()

    def _log_assignment(self, latents: Tensor, vectors: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            # |z|^2 is the same for all codes and drops out of the softmax.
            similarity = latents @ vectors.t() - vectors.square().sum(1) / 2
            return F.log_softmax(similarity / self.temperature, dim=-1)


def build_regularizer(
    params: RegularizerParams, latent_dim: int, num_positions: int, codebook_size: int
) -> Regularizer:
    """The regularizer that the params name.

    Args:
        params: section train_tokenizer.regularizer, of a kind other than "none".
        latent_dim: D.
        num_positions: N.
        codebook_size: K.
    """
    sizes = {"layers": params.layers, "width": params.width, "heads": params.heads}
    if params.kind == "l2":
        return NextLatentL2(latent_dim, num_positions, params.context, **sizes)
    if params.kind == "cross_entropy":
        return NextCodeCrossEntropy(latent_dim, num_positions, codebook_size, params.context, **sizes)
    if params.kind == "larp":
        return StochasticCrossEntropy(latent_dim, num_positions, codebook_size, params.temperature, **sizes)
    raise ValueError(f"no regularizer of kind {params.kind!r}")


def _known(context: RegularizerContext, latents: Tensor, codes: Tensor, vectors: Tensor) -> Tensor:
    """What f reads, (B, N, D): latents, or the vectors of their codes with the gradient passed on to the latents."""
    if context == "latents":
        return latents
    return latents + (F.embedding(codes, vectors) - latents).detach()


def annealed_lambda(step: int, value: float, anneal_steps: int) -> float:
    """lambda(t): from 0 at step 0 along a line to `value` at step `anneal_steps`, and `value` from there on."""
    return value * min(step / anneal_steps, 1.0) if anneal_steps else value


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, with its gradient multiplied by `factor`: applies lambda to the encoder but not to f."""
    return _ScaledGradient.apply(x, factor)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None  # type: ignore[attr-defined]
