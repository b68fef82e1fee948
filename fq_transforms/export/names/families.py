"""What the files of a model of transformers are called, and which rows each has: what `save_pretrained` would write.

transformers renames, splits, fuses and transposes what files hold when it loads them, and reverts that when it saves.
Here it reverts numbers in place of weights, and what it makes of them says where each row goes. No table of ours is
between them. Source: transformers 5.23, `revert_weight_conversion` in core_model_loading.py.
"""

import copy
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["FileLayout", "FileTensor", "decode_mxfp4", "files_of", "folded", "is_tied", "model_of", "rows_of"]

# Of a parameter's columns, as many as tell a matrix from its transpose.
COLUMNS = 2
# Tensors of more dims are kernels of convolutions, which are small, and which transformers reshapes as they are.
MOST_DIMS = 3


class FileTensor(NamedTuple):
    """A tensor of the files: its name, `*` for an expert of a stack, and which rows of `out` of its source it has."""

    name: str
    rows: slice | Tensor


class FileLayout(NamedTuple):
    """The files of a model.

    Attributes:
        tensors: What each parameter becomes, by its name in memory.
        refused: Parameters that files do not have, or not by whole rows: what was found and wanted.
    """

    tensors: dict[str, list[FileTensor]]
    refused: dict[str, str]


class _Part(NamedTuple):
    name: str
    expert: int | None
    rows: slice | Tensor


def model_of(config: Mapping[str, Any]) -> Any:
    """The model that config describes, on the meta device; None if transformers has no such class.

    Args:
        config: What config.json holds: `architectures`, `model_type`, and what differs from the defaults.

    Raises:
        ImportError: transformers is not installed.
        ValueError: The class is one of another `model_type`, or does not take this config.

    Example:
        >>> type(model_of({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]})).__name__
        'MixtralForCausalLM'
        >>> model_of({"model_type": "mine", "architectures": ["MineForCausalLM"]})
    """
    found = _class_of(config)
    if found is None:
        return None
    from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

    own = _own_config(found, config)
    try:
        with torch.device("meta"), meta_device_safe_creation_ops(), no_init_weights():
            return found(own)
    except Exception as error:  # whatever a class raises of a config that it does not take
        raise _not_built(found, error) from error


def is_tied(config: Mapping[str, Any]) -> bool:
    """True if the head is the embedding, as config says, or else its class's default.

    Example:
        >>> is_tied({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]})
        True
    """
    found = _class_of(config)
    if found is None:
        return bool(config.get("tie_word_embeddings"))
    own = _own_config(found, config)
    return bool(getattr(own, "tie_word_embeddings", False))


