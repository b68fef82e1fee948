"""Names and rules to a static `Spec`: rules choose a parameter's formats, and its name says whose expert it is."""

import re
from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal

from torch import Tensor

from fq_transforms.checks import check_dtype, check_is_tensor, check_readable
from fq_transforms.formats import FORMATS, Format, code_bits
from fq_transforms.parse import check_name, nearest, shown
from fq_transforms.rules import Rule, Rules, as_rules, name_matches, unwrapped
from fq_transforms.spec import Group, Inputs, Skipped, Spec, experts_regex, group_key, numbered, ranges

__all__ = ["check_fits", "select"]

_STACKED_EXPERTS = (r"(?:.*\.)?(?:local_)?experts\..+",)
_ROUTER = re.compile(r"(?P<block>(?:.*\.)?)(?:router|gate)(?:\.[^.]+)?\.weight")
# Roles whose `in` is the width of the model, as a router's is, and roles whose `out` is.
_FROM_HIDDEN = re.compile(r"(?:.*\.)?(?:gate_up_proj|gate_proj|up_proj|w1|w3|input_linear)(?:\.weight)?")
_TO_HIDDEN = re.compile(r"(?:.*\.)?(?:down_proj|w2|output_linear)(?:\.weight)?")
# Roles of stacks that models of transformers store either way.
_EITHER_WAY = re.compile(r"(?:.*\.)?(?:gate_up|gate|up|down)_proj")
MOST_NEAR = 1000  # names that are compared with one that was meant
MOST_EXPERTS = 10**6  # of one layer: a number in a name is not yet so many experts
_BIAS = re.compile(r"(?:^|[._])bias\d*$")
_CONVOLUTION = re.compile(r"conv(?:s|olution|transpose)?(?![a-z])", re.IGNORECASE)
# What PEFT and Megatron-Bridge call the layer that an adapter is put beside.
_ADAPTED = re.compile(r"(?<![^.])(?=(?:base_layer|to_wrap)\.)")
_NO_RULE = Rule("", required=False)


def select(
    params: Mapping[str, Tensor],
    rules: Rules,
    *,
    experts: str | Sequence[str] = (),
    transposed: str | Sequence[str] | Mapping[str, bool] = (),
) -> Spec:
    r"""Which parameters are quantized, and how: the last rule whose glob matches a name decides its weights and inputs.

    Only matrices (2-D) and stacked experts (3-D) can be quantized; biases, vectors, convolutions, and adapters beside a
    `base_layer` never are. Values are not read, so meta tensors will do. A DTensor counts by its global shape: every
    rank and every mesh has the same spec.

    Args:
        params: `dict(model.named_parameters())`, names to tensors.
        rules: Globs to formats of weights; or a list of `Rule`s, of weights and inputs; or a preset, which is one.
        experts: Regular expressions (full match) for names that are not found by themselves. With a named group
            `(?P<expert>\d+)`, a list of experts; without, a stacked 3-D parameter, or a single matrix of a layer.
        transposed: Globs of parameters whose matrices are stored [in, out]; or globs to False for [out, in] and True
            for [in, out], the last match counts. Matrices are taken as [out, in], as `nn.Linear` has them. Of stacks
            `gate_up_proj` and `down_proj`, a router or a bias beside them tell; where nothing does, say it.

    Raises:
        ValueError: A rule or a glob matches nothing, or nothing is selected; a group lacks an expert, or its experts
            differ in shape, dtype or rule; which part of a parameter is which expert's, or which side is `in`, is not
            known; `in` is not a multiple of the block; a dtype is not bf16, fp16 or fp32; a weight is empty, or is
            no tensor whose values lie in memory; the message shows the rule to write.

    Example:
        >>> import torch
        >>> from fq_transforms.formats import FP8, NVFP4
        >>> params = {"mlp.experts.down_proj": torch.empty(4, 64, 32), "attn.q.weight": torch.empty(64, 64)}
        >>> rules = [Rule("*", FP8), Rule("*.experts.*", NVFP4, inputs=FP8)]
        >>> spec = select(params, rules, transposed={"*.down_proj": False})
        >>> [(group.key, group.format.name) for group in spec.all_groups]
        [('mlp.experts.down_proj', 'NVFP4'), ('attn.q.weight', 'FP8'), ('mlp.experts.down_proj.input', 'FP8')]
    """
    rules = as_rules(rules)
    patterns = (experts,) if isinstance(experts, str) else tuple(experts)
    if not isinstance(params, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"params: found {type(params).__name__}, wanted names to tensors, such as dict(model.named_parameters())"
        )
    for name, param in params.items():
        _check_entry(name, param)
    orientation = _orientation(transposed)
    never = _never_weights(params)
    _check_patterns(params, [name for name in params if name not in never], rules, patterns, tuple(orientation))
    layouts = _Layouts(params, patterns, orientation)

    members: dict[str, list[tuple[int, str, Rule]]] = {}
    skipped: list[Skipped] = []
    for name, param in params.items():
        why = never.get(name, "")
        if not why:
            rule = next((r for r in reversed(rules) if r.matches(name)), _NO_RULE)
            key, expert = group_key(name, patterns)
            members.setdefault(key, []).append((expert, name, rule))
            why = _why_left(rule)
        if why:
            skipped.append(Skipped(name, tuple(param.shape), why))

    of_weights = {key: found for key, found in members.items() if any(rule.weights for _, _, rule in found)}
    of_inputs = {key: found for key, found in members.items() if any(rule.inputs for _, _, rule in found)}
    groups = [_group(key, sorted(found), "weights", layouts) for key, found in of_weights.items()]
    inputs = [_inputs(_group(key, sorted(found), "inputs", layouts), found, params) for key, found in of_inputs.items()]
    if not groups and not inputs:
        raise ValueError(
            f"the rules select no weight among {len(params)} parameters; patterns: {[r.pattern for r in rules]}"
        )
    return Spec(tuple(groups), tuple(skipped), tuple(inputs), rules, tuple(layouts.assumed))


