"""Causally Regularized Tokenization: tokenizers made for generation, and the pipeline around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crt.ar.generator import Generator
    from crt.tokenizer.model import Tokenizer

__version__ = "0.1.0"
__all__ = ["Generator", "Tokenizer"]


def __getattr__(name: str) -> Any:
    # Lazy, so that reading params or the pipeline's graph does not import torch.
    if name == "Tokenizer":
        from crt.tokenizer.model import Tokenizer

        return Tokenizer
    if name == "Generator":
        from crt.ar.generator import Generator

        return Generator
    raise AttributeError(f"module 'crt' has no attribute {name!r}")
