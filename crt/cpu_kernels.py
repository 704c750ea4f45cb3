"""What the kernels that Numba compiles for CPUs have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from crt.processor import processor_features

_LAST, _HALF_BITS, _ROUNDING = np.uint32(1), np.uint32(16), np.uint32(0x7FFF)
_BIAS, _MANTISSA = np.int32(127), np.int32(23)
_SIGN, _MAGNITUDE = np.int32(31), np.int32(0x7FFFFFFF)
_LOG2_E, _LOWEST, _HALF, _UNIT = np.float32(math.log2(math.e)), np.float32(-126), np.float32(0.5), np.float32(1)
# Of 2^f, for f from -1/2 to 1/2: a relative error of 1e-7, that of float32.
_C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(math.log(2) ** k / math.factorial(k)) for k in range(1, 7))

compile_kernel: Any = numba.njit(
    nogil=True, error_model="numpy", boundscheck=False, fastmath={"contract", "nsz", "reassoc", "arcp"}
)
"""Decorator: sums in any order and fused products, as vectors need; NaN and infinity stay what they are."""


@compile_kernel
def from_bits(bits: Any) -> Any:
    """The float32 of a bfloat16's bits, uint16."""
    return np.uint32(np.uint32(bits) << _HALF_BITS).view(np.float32)


@compile_kernel
def to_bits(value: Any) -> Any:
    """The bits, uint16, of the bfloat16 nearest to a float32, ties to even."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + _ROUNDING + ((bits >> _HALF_BITS) & _LAST)) >> _HALF_BITS)


@compile_kernel
def in_one_word(low: Any, high: Any) -> Any:
    """Two float32 as bfloat16 in one uint32, as they lie beside each other in memory."""
    return np.uint32(to_bits(low)) | np.uint32(np.uint32(to_bits(high)) << _HALF_BITS)


@compile_kernel
def as_is(value: Any) -> Any:
    """A float32; beside `from_bits` and `to_bits`."""
    return np.float32(value)


def conversions(as_bits: bool) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Of an array's element to float32, and back; of bfloat16's bits, or of float32."""
    return (from_bits, to_bits) if as_bits else (as_is, as_is)


@compile_kernel
def exp_of_negative(x: Any) -> Any:
    """The exponential of a float32 that is not positive; one that vectors can take, unlike the library's."""
    z = max(x * _LOG2_E, _LOWEST)
    whole = np.floor(z + _HALF)
    f = z - whole
    power = _UNIT + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * _C6)))))
    return power * np.int32((np.int32(whole) + _BIAS) << _MANTISSA).view(np.float32)


@compile_kernel
def in_order(bits: Any) -> Any:
    """A float32's bits to an int32 of the same order, and back: vectors find the largest of these."""
    return np.int32(bits ^ ((bits >> _SIGN) & _MAGNITUDE))


def advance(builder: Any, size: Any, pointer: Any, *terms: Any) -> Any:
    """In the body of an intrinsic: a pointer so many elements on, by numbers or values of the type `size`."""
    for term in terms:
        pointer = builder.gep(pointer, [size(term) if isinstance(term, int) else term])
    return pointer


def generate_prefetch(builder: Any, address: Any) -> None:
    """In the body of an intrinsic: have the line at an address brought to the second-level cache meanwhile."""
    pointer, number = builder.bitcast(address, cgutils.voidptr_t), ir.IntType(32)
    function_type = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0i8")
    read, second_level, data_cache = number(0), number(2), number(1)
    builder.call(function, [pointer, read, second_level, data_cache])


def _prefetch_type(_: Any, array: Any, index: Any) -> tuple[Any, Callable[..., Any]]:
    """Have the line of array[index] brought to the second-level cache while work goes on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        generate_prefetch(builder, builder.gep(data, [args[1]]))
        return context.get_dummy_value()

    return types.void(array, index), generate


prefetch: Any = intrinsic(_prefetch_type)


NO_WAITING = 2**62
"""For the counter of `wait_for_all`, where a thread will not come."""
# Looks at the others before a waiting thread lets other processes go first; some microseconds.
_LOOKS = 200


def _wait_type(_: Any, arrived: Any, threads: Any) -> tuple[Any, Callable[..., Any]]:
    """Wait until as many threads have come here; arrived: int64 (1,), 0 at first, counts over all such meetings.

    Once it is `NO_WAITING`, nobody waits any more.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = context.make_array(signature.args[0])(context, builder, args[0]).data
        number, threads = place.type.pointee, args[1]
        before = builder.atomic_rmw("add", place, number(1), "acq_rel")
        all_here = builder.mul(builder.add(builder.udiv(before, threads), number(1)), threads)
        nobody = number(NO_WAITING)
        goal = builder.select(builder.icmp_unsigned("<", all_here, nobody), all_here, nobody)
        looks = cgutils.alloca_once_value(builder, number(0))
        wait, done = (builder.append_basic_block(name) for name in ("wait", "done"))
        builder.branch(wait)
        builder.position_at_end(wait)
        seen = builder.load_atomic(place, "acquire", align=8)
        count = builder.add(builder.load(looks), number(1))
        builder.store(count, looks)
        with builder.if_then(builder.icmp_unsigned("==", builder.urem(count, number(_LOOKS)), number(0))):
            yields = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, yields, "sched_yield"), [])
        _pause(builder)
        builder.cbranch(builder.icmp_unsigned(">=", seen, goal), done, wait)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(arrived, threads), generate


def _pause(builder: Any) -> None:
    """Leave the core to its other thread for a moment."""
    if "sse2" in processor_features():
        nothing = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, nothing, "llvm.x86.sse2.pause"), [])


wait_for_all: Any = intrinsic(_wait_type)