def _check_entry(name: Any, param: Any) -> None:
    """Raise ValueError unless an entry of `params` is a name and a tensor."""
    if not isinstance(name, str):
        raise ValueError(f"params: found the key {shown(name)}, wanted the name of a parameter, a str")
    if isinstance(param, Mapping):
        raise ValueError(
            f"params: found a dict at {shown(name)}, wanted one flat dict from names, joined by dots, to tensors: pass "
            "{'.'.join(map(str, path)): tensor "
            "for path, tensor in zip(optree.tree_paths(params), optree.tree_leaves(params))}"
        )
    check_is_tensor(f"parameter {check_name(name, 'params')!r}", param)


def _why_left(rule: Rule) -> str:
    """Why the weights are not quantized, or ''."""
    if rule.weights:
        return ""
    if rule.inputs:
        return f"inputs only by {rule.pattern}"
    return "no rule" if rule is _NO_RULE else f"excluded by {rule.pattern}"


def _inputs(group: Group, found: Sequence[tuple[int, str, Rule]], params: Mapping[str, Tensor]) -> Inputs:
    """What the weights of a group are multiplied with."""
    key = f"{group.key}.input"
    if key in params:
        raise ValueError(f"inputs of {group.key!r}: found a parameter {key!r}, which is their own name")
    flags = {rule.per_expert_inputs for _, _, rule in found}
    if len(flags) > 1:
        shown = ", ".join(f"{name!r}: {rule.per_expert_inputs}" for _, name, rule in sorted(found)[:8])
        raise ValueError(
            f"group {group.key!r}: its experts get different per_expert_inputs ({shown}); let the rules treat them "
            "alike"
        )
    shapes = (group.shape, group.stacked, group.transposed)
    return Inputs(key, group.names, group.format, group.experts, *shapes, per_expert=flags.pop())


