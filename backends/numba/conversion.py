"""fp16 and bf16 to fp32 and back."""

import numpy as np

from .intrinsics import (
    BFLOAT16,
    FLOAT32,
    bits_float,
    float_bits,
    half_to_float,
    load_f32,
    load_u16,
    store_16,
)
from .rows import copy_float32, widen_bfloat16, widen_float16
from .schedule import inlined


@inlined
def widen(source, out, count, dtype) -> None:
    """Copy a row of `count` numbers (a multiple of 16) to fp32."""
    if dtype == FLOAT32:
        copy_float32(source, out, count)
    elif dtype == BFLOAT16:
        widen_bfloat16(source, out, count)
    else:
        widen_float16(source, out, count)


@inlined
def narrow(source, out, count, dtype) -> None:
    """Copy a row of fp32 numbers, rounded to nearest even."""
    if dtype == FLOAT32:
        copy_float32(source, out, count)
        return
    for i in range(count):
        value = load_f32(source + 4 * i)
        half = bfloat_bits(value) if dtype == BFLOAT16 else half_bits(value)
        store_16(out + 2 * i, half)


@inlined
def load_number(address, index, dtype) -> np.float32:
    """Number `index` of a row of any data dtype, as fp32."""
    if dtype == FLOAT32:
        return load_f32(address + 4 * index)
    bits = load_u16(address + 2 * index)
    return bits_float(bits << 16) if dtype == BFLOAT16 else half_to_float(bits)


@inlined
def bfloat_bits(value) -> int:
    """The 16 bits of the nearest bf16 number, ties to even."""
    bits = float_bits(value)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 if value == value else 0x7FC0


@inlined
def half_bits(value) -> int:
    """The 16 bits of the nearest fp16 number, ties to even; overflow gives infinity."""
    bits = float_bits(value)
    sign, bits = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    if bits > 0x7F800000:
        return sign | 0x7E00
    if bits >= 0x477FF000:
        return sign | 0x7C00
    if bits < 0x38800000:
        # below 2^-14: adding 0.5 leaves the mantissa, rounded, in the low bits
        return sign | (float_bits(bits_float(bits) + np.float32(0.5)) - 0x3F000000)
    return sign | ((bits - (112 << 23) + 0xFFF + ((bits >> 13) & 1)) >> 13)
