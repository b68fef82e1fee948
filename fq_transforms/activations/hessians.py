"""Second moments of the inputs of each expert, whole: what GPTQ weighs the errors of weights by."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from fq_transforms.activations.observe import Forward, observe
from fq_transforms.activations.products import Use
from fq_transforms.activations.second_moments import Unseen, check_policy, check_unseen, inputs_of
from fq_transforms.distributed import check_group, said_by_all, tell_failure
from fq_transforms.ops.hessian.launch import add_products
from fq_transforms.spec import Inputs, Spec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["input_hessians"]

# Inputs that are held until another is seen: one, and another between two layers that see the first, as in MLA.
MOST_WAITING = 2


def input_hessians(
    params: Mapping[str, Tensor],
    batches: Any,
    *,
    spec: Spec,
    model: Module,
    forward: Forward | None,
    unseen: Unseen,
    group: "ProcessGroup | None",
) -> dict[str, dict[str, Tensor]]:
    """`Transform.input_hessians`, with the spec of the Transform."""
    check_group(group)
    wanted = inputs_of(spec)
    sums: dict[str, _Sums] = {}
    try:
        check_policy(unseen)
        if wanted:
            kind = partial(_Products, _Empty())
            found = observe(params, batches, wanted, kind, model=model, forward=forward, caller="input_hessians")
            sums = {key: one.sums() for key, one in found.items()}
    except Exception as error:
        tell_failure(group, error)
        raise
    ids = [id(sums[inputs.key]) for inputs in wanted]
    shared = said_by_all(group, [ids.index(one) for one in ids], "input_hessians")
    if group is not None:
        sums = _over(group, wanted, sums, shared)
    done: dict[int, dict[str, Tensor]] = {}
    for inputs in wanted:
        own = sums[inputs.key]
        if id(own) not in done:
            done[id(own)] = _means(inputs, own, unseen)
    return {inputs.key: dict(done[id(sums[inputs.key])]) for inputs in wanted}


class _Sums:
    """Sums of x x^T and numbers of tokens, of groups that have seen the same inputs."""

    def __init__(self, hessian: Tensor, tokens: Tensor) -> None:
        self.hessian, self.tokens = hessian, tokens

    @staticmethod
    def of(inputs: Inputs, device: torch.device) -> "_Sums":
        side = inputs.shape[1]
        return _Sums(
            torch.zeros((inputs.experts, side, side), dtype=torch.float32, device=device),
            torch.zeros(inputs.experts, dtype=torch.float64, device=device),
        )

    def copy(self) -> "_Sums":
        return _Sums(self.hessian.clone(), self.tokens.clone())


class _Seen:
    """An input that one group has seen, and others may be about to see, with the groups that have.

    It is a copy: the model may write to its own before these groups are known, as `x.relu_()` after a layer does.
    """

    def __init__(self, use: Use, x: Tensor, by: "_Products") -> None:
        self.use, self.by = use, [by]
        self.x = x.clone(memory_format=torch.contiguous_format)

    def is_seen_again(self, use: Use, x: Tensor) -> bool:
        """True if it has the same values, for the same experts."""
        one, other = self.use.experts, use.experts
        if isinstance(one, int) or isinstance(other, int):
            is_same = isinstance(one, int) and isinstance(other, int) and one == other
        else:
            is_same = torch.equal(one, other)
        return is_same and x.dtype == self.x.dtype and torch.equal(x, self.x)


class _Node:
    """Groups that have seen the same so far, what that was, and what the first of them has seen since."""

    def __init__(self, sums: _Sums | None, members: "list[_Products]") -> None:
        self.sums, self.members = sums, members
        self.next: _Seen | None = None
        for member in members:
            member.node = self

    @torch.inference_mode(False)  # within which a model may run, and tensors made are not written to outside
    @torch.no_grad()
    def settle(self) -> None:
        """Add what was seen next; those that have not seen it go on by themselves."""
        seen, self.next = self.next, None
        if seen is None:
            return
        left = [member for member in self.members if member not in seen.by]
        if left:
            rest = _Node(None if self.sums is None else self.sums.copy(), left)
            self.members = seen.by
            if rest.sums is None:  # whom groups that have yet to begin may go with
                left[0].empty.put(rest)
        if self.sums is None:
            self.sums = _Sums.of(seen.use.inputs, seen.x.device)
        experts = seen.use.experts
        x = seen.x.reshape(-1, seen.x.shape[-1])
        experts = experts if isinstance(experts, int) else experts.reshape(-1).long()
        add_products(self.sums.hessian, x, experts)
        if isinstance(experts, int):
            self.sums.tokens[experts] += len(x)
        else:
            self.sums.tokens += experts.bincount(minlength=len(self.sums.tokens) + 1)[:-1]


class _Empty(dict[tuple[int, int], _Node]):
    """Groups that have seen nothing yet, by experts and `in`; and what waits to be added, of all groups."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[_Node] = []

    def wait(self, node: _Node) -> None:
        """Others may see what the node has seen, but no inputs of a whole model are held for them."""
        if node in self.waiting:
            self.waiting.remove(node)
        self.waiting.append(node)
        if len(self.waiting) > MOST_WAITING:
            self.waiting.pop(0).settle()

    def put(self, node: _Node) -> None:
        self[_size(node.members[0])] = node

    def add(self, member: "_Products") -> None:
        node = self.get(_size(member))
        if node is None or node.sums is not None:
            self.put(_Node(None, [member]))
        else:
            node.members.append(member)
            member.node = node


