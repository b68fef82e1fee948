"""`python -m fq_transforms.bench gptq`: GPTQ of all experts of a layer, Hessians included, against its own products.

    products    x^T x, one Cholesky factor, one triangular inverse, and the updates that follow each block of columns,
                by PyTorch in fp32, batched over the experts: what the published loop is made of
    work        the operations of `fq_transforms.gptq`, counted, at the chip's peak of their kind, and its bytes at
                `copy_`'s bandwidth: what no implementation can be faster than

A peer's loop over experts is timed on some of them and counted for all.
"""

import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fq_transforms as fqt
from fq_transforms.formats import Format
from fq_transforms.methods import Mse
from fq_transforms.ops.hessian.launch import add_products
from fq_transforms.ops.quantize.autograd import fake_quantize

__all__ = ["page", "rows"]

Row = dict[str, Any]

DEVICE = "cuda"
# A layer of Qwen3-30B-A3B: experts, out and in of gate and of up, and tokens per expert.
EXPERTS, INNER, HIDDEN, TOKENS = 128, 768, 2048, 512
FORMATS = [fqt.INT4_BLOCK128, fqt.NVFP4_STATIC]
# Columns that the published loop, and ModelOpt's, rounds before a product.
BLOCK = 128
ROUNDS, PEER_EXPERTS = 3, 2
LIMITS = {"products": 2.5, "ModelOpt": 20.0}
# H200, operations per second: fp32, dense bf16 and fp64 on tensor cores, by NVIDIA's data sheet.
PEAKS = {"fp32": 67e12, "bf16": 989e12, "fp64": 67e12}


def rows(progress: Callable[..., Any], *, peers: bool = True) -> Generator[Row, None, None]:
    """One row per format.

    Raises:
        SystemExit: The weights are not on the grid, or an expert's error is larger than by rounding to the nearest.
    """
    layer = _Layer()
    products = layer.products_ms()
    for format in progress(FORMATS, desc="gptq"):
        fq = fqt.transform(layer.spec_of(format), method=Mse())
        state = fq.calibrate(layer.params)
        hessians = layer.hessians()
        new = fqt.gptq(fq, layer.params, state, hessians)
        _check(fq, layer.params, new, state, hessians)
        hessian_ms = _ms(layer.hessians)
        gptq_ms = _ms(lambda fq=fq, state=state, hessians=hessians: fqt.gptq(fq, layer.params, state, hessians))
        row: Row = {
            "format": format.name,
            "hessian_ms": hessian_ms,
            "gptq_ms": gptq_ms,
            **{f"{name}_ms": value for name, value in products.items()},
            "ratio": (hessian_ms + gptq_ms) / sum(products.values()),
            "work_ms": 1e3 * sum(work_s().values()),
            **{f"work_{name}_ms": 1e3 * value for name, value in work_s().items()},
        }
        for name, is_fused in {"modelopt": False, "fused": True}.items():
            if peers and (not is_fused or format.scale == "e4m3"):
                peer_ms = layer.modelopt_ms(format, state, is_fused=is_fused)
                if peer_ms is not None:
                    row |= {f"{name}_ms": peer_ms, f"over_{name}": peer_ms / (hessian_ms + gptq_ms)}
        yield row


def work_s() -> dict[str, float]:
    """Seconds that the work takes at the chip's peaks, by kind.

    Example:
        >>> {kind: f"{1e3 * value:.1f} ms" for kind, value in work_s().items()}
        {'Hessians': '0.3 ms', 'factors': '5.8 ms', 'updates': '14.6 ms', 'comparison': '29.2 ms'}
    """
    cubes = HIDDEN**3 + INNER**3
    weights = 2 * INNER * HIDDEN**2 + HIDDEN * INNER**2  # of gate, up and down, times `in`
    return {
        "Hessians": EXPERTS * TOKENS * (HIDDEN**2 + INNER**2) / PEAKS["bf16"],  # half of it, as it is symmetric
        "factors": EXPERTS * cubes / 3 / PEAKS["fp32"],
        "updates": EXPERTS * weights / PEAKS["fp32"],  # half of the products with whole matrices
        "comparison": EXPERTS * 2 * weights / PEAKS["fp64"],  # with the error by rounding, by whole matrices
    }