def _check_patterns(
    params: Mapping[str, Tensor],
    weights: Sequence[str],
    rules: Sequence[Rule],
    experts: Sequence[str],
    transposed: Sequence[str],
) -> None:
    for rule in rules:
        if rule.required and not any(rule.matches(name) for name in weights):
            others = [name for name in params if rule.matches(name)]
            found = f"only {others[0]!r}, which is no weight" if others else "none"
            raise ValueError(
                f"rule {rule.pattern!r} matches no weight: found {found}, among {len(weights)} weights such as "
                f"{_nearest(rule.pattern, weights)}; {_glob_meant(rule.pattern, weights)}correct the pattern or remove "
                "the rule"
            )
    for regex in experts:
        try:
            matches = [match for name in weights if (match := re.fullmatch(regex, name))]
        except re.error as error:
            raise ValueError(f"experts={regex!r} is not a regular expression: {error}") from error
        if not matches:
            raise ValueError(f"experts={regex!r} matches no weight, among {len(weights)} such as {weights[:3]}")
        for match in matches:
            number = match.groupdict().get("expert", "0")
            if not (number and number.isdecimal()):
                raise ValueError(
                    f"experts={regex!r}: found the expert {number!r} in {match.string!r}, wanted a number; "
                    r"let the group `expert` match \d+"
                )
        if all("expert" not in match.re.groupindex for match in matches):
            _check_says_something(regex, [match.string for match in matches], params)
    for glob in transposed:
        if not any(name_matches(name, glob) for name in weights):
            raise ValueError(
                f"transposed={glob!r} matches no weight, among {len(weights)} such as {_nearest(glob, weights)}; "
                f"{_glob_meant(glob, weights)}correct the glob"
            )


