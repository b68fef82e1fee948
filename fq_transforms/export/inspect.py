"""What is in a folder: the roles of its tensors, which layers have them, what they are stored in, their sizes."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from fq_transforms.export.files.tables import layers_of, size
from fq_transforms.export.streaming.sources import Folder
from fq_transforms.report.report import role_of
from fq_transforms.spec import group_key
from fq_transforms.tables import preformatted, table

__all__ = ["Contents", "Role", "inspect", "is_stack"]


class Role(NamedTuple):
    """Tensors that are alike in all layers.

    Attributes:
        name: With `*` for the layer and for an expert of a list.
        layers: Numbers of the layers; none for what no layer has.
        experts: In a layer, of lists and stacks; None for what is no expert.
        shape: Of one, as the files have it; of a stack that of an expert.
        stored: A dtype, as files call it, or the format of codes.
        weights: Numbers in all of them.
        size: Bytes in the files, with scales.
    """

    name: str
    layers: tuple[int, ...]
    experts: int | None
    shape: tuple[int, ...]
    stored: str
    weights: int
    size: int


@dataclass(frozen=True, repr=False)
class Contents:
    """What is in a folder. Prints as a table.

    Attributes:
        path: The folder.
        architectures: What config.json says, as is the next.
        model_type: The family.
        method: How it is quantized, as config.json calls it; None if it is not.
        roles: By name.
        left: Names of tensors that plain weights do not need, and why.
        shards: How many files of tensors there are.
        others: The files beside them.
    """

    path: Path
    architectures: tuple[str, ...]
    model_type: str
    method: str | None
    roles: tuple[Role, ...]
    left: Mapping[str, str]
    shards: int
    others: tuple[str, ...]

    @property
    def formats(self) -> dict[str, tuple[int, int]]:
        """Dtype or format to weights and bytes, the largest first."""
        found: dict[str, tuple[int, int]] = {}
        for role in self.roles:
            weights, held = found.get(role.stored, (0, 0))
            found[role.stored] = (weights + role.weights, held + role.size)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            "path": str(self.path),
            "architectures": list(self.architectures),
            "model_type": self.model_type,
            "method": self.method,
            "roles": [role._asdict() for role in self.roles],
            "formats": {name: {"weights": w, "size": s} for name, (w, s) in self.formats.items()},
            "left": dict(self.left),
            "shards": self.shards,
            "others": list(self.others),
        }

    def __repr__(self) -> str:
        return f"Contents({str(self.path)!r}: {self.model_type}, {size(sum(role.size for role in self.roles))})"

    def _repr_html_(self) -> str:
        return preformatted(str(self))

    def __str__(self) -> str:
        method = "not quantized" if self.method is None else f"quantized: {self.method}"
        rows = [("role", "layers", "experts", "shape", "stored as", "weights", "size")]
        rows += [
            (
                role.name,
                layers_of(role.layers),
                "-" if role.experts is None else str(role.experts),
                " x ".join(map(str, role.shape)) or "1",
                role.stored,
                f"{role.weights:,}",
                size(role.size),
            )
            for role in self.roles
        ]
        totals = [("stored as", "weights", "size")]
        totals += [(name, f"{weights:,}", size(held)) for name, (weights, held) in self.formats.items()]
        if len(totals) > 2:
            totals.append(("all", f"{sum(r.weights for r in self.roles):,}", size(sum(r.size for r in self.roles))))
        lines = [
            f"{', '.join(self.architectures) or 'no architecture'} ({self.model_type}), {method}",
            table(rows, left=(0, 1, 3, 4)),
            "",
            table(totals),
        ]
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name)
        lines += [f"besides: {len(names)} tensors such as {names[0]!r}, {why}" for why, names in reasons.items()]
        shards, others = (
            f"{n} {noun}{'s' * (n != 1)}" for n, noun in ((self.shards, "shard"), (len(self.others), "other file"))
        )
        return "\n".join([*lines, f"{shards}, {others}"])


def inspect(src: str | os.PathLike[str]) -> Contents:
    """What is in a folder of safetensors, from headers and config.json alone.

    Args:
        src: As `folder` takes it, quantized or not.

    Raises:
        ValueError: `src` is no such folder.
        OSError: A file cannot be read.

    Example:
        >>> import json, tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as path:
        ...     _ = Path(path, "config.json").write_text(json.dumps({"model_type": "toy", "architectures": ["Toy"]}))
        ...     names = [f"layers.{n}.mlp.experts.{e}.w1.weight" for n in range(3) for e in range(2)]
        ...     save_file({name: torch.ones(4, 8) for name in names}, Path(path, "model.safetensors"))
        ...     print(inspect(path))
        Toy (toy), not quantized
        role                              layers  experts  shape  stored as  weights    size
        layers.*.mlp.experts.*.w1.weight  0-2           2  4 x 8  F32            192   768 B
        <BLANKLINE>
        stored as  weights   size
        F32            192  768 B
        1 shard, 0 other files
    """
    with Folder(src) as source:
        entries = source.config
        named: Any = entries.get("architectures")
        return Contents(
            path=source.path,
            architectures=tuple(map(str, named)) if isinstance(named, list) else (),
            model_type=str(entries.get("model_type") or "no model_type"),
            method=source.method,
            roles=tuple(_roles(source)),
            left=dict(source.left),
            shards=len({place.file for place in source.files.places.values()}),
            others=tuple(source.others()),
        )


def is_stack(name: str, shape: Sequence[int]) -> bool:
    """True for experts along the first dimension.

    Example:
        >>> is_stack("mlp.experts.down_proj", (8, 64, 32)), is_stack("linear_attn.conv1d.weight", (64, 1, 4))
        (True, False)
    """
    return len(shape) == 3 and group_key(name, ())[0] == name and "conv" not in name.lower()


def _roles(source: Folder) -> Iterable[Role]:
    groups: dict[tuple[str, tuple[int, ...], str], list[tuple[int, int]]] = {}
    for name, weight in source.params().items():
        key, _ = group_key(name, ())
        encoded = source.encoded.get(name)
        place = source.places(name)[0]
        stored = encoded.format if encoded else place.type.dtype
        shape = tuple(weight.shape) if encoded else place.type.shape
        groups.setdefault((key, shape, stored), []).append((prod(shape), source.size(name)))
    roles: dict[tuple[str, int, tuple[int, ...], str], list[tuple[int | None, int, int]]] = {}
    for (key, shape, stored), members in groups.items():
        role, layer = role_of(key)
        stacked = is_stack(key, shape)
        experts = shape[0] if stacked else len(members) if "*" in key else -1
        weights, held = (sum(column) for column in zip(*members, strict=True))
        alike = (role, experts, shape[1:] if stacked else shape, stored)
        roles.setdefault(alike, []).append((layer, weights, held))
    for (role, experts, shape, stored), layers in sorted(roles.items()):
        yield Role(
            role,
            tuple(sorted(layer for layer, _, _ in layers if layer is not None)),
            None if experts < 0 else experts,
            shape,
            stored,
            sum(weights for _, weights, _ in layers),
            sum(held for _, _, held in layers),
        )
