"""What this machine's processor can do, beyond the least that its kind can."""

from __future__ import annotations

import ctypes
import functools
import platform

import torch

# Numbers of the system call and of what it asks for, on x86-64.
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


@functools.cache
def processor_features() -> frozenset[str]:
    """What this processor can do beyond its kind's least, by LLVM's names."""
    from llvmlite import binding

    return frozenset(name for name, present in binding.get_host_cpu_features().items() if present)


@functools.cache
def has_matrix_registers() -> bool:
    """Whether this process may use AMX for bfloat16: Linux lends its registers to those that ask (arch_prctl(2))."""
    if not {"amx-tile", "amx-bf16"} <= processor_features() or platform.system() != "Linux":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has a fast product of bfloat16.

    oneDNN has none below AVX-512. torch's own takes 10 to 200 times as long there as one of float32.
    """
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
