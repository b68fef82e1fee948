"""What a checkpoint can hold, a state or packed weights, and all that differs between the two.

Names, shapes, dtypes, and what makes numbers wrong are asked here; how a leaf is sharded `sharding` says by its field.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from fq_transforms.dtensor import local_values
from fq_transforms.pack import PackedTree, check_packed, packed_leaves
from fq_transforms.spec import Group, Spec, refuse_inputs
from fq_transforms.checks import UNCALIBRATED, LeafType, leaf_types
from fq_transforms.state import State, check, flatten

__all__ = ["KINDS", "PACKED", "STATE", "Kind", "Tree", "kind_of"]

Tree = TypeVar("Tree", State, PackedTree)


@dataclass(frozen=True)
class Kind:
    """A kind of tree.

    Attributes:
        name: What messages call one, and what a checkpoint says that it holds.
        noun: The same in a sentence.
        like: How to make one to load into.
        leaves: Shape and dtype of each leaf of a group, by field.
        check: Raises unless a tree fits a spec, and with `values=True` holds numbers that can be saved.
        is_place: True if a leaf has no numbers, so that it can only be loaded into.
    """

    name: str
    noun: str
    like: str
    leaves: Callable[[Group], dict[str, LeafType]]
    check: Callable[..., None]
    is_place: Callable[[Tensor], bool]

    def leaves_of(self, spec: Spec) -> dict[str, LeafType]:
        """Shape and dtype of each leaf of a tree, by flat name as `state.flatten` has them."""
        return {f"{g.key}.{field}": leaf for g in spec.all_groups for field, leaf in self.leaves(g).items()}


def kind_of(tree: Mapping[str, Any]) -> Kind:
    """The kind of a tree: packed weights if any of its groups is packed. Whether all are, its `check` says.

    Example:
        >>> import torch
        >>> kind_of({"w": {"codes": torch.zeros(1, 2, 2), "scale": torch.ones(1)}}).name
        'packed'
    """
    return PACKED if any("codes" in group for group in tree.values()) else STATE


def _check_packed(packed: PackedTree, spec: Spec, *, values: bool = True) -> None:
    """Any byte is a code, and NaN marks a granule of NaN: numbers have to be there, and nothing else."""
    refuse_inputs(spec, "packed weights")
    check_packed(packed, spec)
    for name, leaf in flatten(packed).items():
        if values and leaf.is_meta:
            raise ValueError(f"packed {name!r}: found a meta tensor, wanted numbers; pack weights that are not on meta")


def _is_uncalibrated(leaf: Tensor) -> bool:
    return leaf.is_meta or bool((local_values(leaf) == UNCALIBRATED).all())


STATE = Kind("state", "a state", "fq.init(params)", leaf_types, check, _is_uncalibrated)
PACKED = Kind(
    "packed",
    "packed weights",
    "fq.pack(params, fq.init(params)) of meta parameters",
    packed_leaves,
    _check_packed,
    lambda leaf: leaf.is_meta,
)
KINDS = {kind.name: kind for kind in (STATE, PACKED)}
