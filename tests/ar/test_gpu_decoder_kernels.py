"""The GPU's sampling kernels without a GPU: results in Triton's interpreter, and that the compiler takes them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from crt.ar.model import ARTransformer
from tests.ar.conftest import small_config
from tests.conftest import ROOT

pytest.importorskip("triton", reason="Triton comes with torch builds for NVIDIA's GPUs")

KERNELS = ("_linear", "_attend", "_norm", "_swiglu_rows", "_draw")
SIZES = YAML(typ="safe").load(ROOT / "crt" / "ar" / "sizes.yaml")


def test_results_in_the_interpreter() -> None:
    """In a process of its own: Triton decides while it is imported whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "tests/ar/interpreted_gpu_kernels.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize(("size", "sequences"), [("B", 2), ("XL", 2), ("3B", 2), ("3B", 64)])
def test_the_compiler_takes_every_kernel_of_a_step(
    size: str, sequences: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For an H100, in bfloat16, at the shapes of a real model; no kernel runs out of registers."""
    from crt.ar import gpu_decoder_kernels as kernels
    from crt.ar.gpu_decoder import GPUDecoder

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches: dict[str, tuple[Any, tuple, dict[str, Any]]] = {}

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name, self.function = name, getattr(kernels, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return self.launch

        def launch(self, *args: Any, **options: Any) -> None:
            types = [str(arg.dtype) if isinstance(arg, torch.Tensor) else type(arg) for arg in args]
            launches[f"{self.name} {types} {options}"] = self.function, args, options

    with torch.device("meta"):
        config = small_config(codebook_size=16384, grid=(16, 16), ffn_multiple=256, **SIZES[size] | {"layers": 1})
        model = ARTransformer(config).to(torch.bfloat16).requires_grad_(False)
    with monkeypatch.context() as patched:
        for name in KERNELS:
            patched.setattr(kernels, name, Recorder(name))
        GPUDecoder(model, sequences // 2, sequences).step()
    used = {function.__name__ for function, _, _ in launches.values()}
    assert used == {"_linear", "_attend", "_draw"} if sequences <= kernels.FEW else set(KERNELS) - {"_linear"}
    for function, args, options in launches.values():
        usage = compile_for_h100(function, args, options)
        assert "STACK:0" in usage, usage


def compile_for_h100(function: Any, args: tuple, options: dict[str, Any]) -> str:
    """What the binary takes of a multiprocessor, after compilation as a launch would do it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, types = function.arg_names, {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
    constants = {(names.index(name),): value for name, value in options.items() if name in names}
    signature, attributes = dict.fromkeys(names, "constexpr"), {}
    for index, arg in enumerate(args):
        if isinstance(arg, torch.Tensor):
            signature[names[index]] = "*" + types.get(arg.dtype, "i64")
        elif arg == 1:  # which a launch makes a constant
            constants[(index,)] = 1
            continue
        else:
            signature[names[index]] = "fp32" if isinstance(arg, float) else "i32"
        if isinstance(arg, torch.Tensor) or (isinstance(arg, int) and arg % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    binary = triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={name: value for name, value in options.items() if name not in names},
    ).asm["cubin"]
    file = Path(os.environ["TRITON_CACHE_DIR"]) / "binary"
    file.write_bytes(binary)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