def _check_says_something(regex: str, names: Sequence[str], params: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a regex without the group `expert` is of a list of matrices, each of which stays a group."""
    lists = numbered(names)
    if not lists or any(
        params[name].dim() != 2
        or _is_among_experts(name)
        or _is_computed_with(name, params)
        or group_key(name, ()) != (name, 0)
        for name in names
    ):
        return
    before, after, numbers = lists[0]
    raise ValueError(
        rf"experts={regex!r}: found no group (?P<expert>\d+), and matrices {before}[{ranges(numbers)}]{after} that "
        "differ in a number, wanted the group in the place of the expert's number: pass "
        f"experts=r'{experts_regex(before, after)}'; what is no expert needs no experts="
    )


def _is_among_experts(key: str) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in _STACKED_EXPERTS)


def _is_computed_with(name: str, params: Mapping[str, Tensor]) -> bool:
    """True if torch.nn.utils computes a weight from a parameter."""
    pair = {"weight_g": "weight_v", "weight_v": "weight_g"}.get(name.rpartition(".")[2], "")
    has_pair = bool(pair) and f"{name[: -len(pair)]}{pair}" in params
    return "parametrizations" in name.split(".") or name.endswith("weight_orig") or has_pair


def _glob_meant(glob: str, names: Sequence[str]) -> str:
    """What to write in place of a glob that matches nothing, or ''."""
    if glob.startswith("*.") and any(name_matches(name, glob[2:]) for name in names):
        return f"`*.` wants a dot before the rest, and there the names begin with it: write {glob[2:]!r}; or "
    if "[" not in glob:
        return ""
    literal = glob.replace("[", "[[]")
    if any(name_matches(name, literal) for name in names):
        return f"in a glob [...] is one character of a set, and there the names have brackets: write {literal!r}; or "
    return ""


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """Some names that are spelled most like a pattern; of those that differ in numbers the first."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(re.sub(r"\d+", "*", name), name)
    return [first[name] for name in nearest(re.sub(r"\d+", "*", pattern), [*first][:MOST_NEAR], 3)]


def _never_weights(params: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of parameters that can never be quantized, and why."""
    # Modules that hold an adapter beside the layer.
    adapted = {name[: match.start()] for name in params for match in _ADAPTED.finditer(name)}
    reasons = ((name, _not_a_weight(name, param, adapted)) for name, param in params.items())
    return {name: why for name, why in reasons if why}


def _not_a_weight(name: str, param: Tensor, adapted: Set[str]) -> str:
    """Why a parameter can never be quantized, or ''."""
    if _BIAS.search(name):
        return "bias"
    if param.dim() not in (2, 3):
        return f"{param.dim()}-D"
    if param.dim() == 3 and _is_convolution(name):
        return "convolution"
    if not adapted:
        return ""
    own = {name[: match.start()] for match in _ADAPTED.finditer(name)}
    modules = (name[: match.start()] for match in re.finditer(r"(?<![^.])", name))
    return "adapter" if any(module in adapted and module not in own for module in modules) else ""


def _is_convolution(name: str) -> bool:
    """True if a parameter, its module or the list that has the module is called one: kernels [out, in, width]."""
    *modules, last = unwrapped(name).split(".")
    while modules and modules[-1].isdecimal():
        modules.pop()
    return "expert" not in name and any(_CONVOLUTION.search(part) for part in (*modules[-1:], last))


def _orientation(transposed: Any) -> dict[str, bool]:
    """Globs to whether matrices are stored [in, out]."""
    if isinstance(transposed, Mapping):
        for glob, is_transposed in transposed.items():
            if not isinstance(is_transposed, bool):
                raise ValueError(f"transposed={{{glob!r}: {is_transposed!r}}}: found no bool, wanted True or False")
        return dict(transposed)
    return dict.fromkeys((transposed,) if isinstance(transposed, str) else transposed, True)


def _group(
    key: str, found: Sequence[tuple[int, str, Rule]], role: Literal["weights", "inputs"], layouts: "_Layouts"
) -> Group:
    params = layouts.params
    numbers, names = [number for number, _, _ in found], tuple(name for _, name, _ in found)
    if numbers[-1] >= MOST_EXPERTS:
        raise ValueError(f"parameter {names[-1]!r}: found expert {numbers[-1]}, wanted at most {MOST_EXPERTS} experts")
    wanted = range(numbers[-1] + 1)
    if numbers != list(wanted):
        missing, twice = set(wanted) - set(numbers), {n for n in numbers if numbers.count(n) > 1}
        what = f"{ranges(missing)} missing" if missing else f"{ranges(twice)} twice"
        raise ValueError(
            f"group {key!r}: found experts {ranges(set(numbers))}, wanted {ranges(wanted)}, each once: {what}"
        )
    chosen: list[Format | None] = [getattr(rule, role) for _, _, rule in found]
    if len(set(chosen)) > 1:
        shown = ", ".join(f"{n!r}: {c.name if c else None}" for n, c in zip(names[:8], chosen[:8], strict=True))
        raise ValueError(
            f"group {key!r}: its experts get different formats of {role} ({shown}); let the rules treat them alike"
        )
    format = chosen[0]
    assert format is not None
    first = params[names[0]]
    for name in names:
        layouts.check_computed_with(name)
        check_readable(f"parameter {name!r}", params[name])
        check_dtype(name, params[name])
        if params[name].shape != first.shape or params[name].dtype != first.dtype:
            raise ValueError(
                f"group {key!r}: {name!r} is {tuple(params[name].shape)} {params[name].dtype}, but {names[0]!r} is "
                f"{tuple(first.shape)} {first.dtype}; the experts of a group are of one shape and dtype"
            )
        if params[name].numel() == 0:
            raise ValueError(f"parameter {name!r}: found the empty shape {tuple(first.shape)}, wanted a weight")
    stacked = first.dim() == 3
    layouts.check_experts(key, names, first)
    is_transposed = layouts.is_transposed(key, names, first)
    matrix = first.shape[-2:]
    shape = (matrix[1], matrix[0]) if is_transposed else (matrix[0], matrix[1])
    check_fits(names[0], shape, format)
    return Group(key, names, format, first.shape[0] if stacked else len(names), shape, stacked, is_transposed)


def check_fits(name: str, shape: tuple[int, int], format: Format) -> None:
    """Raise ValueError, naming the parameter, unless blocks of a format divide the rows of an expert's (out, in).

    Example:
        >>> check_fits("head", (8, 40), FORMATS["INT4_BLOCK32"])
        Traceback (most recent call last):
        ...
        ValueError: parameter 'head': found shape (out, in) = (8, 40), wanted `in` to be a multiple of 32, the block of
        INT4_BLOCK32; choose a format of another element or exclude it with the rule 'head': None
    """
    columns = format.block[1]
    if format.has_blocks_along_in and columns and shape[1] % columns:
        before, is_expert, _ = _glob(name).partition(".experts.")
        together = f", or, for files of codes, all roles of these experts: '{before}.experts.*': None" * bool(is_expert)
        raise ValueError(
            f"parameter {name!r}: found shape (out, in) = {shape}, wanted `in` to be a multiple of {columns}, the "
            f"block of {format.name}; choose {_fitting(format, shape[1])} or exclude it with the rule "
            f"{_glob(name)!r}: None{together}"
        )


def _fitting(format: Format, width: int) -> str:
    """Formats that take rows of `width`, for a message: of the same element, or else of as many bits.

    Those of the largest blocks first.
    """
    fitting = [one for one in FORMATS.values() if not (one.has_blocks_along_in and width % (one.block[1] or 1))]
    fitting.sort(key=lambda one: (one.has_blocks_along_in, one.block[1] or 0), reverse=True)
    if alike := [one.name for one in fitting if one.element == format.element]:
        return f"one of the same element that fits, {', '.join(alike[:6])},"
    of_bits = [one.name for one in fitting if code_bits(one) == code_bits(format)]
    return f"one of as many bits that fits, {', '.join(of_bits[:6])}," if of_bits else "a format of another element"


class _Layouts:
    """Which part of a parameter is which expert's, and which side of a matrix is `in`: told, or shown by what is there.

    NOTE layouts: [E, a, b] alone may be [E, out, in] or [E, in, out]. Roles that models store either way are asked for;
    others are [E, out, in], which the spec's table says. What shows which: a bias [E, out]; a
    `gate_up_proj` that is twice as wide as its `down_proj` only one way round; a router [E, hidden], whose `in` is
    that of gate and up and the `out` of down.
    """

    def __init__(self, params: Mapping[str, Tensor], patterns: Sequence[str], told: dict[str, bool]) -> None:
        self.params, self.patterns, self.told = params, patterns, told
        self.widths: dict[str, set[int]] = {}  # of the routers that lie in a block
        self.stacks: dict[str, list[str]] = {}  # by the module that holds them
        self.assumed: dict[str, None] = {}  # globs of those that are taken for [E, out, in] without evidence
        for name, param in params.items():
            if param.dim() == 2 and (match := _ROUTER.fullmatch(name)):
                self.widths.setdefault(match["block"], set()).add(param.shape[1])
            if param.dim() == 3:
                self.stacks.setdefault(name[: name.rfind(".") + 1], []).append(name)

    def check_computed_with(self, name: str) -> None:
        """Raise ValueError for what a weight is computed from, which would be off the grid, unless it is told."""
        if _is_computed_with(name, self.params) and not any(re.fullmatch(pattern, name) for pattern in self.patterns):
            raise ValueError(
                f"parameter {name!r}: found what torch.nn.utils computes a weight from, wanted the weight that the "
                "layer computes with: call remove_parametrizations, or the remove_* of its kind; exclude it with the "
                f"rule {_glob(name)!r}: None; or, if updates are added to what is quantized, pass "
                f"experts=r'{_regex(name)}'"
            )

    def check_experts(self, key: str, names: Sequence[str], first: Tensor) -> None:
        """Raise ValueError unless the experts of a group are a list, a stack, or one."""
        is_told = any(re.fullmatch(pattern, key) for pattern in self.patterns)
        is_among_experts = _is_among_experts(key)
        if first.dim() == 3 and (key not in names or not (is_told or is_among_experts)):
            raise ValueError(
                f"parameter {names[0]!r}: found the 3-D shape {tuple(first.shape)}, wanted a matrix or stacked "
                f"experts; exclude it with the rule {_glob(key)!r}: None, or, if it is a stack of experts, pass "
                f"experts=r'{_regex(key)}'"
            )
        if first.dim() == 2 and key in names and is_among_experts and not (is_told or _ROUTER.fullmatch(key)):
            numbered = re.sub(r"(.*experts\..*)\\d\+", r"\1(?P<expert>\\d+)", _regex(key))
            own = f", or, if its last number is the expert's, pass experts=r'{numbered}'" * ("expert>" in numbered)
            raise ValueError(
                f"parameter {key!r}: found the matrix {tuple(first.shape)} among experts, without the number of one in "
                "its name: it may hold all of them, wanted a matrix per expert, or a stack [E, out, in]; exclude "
                f"it with the rule {_glob(key)!r}: None{own}, or, if it is a single matrix, pass "
                f"experts=r'{_regex(key)}'"
            )

    def is_transposed(self, key: str, names: Sequence[str], first: Tensor) -> bool:
        """True if a group's matrices are stored [in, out]."""
        globs = [next((g for g in reversed(self.told) if name_matches(name, g)), None) for name in names]
        values = [None if glob is None else self.told[glob] for glob in globs]
        if len(set(values)) > 1:
            marked = [name for name, value in zip(names, values, strict=True) if value is not None]
            raise ValueError(
                f"group {key!r}: transposed= matches {len(marked)} of {len(names)} experts, such as {marked[0]!r}, or "
                "says different things of them; let it match all"
            )
        if values[0] is not None:
            return values[0]
        shown = [self._shown(name) for name in names]
        if first.dim() == 3 and shown[0] is None and _EITHER_WAY.fullmatch(key):
            raise ValueError(
                f"parameter {key!r}: found the stack {tuple(first.shape)} and nothing that shows whether its matrices "
                f"are [out, in] or [in, out], wanted to be told: pass transposed={{{_glob(key)!r}: False}} for "
                "[out, in], as nn.Linear has them, or True for [in, out]"
            )
        if first.dim() == 3 and shown[0] is None:
            self.assumed[_glob(key)] = None
        if first.dim() == 2 and True in shown:
            name = names[shown.index(True)]
            raise ValueError(
                f"parameter {name!r}: found {tuple(first.shape)} beside a bias of {first.shape[1]}, wanted [out, in]; "
                f"pass transposed={{{_glob(name)!r}: True}} if it is stored [in, out], else False"
            )
        return bool(shown[0])

    def _shown(self, name: str) -> bool | None:
        """What the parameters beside one show; None if that is nothing."""
        a, b = self.params[name].shape[-2:]
        experts = self.params[name].shape[:-2]
        bias = self.params.get(f"{name}_bias" if experts else f"{name.removesuffix('weight')}bias")
        if bias is not None and a != b and tuple(bias.shape) in ((*experts, a), (*experts, b)):
            return tuple(bias.shape) == (*experts, b)
        if not experts:
            return None
        parent = name[: name.rfind(".") + 1]
        gate_up, down = self.params.get(f"{parent}gate_up_proj"), self.params.get(f"{parent}down_proj")
        if gate_up is not None and down is not None and gate_up.dim() == down.dim() == 3:
            (p, q), (r, s) = gate_up.shape[1:], down.shape[1:]
            if ((p, q) == (2 * s, r)) != ((p, q) == (s, 2 * r)):
                return (p, q) == (s, 2 * r)
        of_module = {n: _between(n, self.params[n], self._hidden(n)) for n in self.stacks[parent]}
        known = {found for found in of_module.values() if found is not None}
        return known.pop()[0] if len(known) == 1 and of_module[name] is not None else None

    def _hidden(self, name: str) -> int | None:
        """The `in` of the routers in the nearest block around a parameter, if it is one number."""
        block = name
        while block:
            block = block[: block.rstrip(".").rfind(".") + 1]
            if widths := self.widths.get(block):
                return next(iter(widths)) if len(widths) == 1 else None
        return None


def _between(name: str, stack: Tensor, hidden: int | None) -> tuple[bool, int] | None:
    """Of a stack between `hidden` and another width, by its role: whether it is stored [in, out], and that width."""
    a, b = stack.shape[-2:]
    is_from, is_to = _FROM_HIDDEN.fullmatch(name), _TO_HIDDEN.fullmatch(name)
    if a == b or hidden not in (a, b) or not (is_from or is_to):
        return None
    width = a + b - hidden
    return hidden == (a if is_from else b), width // 2 if name.endswith("gate_up_proj") else width


def _glob(name: str) -> str:
    """A name with `*` for numbers between dots, such as the layer's."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _regex(name: str) -> str:
    """A name as a regular expression, with any digits for its numbers between dots or behind an underscore."""
    return re.sub(r"(?<=[._])\d+(?=\.)", r"\\d+", name)
