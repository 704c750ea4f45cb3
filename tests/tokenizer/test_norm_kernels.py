"""The GPU's group normalisation, in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton comes with torch's builds for GPUs", allow_module_level=True)


def test_kernels_agree_with_torch() -> None:
    script = Path(__file__).with_name("interpreted_norm.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
