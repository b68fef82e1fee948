"""What `value_and_grad` and `layerwise` refuse: modules whose parameters something else puts in place or keeps."""

from collections.abc import Iterable

import torch
from torch.nn import Module

from fq_transforms.ops import private
from fq_transforms.spec import Spec

__all__ = ["OTHER_WAY", "check_eager", "check_plain", "check_unparametrized"]

OTHER_WAY = (
    "train the model as it is, with fq.fakequant(masters, state, out=model) before the step and "
    "fq.take_grads(model, masters, state) after it"
)

# By the package and the name of a class, of which the module's own may derive.
_WRAPPERS = {
    ("torch", "DistributedDataParallel"): "PyTorch's DDP, which reduces the gradients of its own parameters",
    ("torch", "DDP"): "PyTorch's replicate, which reduces the gradients of its own parameters",
    ("torch", "DataParallel"): "which copies its parameters to each device",
    ("torch", "FSDPModule"): "whose parameters FSDP2 gathers and shards around forward",
    ("torch", "FullyShardedDataParallel"): "whose parameters FSDP gathers and shards around forward",
    ("torch", "OptimizedModule"): "which torch.compile has compiled",
    ("peft", "ParamWrapper"): "PEFT's target_parameters, which puts parameters in place around forward",
}


def check_plain(name: str, modules: Iterable[Module]) -> None:
    """Raise ValueError for a module that does not compute with just what hangs in it as its parameters."""
    for module in modules:
        if (reason := _wrapper(module)) is not None:
            raise ValueError(f"{name}: found {type(module).__name__}, {reason}, wanted a plain module; or {OTHER_WAY}")


def _wrapper(module: Module) -> str | None:
    for base in type(module).__mro__:
        if (reason := _WRAPPERS.get((base.__module__.partition(".")[0], base.__name__))) is not None:
            return reason
    if isinstance(module, torch.jit.ScriptModule):
        return "which TorchScript has compiled"
    is_compiled = hasattr(module.forward, "_torchdynamo_orig_callable")
    if is_compiled and getattr(module.forward, "_torchdynamo_disable", False):  # of torch.compiler.disable
        is_compiled = False
    if getattr(module, "_compiled_call_impl", None) or is_compiled:
        return "which torch.compile has compiled"
    # A hook that does not say whether it offloads, such as CpuOffload, moves weights.
    if hasattr(module, "_hf_hook") and getattr(module._hf_hook, "offload", True):
        return "whose parameters accelerate's hook puts in place around forward"
    return None


def check_eager(layer: Module) -> None:
    """Raise ValueError for a layer that runs, or whose weight is read, within what torch.compile has compiled."""
    if private.is_in_compiled():
        raise ValueError(
            f"layer {type(layer).__name__}: found torch.compile around it within layerwise, wanted eager mode; or "
            f"{OTHER_WAY}"
        )


def check_unparametrized(spec: Spec) -> None:
    """Raise ValueError for weights that torch.nn.utils.parametrize makes others of, which would be off the grid."""
    for name in (name for group in spec.groups for name in group.names):
        if "parametrizations" in name.split("."):
            raise ValueError(
                f"parameter {name!r}: found what torch.nn.utils.parametrize computes a weight from, wanted the weight "
                "that the layer computes with; torch.nn.utils.parametrize.remove_parametrizations makes it one"
            )