def _class_of(config: Mapping[str, Any]) -> Any:
    """The class of transformers that config names; None if there is none."""
    name = config["architectures"][0]
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"config: found the architecture {name!r}, whose names in files transformers>=5.23 knows, wanted it to be "
            "installed: pip install 'fq_transforms[export]'"
        ) from error
    found: Any = getattr(transformers, name, None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not is_model or found.config_class is None:
        return None
    wanted, given = found.config_class.model_type, config["model_type"]
    if given != wanted and given in transformers.CONFIG_MAPPING:  # others, such as kimi_k2, are read by this class
        raise ValueError(f"config: found the model_type {given!r} beside the architecture {name!r}, wanted {wanted!r}")
    return found


def _own_config(found: Any, config: Mapping[str, Any]) -> Any:
    try:
        entries = _for_class(config) | {"model_type": found.config_class.model_type}
        return found.config_class.from_dict(copy.deepcopy(entries))
    except Exception as error:  # whatever a class raises of a config that it does not take
        raise _not_built(found, error) from error


def _for_class(value: Any) -> Any:
    """Config without the name of a kernel that may not be installed here, and that no name depends on.

    Infinity is a number again, which transformers' files hold as {"__float__": "Infinity"}.
    """
    if isinstance(value, list):
        return [_for_class(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    if list(value) == ["__float__"]:
        return float(value["__float__"])
    return {key: _for_class(one) for key, one in value.items() if not str(key).endswith("attn_implementation")}


def _not_built(found: Any, error: Exception) -> ValueError:
    return ValueError(
        f"config: found {type(error).__name__} when transformers builds {found.__name__!r} from it: {error}; wanted "
        "model.config, or what config.json holds"
    )


def files_of(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> FileLayout:
    """What `save_pretrained` makes of a model whose parameters have these shapes.

    Args:
        model: Of `model_of`. Its parameters become the numbers that transformers reverts.
        shapes: By names in memory; of what is not among them the model's own.

    Raises:
        ValueError: transformers cannot revert it.

    Example:
        >>> model = model_of({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]})
        >>> files = files_of(model, {"model.layers.0.mlp.experts.gate_up_proj": (8, 4, 6)})
        >>> files.tensors["model.layers.0.mlp.experts.gate_up_proj"]
        [FileTensor(name='model.layers.0.block_sparse_moe.experts.*.w1.weight', rows=slice(0, 2, None)),
         FileTensor(name='model.layers.0.block_sparse_moe.experts.*.w3.weight', rows=slice(2, 4, None))]
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    probes = _probes({name: shapes.get(name, shape) for name, shape in own.items()})
    for name, probe in probes.items():
        # Some of its operations ask the model for a shape.
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        is_parameter = last in dict(module.named_parameters(recurse=False))
        setattr(module, last, torch.nn.Parameter(probe, requires_grad=False) if is_parameter else probe)
    found = _reverted(model, probes)
    files = _read(found, probes)
    others = {name: shape for name, shape in shapes.items() if name not in own}
    # Those that have names of files are none that transformers would convert.
    probes = _probes({name: shape for name, shape in others.items() if name not in found})
    kept = _reverted(model, probes) if probes else {}
    for name in others:
        if name in found or (name in kept and torch.equal(kept[name], probes[name])):
            files.tensors[name] = [FileTensor(name, slice(None))]
        else:
            files.refused[name] = (
                f"found a name that {type(model).__name__} has neither in memory nor in files, wanted one of either"
            )
    return files


def decode_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The stack [E, in, out] that gpt-oss's blocks [E, out, in/32, 16] and scales [E, out, in/32] stand for."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales, dtype=dtype)


def folded(of_experts: Sequence[Sequence[FileTensor]]) -> list[FileTensor] | None:
    """One tensor with `*` for those of all experts; None if they differ by more than the expert's number.

    Example:
        >>> folded([[FileTensor(f"layers.0.experts.{e}.up", slice(None))] for e in range(2)])
        [FileTensor(name='layers.0.experts.*.up', rows=slice(None, None, None))]
        >>> folded([[FileTensor(f"experts.{e}.up", slice(None))] for e in (4, 5)])
    """
    if len({len(tensors) for tensors in of_experts}) != 1:
        return None
    found = list[FileTensor]()
    for alike in zip(*of_experts, strict=True):
        name = _numbered([tensor.name for tensor in alike])
        if name is None or not all(_same(tensor.rows, alike[0].rows) for tensor in alike):
            return None
        found.append(FileTensor(name, alike[0].rows))
    return found


def rows_of(numbers: Tensor, out: int) -> slice | Tensor:
    """Rows by their numbers: as a slice where they follow one another, of all of them if they are `out`.

    Example:
        >>> rows_of(torch.tensor([0, 1]), 2), rows_of(torch.tensor([2, 3]), 4), rows_of(torch.tensor([3, 2]), 4)
        (slice(None, None, None), slice(2, 4, None), tensor([3, 2]))
    """
    first, count = int(numbers[0]), len(numbers)
    if not torch.equal(numbers, torch.arange(first, first + count)):
        return numbers
    return slice(None) if count == out else slice(first, first + count)


def _probes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of these shapes, with few columns, no number of which occurs twice."""
    probes, start = dict[str, Tensor](), 0
    for name, shape in shapes.items():
        cut = (*shape[:-1], COLUMNS) if 1 < len(shape) <= MOST_DIMS else shape
        probes[name] = torch.arange(start, start := start + math.prod(cut)).view(cut)
    return probes


def _reverted(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return revert_weight_conversion(model, dict(tensors))
    except Exception as error:  # whatever an operation raises of shapes that it does not take
        raise ValueError(
            f"params: found {type(error).__name__} when transformers reverts {type(model).__name__} to its files: "
            f"{error}; wanted a model that save_pretrained can save; give params as its files have them"
        ) from error


def _read(found: Mapping[str, Tensor], probes: Mapping[str, Tensor]) -> FileLayout:
    """Of each tensor in files, the parameter, the expert and the rows that its numbers are."""
    names = [name for name, probe in probes.items() if probe.numel()]
    starts = [int(probes[name].flatten()[0]) for name in names]
    parts: dict[str, list[_Part]] = {name: [] for name in probes}
    refused: dict[str, str] = {}
    for name, tensor in found.items():
        if not tensor.numel():
            continue
        first = bisect_right(starts, int(tensor.flatten()[0])) - 1
        if part := _part(name, tensor, probes[names[first]], starts[first]):
            parts[names[first]].append(part)
            continue
        owners = torch.searchsorted(torch.tensor(starts), tensor.flatten(), right=True).unique() - 1
        sources = [names[owner] for owner in owners.tolist()]
        what = f"of {sources} together" if len(sources) > 1 else "that is not rows of it, but transposed or otherwise"
        refused |= dict.fromkeys(sources, f"found the tensor {name!r} {what} in files, wanted tensors of its rows")
    tensors = dict[str, list[FileTensor]]()
    for source, of_source in parts.items():
        if source in refused:
            continue
        if of_all := _of_source(of_source, len(probes[source]) if probes[source].dim() else 0):
            tensors[source] = of_all
        else:
            found_names = [part.name for part in of_source]
            refused[source] = f"found {found_names} for it in files, wanted the same for all experts, by their numbers"
    return FileLayout(tensors, refused)


def _part(name: str, tensor: Tensor, probe: Tensor, start: int) -> _Part | None:
    """The rows of a parameter that a tensor of the files is, of one expert if it has one dim less; else None."""
    if tensor.shape == probe.shape and torch.equal(tensor, probe):
        return _Part(name, None, slice(None))
    if not tensor.dim():
        return None
    expert, matrix = None, probe
    if tensor.dim() == probe.dim() - 1 == 2:
        expert = (int(tensor[0, 0]) - start) // probe[0].numel()
        matrix, start = probe[expert], start + expert * probe[0].numel()
    if tensor.shape[1:] != matrix.shape[1:]:
        return None
    numbers = (tensor.flatten(1)[:, 0] if tensor.dim() > 1 else tensor) - start
    numbers = numbers // math.prod(matrix.shape[1:])
    if int(numbers.min()) < 0 or int(numbers.max()) >= len(matrix) or not torch.equal(tensor, matrix[numbers]):
        return None
    return _Part(name, expert, rows_of(numbers, len(matrix)))


def _of_source(parts: list[_Part], experts: int) -> list[FileTensor] | None:
    """What a parameter becomes; None if there is nothing of it in files, or experts differ by more than numbers."""
    if not any(part.expert is not None for part in parts):
        return [FileTensor(part.name, part.rows) for part in parts] or None
    of_experts: list[list[FileTensor]] = [[] for _ in range(experts)]
    for part in parts:
        if part.expert is None:
            return None
        of_experts[part.expert].append(FileTensor(part.name, part.rows))
    return folded(of_experts)


def _numbered(names: Sequence[str]) -> str | None:
    """The name with `*` that stands for all of these, by 0, 1, and so on in its place; None if there is none."""
    words = names[0].split(".")
    # From the end: of one expert alone in layer 0 the last number is the expert's.
    for i in (i for i in reversed(range(len(words))) if words[i] in ("0", "expert_0")):
        word = words[i][:-1]  # Switch and NLLB have `expert_0`
        if all(name.split(".") == [*words[:i], f"{word}{n}", *words[i + 1 :]] for n, name in enumerate(names)):
            return ".".join([*words[:i], f"{word}*", *words[i + 1 :]])
    return None


def _same(one: slice | Tensor, two: slice | Tensor) -> bool:
    if isinstance(one, slice) or isinstance(two, slice):
        return isinstance(one, slice) and isinstance(two, slice) and one == two
    return torch.equal(one, two)
