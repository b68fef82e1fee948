"""Compile every kernel for an H200 (sm_90) without one: run as a script, since tests have Triton's interpreter.

The interpreter takes Python that the compiler refuses, such as a name that two branches give different types. Packing
is bound by its instructions, so they are counted in what ptxas made. Each format has its kernels in both layouts; what
is independent of the format and of each other, such as the dtype, is in pairs. As many processes as there are cores.
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fq_transforms as fqt
from fq_transforms.formats import FORMATS
from fq_transforms.gptq import BLOCK
from fq_transforms.methods import Mse
from fq_transforms.ops.amax.launch import amax_plan
from fq_transforms.ops.cast.launch import cast_plan
from fq_transforms.ops.gptq.launch import gptq_plan
from fq_transforms.ops.hessian.kernel import add_products_kernel
from fq_transforms.ops.hessian.launch import SIDE, TOKENS, WARPS
from fq_transforms.ops.launch import Plan
from fq_transforms.ops.pack.kernel import pack_scale_kernel
from fq_transforms.ops.pack.launch import SCALE_TILE, STRAND, pack_plan
from fq_transforms.ops.percentile.launch import DIGIT, HELD, digit_plan, digits_of, percentile_plan
from fq_transforms.ops.quantize.launch import BACKWARD, backward_plan, forward_plan, lsq_plan
from fq_transforms.ops.report.launch import report_plan
from fq_transforms.ops.sweep.launch import sweep_plan
from fq_transforms.ops.sweep.reference import Search
from fq_transforms.rounding import Stream

TARGET = GPUTarget("cuda", 90, 32)
SHAPE = (1856, 2688)
SCALE_DTYPES = {"fp32": "fp32", "e4m3": "u8", "e8m0": "u8"}

# The most instructions a weight (bf16) of packing; NVFP4 counts its path for tiny and huge experts too, and
# issues about half of them. Of four bytes a weight, an H200 moves one while it issues 28 instructions, 14 if they are
# logic.
MOST_INSTRUCTIONS = {
    "FP8": 6,
    "FP8_PER_CHANNEL": 8,
    "FP8_BLOCK": 9,
    "INT8": 9,
    "INT8_PER_CHANNEL": 11,
    "INT4_BLOCK32": 9,
    "INT4_BLOCK128": 10,
    "MXFP8": 7,
    "MXFP6_E3M2": 14,
    "MXFP6_E2M3": 15,
    "MXFP4": 13,
    "NVFP4": 30,
    "NVFP4_STATIC": 31,
}

# The most instructions a weight and candidate of the sweep, in the loop over candidates; `fq_transforms.bench.mse` has
# the least that the formulas need.
MOST_SWEEP_INSTRUCTIONS = {"INT": 12.7, "FP8": 11.9, "NVFP4": 13.9}
# The same with second moments, in the innermost loop, where 16 rows of H take 32; NVFP4 has all of a candidate there.
MOST_FORM_INSTRUCTIONS = {"INT": 43.5, "NVFP4": 50.0}
SEARCHES = [Search("ratios", Mse().ratios), Search("window"), Search("scales")]


def listing_of(compiled):
    """A kernel's machine instructions as (address, name, operands), padding aside."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", text, re.MULTILINE)
    return [(int(address, 16), name, operands) for address, name, operands in found if name != "NOP"]


def instructions_of(compiled):
    """The names of a kernel's machine instructions, padding aside."""
    return [name for _, name, _ in listing_of(compiled)]


def check_sweep(format, plan, compiled):
    """Weights are loaded once, before a loop over candidates that exchanges none, and has few instructions a weight."""
    listing = listing_of(compiled)
    jumps = [
        (int(target.group(1), 16), address)
        for address, name, operands in listing
        if name == "BRA" and (target := re.search(r"0x([0-9a-f]+)", operands)) and int(target.group(1), 16) < address
    ]
    (loop,) = jumps
    body = [name for address, name, _ in listing if loop[0] <= address <= loop[1]]
    weights = plan.constants["CHUNK"] * plan.constants["TILE"] / (32 * plan.warps)
    found = len(body) / weights
    most = next(most for name, most in MOST_SWEEP_INSTRUCTIONS.items() if format.name.startswith(name))
    assert found <= most, f"{format.name}: {found:.2f} instructions a weight and candidate"
    exchanges = [name for name in body if name.startswith(("LDS", "STS", "SHFL", "BAR", "LDL", "STL"))]
    assert not exchanges, f"{format.name}: {exchanges}"
    loads = [name for name in body if name.startswith("LDG")]
    assert len(loads) <= 1, f"{format.name}: {loads}"  # the candidate's ratio
    before = [name for address, name, _ in listing if address < loop[0]]
    assert before.count("LDG.E.128") == weights / 8, f"{format.name}: {before.count('LDG.E.128')} wide loads"


