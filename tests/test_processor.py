"""What a processor can do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from crt import processor


@pytest.mark.parametrize(
    "features, system, answer, expected",
    [
        ({"amx-tile", "amx-bf16"}, "Linux", 0, True),
        ({"amx-tile", "amx-bf16"}, "Linux", -1, False),
        ({"amx-tile", "amx-bf16"}, "Darwin", 0, False),
        ({"amx-tile", "amx-int8"}, "Linux", 0, False),
    ],
)
def test_matrix_registers_serve_only_where_the_system_lends_them(
    features: set[str], system: str, answer: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without leave the first such instruction ends the process."""
    monkeypatch.setattr(processor, "processor_features", lambda: frozenset(features))
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(syscall=lambda *_: answer))
    assert processor.has_matrix_registers.__wrapped__() == expected
