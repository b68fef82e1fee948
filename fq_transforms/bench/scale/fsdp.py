"""The part `fsdp`: a Mixture of Experts under FSDP2 and expert parallelism on one mesh, as torchtitan splits it.

Masters are fp32 shards, which AdamW (fused) steps. What bf16 does beside it is the plain cast both ways, of all shards
in one call; the lens is `fq.take_grads` and `fq.fakequant(masters, state, out=model)`.
"""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.nn.functional import all_to_all_single
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F  # noqa: N812 (PyTorch's own name for it)

import fq_transforms as fqt
from fq_transforms.bench.scale import steps
from fq_transforms.bench.timing import Turn

__all__ = ["load", "train"]

RULES = {"*.experts.up_proj": steps.FORMAT, "*.experts.down_proj": steps.FORMAT}
RATE = 1e-4


class _Experts(nn.Module):
    """Stacks [E, out, in], squared ReLU between them; tokens go to `top` experts in turn, so that all have as many."""

    def __init__(self, options: Namespace, mesh: DeviceMesh) -> None:
        super().__init__()
        self.group, self.count, self.top = mesh.get_group("ep"), options.experts, options.top
        for name, shape in (("up_proj", (options.ffn, options.hidden)), ("down_proj", (options.hidden, options.ffn))):
            here = torch.empty(options.experts // mesh["ep"].size(), *shape)
            setattr(self, name, nn.Parameter(DTensor.from_local(here, mesh["ep"], [Shard(0)], run_check=False)))

    def forward(self, x_TH: Tensor, scores_TE: Tensor) -> Tensor:
        up, down = _local(dict(self.named_parameters()))
        tokens, hidden = x_TH.shape
        chosen = (torch.arange(tokens * self.top, device=x_TH.device) % self.count).view(tokens, self.top)
        sent_ECH = x_TH.repeat_interleave(self.top, 0).view(-1, self.count, hidden).transpose(0, 1)
        got = self._exchanged(sent_ECH).unflatten(0, (-1, len(up))).transpose(0, 1).flatten(1, 2)
        got = torch.relu(got @ up.mT).square() @ down.mT
        back_ECH = self._exchanged(got.unflatten(1, (-1, sent_ECH.shape[1])).transpose(0, 1).flatten(0, 1))
        back_TKH = back_ECH.transpose(0, 1).reshape(tokens, self.top, hidden)
        return (back_TKH * scores_TE.gather(1, chosen)[..., None]).sum(1)

    def _exchanged(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        return all_to_all_single(torch.empty_like(x), x, group=self.group)


class _Block(nn.Module):
    """Attention, then experts."""

    def __init__(self, options: Namespace, mesh: DeviceMesh) -> None:
        super().__init__()
        hidden: int = options.hidden
        self.heads = hidden // 64
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2))
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.router = nn.Linear(hidden, options.experts, bias=False)
        self.experts = _Experts(options, mesh)

    def forward(self, x_BLH: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x_BLH)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BLH = x_BLH + self.proj(mixed.transpose(1, 2).flatten(2))
        x_TH = self.norms[1](x_BLH).flatten(0, 1)
        return x_BLH + self.experts(x_TH, self.router(x_TH).sigmoid()).view_as(x_BLH)


def _model(options: Namespace) -> nn.Module:
    """On meta, sharded: experts over both axes of (fsdp, ep), all else over all ranks."""
    size = dist.get_world_size()
    mesh = init_device_mesh(options.device, _sizes(), mesh_dim_names=("fsdp", "ep"))
    everyone = init_device_mesh(options.device, (size,))
    with torch.device("meta"):
        blocks = [_Block(options, mesh) for _ in range(options.layers)]
        ends = nn.Embedding(steps.VOCABULARY, options.hidden), nn.Linear(options.hidden, steps.VOCABULARY, bias=False)
        model = nn.Sequential(ends[0], *blocks, ends[1]).bfloat16()
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block.experts, mesh=mesh["fsdp"], mp_policy=policy)
        assert isinstance(block.experts, FSDPModule)
        block.experts.set_gradient_divide_factor(size)  # each has the tokens of all ranks of "ep" already
        if options.device == "cpu":
            block.experts.set_force_sum_reduction_for_comms(True)  # gloo cannot divide while it sums
        fully_shard(block, mesh=everyone, mp_policy=policy)
    fully_shard(model, mesh=everyone, mp_policy=policy)
    return model


