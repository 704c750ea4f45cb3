"""Terms of the VQGAN loss that compare images or judge them (Esser et al. 2021)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crt.distributed import mean_over_ranks
from crt.errors import UserError
from crt.locks import fetching

_MAX_ADAPTIVE_WEIGHT = 1e4
_ADAPTIVE_EPSILON = 1e-4


def pixel_loss(reconstructions: Tensor, images: Tensor, kind: Literal["l2", "l1"]) -> Tensor:
    """Mean squared (l2) or absolute (l1) difference of (B, 3, H, W) images, in float32; pixels span [-1, 1]."""
    difference = reconstructions.float() - images.float()
    return difference.square().mean() if kind == "l2" else difference.abs().mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake))) / 2 (Lim and Ye 2017)."""
    real, fake = real_logits.float(), fake_logits.float()
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """-mean D(fake)."""
    return -fake_logits.float().mean()


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Weight that makes both losses pull equally hard on the decoder's last layer (Esser et al. 2021, eq. 7).

    Args:
        reconstruction_loss: pixels and perceptual term, weighted.
        adversarial_loss: unweighted.
        last_layer: weights of the decoder's last convolution.

    Returns:
        Scalar without gradient, at most 10,000.
    """
    losses = (reconstruction_loss, adversarial_loss)
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in losses]
    reconstruction, adversarial = mean_over_ranks(torch.stack(gradients)).flatten(1).norm(dim=1)
    return (reconstruction / (adversarial + _ADAPTIVE_EPSILON)).clamp_max(_MAX_ADAPTIVE_WEIGHT).detach()


class PerceptualLoss(nn.Module):
    """LPIPS on VGG-16 (Zhang et al. 2018), through the package `lpips`; its dropout is off.

    Args:
        weights: file of the VGG-16 as torchvision publishes it (vgg16-397923af.pth), or of the package's whole
            network; None: the package fetches what it needs at first use, in one process while others wait.
        key: of the params, that names the file.

    Raises:
        UserError: the weights cannot be had or do not fit.
    """

    def __init__(self, weights: str | Path | None, key: str = "train_tokenizer.loss.lpips_weights") -> None:
        super().__init__()
        try:
            with fetching(_vgg_file()) if weights is None else nullcontext():
                network = _lpips_network(pnet_rand=weights is not None)
        except OSError as error:
            raise UserError(
                f"{key}: null, and VGG-16 cannot be fetched ({error}): download vgg16-397923af.pth and name it there"
            ) from None
        if weights is not None:
            _load_lpips(network, Path(weights), key)
        self.network = network.requires_grad_(False)

    def train(self, mode: bool = True) -> PerceptualLoss:
        """A measuring instrument: it stays in evaluation mode."""
        return super().train(False)

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Mean over the batch of the distance of (B, 3, H, W) images in [-1, 1]."""
        return _mean_perceptual_distance(self.network, reconstructions, images)


def untrained_perceptual_loss() -> Callable[[Tensor, Tensor], Tensor]:
    """What `PerceptualLoss` computes, with random weights: nothing is read or fetched."""
    network = _lpips_network(pretrained=False, pnet_rand=True).requires_grad_(False)
    return partial(_mean_perceptual_distance, network)


def _mean_perceptual_distance(network: Any, reconstructions: Tensor, images: Tensor) -> Tensor:
    """Mean of what the package's network returns for a batch, with less kept for the backward pass.

    Features are compared in float32, in maps that hold more than VGG-16's own in bfloat16: they are made again there.
    """
    features, targets = network.scaling_layer(reconstructions), network.scaling_layer(images)
    distances = []
    for layers, weigh in zip(network.net.children(), network.lins, strict=True):
        features, targets = layers(features), layers(targets)
        distances.append(
            checkpoint(_feature_distance, features, targets, weigh, use_reentrant=False, preserve_rng_state=False)
        )
    return sum(distances[1:], distances[0]).float().mean()


def _feature_distance(features: Tensor, targets: Tensor, weigh: nn.Module) -> Tensor:
    """(B, C, h, w) features of one layer of both sides to their (B, 1, 1, 1) distances."""
    from lpips import normalize_tensor, spatial_average

    difference = normalize_tensor(features.float()) - normalize_tensor(targets.float())
    distances: Tensor = spatial_average(weigh(difference**2))
    return distances


def _lpips_network(**options: bool) -> nn.Module:
    """The package's network on VGG-16, in evaluation mode."""
    import lpips

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")  # it asks in an old way
        network: nn.Module = lpips.LPIPS(net="vgg", verbose=False, **options)
    return network


def _vgg_file() -> Path:
    """Where torchvision, which the package asks, keeps what it fetches."""
    return Path(torch.hub.get_dir(), "checkpoints", "vgg16-397923af.pth")


def _load_lpips(network: nn.Module, path: Path, key: str) -> None:
    """Fill the package's network from a file, which may hold VGG-16 alone: the package brings the rest."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        own = network.state_dict()
        if "features.0.weight" in state:
            # The package keeps torchvision's numbering inside its five slices: net.slice2.5 is features.5.
            for name in own:
                if name.startswith("net.slice"):
                    own[name] = state[f"features.{name.split('.', 2)[2]}"]
            state = own
        network.load_state_dict(state)
    except Exception as error:  # bytes that are no weights fail in the unpickler in every possible way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: no weights of LPIPS on VGG-16 ({reason}): name torchvision's vgg16-397923af.pth, "
            f"or set {key} to null"
        ) from None
