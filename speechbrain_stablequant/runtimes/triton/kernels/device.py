"""Device functions that several kernels use."""

import triton
import triton.language as tl

# Adding 1.5 * 2^23 to a float32 of at most 22 bits rounds it to an integer,
# ties to even, and leaves that integer in the low bits of the sum.
ROUNDER = tl.constexpr(12582912.0)
# log2 of the normal distribution's tail, log2(Phi(-t)), as a polynomial in t:
# coefficients from t^0 to t^5. Minimax fit of GELU's term t * Phi(-t) on
# [0, 6.5], by linear programming. The leading coefficient is negative, so the
# tail keeps falling towards 0 beyond 6.5.
TAIL = tl.constexpr(
    (
        -1.00003763,
        -1.15078777,
        -0.459992645,
        -0.0518271688,
        0.00708446117,
        -0.000473294001,
    )
)


@triton.jit
def round_to_int8(x, inverse, limit, zero):
    """``clamp(round(x * inverse + zero))`` as ``affine.quantize`` does it
    with ``x - offset``, where ``zero`` is ``-offset * inverse``, an integer.

    The limits are integers, so clamping before rounding gives the same; it
    also keeps the sums from being fused into one rounding.
    """
    v = tl.minimum(tl.maximum(x * inverse + zero, -limit), limit)
    return (v + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def gelu_erf(x):
    """The exact GELU of finite values, to 1e-6.

    ``x * Phi(x)`` is ``max(x, 0) - |x| * Phi(-|x|)``, and the tail is a power
    of two whose exponent is smooth: a quarter of the instructions of erf,
    which would take longer than an integer product before it.
    """
    t = tl.abs(x)
    exponent = t * TAIL[5] + TAIL[4]
    exponent = exponent * t + TAIL[3]
    exponent = exponent * t + TAIL[2]
    exponent = exponent * t + TAIL[1]
    exponent = exponent * t + TAIL[0]
    return tl.maximum(x, 0.0) - t * tl.exp2(exponent)


@triton.jit
def standardize_rows(y, inside, eps, COLUMNS: tl.constexpr):
    """Rows of a tile that holds whole rows, to mean 0 and variance 1.

    ``inside`` [1, BLOCK] marks the real columns, ``COLUMNS`` is their number.
    """
    if y.shape[1] == COLUMNS:
        y -= (tl.sum(y, axis=1) / COLUMNS)[:, None]
    else:
        mean = tl.sum(tl.where(inside, y, 0.0), axis=1) / COLUMNS
        y = tl.where(inside, y - mean[:, None], 0.0)
    variance = tl.sum(y * y, axis=1) / COLUMNS
    return y * tl.rsqrt(variance + eps)[:, None]


@triton.jit
def affine_columns(y, weight, bias, column, inside):
    """``y * weight + bias`` by column."""
    w = tl.load(weight + column, mask=inside, other=0.0)
    b = tl.load(bias + column, mask=inside, other=0.0)
    return y * w[None, :] + b[None, :]


@triton.jit
def empty_sums(
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr
):
    """A tile of zeros for `add_products`."""
    if WIDE:
        return tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        return tl.zeros((BLOCK_M, BLOCK_N), tl.int32)


@triton.jit
def add_products(acc, a, b, WIDE: tl.constexpr):
    """``acc + a @ b.T`` of integers, multiplied as float16, which holds
    them exactly, if ``WIDE``."""
    if WIDE:
        return tl.dot(a.to(tl.float16), b.to(tl.float16).T, acc)
    else:
        return tl.dot(a, b.T, acc, out_dtype=tl.int32)


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns.

    What follows a product is done half by half where all of it at once would
    not fit into the registers.
    """
    pair = tile.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1)
    return pair.split()


@triton.jit
def scale_and_bias(acc, scale, bias, channels, inside, HAS_BIAS: tl.constexpr):
    """int32 sums to float32: ``acc * scale + bias`` by column."""
    s = tl.load(scale + channels, mask=inside, other=0.0)
    y = acc.to(tl.float32) * s[None, :]
    if HAS_BIAS:
        b = tl.load(bias + channels, mask=inside, other=0.0)
        y += b[None, :]
    return y


@triton.jit
def store_tile(
    out, offsets, y, inverse, limit, zero, mask, QUANTIZE: tl.constexpr
):
    """Stores a float32 tile as int8 or in the dtype of ``out``."""
    if QUANTIZE:
        q = round_to_int8(y, inverse, limit, zero)
        tl.store(out + offsets, q, mask=mask)
    else:
        tl.store(out + offsets, y.to(out.dtype.element_ty), mask=mask)
