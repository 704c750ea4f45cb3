"""What tokenizer training minimises: VQGAN's terms (Esser et al. 2021) and the causal regularizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crt.params import TrainTokenizer
from crt.precision import autocast
from crt.tokenizer.discriminator import build_discriminator
from crt.tokenizer.losses import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss, pixel_loss
from crt.tokenizer.model import Tokenizer, TokenizerConfig
from crt.tokenizer.quantizer import Quantized
from crt.tokenizer.regularizer import Regularizer, build_regularizer, scale_gradient


@dataclass(frozen=True)
class TokenizerLoss:
    """What the pass over one batch gave.

    Attributes:
        total: scalar to derive: its gradient reaches the tokenizer and the regularizer.
        figures: scalars by name: `loss` (lambda times the regularizer in it) and its terms without their weights.
        latents: (B, D, h, w), before quantization.
        codes: (B, h, w).
        reconstructions: (B, 3, H, W).
    """

    total: Tensor
    figures: dict[str, Tensor]
    latents: Tensor
    codes: Tensor
    reconstructions: Tensor


class Objective:
    """The losses of one training step.

    Args:
        params: section train_tokenizer.
        model: the tokenizer.
        regularizer: None: no causal regularizer.
        discriminator: None: no adversarial term.
        perceptual: mean distance of reconstructions and images, for `loss.lpips_weight`; None: no such term.
        device: where the step runs, under autocast if `precision` asks for it.
    """

    def __init__(
        self,
        params: TrainTokenizer,
        model: Tokenizer,
        regularizer: Regularizer | None,
        discriminator: nn.Module | None,
        *,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None,
        device: torch.device,
    ) -> None:
        self.params = params
        self.model, self.regularizer, self.discriminator = model, regularizer, discriminator
        self.perceptual = perceptual
        self.device = device

    @classmethod
    def untrained(
        cls, params: TrainTokenizer, with_regularizer: bool, perceptual: Callable[[Tensor, Tensor], Tensor] | None
    ) -> Objective:
        """Of fresh networks on the CPU: on fake tensors it tells what a step costs.

        Args:
            params: section train_tokenizer.
            with_regularizer: whether lambda is above 0; without, no regularizer is built.
            perceptual: as above.
        """
        quantizer, model = params.quantizer, Tokenizer(TokenizerConfig.from_params(params))
        regularizer = None
        if with_regularizer and params.regularizer.kind != "none":
            regularizer = build_regularizer(
                params.regularizer, quantizer.codebook_dim, model.num_tokens, quantizer.codebook_size
            )
        discriminator = build_discriminator(params.discriminator, params.image_size)
        return cls(params, model, regularizer, discriminator, perceptual=perceptual, device=torch.device("cpu"))

    def is_adversarial(self, step: int) -> bool:
        """Whether the discriminator takes part in step number `step`, counted from 0."""
        return self.discriminator is not None and step >= self.params.discriminator.start_step

    def tokenizer_loss(self, images: Tensor, uniforms: Tensor, lambda_: float, adversarial: bool) -> TokenizerLoss:
        """The loss of tokenizer and regularizer.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            uniforms: (B, N) independent random numbers in [0, 1), for regularizers that draw codes.
            lambda_: weight of the regularizer at this step.
            adversarial: whether the discriminator judges the reconstructions.
        """
        weights, model = self.params.loss, self.model
        with autocast(self.device, self.params.precision):
            latents = model.latents(images)  # B, D, h, w
            raster = latents.flatten(2).transpose(1, 2)  # B, N, D
            drawn = None
            if self.regularizer is not None:
                drawn = self.regularizer.draw_codes(raster, model.quantizer.vectors(), uniforms)
            quantized = model.quantizer(latents, None if drawn is None else drawn.view(-1, *latents.shape[2:]))
            reconstructions = model.reconstruct(quantized.values)

            figures = {"pixel": pixel_loss(reconstructions, images, weights.pixel)}
            loss = weights.pixel_weight * figures["pixel"]
            if self.perceptual is not None:
                figures["lpips"] = self.perceptual(reconstructions, images)
                loss = loss + weights.lpips_weight * figures["lpips"]
            if adversarial:
                figures |= self._adversarial(loss, reconstructions)
                loss = loss + figures["adaptive_weight"] * figures["adversarial"]
            figures["codebook"], figures["commitment"] = quantized.codebook_loss, quantized.commitment_loss
            if self.params.quantizer.update == "gradient":
                loss = loss + weights.codebook_weight * quantized.codebook_loss
            loss = loss + weights.commitment_weight * quantized.commitment_loss
            if weights.entropy_weight > 0:
                figures["entropy"] = model.quantizer.entropy_loss(latents, weights.entropy_temperature)
                loss = loss + weights.entropy_weight * figures["entropy"]

            total = loss
            if self.regularizer is not None:
                figures["regularizer"] = self._predictability(self.regularizer, raster, quantized, lambda_)
                total = loss + figures["regularizer"]
                loss = loss.detach() + lambda_ * figures["regularizer"].detach()
        return TokenizerLoss(total, {**figures, "loss": loss}, latents, quantized.codes, reconstructions)

    def discriminator_loss(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """The discriminator's own loss: a scalar whose gradient reaches it alone."""
        assert self.discriminator is not None
        with autocast(self.device, self.params.precision):
            return hinge_discriminator_loss(self.discriminator(images), self.discriminator(reconstructions.detach()))

    def _adversarial(self, reconstruction_loss: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """What the discriminator thinks of the reconstructions, and the weight of that."""
        discriminator, settings = self.discriminator, self.params.discriminator
        assert discriminator is not None
        # Only the decoder learns from this pass.
        discriminator.requires_grad_(False)
        judged = hinge_generator_loss(discriminator(reconstructions))
        discriminator.requires_grad_(True)
        weight = torch.full((), settings.weight, device=judged.device)
        if settings.adaptive_weight:
            weight = weight * adaptive_weight(reconstruction_loss, judged, self.model.decoder.conv_out.weight)
        return {"adversarial": judged, "adaptive_weight": weight}

    def _predictability(self, regularizer: Regularizer, raster: Tensor, quantized: Quantized, lambda_: float) -> Tensor:
        """The regularizer's loss: the encoder's gradient is scaled by lambda, the regularizer's own is not."""
        scaled = scale_gradient(raster, lambda_)
        return regularizer(scaled, quantized.codes.flatten(1), self.model.quantizer.vectors())
