"""The untrained projections: random, with orthogonal columns, the same on every machine."""

from __future__ import annotations

import numpy as np

from hata.encoder.shape import ModelShape


def orthogonal(shape: ModelShape, bits: int, seed: int) -> tuple[np.ndarray, ...]:
    """A projection `[Hkv, D, bits]` for every layer; see `Encoder.random`."""
    blocks = -(-bits // shape.head_dim)
    projections = []
    for layer in range(shape.num_layers):
        columns = _orthonormal(
            np.stack(
                [
                    _gaussian((seed, layer, head, block), shape.head_dim)
                    for head in range(shape.kv_heads)
                    for block in range(blocks)
                ]
            )
        )
        # [Hkv * blocks, D columns, D] -> [Hkv, D, blocks * D]
        wide = columns.reshape(shape.kv_heads, blocks * shape.head_dim, shape.head_dim)
        projections.append(round_to_bfloat16(wide.transpose(0, 2, 1)[..., :bits]))
    return tuple(projections)


def _gaussian(stream: tuple[int, ...], size: int) -> np.ndarray:
    """A `[size, size]` Gaussian matrix, one column a row."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(stream)))
    return generator.standard_normal((size, size)).T


def _orthonormal(vectors: np.ndarray) -> np.ndarray:
    """Orthonormalise each set of rows of `[sets, n, n]`, first row first (Gram-Schmidt).

    That is the Q of a QR decomposition with a positive diagonal. LAPACK's is not taken, since its
    threads stall on a busy machine and its last bits depend on the build.
    """
    vectors = np.ascontiguousarray(vectors)
    for i in range(vectors.shape[1]):
        row = vectors[:, i]
        row /= np.sqrt(np.einsum("sd,sd->s", row, row))[:, None]
        rest = vectors[:, i + 1 :]
        rest -= np.einsum("snd,sd->sn", rest, row)[:, :, None] * row[:, None]
    return vectors


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even, kept as float32."""
    words = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = words + 0x7FFF + ((words >> 16) & 1)
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
