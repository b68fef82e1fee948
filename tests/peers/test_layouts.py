"""The law of layouts: what `select` says of experts is what the model's own forward does with them, or it is refused.

The oracle: each element of a stack is a number of its own, the experts' forward runs on it, and every product that
PyTorch makes is looked at: the numbers say which expert an operand is, and which axis is summed over.
"""

import math
import re
from inspect import signature

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fq_transforms as fqt
from fq_transforms.export.names import families
from tests.cases import assert_names, message_of
from tests.export.test_families import OWN, classes, smaller, transformers
from tests.full import FULL

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about what they would like to have

TOKENS = 8
# Layouts that differ: transposed, one tensor for all, of no gate, module dicts, shared and zero experts, [E, out, in].
DEFAULT = [
    *("GptOssForCausalLM", "Llama4ForCausalLM", "AriaTextForCausalLM", "DbrxForCausalLM", "JetMoeForCausalLM"),
    *("NemotronHForCausalLM", "LongcatFlashForCausalLM", "SwitchTransformersForConditionalGeneration"),
    *("InklingForConditionalGeneration", "MixtralForCausalLM"),
]
# Sizes with nothing in common with others, by which a class could not be made smaller.
ODD = {1407: 1408}
PRODUCTS = {"mm": 1, "bmm": 1, "addmm": 2, "baddbmm": 2, "_grouped_mm": 1}  # where the right operand stands


def built(name):
    """A model on meta, with four experts, and zero experts where the class has some by default."""
    own = {key: value for key, value in OWN.get(name, {}).items() if key != "zero_expert_num"}
    entries = smaller(getattr(transformers, name).config_class(**own).to_dict()) | {"architectures": [name]}
    return families.model_of(even(entries))


def even(entries):
    """A config with sizes that have a divisor in common."""
    if isinstance(entries, dict):
        return {key: even(value) for key, value in entries.items()}
    return ODD.get(entries, entries) if type(entries) is int else entries


def selected(params):
    """The spec of all experts, once each error's own advice is followed; and what it was, by glob."""
    rules, experts, followed = [fqt.Rule("*", fqt.INT8)], [], {}
    while True:
        try:
            return fqt.select(params, rules, experts=experts), followed
        except ValueError as error:
            message = str(error)
        glob = re.search(r"exclude it with the rule '([^']+)': None", message)[1]
        assert glob not in followed, message
        followed[glob] = message
        named = re.search(r"if it is a stack of experts, pass experts=r'([^']+)'", message)
        if named and "conv" not in glob:
            experts.append(named[1])
        else:
            rules.append(fqt.Rule(glob))


