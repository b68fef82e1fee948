"""What a checkpoint says of itself in DCP's metadata: the Spec, the kind of tree, and its leaves."""

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod

from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from fq_transforms.checkpoint.trees import KINDS, STATE, Kind
from fq_transforms.dtensor import local_values
from fq_transforms.spec import Spec
from fq_transforms.checks import LeafType

__all__ = [
    "check_complete",
    "check_kind",
    "check_stored_leaves",
    "describe",
    "kind_in",
    "may_replace",
    "spec_in",
    "squeezed",
    "unsqueezed",
]

# zlib of the spec's JSON; and the name of the kind, without which a checkpoint is of a state.
SPEC, KIND = "fq_transforms.spec", "fq_transforms.kind"


def describe(spec: Spec, kind: Kind) -> dict[str, bytes | str]:
    """What goes into the `planner_data` of DCP's metadata."""
    return {SPEC: squeezed(spec), KIND: kind.name}


def squeezed(spec: Spec) -> bytes:
    """A spec in few bytes; `unsqueezed` leads back.

    Example:
        >>> unsqueezed(squeezed(Spec(())))
        Spec(groups=(), skipped=(), inputs=())
    """
    return zlib.compress(spec.to_json().encode(), 9)


def unsqueezed(content: bytes) -> Spec:
    """The spec that `squeezed` made small. Raises ValueError if the bytes are not one."""
    try:
        return Spec.from_json(zlib.decompress(content).decode())
    except (zlib.error, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"not a stored Spec: {error}") from error


def spec_in(metadata: Metadata) -> Spec:
    """The stored spec. Raises ValueError if there is none."""
    if not _has_spec(metadata):
        raise ValueError("found a checkpoint without a Spec, wanted one that fq_transforms.checkpoint.save wrote")
    return unsqueezed(metadata.planner_data[SPEC])


def kind_in(metadata: Metadata) -> Kind:
    """The kind of tree that is stored. Raises ValueError for one that this version does not know."""
    name = metadata.planner_data.get(KIND, STATE.name)
    if name not in KINDS:
        raise ValueError(f"found a checkpoint of {name!r}, wanted one of {list(KINDS)}")
    return KINDS[name]


def may_replace(metadata: Metadata, kind: Kind) -> bool:
    """True for a checkpoint of the same kind, False for another program's. Raises ValueError for another kind."""
    if not _has_spec(metadata):
        return False
    if (found := kind_in(metadata)) is not kind:
        raise ValueError(f"found a checkpoint of {found.noun}, which {kind.noun} would replace")
    return True


def check_kind(metadata: Metadata, wanted: Kind) -> None:
    """Raise ValueError unless the wanted kind of tree is stored."""
    if (found := kind_in(metadata)) is not wanted:
        raise ValueError(
            f"found a checkpoint of {found.noun}, wanted {wanted.noun} as `like` is; to load {found.noun} give "
            f"like={found.like}"
        )


def check_stored_leaves(metadata: Metadata, wanted: Mapping[str, LeafType]) -> None:
    """Raise ValueError unless the stored leaves have exactly these names, shapes and dtypes."""
    found = metadata.state_dict_metadata
    for which, names in (("missing", wanted.keys() - found.keys()), ("unknown", found.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{which} {len(names)} of {len(wanted)} leaves: {sorted(names)[:4]}")
    for name, (shape, dtype) in wanted.items():
        leaf = found[name]
        if not isinstance(leaf, TensorStorageMetadata):
            raise ValueError(f"leaf {name!r}: found bytes, wanted a tensor")
        if tuple(leaf.size) != shape or leaf.properties.dtype != dtype:
            raise ValueError(f"leaf {name!r}: found {tuple(leaf.size)} {leaf.properties.dtype}, wanted {shape} {dtype}")


def check_complete(items: Iterable[ReadItem], leaves: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless all numbers of this rank's part of each leaf will be read."""
    found: Counter[str] = Counter()
    for item in items:
        found[item.dest_index.fqn] += prod(item.lengths)
    for name, leaf in leaves.items():
        wanted = local_values(leaf).numel()
        if found[name] != wanted:
            raise ValueError(
                f"leaf {name!r}: found {found[name]} of the {wanted} numbers of this part, wanted all; the checkpoint "
                "is incomplete"
            )


def _has_spec(metadata: Metadata) -> bool:
    return isinstance(metadata.planner_data, dict) and SPEC in metadata.planner_data