def check_form(format, plan, compiled):
    """Of the sweep with second moments: few instructions a weight in the innermost loop, 16 rows of H and candidates.

    Where a thread holds a chunk whole, nothing is exchanged; else numbers within a warp, without a barrier.
    """
    listing = listing_of(compiled)
    jumps = [
        (int(target.group(1), 16), address)
        for address, name, operands in listing
        if name == "BRA" and (target := re.search(r"0x([0-9a-f]+)", operands)) and int(target.group(1), 16) < address
    ]
    start, end = max(jumps)  # the last to begin: rows of H, or, where 16 are all of them, candidates
    body = [name for address, name, _ in listing if start <= address <= end]
    weights = plan.constants["CHUNK"] * plan.constants["TILE"] / (32 * plan.warps)
    found = len(body) / weights
    most = next(most for name, most in MOST_FORM_INSTRUCTIONS.items() if format.name.startswith(name))
    assert found <= most, f"{format.name}: {found:.1f} instructions a weight"
    exchanges = [name for name in body if name.startswith(("LDS", "STS", "SHFL", "BAR", "STL"))]
    allowed = ("SHFL",) if plan.constants["CHUNK"] > weights else ()
    assert all(name.startswith(allowed) for name in exchanges), f"{format.name}: {exchanges}"


def check_packing(format, plan, compiled):
    """A thread packs by itself, loads 16 bytes at a time, stores words, and takes few instructions."""
    names = instructions_of(compiled)
    weights = plan.constants["BLOCKS"] * plan.constants["CHUNK"] * plan.constants["TILE"] / (32 * plan.warps)
    found = len(names) / weights
    assert found <= MOST_INSTRUCTIONS[format.name], f"{format.name}: {found:.1f} instructions a weight"
    exchanges = [name for name in names if name.startswith(("LDS", "STS", "SHFL", "BAR", "LDL", "STL"))]
    assert not exchanges, f"{format.name}: {exchanges}"
    assert names.count("LDG.E.128") == weights / 8, f"{format.name}: {names.count('LDG.E.128')} wide loads"
    stores = [name for name in names if name.startswith("STG.E")]
    assert len(stores) <= 4 * max(1, weights / STRAND), f"{format.name}: {stores}"


