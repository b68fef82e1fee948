# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# Kernels are Triton, a language of its own in Python syntax, which a Python type checker cannot follow.
"""The amax of each granule: `fq_transforms.ops.amax.reference.expert_amax_reference`, bit for bit.

NOTE integer maxima: the bits of non-negative floats order as the floats do, with NaN above infinity. So amax is an
integer maximum: NaN is kept, atomics are exact, and the order of the programs does not matter.
"""

import triton
import triton.language as tl

from fq_transforms.ops.device import address, bits_of, chunks

__all__ = ["expert_amax_kernel"]


@triton.jit
def _raise_to(maximum, bits):
    """Maximum = max(maximum, bits), by an atomic only where it may change something: one address takes them in turn."""
    tl.atomic_max(maximum, bits, mask=bits > tl.load(maximum), sem="relaxed")


@triton.jit
def expert_amax_kernel(
    weight_base,
    weight_table,
    weight_stride,
    amax_ptr,
    global_amax_ptr,
    out_features,
    in_features,
    rows,
    columns,
    SWEEP: tl.constexpr,
    GLOBAL: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A program sweeps tiles, STEPS of them along memory, or along rows, or down a square block."""
    weight = address(weight_base, weight_table, weight_stride, ALIGNED)
    expert = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, TILE)
    j = tl.arange(0, CHUNK)
    largest = tl.zeros([TILE, CHUNK], dtype=tl.int32)
    if SWEEP == "rows":  # TILE whole rows
        row = tl.program_id(0) * TILE + c
        start = weight + row.to(tl.int64)[:, None] * in_features + j[None, :]
        for column in range(0, in_features, CHUNK):
            mask = (row < out_features)[:, None] & (column + j < in_features)[None, :]
            x = tl.load(start + column, mask=mask, other=0.0)
            largest = tl.maximum(largest, bits_of(tl.abs(x.to(tl.float32))))
        tl.store(amax_ptr + expert * out_features + row, tl.max(largest, axis=1), mask=row < out_features)
    elif SWEEP == "square":  # one block of ROWS x COLUMNS, COLUMNS == CHUNK
        block_row = tl.program_id(0) // columns
        column = (tl.program_id(0) % columns) * COLUMNS + j
        for step in tl.static_range(ROWS // TILE):
            row = block_row * ROWS + step * TILE + c
            mask = (row < out_features)[:, None] & (column < in_features)[None, :]
            x = tl.load(weight + row.to(tl.int64)[:, None] * in_features + column[None, :], mask=mask, other=0.0)
            largest = tl.maximum(largest, bits_of(tl.abs(x.to(tl.float32))))
        tl.store(amax_ptr + expert * rows * columns + tl.program_id(0), tl.max(largest))
    elif SWEEP == "scatter":  # matrices stored [in, out], where several programs share a granule
        base, offsets, mask, exists, granule, _row, _column = chunks(
            out_features, in_features, rows, columns, ROWS, COLUMNS, CHUNK, TILE, TRANSPOSED
        )
        x = tl.load(weight + base + offsets, mask=mask, other=0.0)
        chunk_amax = tl.max(bits_of(tl.abs(x.to(tl.float32))), axis=1)
        tl.atomic_max(amax_ptr + granule, chunk_amax, mask=exists, sem="relaxed")
        if GLOBAL:
            _raise_to(global_amax_ptr + expert, tl.max(chunk_amax))
    else:  # along memory: one granule per "expert", or the "blocks" of one chunk each
        count = out_features * (in_features // CHUNK)
        largest_chunk = tl.zeros([TILE], dtype=tl.int32)
        for step in tl.static_range(STEPS):
            first = (step * tl.num_programs(0) + tl.program_id(0)) * TILE
            chunk = first + c
            x = tl.load(
                weight + first.to(tl.int64) * CHUNK + c[:, None] * CHUNK + j[None, :],
                mask=(chunk < count)[:, None] & (j >= 0)[None, :],
                other=0.0,
            )
            bits = bits_of(tl.abs(x.to(tl.float32)))
            if SWEEP == "expert":
                largest = tl.maximum(largest, bits)
            else:
                chunk_amax = tl.max(bits, axis=1)
                tl.store(amax_ptr + expert * count + chunk, chunk_amax, mask=chunk < count)
                if GLOBAL:
                    largest_chunk = tl.maximum(largest_chunk, chunk_amax)
        if SWEEP == "expert":
            _raise_to(amax_ptr + expert, tl.max(largest))
        elif GLOBAL:
            _raise_to(global_amax_ptr + expert, tl.max(largest_chunk))
