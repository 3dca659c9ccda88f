"""Load rows of HBM into SBUF, in the layouts that the flash core takes."""

from typing import Any

import nki.isa as nisa
import nki.language as nl

from neuron_attn_rewrite.kernels.nki.core import BANK, ROWS


def load_transposed(source: Any, offset: int, count: int, column: int = 0, heads: int = 1) -> Any:
    """Rows [offset, offset + count) of HBM [rows, heads * head_dim], from `column` on, transposed.

    Gives a list of SBUF tiles [<=128 of head_dim, count]. The DMA transposes 16-bit rows, the tensor engine float32.
    """
    width = source.shape[1]
    head_dim = width // heads
    tiles = []
    for c in range(0, head_dim, ROWS):
        features = min(ROWS, head_dim - c)
        tile = nl.ndarray((features, count), dtype=source.dtype, buffer=nl.sbuf)
        for a in range(0, count, BANK if source.dtype != nl.float32 else ROWS):
            b = min(a + BANK, count)
            if source.dtype == nl.float32:
                b = min(a + ROWS, count)
                rows = nl.ndarray((b - a, features), dtype=source.dtype, buffer=nl.sbuf)
                nisa.dma_copy(dst=rows, src=source[offset + a : offset + b, column + c : column + c + features])
                transposed = nl.ndarray((features, b - a), dtype=source.dtype, buffer=nl.psum)
                nisa.nc_transpose(dst=transposed, data=rows, engine=nisa.engine.tensor)
                nisa.activation(dst=tile[:, a:b], op=nl.copy, data=transposed)
            else:
                nisa.dma_transpose(
                    dst=tile.ap([[count, features], [1, 1], [1, 1], [1, b - a]], offset=a),
                    src=source.ap(
                        [[width, b - a], [1, 1], [1, 1], [1, features]],
                        offset=(offset + a) * width + column + c,
                    ),
                    axes=(3, 1, 2, 0),
                )
        tiles.append(tile)
    return tiles


def load_values(source: Any, offset: int, count: int, column: int = 0, heads: int = 1) -> Any:
    """Rows [offset, offset + count) of HBM [rows, heads * v_dim], from `column` on.

    Gives an SBUF tile [128, blocks, v_dim] with 128 keys in each block.
    """
    width = source.shape[1]
    v_dim = width // heads
    whole = count // ROWS
    blocks = (count + ROWS - 1) // ROWS
    tile = nl.ndarray((ROWS, blocks, v_dim), dtype=source.dtype, buffer=nl.sbuf)
    if whole > 0:
        nisa.dma_copy(
            dst=tile[:, 0:whole, :],
            src=source.ap([[width, ROWS], [ROWS * width, whole], [1, v_dim]], offset=offset * width + column),
        )
    if whole < blocks:
        start = offset + whole * ROWS
        nisa.dma_copy(
            dst=tile[0 : count - whole * ROWS, whole, :],
            src=source[start : offset + count, column : column + v_dim],
        )
    return tile


def mean_of_values(source: Any, offset: int, count: int, column: int = 0, heads: int = 1) -> Any:
    """The mean of rows [offset, offset + count) of HBM [rows, heads * v_dim], from `column` on.

    Gives an SBUF tile [128, v_dim] float32 with the mean in each row.
    """
    v_dim = source.shape[1] // heads
    ones = nl.ndarray((ROWS, ROWS), dtype=source.dtype, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0)
    total = nl.ndarray((ROWS, v_dim), dtype=nl.float32, buffer=nl.psum)
    for a in range(0, count, ROWS):
        b = min(a + ROWS, count)
        values = nl.ndarray((b - a, v_dim), dtype=source.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=values, src=source[offset + a : offset + b, column : column + v_dim])
        nisa.nc_matmul(dst=total, stationary=ones[0 : b - a, :], moving=values, accumulate=a > 0)
    mean = nl.ndarray((ROWS, v_dim), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=mean, op=nl.copy, data=total, scale=1.0 / count)
    return mean
