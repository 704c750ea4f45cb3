"""Floating-point operations, counted by torch on fake tensors: nothing is computed, nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from crt.ar.model import ARConfig
    from crt.params import TrainTokenizer

Shape = tuple[int, ...]


def _attention_flops(query: Shape, key: Shape, *_: object, **__: object) -> int:
    """Scores and weighted sum of (B, H, T, D): two products."""
    batch, heads, length, width = query
    return 2 * (2 * batch * heads * length * key[2] * width)


def _attention_backward_flops(grad: Shape, query: Shape, key: Shape, *_: object, **__: object) -> int:
    """The scores again, and two products for each of those of the forward pass."""
    return 5 * _attention_flops(query, key) // 2


# torch counts its attention kernels of GPUs, and forgets those of CPUs, which fake tensors go through as well.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs (multiply and add count as two) of all matrix products, convolutions and attentions in `work`.

    Attention counts as if no position were masked, as is usual.

    Build models and inputs of `work` under `FakeTensorMode` to count without computing.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with counter:
        work()
    return int(counter.get_total_flops())


def tokenizer_flops_per_image(params: TrainTokenizer, with_regularizer: bool) -> int:
    """FLOPs that stage 1 spends on one training image: forward and backward of all its networks.

    Args:
        params: section train_tokenizer.
        with_regularizer: whether lambda is above 0; without, no regularizer runs.
    """
    from crt.tokenizer.discriminator import build_discriminator
    from crt.tokenizer.model import Tokenizer, TokenizerConfig
    from crt.tokenizer.regularizer import build_regularizer

    with FakeTensorMode():
        model = Tokenizer(TokenizerConfig.from_params(params))
        images = torch.zeros(1, 3, params.image_size, params.image_size)
        networks: list[Callable[[], Tensor]] = []

        def autoencoder() -> Tensor:
            images_out, quantized = model(images)
            return images_out.mean() + quantized.commitment_loss + quantized.codebook_loss

        networks.append(autoencoder)
        if with_regularizer and params.regularizer.kind != "none":
            quantizer = params.quantizer
            regularizer = build_regularizer(
                params.regularizer, quantizer.codebook_dim, model.num_tokens, quantizer.codebook_size
            )
            latents = torch.zeros(1, model.num_tokens, quantizer.codebook_dim, requires_grad=True)
            codes = torch.zeros(1, model.num_tokens, dtype=torch.int64)
            vectors = torch.zeros(quantizer.codebook_size, quantizer.codebook_dim)
            networks.append(lambda: regularizer(latents, codes, vectors))
        discriminator = build_discriminator(params.discriminator, params.image_size)
        if discriminator is not None:
            pair = torch.zeros(2, 3, params.image_size, params.image_size)
            fake = torch.zeros(1, 3, params.image_size, params.image_size, requires_grad=True)
            # Once for the decoder, through frozen weights, and once for itself on a real and a decoded image.
            networks.append(partial(_score_twice, discriminator, fake, pair))
        return sum(count_flops(partial(_forward_and_backward, network)) for network in networks)


def ar_flops_per_image(config: ARConfig, activation_checkpointing: bool = False) -> int:
    """FLOPs that stage 2 spends on one training sequence: forward and backward, and recomputation if asked."""
    from crt.ar.model import ARTransformer

    with FakeTensorMode():
        model = ARTransformer(config, activation_checkpointing).train()
        codes = torch.zeros(1, config.num_tokens, dtype=torch.int64)
        labels = torch.zeros(1, dtype=torch.int64)
        return count_flops(lambda: model(codes, labels).mean().backward())


def _forward_and_backward(network: Callable[[], Tensor]) -> Tensor:
    loss = network()
    loss.backward()
    return loss


def _score_twice(discriminator: nn.Module, fake: Tensor, pair: Tensor) -> Tensor:
    return discriminator(fake).mean() + discriminator(pair).mean()
