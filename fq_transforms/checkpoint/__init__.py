"""Checkpoints of the state, and of packed weights.

    save, load              a directory: torch.distributed.checkpoint, any number of ranks, any sharding to any other
    save_file, load_file    one file to share, of a state: safetensors, one process
    read_spec               the Spec that either holds
    Stateful                within the user's own DCP checkpoint: a state with its formats, beside the model
    megatron, modelopt      modules: Megatron's distributed checkpoints, ModelOpt's keys

Each is imported when it is first used: torch.distributed.checkpoint alone takes about a second.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from fq_transforms.checkpoint import megatron, modelopt
    from fq_transforms.checkpoint.dcp import load, save
    from fq_transforms.checkpoint.safetensors import load_file, save_file
    from fq_transforms.checkpoint.stateful import Stateful
    from fq_transforms.spec import Spec

__all__ = ["Stateful", "load", "load_file", "megatron", "modelopt", "read_spec", "save", "save_file"]

_HOME = {"load": "dcp", "save": "dcp", "load_file": "safetensors", "save_file": "safetensors", "Stateful": "stateful"}


def read_spec(path: "str | os.PathLike[str]") -> "Spec":
    """The Spec stored at `path`, a directory of `save` or a file of `save_file`. No leaf is needed for it.

    Raises:
        ValueError: It is neither, or is damaged; the message names the path.
        OSError: There is nothing at the path, or it cannot be read.

    Example:
        >>> import tempfile, torch, fq_transforms as fqt
        >>> params = {"experts.0.weight": torch.ones(8, 4)}
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.FP8}))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fqt.checkpoint.save_file(f"{folder}/amax.safetensors", fq, fq.calibrate(params))
        ...     fqt.checkpoint.read_spec(f"{folder}/amax.safetensors") == fq.spec
        True
    """
    from fq_transforms.checkpoint import dcp, safetensors, storage

    return safetensors.read_spec(path) if storage.local_path(path).is_file() else dcp.read_spec(path)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in ("megatron", "modelopt"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
