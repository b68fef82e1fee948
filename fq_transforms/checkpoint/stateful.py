"""A state within the user's own checkpoint: what `torch.distributed.checkpoint` asks of a model, asked of a state.

    kept = Stateful(fq, state)
    dcp.save({"model": model, "optimizer": optimizer, "fq": kept}, checkpoint_id=path)

    kept = Stateful(fq, fq.init(params))
    dcp.load({"model": model, "optimizer": optimizer, "fq": kept}, checkpoint_id=path)
    state = kept.tree

A bare state goes into `dcp.save` as well: its nested dicts are those of a state dict. What it lacks is its formats, so
that a load in another one is not noticed. Here the format of each group lies beside its leaves.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fq_transforms.checkpoint.manifest import FORMAT, check_format, encode_format, kind_of
from fq_transforms.pack import PackedTree
from fq_transforms.state import State, flatten
from fq_transforms.transform import Transform

__all__ = ["Stateful"]


class Stateful:
    """A state or packed weights with their formats, for `dcp.save`, `dcp.async_save` and `dcp.load`.

    Leaves are DTensors, or plain tensors that are the same on all ranks, or of groups that no other rank has: of what
    ranks hold under one name, DCP stores one. `checkpoint.save` compares them.

    Args:
        fq: What the tree must fit.
        tree: A state from `calibrate`, or packed weights; to load, `fq.init(params)`, or packed weights of any values.

    Attributes:
        fq: As given.
        tree: As given; after a load that was not refused, the loaded one, of new tensors.

    Source: `torch.distributed.checkpoint.stateful`, PyTorch 2.13.

    Example:
        >>> import tempfile, warnings, torch, torch.distributed.checkpoint as dcp, fq_transforms as fqt
        >>> params = {"experts.0.weight": torch.ones(8, 4), "experts.1.weight": torch.zeros(8, 4)}
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}))
        >>> kept = Stateful(fq, fq.init(params))
        >>> with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        ...     _ = dcp.save({"fq": Stateful(fq, fq.calibrate(params))}, checkpoint_id=folder)
        ...     dcp.load({"fq": kept}, checkpoint_id=folder)
        >>> kept.tree
        {'experts.*.weight': {'amax': tensor([1., 0.])}}
    """

    def __init__(self, fq: Transform, tree: State | PackedTree) -> None:
        kind_of(tree).check(tree, fq.spec, values=False)
        self.fq, self.tree = fq, tree

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Of each group a copy of the leaves, since DCP loads into what it is given, and its format as bytes.

        Raises:
            ValueError: A value cannot be saved. A tree without any values is one to load into.
        """
        kind, leaves = kind_of(self.tree), flatten(self.tree)
        kind.check(self.tree, self.fq.spec, values=any(kind.has_values(leaf) for leaf in leaves.values()))
        return {
            group.key: {name: leaves[f"{group.key}.{name}"].detach().clone() for name in kind.leaves(group)}
            | {FORMAT: encode_format(group.format)}
            for group in self.fq.spec.all_groups
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the loaded leaves.

        Raises:
            KeyError: A group or a format is missing.
            ValueError: A group was saved in another format; an amax is NaN, infinite, negative or uncalibrated.
        """
        kind = kind_of(self.tree)
        tree: dict[str, dict[str, Tensor]] = {}
        for group in self.fq.spec.all_groups:
            entry = state_dict.get(group.key)
            if not isinstance(entry, Mapping) or FORMAT not in entry:
                raise KeyError(
                    f"group {group.key!r} or its format is not in the checkpoint, wanted what Stateful saved"
                )
            check_format(group, entry[FORMAT])
            tree[group.key] = {name: leaf for name, leaf in entry.items() if name != FORMAT}
        kind.check(tree, self.fq.spec)
        self.tree = tree
