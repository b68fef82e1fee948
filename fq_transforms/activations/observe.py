"""A model run on batches, to see what its selected weights are multiplied with: the loop of all calibration by data."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Module

from fq_transforms.activations.products import Use, products
from fq_transforms.checks import DTYPES, plain_weights_of, refuse_compiled
from fq_transforms.in_use import InUse
from fq_transforms.ops.private import is_mapped
from fq_transforms.spec import Group, Inputs

__all__ = ["Forward", "Seen", "check_input", "each_batch", "observe", "run_batch"]

Forward = Callable[[Callable[..., Any], Any], Any]


class Seen(Protocol):
    """What is kept of the inputs of a group, on one device; made by `kind(inputs, device)`, and a fold over batches.

    Attributes:
        inputs: The group.
        measure: What `sizes` are, in words.
    """

    inputs: Inputs
    measure: str

    def add(self, use: Use, x: Tensor) -> None:
        """Take in x [..., in], which has rows, of the experts that `use` names."""
        ...

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        ...

    def sizes(self) -> Tensor:
        """A number an expert, [E]: NaN or infinite exactly if something that it saw was."""
        ...


SeenType = TypeVar("SeenType", bound=Seen)


def observe(
    params: Mapping[str, Tensor],
    batches: Any,
    wanted: Sequence[Inputs],
    kind: Callable[[Inputs, torch.device], SeenType],
    *,
    model: Module | None,
    forward: Forward | None,
    caller: str,
) -> dict[str, SeenType]:
    """Run the model on the batches, unquantized and without gradients; what each group has seen, by its key.

    Args:
        params: Names to tensors; may hold more than `wanted` names.
        batches: One batch or many, see `Transform.calibrate`.
        wanted: The groups, at least one.
        kind: What is kept of each.
        model: Whose parameters `params` are. What it writes into buffers is lost.
        forward: See there.
        caller: The function that errors name.

    Raises:
        KeyError: A parameter is missing.
        ValueError: As `Transform.calibrate` says of inputs.
    """
    if model is None:
        raise ValueError(f"model: found None, wanted the module that reads {wanted[0].names[0]!r}, for its inputs")
    refuse_compiled(caller, "run the model on batches before")
    for inputs in wanted:
        plain_weights_of(params, inputs)
    # Calibration changes nothing: what a layer writes into its buffers as it runs goes into copies.
    values = {name: buffer.clone() for name, buffer in model.named_buffers()} | dict(params)
    ran: set[str] = set()
    in_use = InUse(caller, model.named_modules(), nests=True)
    found: dict[str, SeenType] = {}
    number = -1
    for number, one in enumerate(each_batch(batches, wanted[0], caller)):
        in_order: dict[str, None] = {}  # in which the layers ran

        def see(use: Use, x: Tensor, in_order: dict[str, None] = in_order) -> Tensor:
            key = use.inputs.key
            check_input(use.inputs, x)
            if is_mapped(x):
                raise ValueError(
                    f"inputs {key!r}: found an input that vmap maps, wanted a plain tensor; call {caller} "
                    "outside of vmap, and take out layers that the model maps with a rule to None"
                )
            in_order[key] = None
            if key not in found:
                found[key] = kind(use.inputs, x.device)
            if x.numel():
                found[key].add(_of_tokens(use, x), x.detach())
            return x

        with torch.no_grad(), in_use, in_use, products(model, values, wanted, see) as keys:
            try:
                run_batch(lambda *args, **kwargs: in_use.call(model, values, args, kwargs), one, forward)
            except Exception as error:
                error.add_note(f"{caller}: in batch {number}")
                raise
        ran |= keys
        _check_finite([found[key] for key in in_order], number, caller)
    if number < 0:
        raise ValueError(f"batches: found no batch in {type(batches).__name__}, wanted at least one")
    if idle := [inputs for inputs in wanted if inputs.key not in ran and inputs.always_runs]:
        raise ValueError(
            f"inputs {idle[0].key!r}: found that its layer never ran in {number + 1} batches ({len(idle)} of "
            f"{len(wanted)} groups did not), or used another tensor than its parameter, wanted every selected layer to "
            "run; take it out with a rule to None"
        )
    devices = {inputs.key: params[inputs.names[0]].device for inputs in wanted}
    return {
        inputs.key: found[inputs.key].to(devices[inputs.key])
        if inputs.key in found
        else kind(inputs, devices[inputs.key])
        for inputs in wanted
    }


def _of_tokens(use: Use, x: Tensor) -> Use:
    """The same, with rows of zeros as of no expert, where x has rows of several.

    They are no tokens, but what fills up a buffer, or tokens times 0 where an expert is not theirs, as in Llama 4.
    """
    if isinstance(use.experts, int) or use.blocks > 1:
        return use
    return use._replace(experts=use.experts.masked_fill((x == 0).all(-1), use.inputs.experts))


def check_input(inputs: Inputs, x: Tensor) -> None:
    """Raise ValueError unless x is what the weights of a group can be multiplied with, [..., in]."""
    if x.dtype not in DTYPES:
        raise ValueError(f"inputs {inputs.key!r}: found {x.dtype}, wanted bfloat16, float16 or float32")
    if not x.dim() or x.shape[-1] != inputs.shape[1]:
        raise ValueError(f"inputs {inputs.key!r}: found {tuple(x.shape)}, wanted (..., {inputs.shape[1]})")


def _check_finite(seen: Iterable[Seen], number: int, caller: str) -> None:
    """Raise ValueError for the first layer that got NaN or infinity in this batch. One wait per device."""
    in_order = [(one, one.sizes()) for one in seen]
    for device in {sizes.device for _, sizes in in_order}:
        here = [(one, sizes) for one, sizes in in_order if sizes.device == device]
        if bool((torch.cat([sizes for _, sizes in here]) < torch.inf).all()):
            continue
        for one, sizes in here:
            wrong = ~(sizes < torch.inf)
            if bool(wrong.any()):
                expert = int(wrong.nonzero()[0])
                raise ValueError(
                    f"{caller}: batch {number}: the input of {one.inputs.expert_name(expert)!r} is the first with the "
                    f"{one.measure} {sizes[expert].item()}, wanted finite values"
                )


def each_batch(batches: Any, group: Group, caller: str) -> Generator[Any]:
    """One batch (a tensor, a tuple, a mapping), or each of many."""
    if batches is None:
        raise ValueError(
            f"batches: found None, wanted some for {group.key!r}: {caller}(params, batches), with a tensor, a tuple "
            "of arguments, a dict of keyword arguments, or a list of these"
        )
    if isinstance(batches, Tensor | tuple | Mapping):
        yield batches
    elif isinstance(batches, Iterable) and not isinstance(batches, str | bytes):
        yield from batches
    else:
        raise ValueError(
            f"batches: found {type(batches).__name__}, wanted a tensor, a tuple, a dict, or an iterable of these"
        )


def run_batch(call: Callable[..., Any], one: Any, forward: Forward | None) -> None:
    """Run a model on one batch, as `Transform.calibrate` says."""
    if forward is not None:
        forward(call, one)
    elif isinstance(one, Tensor):
        call(one)
    elif isinstance(one, tuple):
        try:
            call(*one)
        except TypeError as error:
            if len({(x.dtype, x.shape[1:]) if isinstance(x, Tensor) else None for x in one}) == 1:  # as of `split`
                error.add_note(f"a tuple of {len(one)} is the arguments of one batch; give many batches as a list")
            raise
    elif isinstance(one, Mapping):
        call(**cast("Mapping[str, Any]", one))
    else:
        raise ValueError(
            f"batches: found {type(one).__name__} as one of them, wanted a tensor, a tuple of arguments or a dict of "
            "keyword arguments; pass forward=lambda call, batch: call(...) for others"
        )