class Sums(TorchDispatchMode):
    """Which axis of each coded stack is summed over, and of which experts."""

    def __init__(self, coded):
        super().__init__()
        self.coded, self.axes, self.experts = coded, {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        right = PRODUCTS.get(func.overloadpacket.__name__)
        if right is not None:
            self.look(args[right - 1], -1)
            self.look(args[right], -2)
        return func(*args, **(kwargs or {}))

    def look(self, operand, dim):
        for name, (first, shape) in self.coded.items():
            codes = operand.double() - first
            if bool(((codes >= 0) & (codes < math.prod(shape)) & (codes == codes.floor())).all()):
                e, a, b = torch.unravel_index(codes.long(), shape)
                varies = [bool((index != index.narrow(dim, 0, 1)).any()) for index in (e, a, b)]
                assert sum(varies) == 1, (name, varies)
                self.axes.setdefault(name, set()).add(varies.index(True))
                self.experts.setdefault(name, set()).update(e.unique().tolist())


def shrunk(owner, names):
    """The owner with few rows and columns, all its sizes divided alike, and each element of its stacks a code."""
    stacks = {name: getattr(owner, name) for name in names}
    divisor = math.gcd(*(size for stack in stacks.values() for size in stack.shape[1:]))
    divisor //= 1 + (divisor == min(size for stack in stacks.values() for size in stack.shape[1:]))  # two at least
    sizes = {size for stack in stacks.values() for size in stack.shape[1:]}
    for attribute, value in vars(owner).items():
        if type(value) is int and value in sizes:
            setattr(owner, attribute, value // divisor)
    coded, first = {}, 1
    for name, stack in stacks.items():
        shape = (stack.shape[0], *(size // divisor for size in stack.shape[1:]))
        codes = torch.arange(first, first + math.prod(shape), dtype=torch.float32).view(shape)
        setattr(owner, name, torch.nn.Parameter(codes, requires_grad=False))
        coded[name], first = (first, shape), first + math.prod(shape)
    assert first < 2**24  # exact in fp32
    for name, other in list(owner.named_parameters(recurse=False)):
        if name not in stacks:  # a bias, say
            empty = torch.zeros([size // divisor if size in sizes else size for size in other.shape])
            setattr(owner, name, torch.nn.Parameter(empty, requires_grad=False))
    return coded


def run(owner, coded, hidden):
    """The owner's forward, all experts with tokens."""
    x = torch.full((TOKENS, hidden), 0.3)
    experts = min(shape[0] for _, shape in coded.values())
    wanted = list(signature(owner.forward).parameters)
    if "expert_size" in wanted:
        return owner(x, [TOKENS // experts] * experts)
    if "gammas" in wanted:
        return owner(x, torch.ones(TOKENS, experts))
    if len(wanted) == 1:
        return owner(x)
    return owner(x, (torch.arange(2 * TOKENS) % experts).view(TOKENS, 2), torch.ones(TOKENS, 2))


def stacks_of(spec):
    """Stacked groups of the first layer that has some, by module."""
    owners = {}
    for group in spec.groups:
        if group.stacked:
            owners.setdefault(group.key.rpartition(".")[0], []).append(group)
    found = {}
    for path, groups in owners.items():
        found.setdefault(re.sub(r"\d+", "", path), (path, groups))
    return list(found.values())


@pytest.mark.parametrize("name", classes() if FULL else DEFAULT)
def test_what_is_selected_is_what_forward_computes(name):
    """For each stack the axis that is summed over is `in`, and dimension 0 counts experts; lists are of `nn.Linear`."""
    model = built(name)
    params = dict(model.named_parameters())
    spec, _ = selected(params)
    for path, groups in stacks_of(spec):
        owner = model.get_submodule(path)
        if hasattr(owner, "config"):
            owner.config._experts_implementation = "eager"
        roles = {group.key.rpartition(".")[2]: group for group in groups}
        coded = shrunk(owner, roles)
        takes = {role: shape[1 if roles[role].transposed else 2] for role, (_, shape) in coded.items()}
        first = next(role for role in roles if role not in ("down_proj", "w2"))
        with torch.no_grad(), Sums(coded) as sums:
            run(owner, coded, takes[first])
        used = min(shape[0] for _, shape in coded.values())  # of LongCat's stacks one has zero experts, never used
        for role, group in roles.items():
            assert sums.axes[role] == {1 if group.transposed else 2}, group
            assert sums.experts[role] == set(range(used)), group
            assert group.experts == params[group.key].shape[0]
    for group in spec.groups:
        if not group.stacked and ".experts." in group.key and "router" not in group.key:
            assert group.experts > 1, group
            for weight in group.names:
                owner = model.get_submodule(weight.rpartition(".")[0])
                assert type(owner).forward is torch.nn.Linear.forward
            assert not group.transposed


@pytest.mark.parametrize("name", classes() if FULL else DEFAULT)
def test_a_stack_alone_is_right_or_refused(name):
    """Without anything beside it that shows its layout, the error has what to pass, and that leads to the same."""
    params = dict(built(name).named_parameters())
    spec, followed = selected(params)
    for _, groups in stacks_of(spec):
        for group in groups:
            alone, told = {group.key: params[group.key]}, {}
            if group.key.endswith("_proj"):
                message = message_of(ValueError, fqt.select, alone, {"*": fqt.INT8}, experts=group.key)
                glob = re.search(r"pass transposed=\{'([^']+)': False\} for \[out, in\]", message)[1]
                told = {glob: group.transposed}
            spec = fqt.select(alone, {"*": fqt.INT8}, experts=group.key, transposed=told)
            assert spec.groups == (group,)
    for message in followed.values():
        assert_names(message, "found", "wanted")
