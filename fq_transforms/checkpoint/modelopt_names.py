"""Under which names, and in which shapes, ModelOpt keeps the amax of weight quantizers: text and numbers only.

ModelOpt is not needed for it. The table of the names is in `fq_transforms.checkpoint.modelopt`.
"""

import re
from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

from fq_transforms.parse import check_name
from fq_transforms.spec import Group

__all__ = [
    "FUSED",
    "PER_EXPERT",
    "Form",
    "Index",
    "fits",
    "fits_rows",
    "forms_of",
    "index_of",
    "is_grouped",
    "native_shape",
    "quantizer_name",
]

# Roles that are one matrix to an inference engine, with one scale where a weight has one number: ModelOpt 0.47 gives
# their weight quantizers one `_global_amax`.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
PER_EXPERT = "_modelopt_per_expert_weight_quantizer"

# In a name: those of layers, experts, quantizers in sequence, and some to spare.
MOST_NUMBERS = 16

_KEY = re.compile(r"(.*weight_quantizer(?:s|_\d+)?(?:\.\d+)*)\._(amax|global_amax)")
_PER_EXPERT_KEY = re.compile(rf"(.*{PER_EXPERT})_(amax|global_amax)")
_LIST = re.compile(r"(?P<parent>(?:.*\.)?)(?P<container>local_experts|experts)\.\*\.(?P<role>.+)\.weight")
# transformers keeps Mixtral's first in memory and stores it as the second.
_STORED_AS = (".mlp.", ".block_sparse_moe.")

# Field to stem to expert to key. A stem has one of its numbers as `*`, or none, and then its expert is 0.
Index = dict[str, dict[str, dict[int, str]]]


class Form(NamedTuple):
    """A name of quantizers, `*` for an expert's number; `is_local` if a rank may count its own experts by it."""

    stem: str
    is_local: bool = True


def index_of(keys: Iterable[str]) -> Index:
    """Which keys hold the amax of weight quantizers, each under its own stem and under each with one number as `*`.

    Raises:
        ValueError: A name is longer, or has more numbers, than those of models; each number is another entry here.

    Example:
        >>> index_of(["experts.3.w1.weight_quantizer._amax"])["amax"]["experts.*.w1.weight_quantizer"]
        {3: 'experts.3.w1.weight_quantizer._amax'}
    """
    index: Index = {"amax": {}, "global_amax": {}}
    for key in keys:
        if match := _KEY.fullmatch(check_name(key, "entries")) or _PER_EXPERT_KEY.fullmatch(key):
            stem, stems = match[1], index[match[2]]
            stems.setdefault(stem, {})[0] = key
            numbers = list(re.finditer(r"(?<![0-9])(?:0|[1-9][0-9]{0,8})(?![0-9])", stem))
            if len(numbers) > MOST_NUMBERS:
                raise ValueError(
                    f"entry {key!r}: found {len(numbers)} numbers in its name, wanted {MOST_NUMBERS} at most"
                )
            for number in numbers:
                start, end = number.span()
                stems.setdefault(f"{stem[:start]}*{stem[end:]}", {})[int(number[0])] = key
    return index


def forms_of(key: str, *, stacked: bool) -> list[Form]:
    """The names under which any version of ModelOpt stores the quantizers of a group; of its own module first.

    Example:
        >>> [form.stem for form in forms_of("experts.down_proj", stacked=True)]
        ['experts.down_proj_weight_quantizers.*', 'experts.down_proj_weight_quantizer']
    """
    grouped, of_list = is_grouped(key), _LIST.fullmatch(key)
    if stacked:
        forms = [Form(f"{key}_weight_quantizers.*"), Form(f"{key}_weight_quantizer")]
    elif not grouped:
        forms = [Form(quantizer_name(key))]
    else:
        forms = []
    if grouped or of_list:
        if of_list:
            parent = of_list["parent"] + ("experts." if of_list["container"] == "experts" else "")
            module = of_list["role"] + "."
        else:
            head, dot, role = key.removesuffix("weight*").removesuffix(".").rpartition(".")
            parent, module = head + dot, f"{role}." if role else ""
        quantizer = f"{module}weight_quantizer"
        forms += [
            Form(f"{parent}{quantizer}.*"),
            Form(f"{parent}{quantizer}_*"),
            Form(f"{parent}local_experts.*.{quantizer}"),
            Form(f"{parent}*.{quantizer}", is_local=False),
            Form(f"{parent}experts.*.{quantizer}", is_local=False),
            Form(f"{parent}{quantizer}"),
            Form(f"{parent}experts.{quantizer}"),
            Form(f"{parent}{module}{PER_EXPERT}"),
        ]
    forms += [Form(form.stem.replace(*_STORED_AS), form.is_local) for form in forms]
    # Of two forms of one name the first counts: by the name of its own module a rank may count its own experts.
    return list({form.stem: form for form in forms[::-1]}.values())[::-1]


def is_grouped(key: str) -> bool:
    """True for the weights of a grouped linear of Transformer Engine, `weight0`, `weight1`, ..."""
    return key == "weight*" or key.endswith(".weight*")


def quantizer_name(name: str) -> str:
    """ModelOpt's name for the quantizer of a parameter that has one of its own.

    Example:
        >>> quantizer_name("fc.weight"), quantizer_name("experts.down_proj")
        ('fc.weight_quantizer', 'experts.down_proj_weight_quantizer')
    """
    return f"{name}_quantizer" if name == "weight" or name.endswith(".weight") else f"{name}_weight_quantizer"


def native_shape(group: Group, field: str) -> tuple[int, ...]:
    """The shape that one expert's amax has in ModelOpt 0.47: that of the leaf, in two or four axes, () for one number.

    Example:
        >>> from fq_transforms.formats import INT4_BLOCK32
        >>> native_shape(Group("w", ("w",), INT4_BLOCK32, 1, (8, 64)), "amax")
        (16, 1)
    """
    one = group.leaf_shapes[field][1:]
    if prod(one) == 1:
        return ()
    rows, columns = one
    if group.format.block[1] is None:
        return one
    return (rows * columns, 1) if group.format.has_blocks_along_in else (rows, 1, columns, 1)


def fits(found: Sequence[int], one: Sequence[int]) -> bool:
    """True for the shapes that one expert's amax, a leaf of shape `one`, has anywhere; its numbers are in one order.

    Example:
        >>> fits((16, 1), (8, 2)), fits((2, 8), (8, 2)), fits((1, 8), (8, 1))
        (True, False, False)
    """
    if prod(one) == 1:
        return prod(found) == 1
    rows, columns = one
    n = rows * columns
    return tuple(found) in {(rows, columns), (rows, columns, 1), (rows, 1, columns, 1), (n,), (n, 1)}


def fits_rows(found: Sequence[int], experts: int, one: Sequence[int]) -> bool:
    """True for the shapes of the amax of `experts` in one tensor: an axis of their own, or flat.

    Example:
        >>> fits_rows((4,), 4, ()), fits_rows((4, 8, 1), 4, (8, 1)), fits_rows((8, 1), 4, (8, 1))
        (True, True, False)
    """
    n = experts * prod(one)
    has_axis = len(found) > 0 and found[0] == experts and fits(found[1:], one)
    return has_axis or tuple(found) in {(n,), (n, 1)} or (experts == 1 and fits(found, one))
