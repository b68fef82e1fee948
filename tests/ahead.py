"""Compile every kernel for an H200 (sm_90) without one: run as a script, since tests have Triton's interpreter.

The interpreter takes Python that the compiler refuses, such as a name that two branches give different types.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fq_transforms as fqt
from fq_transforms.formats import FORMATS
from fq_transforms.ops import kernels, launch, pack_kernel

TARGET = GPUTarget("cuda", 90, 32)
SHAPE = (1856, 2688)
SCALE_DTYPES = {"fp32": "fp32", "e4m3": "u8", "e8m0": "u8"}


def compile_ahead(kernel, plan, dtypes):
    """Compile a kernel as `launch` would call it; pointers without a dtype are None."""
    signature, constants, attributes = {}, {}, {}
    for number, name in enumerate(kernel.arg_names):
        if name in plan.constants or name == "ALIGNED" or name.endswith("_table") or dtypes.get(name, "") is None:
            signature[name] = "constexpr"
            constants[(number,)] = True if name == "ALIGNED" else plan.constants.get(name)
        elif name in dtypes:
            signature[name] = f"*{dtypes[name]}"
            attributes[(number,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name in ("out_features", "in_features") or name.endswith("_stride"):
                attributes[(number,)] = [["tt.divisibility", 16]]
    options = {"num_warps": plan.warps, "enable_fp_fusion": False}
    triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGET, options=options)


def main():
    formats = [FORMATS[name] for name in fqt.__all__ if name in FORMATS]
    compiled = 0
    for format in formats:
        amax = {
            "amax_ptr": None if format.is_stateless else "fp32",
            "global_amax_ptr": "fp32" if format.has_global_amax else None,
        }
        for transposed in (False, True):
            weights = {"weight_base": "bf16", "out_base": "bf16", "grad_base": "bf16"}
            codes = {"codes_base": "i8" if format.name.startswith("INT8") else "u8"}
            scale = {"scale_ptr": SCALE_DTYPES[format.scale]}
            plan = launch._forward_plan(format, SHAPE, transposed, None)
            compile_ahead(kernels.fake_quantize_kernel, plan, weights | amax)
            compile_ahead(
                pack_kernel.pack_kernel, launch._pack_plan(format, SHAPE, transposed), weights | amax | codes | scale
            )
            compiled += 2
            if not format.is_stateless:
                integers = {name: dtype and "i32" for name, dtype in amax.items()}
                plan = launch._amax_plan(format, SHAPE, transposed, None)
                compile_ahead(kernels.expert_amax_kernel, plan, weights | integers)
                compiled += 1
            if format.clips:
                plan = launch._backward_plan(format, SHAPE, transposed, launch.BACKWARD)
                compile_ahead(kernels.clip_backward_kernel, plan, weights | amax)
                compiled += 1
    print(f"{compiled} kernels compiled for sm_{TARGET.arch} by Triton {triton.__version__}")


if __name__ == "__main__":
    sys.exit(main())
