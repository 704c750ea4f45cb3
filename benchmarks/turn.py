"""Lets benchmarks prepare at once and measure one after the other, so that a borrowed GPU is not kept by a compiler.

`benchmarks/gpu.py` starts several with BENCHMARK_TURN=FILE in their environment. Each warms up, then waits here.
"""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import torch

VARIABLE = "BENCHMARK_TURN"
READY, GO = ".ready", ".go"


def await_turn() -> None:
    """Say that the warm-up is over, and wait until this process alone may measure; at once where nobody asked."""
    name = os.environ.pop(VARIABLE, None)
    if name is None:
        return
    gc.collect()
    torch.cuda.empty_cache()  # others warm up beside
    Path(name + READY).touch()
    while not Path(name + GO).exists():
        time.sleep(0.02)