def _sizes() -> tuple[int, int]:
    """How many ranks share the experts of one rank of expert parallelism, and how many of these there are."""
    sharded = 2 if dist.get_world_size() >= 4 else 1
    return sharded, dist.get_world_size() // sharded


def _layout() -> str:
    return "FSDP2={} x EP={}".format(*_sizes())


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensor.to_local() for tensor in tensors.values()]  # pyright: ignore[reportAttributeAccessIssue] (DTensors)


@torch.no_grad()
def _fill(model: nn.Module, options: Namespace) -> None:
    """Memory and values; each expert has a magnitude of its own."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model.to_empty(device=options.device)
    torch.manual_seed(rank)
    params = dict(model.named_parameters())
    for name, here in zip(params, _local(params), strict=True):
        if "norms" in name:
            here.fill_(1.0)
        else:
            here.normal_(0, 0.02)
        if ".experts." in name and len(here):
            numbers = torch.arange(len(here), device=here.device) + rank * len(here)
            here.mul_((1 + numbers / (size * len(here)))[:, None, None])


def train(options: Namespace) -> steps.Row:
    """Steps by turns, then one more of the lens, and everything that is to be equal; its state is saved.

    Raises:
        SystemExit: Fake weights or state are not those of one GPU.
    """
    model = _model(options)
    _fill(model, options)
    params = dict(model.named_parameters())
    masters = fqt.masters(model)
    fq = fqt.transform(fqt.select(params, RULES, transposed={"*": False}))
    state = fq.calibrate(masters)
    groups = [{"params": [m for n, m in masters.items() if (".experts." in n) == of_experts]} for of_experts in (0, 1)]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)  # a group's masters are on one mesh
    ids = steps.random_ids(options)

    def backward() -> None:
        logits = model(ids[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()

    @torch.no_grad()
    def cast() -> None:
        torch._foreach_copy_(_local(params), _local(masters))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    def take() -> None:
        grads = [torch.empty_like(here) for here in _local(masters)]
        found: Any = [param.grad.to_local() for param in params.values()]  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        torch._foreach_copy_(grads, found)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        for param, master, grad in zip(params.values(), masters.values(), grads, strict=True):
            assert isinstance(master, DTensor)
            layout: Any = {"shape": master.shape, "stride": master.stride(), "run_check": False}
            master.grad = DTensor.from_local(grad, master.device_mesh, master.placements, **layout)
            param.grad = None

    def bf16() -> None:
        backward()
        take()
        optimizer.step()
        optimizer.zero_grad()
        cast()

    def lens() -> None:
        backward()
        fq.take_grads(model, masters, state)
        optimizer.step()
        optimizer.zero_grad()
        write()

    def write() -> None:
        fq.fakequant(masters, state, out=model)

    row = steps.in_turns_on_ranks(Turn(bf16, cast), Turn(lens, write), write, options)

    lens()
    whole = {key: {name: _whole(leaf) for name, leaf in leaves.items()} for key, leaves in state.items()}
    new = fq.calibrate(masters)
    for group in fq.spec.groups:
        (name,) = group.names
        fakes, leaves = steps.on_one_gpu(_whole(masters[name]).unbind(), whole[group.key])
        steps.check_equal(_whole(params[name]), torch.stack(fakes), f"fake weights of {name}")
        for leaf, wanted in leaves.items():
            steps.check_equal(_whole(new[group.key][leaf]), wanted, f"{leaf} of {name}")
    fqt.checkpoint.save(Path(options.saved) / "state", fq, state)
    if dist.get_rank() == 0:
        torch.save(whole, Path(options.saved) / "whole.pt")
    return row | steps.Row(part="fsdp", layout=_layout(), law="fp32 masters")


def load(options: Namespace) -> str:
    """Load the state of every checkpoint on these ranks, whose model is on meta; how these share it.

    Raises:
        SystemExit: It is not what was saved.
    """
    params = dict(_model(options).named_parameters())
    fq = fqt.transform(fqt.select(params, RULES, transposed={"*": False}))
    for folder in map(Path, options.saved):
        state = fqt.checkpoint.load(folder / "state", fq, like=fq.init(params), device=options.device)
        wanted = torch.load(folder / "whole.pt", map_location=options.device, weights_only=True)
        for key, leaves in state.items():
            for name, leaf in leaves.items():
                steps.check_equal(_whole(leaf), wanted[key][name], f"{name} of {key}, loaded from {folder.name}")
    return _layout()
