"""The features of sFID: Inception's, before its pooling has blurred where in the image things are.

sFID (Nash et al. 2021) is the Frechet distance of the first 7 channels of the map `mixed_6/conv`, 17 x 17, as ADM's
evaluator takes them. clean-fid's network is TorchScript, which calls no hooks: it is run stage by stage instead, so
that one pass yields the map as well as the pooled features.

    B: images   17 x 17 x 7: rows, columns, channels, flattened in this order, as ADM's stored statistics have them
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cleanfid.inception_torchscript import InceptionV3W
from torch import nn

from crt.progress import logger

_SIDE, _CHANNELS = 17, 7
SPATIAL_DIMENSION = _SIDE * _SIDE * _CHANNELS
_BLOCK = "mixed_6"
_INPUT_SIDE = 299
_PROBE_SIDE = 256
# Of the largest feature. The same operations on the same weights; a compiler may still join some of them.
_TOLERANCE = 1e-4


class InceptionStages(nn.Module):
    """Pooled features and the spatial map in one pass.

    Args:
        network: clean-fid's.
        resize_inside: whether images come as they are, or resized to 299 pixels already.

    Raises:
        AttributeError: the network has no such block.
    """

    def __init__(self, network: InceptionV3W, resize_inside: bool) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(network.layers.named_children())  # a sequence: they run in this order
        self.branch = getattr(network.layers, _BLOCK).conv  # 1x1 convolution, normalisation, ReLU
        self.resize_inside = resize_inside

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 (B, 3, H, W) in [0, 255] -> (B, 2048) and (B, SPATIAL_DIMENSION)."""
        x = _tensorflow_resize(images) if self.resize_inside else images
        x = (x - 128) / 128
        for name, stage in self.stages.items():
            if name == _BLOCK:
                # That branch runs twice: under one per cent of the network.
                spatial = self.branch(x)[:, :_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            x = stage(x)
        return x.flatten(1), spatial


@torch.inference_mode()
def split_inception(network: InceptionV3W, resize_inside: bool, device: torch.device) -> InceptionStages | None:
    """The network in stages; None, with a warning, if it is not built as expected.

    Whether the stages are the network is not taken on trust: on a probe image they must give its own pooled features.
    """
    generator = torch.Generator().manual_seed(0)
    side = _PROBE_SIDE if resize_inside else _INPUT_SIDE
    probe = torch.randint(0, 256, (1, 3, side, side), generator=generator).float().to(device)
    expected = network(probe).float()
    try:
        stages = InceptionStages(network, resize_inside)
        features, spatial = stages(probe)
        error = float((features - expected).abs().max() / expected.abs().max())
        reason = f"its features differ by {error:.2g}" if not error <= _TOLERANCE else ""
        if spatial.shape[1] != SPATIAL_DIMENSION:
            reason = f"{spatial.shape[1]} spatial features instead of {SPATIAL_DIMENSION}"
    except (AttributeError, RuntimeError) as failure:  # TorchScript's failures are RuntimeErrors
        reason = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
    if reason:
        logger.warning("warning: sFID is left out: the Inception network, run in stages, is another one: %s", reason)
        return None
    return stages


def _tensorflow_resize(images: torch.Tensor) -> torch.Tensor:
    """TensorFlow 1's bilinear resize, by the corners of pixels: (B, 3, H, W) -> (B, 3, 299, 299)."""
    shift = [[1, 0, 1 / images.shape[3] - 1 / _INPUT_SIDE], [0, 1, 1 / images.shape[2] - 1 / _INPUT_SIDE]]
    theta = torch.tensor(shift, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, [*images.shape[:2], _INPUT_SIDE, _INPUT_SIDE], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
