"""Parameters in the layouts that a write and a pullback meet, and tensors that must stay as they are."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import fq_transforms as fqt
from tests.cases import CORE_FORMATS, ONE_OF_EACH_LEAF, experts, name_of, same_bits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAYOUTS = ["separate", "stacked", "transposed", "flat"]


# A GPU compiles a kernel for each format, layout and pair of dtypes, so there the product is of a few formats only.
_CASES = [(format, layout, "cpu") for format in CORE_FORMATS for layout in LAYOUTS]
_CASES += [
    pytest.param(format, layout, "cuda", marks=pytest.mark.gpu)
    for format in CORE_FORMATS
    for layout in LAYOUTS
    if layout == "flat" or format in ONE_OF_EACH_LEAF
]
on_each_case = pytest.mark.parametrize(("format", "layout", "device"), _CASES, ids=name_of)


def dtypes_of(format, device):
    """All where it costs little, else the one that models have."""
    return (BF16, FP16, FP32) if device == "cpu" or format in ONE_OF_EACH_LEAF else (BF16,)


def parameters(layout="separate", dtype=torch.float32, device="cpu", seed=0):
    """Two groups of three experts, and a norm and a gain that no rule selects.

    "flat" has separate experts as views of one buffer, as data-parallel wrappers do, none at an aligned address.
    """
    w1, w2 = (experts(3, shape, dtype, seed=seed + i, device=device) for i, shape in enumerate([(24, 128), (7, 256)]))
    norm = {"norm.weight": torch.linspace(-1, 1, 131, device=device).to(dtype)}
    gain = {"gain": torch.tensor(0.3, device=device).to(dtype)}
    if layout in ("stacked", "transposed"):
        stacks = {f"experts.w{i}": torch.stack(weights) for i, weights in ((1, w1), (2, w2))}
        if layout == "transposed":
            stacks = {name: weight.mT.contiguous() for name, weight in stacks.items()}
        return norm | stacks | gain
    params = norm | {f"experts.{e}.w{i}": w for i, ws in ((1, w1), (2, w2)) for e, w in enumerate(ws)} | gain
    if layout == "flat":
        buffer = torch.cat([torch.zeros(3, dtype=dtype, device=device), *(p.flatten() for p in params.values())])
        offset = 3
        for name, p in params.items():
            params[name] = buffer[offset : offset + p.numel()].view(p.shape)
            offset += p.numel()
    return params


def transform_of(params, format, **options):
    transposed = "experts.*" if "experts.w1" in params and params["experts.w1"].shape[-1] != 128 else ()
    return fqt.transform(fqt.select(params, {"experts.*": format}, transposed=transposed), **options)


def lower(state, factor=0.7):
    """A state that clips some weights."""
    return {key: {name: leaf * factor for name, leaf in leaves.items()} for key, leaves in state.items()}


def targets(layout, dtype, device="cpu"):
    """Tensors to write to, all NaN."""
    params = parameters(layout, dtype, device)
    for p in params.values():
        p.fill_(torch.nan)
    return params


def assert_same(found, wanted):
    """The same names in the same order, and the same bits."""
    assert list(found) == list(wanted)
    different = [name for name in wanted if not same_bits(found[name].detach(), wanted[name].detach())]
    assert not different, different


def record(*trees):
    """Tensors of dicts, nested or not: values, versions and gradients, to compare later."""
    tensors = []
    for tree in trees:
        for value in tree.values():
            tensors += record(value) if isinstance(value, dict) else [(value, *_numbers(value))]
    return tensors


def _numbers(tensor):
    grad = tensor.grad if tensor.is_leaf else None
    grad_numbers = None if grad is None else (grad.clone(), grad._version)
    return tensor.detach().clone(), tensor._version, grad, grad_numbers


def assert_untouched(recorded):
    """No value, no version and no gradient is another than when they were recorded."""
    for tensor, value, version, grad, grad_numbers in recorded:
        assert tensor._version == version
        if not tensor.is_meta:
            assert torch.equal(tensor.nan_to_num(1.5), value.nan_to_num(1.5))
        assert (tensor.grad if tensor.is_leaf else None) is grad
        if grad is not None:
            assert grad._version == grad_numbers[1]
            assert torch.equal(grad.nan_to_num(1.5), grad_numbers[0].nan_to_num(1.5))


@pytest.fixture
def mesh():
    """A device mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def leaves(params):
    return {name: torch.nn.Parameter(p) for name, p in params.items()}


def written():
    """fp32 masters, a Transform, its state, and bf16 parameters to write to."""
    masters = fqt.masters(leaves(parameters(dtype=BF16)))
    fq = transform_of(masters, fqt.INT8)
    return masters, fq, fq.calibrate(masters), leaves(targets("separate", BF16))


class Tied(torch.nn.Module):
    """An embedding and a head that are one parameter, and a norm."""

    def __init__(self, dtype=BF16):
        super().__init__()
        self.embed = torch.nn.Embedding(16, 32, dtype=dtype)
        self.norm = torch.nn.LayerNorm(32, dtype=dtype)
        self.head = torch.nn.Linear(32, 16, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight


def gradients(masters, dtype=BF16):
    return {name: torch.randn(m.shape).to(m.device, dtype) for name, m in masters.items()}


def setup(format=fqt.INT8, backward="clip", layout="separate", device="cpu", **options):
    """Masters, a Transform that clips some of their weights, and its state."""
    masters = parameters(layout, device=device)
    fq = transform_of(masters, format, backward=backward, **options)
    return masters, fq, lower(fq.calibrate(masters))
