"""What compiled kernels share."""

from __future__ import annotations

import numpy as np

from crt.cpu_kernels import compile_kernel, in_order


def test_floats_in_the_order_of_integers() -> None:
    tiny = np.float32(1e-40)
    values = np.array([-np.inf, -3e38, -1.5, -1, -tiny, -0.0, 0.0, tiny, 0.25, 1, 3e38, np.inf], np.float32)

    @compile_kernel
    def all_of(bits, out):  # type: ignore[no-untyped-def]
        for k in range(bits.size):
            out[k] = in_order(bits[k])

    numbers, back = np.empty(len(values), np.int32), np.empty(len(values), np.int32)
    all_of(values.view(np.int32), numbers)
    all_of(numbers, back)
    assert (np.diff(numbers.astype(np.int64)) > 0).all()
    assert (back == values.view(np.int32)).all()