def compile_ahead(plan, dtypes):
    """Compile a kernel as `launch` would call it; pointers without a dtype are None, and numbers that it has not."""
    kernel, signature, constants, attributes = plan.kernel, {}, {}, {}
    known = plan.constants | {"ALIGNED": True}
    names = [name for name in kernel.arg_names if name not in known]
    numbers = dict(zip(names[-len(plan.numbers) :], plan.numbers, strict=True))
    for number, name in enumerate(kernel.arg_names):
        if name in known or name.endswith("_table") or dtypes.get(name, numbers.get(name, "")) is None:
            signature[name] = "constexpr"
            constants[(number,)] = known.get(name)
        elif name in dtypes:
            signature[name] = f"*{dtypes[name]}"
            attributes[(number,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name in ("out_features", "in_features", "height", "width", "size") or name.endswith("_stride"):
                attributes[(number,)] = [["tt.divisibility", 16]]
    options = {"num_warps": plan.warps, "enable_fp_fusion": False}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGET, options=options)


def compile_sweeps(format, transposed, amax):
    """Every sweep that a format can have, the transposed ones in bf16; how many."""
    operands = amax | {"ratios_ptr": "fp32", "result_ptr": "fp32" if format.has_blocks_along_in else "i64"}
    searches = SEARCHES if format.scale == "e4m3" else SEARCHES[:1]
    cases = [("bf16", 2, "fp32")] if transposed else [("bf16", 2, None), ("fp32", 4, "fp32")]
    for search in searches:
        for dtype, size, importance in cases:
            plan = sweep_plan(format, SHAPE, transposed, size, search)
            operands |= {"weight_base": dtype, "importance_ptr": importance}
            swept = compile_ahead(plan, operands)
            if dtype == "bf16" and not transposed:
                check_sweep(format, plan, swept)
    if not format.has_blocks_along_in:
        return len(cases) * len(searches)
    for dtype, size, _ in cases:
        plan = sweep_plan(format, SHAPE, transposed, size, searches[-1], is_local=True)
        swept = compile_ahead(plan, operands | {"weight_base": dtype, "importance_ptr": "fp32"})
        if dtype == "bf16" and not transposed:
            check_form(format, plan, swept)
    return len(cases) * (len(searches) + 1)


def compile_stochastic(format, transposed, operands):
    """A seed for all experts and calls of four weights; for one format without either; how many."""
    streams = [(Stream(1), False)]
    if format == fqt.NVFP4:
        streams.append((Stream(1, column=2), True))
    for stream, seeds in streams:
        compile_ahead(forward_plan(format, SHAPE, transposed, stream, seeds), operands | {"seed_ptr": "i64"})
    return len(streams)


def compile_packing(format, transposed, amax):
    """From bf16, and where rows are contiguous from fp32; how many."""
    operands = amax | {"codes_base": "i8" if format.name.startswith("INT8") else "u8"}
    operands |= {"scale_ptr": SCALE_DTYPES[format.scale]}
    if format.scale == "e4m3":
        operands |= {"amax_ptr": None if format.dynamic else "fp32", "global_scale_ptr": "fp32"}
    cases = [("bf16", 2)] if transposed else [("bf16", 2), ("fp32", 4)]
    for dtype, size in cases:
        plan = pack_plan(format, SHAPE, transposed, size)
        packed = compile_ahead(plan, operands | {"weight_base": dtype})
        if dtype == "bf16" and not transposed:
            check_packing(format, plan, packed)
    return len(cases)


def compile_gptq(format):
    """A whole block of columns, and a last one that is not whole; how many."""
    if format.dynamic and not format.is_stateless:  # whose scales follow the weights
        return 0
    operands = dict.fromkeys(("weight_base", "target_ptr", "errors_ptr", "factor_ptr", "amax_ptr"), "fp32")
    operands |= {"global_amax_ptr": "fp32" if format.has_global_amax else None, "columns_ptr": "i64"}
    for first, width in ((BLOCK, BLOCK), (2560, 32)):
        compile_ahead(gptq_plan(format, SHAPE, first, width), operands)
    return 2


def compile_products():
    """The sums of products, of inputs of each dtype; how many."""
    tiles = -(-SHAPE[1] // SIDE)
    plan = Plan(add_products_kernel, tiles * tiles, (SHAPE[1], tiles), {"SIDE": SIDE, "TOKENS": TOKENS}, WARPS)
    for dtype in ("bf16", "fp16", "fp32"):
        compile_ahead(plan, {"x_ptr": dtype, "order_ptr": "i64", "starts_ptr": "i64", "sums_ptr": "fp32"})
    return 3


def compile_casts():
    """The casts, of gradients of each dtype; how many."""
    for dtype in ("bf16", "fp16"):
        compile_ahead(cast_plan(SHAPE[0] * SHAPE[1]), {"grad_base": dtype, "out_base": "fp32"})
    return 2


def compile_format(format):
    """Every kernel that a format can have; how many."""
    compiled = compile_gptq(format)
    amax = {
        "amax_ptr": None if format.is_stateless else "fp32",
        "global_amax_ptr": "fp32" if format.has_global_amax else None,
    }
    weights = {"weight_base": "bf16", "out_base": "bf16", "grad_base": "bf16"}
    for transposed in (False, True):
        compile_ahead(forward_plan(format, SHAPE, transposed), weights | amax | {"seed_ptr": None})
        sums = {"sums_ptr": "fp64", "counts_ptr": "i32"}
        compile_ahead(report_plan(format, SHAPE, transposed), weights | amax | sums)
        compiled += 2
        compiled += compile_stochastic(format, transposed, weights | amax)
        compiled += compile_packing(format, transposed, amax)
        if not format.is_stateless:
            integers = {name: dtype and "i32" for name, dtype in amax.items()}
            compile_ahead(amax_plan(format, SHAPE, transposed), weights | integers)
            is_of_expert = format.dynamic or format.block == (None, None)
            sums = {
                "chunk_sum_ptr": None if is_of_expert else "fp32",
                "program_sum_ptr": "fp32" if is_of_expert or format.has_global_amax else None,
            }
            compile_ahead(lsq_plan(format, SHAPE, transposed), weights | amax | sums)
            compiled += 2
        if format.clips:
            compiled += compile_sweeps(format, transposed, amax)
            compiled += compile_percentiles(format, transposed)
            compile_ahead(backward_plan(format, SHAPE, transposed, BACKWARD), weights | amax)
            compiled += 1
    return compiled


PERCENTILE = {"positions_ptr": "i64", "fractions_ptr": "fp64", "amax_ptr": "fp32"}


def compile_percentiles(format, transposed):
    """Granules that a program keeps, and those that it reads once a bit; how many."""
    if format.block == (None, None):
        return 0
    for dtype, low, held in (("bf16", 16, HELD), ("fp32", 0, 2048)):
        compile_ahead(percentile_plan(format, SHAPE, transposed, low, held), PERCENTILE | {"weight_base": dtype})
    return 2


def compile_digits():
    """The launches of a percentile of whole experts, by dtype; how many."""
    compiled = 0
    for dtype, low in (("bf16", 16), ("fp16", 13), ("fp32", 0)):
        operands = PERCENTILE | {"weight_base": dtype, "histogram_ptr": "i64", "above_ptr": "i32"}
        for number in range(digits_of(low) + 1):
            compile_ahead(digit_plan(SHAPE, low, number, DIGIT), operands)
            compiled += 1
    return compiled


def main():
    formats = [FORMATS[name] for name in fqt.__all__ if name in FORMATS]
    formats.sort(key=lambda format: format.scale != "e4m3")  # which take longest
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        compiled = sum(pool.map(compile_format, formats)) + compile_digits() + compile_products() + compile_casts()
    for kind in ("global", "int", "float"):
        constants = {"KIND": kind, "DIVIDES": False, "QMAX": 6.0, "TILE": SCALE_TILE}
        plan = Plan(pack_scale_kernel, 1, (1,), constants, 4)
        compile_ahead(plan, {"amax_ptr": "fp32", "scale_ptr": "fp32"})
        compiled += 1
    print(f"{compiled} kernels compiled for sm_{TARGET.arch} by Triton {triton.__version__}")


if __name__ == "__main__":
    sys.exit(main())