class _Layer:
    """Weights and inputs of a layer, inputs correlated as those of a model are."""

    def __init__(self) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE)

        shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
        self.params = {
            f"experts.{e}.{role}.weight": (0.02 * drawn(*shape)).bfloat16()
            for role, shape in shapes.items()
            for e in range(EXPERTS)
        }
        self.inputs: list[Tensor] = []
        for side in (HIDDEN, INNER):
            spread = torch.logspace(0, -1, side, device=DEVICE)[:, None] * drawn(side, side) / side**0.5
            self.inputs.append((drawn(EXPERTS * TOKENS, side) @ spread).bfloat16())
        self.experts = torch.arange(EXPERTS, device=DEVICE).repeat(TOKENS)

    def spec_of(self, format: Format) -> fqt.Spec:
        return fqt.select(self.params, {"*": format})

    def hessians(self) -> dict[str, dict[str, Tensor]]:
        """As `input_hessians` has them of one batch."""
        tokens = torch.full((EXPERTS,), float(TOKENS), dtype=torch.float64, device=DEVICE)
        found: list[dict[str, Tensor]] = []
        for x in self.inputs:
            sums = torch.zeros((EXPERTS, x.shape[1], x.shape[1]), device=DEVICE)
            add_products(sums, x, self.experts)
            found.append({"hessian": sums.div_(TOKENS), "tokens": tokens})
        return {
            f"experts.*.{role}.weight": found[role == "down_proj"] for role in ("gate_proj", "up_proj", "down_proj")
        }

    def products_ms(self) -> dict[str, float]:
        """The floors, in milliseconds."""
        found = {"x_x": 0.0, "cholesky": 0.0, "inverse": 0.0, "updates": 0.0}
        for x, rows in zip(self.inputs, (2 * INNER, HIDDEN), strict=True):
            side = x.shape[1]
            own = x.float().view(TOKENS, EXPERTS, side).transpose(0, 1).contiguous()
            found["x_x"] += _ms(partial(torch.bmm, own.mT, own))
            hessian = torch.bmm(own.mT, own) / TOKENS
            hessian.diagonal(dim1=1, dim2=2).add_(0.01 * hessian.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
            found["cholesky"] += _ms(partial(torch.linalg.cholesky, hessian))
            lower = torch.linalg.cholesky(hessian)
            eye = torch.eye(side, device=DEVICE).expand_as(lower)
            found["inverse"] += _ms(partial(torch.linalg.solve_triangular, lower, eye, upper=False))
            errors = torch.randn((EXPERTS, rows, side), device=DEVICE)

            def updates(errors: Tensor = errors, lower: Tensor = lower, side: int = side) -> None:
                for first in range(BLOCK, side, BLOCK):
                    torch.bmm(errors[..., first - BLOCK : first], lower[:, first - BLOCK : first, first:])

            found["updates"] += _ms(updates)
        return found

    def modelopt_ms(self, format: Format, state: fqt.state.State, *, is_fused: bool) -> float | None:
        """ModelOpt's loop over experts: Hessian, inverse, columns, as by default or by its kernel of NVFP4's columns.

        None if it is not installed.
        """
        try:
            from modelopt.torch.quantization.utils import calib_utils  # pyright: ignore[reportMissingImports]
        except ImportError:
            return None
        peer: Any = calib_utils

        def one(key: str, name: str, e: int, x: Tensor) -> None:
            weight = self.params[name].float()
            hessian = torch.zeros((x.shape[1], x.shape[1]), device=DEVICE)
            hessian, _ = peer.update_hessian(x, hessian, 0)
            inverse = peer.compute_hessian_inverse(hessian, weight, 0.01)
            own = {name: leaf[e] for name, leaf in state[key].items()}
            if is_fused:
                scale = own["global_amax"].item() / (6 * 448)
                peer.gptq_blockwise_update_fused_scalar(weight, own["amax"], scale, inverse, BLOCK, 16)
            else:
                leaves = {name: leaf[None] for name, leaf in own.items()}

                def quantized(weight: Tensor) -> Tensor:
                    return fake_quantize([weight], leaves["amax"], leaves.get("global_amax"), format=format)[0]

                peer.gptq_blockwise_update(weight, inverse, BLOCK, quantized)

        def some() -> None:
            for e in range(PEER_EXPERTS):
                for role in ("gate_proj", "up_proj", "down_proj"):
                    x = self.inputs[role == "down_proj"].view(TOKENS, EXPERTS, -1)[:, e].contiguous()
                    one(f"experts.*.{role}.weight", f"experts.{e}.{role}.weight", e, x)

        some()
        return _ms(some, rounds=1) * EXPERTS / PEER_EXPERTS


def _check(
    fq: fqt.Transform,
    params: dict[str, Tensor],
    new: dict[str, Tensor],
    state: fqt.state.State,
    hessians: dict[str, dict[str, Tensor]],
) -> None:
    fakes, nearest = fq.fakequant(new, state), fq.fakequant(params, state)
    for group in fq.spec.groups:
        for e, name in enumerate(group.names):
            hessian = hessians[group.key]["hessian"][e].double()
            losses = [((d @ hessian) * d).sum() for d in ((params[name] - q[name]).double() for q in (new, nearest))]
            if not torch.equal(fakes[name], new[name]) or losses[0] > losses[1] * (1 + 2**-6):  # bf16 is rounded to
                raise SystemExit(
                    f"{fq.spec.groups[0].format.name}: {name!r} is off the grid, or worse than the nearest"
                )


def _ms(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median time of one call, waited for."""
    call()
    times: list[float] = []
    for _ in range(rounds):
        _wait()
        start = time.perf_counter()
        call()
        _wait()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def page(environment: dict[str, str], rows: Sequence[Row]) -> str:
    """The rows as a page, which says how the floors are made."""
    facts = ", ".join(f"{key} {value}" for key, value in environment.items())
    names = ["x_x", "cholesky", "inverse", "updates"]
    header = ["format", "Hessians ms", "gptq ms", *(f"{name} ms" for name in names), "over the products", "work ms"]
    of_peers = ["ModelOpt ms", "times ours", "its kernel ms", "times ours"]
    lines = [[*header, *of_peers], ["---"] * (len(header) + len(of_peers))]
    for row in rows:
        products = [f"{row[f'{name}_ms']:.1f}" for name in names]
        above = " (above the limit)" * (row["ratio"] > LIMITS["products"])
        peer: list[str] = []
        for name in ("modelopt", "fused"):
            peer += [f"{row[f'{name}_ms']:.0f}", f"{row[f'over_{name}']:.1f}"] if f"{name}_ms" in row else ["-", "-"]
        ours = [f"{row['hessian_ms']:.1f}", f"{row['gptq_ms']:.1f}"]
        lines.append([row["format"], *ours, *products, f"{row['ratio']:.2f}{above}", f"{row['work_ms']:.1f}", *peer])
    work = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in work_s().items())
    return "\n".join(
        [
            f"# GPTQ of a layer's experts, {environment['date']}",
            "",
            f"`python -m fq_transforms.bench gptq`: {facts}. {EXPERTS} experts of a Qwen3-30B-A3B layer, gate and up "
            f"[{INNER}, {HIDDEN}], down [{HIDDEN}, {INNER}], {TOKENS} tokens per expert, bf16. Whole calls, waited "
            f"for, median of {ROUNDS}. All weights were on the grid, and no expert's error larger than by rounding to "
            "the nearest, before anything was timed.",
            "",
            "Products: x^T x, one batched Cholesky, one triangular inverse, the updates behind each block of "
            f"{BLOCK} columns, by PyTorch in fp32; the limit is {LIMITS['products']} times their sum. Work: the "
            f"operations of ours at the data sheet's peaks: {work}. ModelOpt's loop was timed on {PEER_EXPERTS} "
            f"experts and counted for {EXPERTS}, Hessians included, as it is by default and with its kernel for "
            "NVFP4's columns.",
            "",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
        ]
    )
