"""What `precision: bf16` of a stage's params means on a device."""

from __future__ import annotations

import torch

from crt import processor
from crt.progress import logger


def multiplies_as(device: torch.device, precision: str) -> torch.dtype:
    """In what type products of `precision`, "float32" or "bf16", are computed on a device."""
    fast = device.type != "cpu" or processor.multiplies_bfloat16()
    return torch.bfloat16 if precision == "bf16" and fast else torch.float32


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bfloat16 where `precision` is "bf16" and the device multiplies that fast; else none."""
    low = multiplies_as(device, precision) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


def announce_precision(section: str, device: torch.device, precision: str) -> None:
    """Say so where `precision` brings no speed on this processor."""
    if precision == "bf16" and multiplies_as(device, precision) != torch.bfloat16:
        logger.info(
            "%s.precision bf16: this processor multiplies no bfloat16: products are computed in float32", section
        )
