"""What bf16 means on a device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from crt import precision
from crt.ar.model import Linear


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_multiplied_as_such_where_that_is_fast(
    fast: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a linear layer, under autocast, and in the rate that utilisation is a share of."""
    monkeypatch.setattr("crt.processor.multiplies_bfloat16", lambda: fast)
    taken: list[torch.dtype] = []
    torchs_linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight, *bias: taken.append(x.dtype) or torchs_linear(x, weight, *bias))
    layer, x = Linear(8, 8, std=1.0).bfloat16(), torch.ones(2, 8, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert taken == [torch.bfloat16 if fast else torch.float32]
    device, gpu = torch.device("cpu"), torch.device("cuda")
    with precision.autocast(device, "bf16"):
        assert torch.is_autocast_enabled("cpu") == fast
    with precision.autocast(device, "float32"):
        assert not torch.is_autocast_enabled("cpu")
    assert precision.multiplies_as(device, "bf16") == taken[0]
    assert precision.multiplies_as(gpu, "bf16") == torch.bfloat16
    assert precision.multiplies_as(gpu, "float32") == torch.float32
    caplog.set_level("INFO", "crt")
    for where, wanted in ((gpu, "bf16"), (device, "float32"), (device, "bf16")):
        precision.announce_precision("sample", where, wanted)
    line = "sample.precision bf16: this processor multiplies no bfloat16: products are computed in float32"
    assert [record.getMessage() for record in caplog.records] == [] if fast else [line]
