"""A group's format as Megatron's checkpoints keep it: JSON in FORMAT_BYTES bytes, one a layer."""

import json
from typing import Any

import torch
from torch import Tensor

from fq_transforms.checkpoint.megatron_shards import FORMAT_BYTES
from fq_transforms.formats import Format
from fq_transforms.spec import Group

__all__ = ["check_format", "encode"]


def encode(format: Format) -> Tensor:
    """The format's numbers as JSON in FORMAT_BYTES bytes, filled up with spaces."""
    text = format.to_json().encode()
    if len(text) > FORMAT_BYTES:
        raise ValueError(
            f"format {format.name!r}: found {len(text)} bytes of JSON, wanted at most {FORMAT_BYTES}; shorten it"
        )
    return torch.frombuffer(bytearray(text.ljust(FORMAT_BYTES)), dtype=torch.uint8)


def check_format(group: Group, stored: Any) -> None:
    """Raise ValueError unless the stored bytes are the group's format."""
    text = (
        bytes(stored.flatten().tolist())
        if isinstance(stored, Tensor) and stored.dtype == torch.uint8
        else repr(stored).encode()
    )
    try:
        found = Format.from_dict(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"group {group.key!r}: found {text[:40]!r} for its format in the checkpoint, wanted the JSON of a Format"
        ) from error
    if found != group.format:
        # Two formats of one name differ in a number only.
        both = (found.name, group.format.name) if found.name != group.format.name else (found, group.format)
        raise ValueError(
            f"group {group.key!r}: found format {both[0]} in the checkpoint, the spec wants {both[1]}; select the "
            "format that it was saved with, or calibrate anew"
        )