def _size(member: "_Products") -> tuple[int, int]:
    return member.inputs.experts, member.inputs.shape[1]


class _Products:
    """Sums of x x^T of a group; groups that see the same inputs, as gate and up do, share them. See `Seen`."""

    measure = "sum of squares"
    node: _Node

    def __init__(self, empty: _Empty, inputs: Inputs, device: torch.device) -> None:
        self.inputs, self._device, self.empty = inputs, device, empty
        empty.add(self)

    def add(self, use: Use, x: Tensor) -> None:
        seen = self.node.next
        # By another group, or by this one with a further part of a weight.
        if seen is not None and (self not in seen.by or not use.is_first) and seen.is_seen_again(use, x):
            if self not in seen.by:
                seen.by.append(self)
            return
        if seen is not None:
            self.node.settle()
        self.node.next = _Seen(use, x, self)
        self.empty.wait(self.node)

    def to(self, device: torch.device) -> "_Products":
        self._device = device
        return self

    def sizes(self) -> Tensor:
        return self.sums().hessian.diagonal(dim1=1, dim2=2).sum(1)

    def sums(self) -> _Sums:
        """Those of its node, on its device."""
        self.node.settle()
        if self.node.sums is None:
            self.node.sums = _Sums.of(self.inputs, self._device)
        sums = self.node.sums
        if sums.hessian.device != self._device:
            self.node.sums = sums = _Sums(sums.hessian.to(self._device), sums.tokens.to(self._device))
        return sums


def _over(
    group: "ProcessGroup", wanted: Sequence[Inputs], sums: Mapping[str, _Sums], shared: Sequence[Sequence[int]]
) -> dict[str, _Sums]:
    """The sums of all ranks. Groups share them that do on each rank: one may have seen no token of an expert."""
    device = torch.device("cpu" if "cpu:" in torch.distributed.get_backend_config(group) else "cuda")
    found: dict[tuple[int, ...], _Sums] = {}
    result: dict[str, _Sums] = {}
    for inputs, labels in zip(wanted, zip(*shared, strict=True), strict=True):
        if labels not in found:
            of_rank = sums[inputs.key]
            leaves = [leaf.to(device, copy=True) for leaf in (of_rank.hessian, of_rank.tokens)]
            for leaf in leaves:
                torch.distributed.all_reduce(leaf, torch.distributed.ReduceOp.SUM, group)
            found[labels] = _Sums(*(leaf.to(of_rank.hessian.device) for leaf in leaves))
        result[inputs.key] = found[labels]
    return result


def _means(inputs: Inputs, sums: _Sums, unseen: Unseen) -> dict[str, Tensor]:
    """The leaves of a group: its Hessians are made of the sums, in place."""
    hessian, tokens = sums.hessian, sums.tokens
    hessian /= tokens.clamp(min=1.0)[:, None, None]
    is_unseen = tokens == 0
    if numbers := check_unseen(inputs, is_unseen, unseen, "input_hessians"):
        if unseen == "ones":
            hessian[numbers] = torch.eye(hessian.shape[-1], device=hessian.device)
        else:
            shares = (~is_unseen / (~is_unseen).sum()).float()
            with torch.autocast(hessian.device.type, enabled=False):  # which would round it to bf16
                hessian[numbers] = torch.einsum("e,eij->ij", shares, hessian)
    return {"hessian": hessian, "tokens": tokens}
