"""Which parameters are quantized: each naming convention, each refusal, and the spec as a value, JSON and a table."""

import json
import re
import time
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.checks import weights_of
from fq_transforms.formats import (
    FORMATS,
    FP8,
    FP8_BLOCK,
    INT4_BLOCK32,
    INT8_PER_CHANNEL,
    MXFP4,
    NVFP4,
    NVFP4_STATIC,
)
from fq_transforms.select import Preset, Rule, select
from fq_transforms.spec import Group, Spec
from fq_transforms.state import InputAmax
from tests.cases import ALL_FORMATS, assert_names, message_of, name_of


def meta(*shape, dtype=torch.bfloat16):
    """A parameter without storage: selection reads names, shapes and dtypes only."""
    return torch.empty(shape, dtype=dtype, device="meta")


def expert_list(pattern, experts=4, shape=(48, 64)):
    """Separate experts, most recent first, so that nothing leans on the order of a state dict."""
    return {pattern.format(i): meta(*shape) for i in reversed(range(experts))}


# name -> (parameters, [(key, experts, (out, in), stacked, transposed)], keywords of select)
CONVENTIONS = {
    "Transformer Engine GroupedLinear": (
        expert_list("decoder.layers.0.mlp.experts.linear_fc1.weight{}")
        | expert_list("decoder.layers.0.mlp.experts.linear_fc2.weight{}", shape=(64, 32)),
        [
            ("decoder.layers.0.mlp.experts.linear_fc1.weight*", 4, (48, 64), False, False),
            ("decoder.layers.0.mlp.experts.linear_fc2.weight*", 4, (64, 32), False, False),
        ],
        {},
    ),
    "GroupedLinear alone": (expert_list("weight{}"), [("weight*", 4, (48, 64), False, False)], {}),
    "more than ten experts": (
        expert_list("mlp.linear_fc1.weight{}", experts=23),
        [("mlp.linear_fc1.weight*", 23, (48, 64), False, False)],
        {},
    ),
    "Megatron SequentialMLP": (
        expert_list("decoder.layers.0.mlp.experts.local_experts.{}.linear_fc1.weight"),
        [("decoder.layers.0.mlp.experts.local_experts.*.linear_fc1.weight", 4, (48, 64), False, False)],
        {},
    ),
    "SequentialMLP alone": (
        expert_list("local_experts.{}.linear_fc1.weight"),
        [("local_experts.*.linear_fc1.weight", 4, (48, 64), False, False)],
        {},
    ),
    "Mixtral module list": (
        expert_list("model.layers.7.block_sparse_moe.experts.{}.w1.weight")
        | expert_list("model.layers.7.block_sparse_moe.experts.{}.w2.weight", shape=(64, 32)),
        [
            ("model.layers.7.block_sparse_moe.experts.*.w1.weight", 4, (48, 64), False, False),
            ("model.layers.7.block_sparse_moe.experts.*.w2.weight", 4, (64, 32), False, False),
        ],
        {},
    ),
    "DeepSeek module list": (
        expert_list("model.layers.3.mlp.experts.{}.gate_proj.weight", experts=12),
        [("model.layers.3.mlp.experts.*.gate_proj.weight", 12, (48, 64), False, False)],
        {},
    ),
    "module list alone": (
        expert_list("experts.{}.w1.weight"),
        [("experts.*.w1.weight", 4, (48, 64), False, False)],
        {},
    ),
    "the same role in two layers": (
        expert_list("layers.0.experts.{}.w1.weight") | expert_list("layers.1.experts.{}.w1.weight", experts=3),
        [
            ("layers.0.experts.*.w1.weight", 4, (48, 64), False, False),
            ("layers.1.experts.*.w1.weight", 3, (48, 64), False, False),
        ],
        {},
    ),
    "stacked": (
        {
            "model.layers.0.mlp.experts.gate_up_proj": meta(4, 192, 64),
            "model.layers.0.mlp.experts.down_proj": meta(4, 64, 96),
        },
        [
            ("model.layers.0.mlp.experts.gate_up_proj", 4, (192, 64), True, False),
            ("model.layers.0.mlp.experts.down_proj", 4, (64, 96), True, False),
        ],
        {},
    ),
    "stacked, gpt-oss and Llama 4": (
        {"layers.0.mlp.experts.gate_up_proj": meta(4, 64, 192), "layers.0.mlp.experts.down_proj": meta(4, 96, 64)},
        [
            ("layers.0.mlp.experts.gate_up_proj", 4, (192, 64), True, True),
            ("layers.0.mlp.experts.down_proj", 4, (64, 96), True, True),
        ],
        {},
    ),
    "stacked, the module alone": (
        {"experts.gate_up_proj": meta(4, 64, 192), "experts.down_proj": meta(4, 96, 64)},
        [("experts.gate_up_proj", 4, (192, 64), True, True), ("experts.down_proj", 4, (64, 96), True, True)],
        {},
    ),
    "stacked, the experts' own names": (
        {"gate_up_proj": meta(4, 64, 192), "down_proj": meta(4, 96, 64)},
        [("gate_up_proj", 4, (192, 64), True, True), ("down_proj", 4, (64, 96), True, True)],
        {"experts": "gate_up_proj|down_proj"},
    ),
    "stacked, of matrices that tell nothing": (
        {"experts.w1": meta(4, 64, 192), "experts.w2": meta(4, 96, 64)},
        [("experts.w1", 4, (64, 192), True, False), ("experts.w2", 4, (96, 64), True, False)],
        {},
    ),
    "stacked, transposed by a glob": (
        {"experts.w1": meta(4, 64, 192), "experts.w2": meta(4, 96, 64)},
        [("experts.w1", 4, (192, 64), True, True), ("experts.w2", 4, (96, 64), True, False)],
        {"transposed": "*.w1"},
    ),
    "separate, transposed by globs": (
        expert_list("experts.{}.w1.weight") | expert_list("experts.{}.w2.weight"),
        [("experts.*.w1.weight", 4, (64, 48), False, True), ("experts.*.w2.weight", 4, (64, 48), False, True)],
        {"transposed": ["*.w1.*", "*.w2.*"]},
    ),
    "dense": (
        {"model.layers.0.self_attn.q_proj.weight": meta(48, 64), "lm_head.weight": meta(96, 64)},
        [
            ("model.layers.0.self_attn.q_proj.weight", 1, (48, 64), False, False),
            ("lm_head.weight", 1, (96, 64), False, False),
        ],
        {},
    ),
    "shared experts are dense": (
        {"layers.0.mlp.shared_experts.up_proj.weight": meta(48, 64)},
        [("layers.0.mlp.shared_experts.up_proj.weight", 1, (48, 64), False, False)],
        {},
    ),
    "dense, transposed by a glob": (
        {"h.0.mlp.c_fc.weight": meta(64, 48), "h.0.attn.weight": meta(48, 64)},
        [("h.0.mlp.c_fc.weight", 1, (48, 64), False, True), ("h.0.attn.weight", 1, (48, 64), False, False)],
        {"transposed": "*.c_fc.weight"},
    ),
    "odd names: a list": (
        expert_list("net.ffn_{}.up", experts=3),
        [("net.ffn_*.up", 3, (48, 64), False, False)],
        {"experts": r"net\.ffn_(?P<expert>\d+)\.up"},
    ),
    "odd names: a stack": (
        {"net.moe_kernel": meta(3, 48, 64)},
        [("net.moe_kernel", 3, (48, 64), True, False)],
        {"experts": r".*_kernel"},
    ),
    "odd names: both": (
        expert_list("net.ffn_{}.up", experts=3) | {"net.moe_kernel": meta(3, 48, 64)},
        [("net.ffn_*.up", 3, (48, 64), False, False), ("net.moe_kernel", 3, (48, 64), True, False)],
        {"experts": [r".*_kernel", r"net\.ffn_(?P<expert>\d+)\.up"]},
    ),
    "a regex comes before the known names": (
        expert_list("experts.0.part.{}.weight", experts=3),
        [("experts.0.part.*.weight", 3, (48, 64), False, False)],
        {"experts": r"experts\.0\.part\.(?P<expert>\d+)\.weight"},
    ),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_groups_are_found_by_name(convention):
    """Each naming convention gives its groups: key, experts in numeric order (2 before 10), (out, in), layout."""
    params, wanted, keywords = CONVENTIONS[convention]
    spec = select(params, {"*": FP8}, **keywords)
    assert [(g.key, g.experts, g.shape, g.stacked, g.transposed) for g in spec.groups] == wanted
    for group in spec.groups:
        separate = group.experts > 1 and not group.stacked
        assert group.names == (
            tuple(group.key.replace("*", str(i)) for i in range(group.experts)) if separate else (group.key,)
        )
        assert all(group.parameter_shape == params[name].shape for name in group.names)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_parameter_is_in_exactly_one_list(convention):
    """Nothing is dropped in silence: what no group holds is skipped with a reason and a shape, nothing is both."""
    params, _, keywords = CONVENTIONS[convention]
    others = {
        "norm.weight": meta(64),
        "proj.bias": meta(64),
        "experts.up_bias": meta(4, 64),
        "conv.weight": meta(8, 8, 3, 3),
    }
    params = params | others | {"tail.weight": meta(8, 64), "scale": meta()}
    spec = select(params, {"*": NVFP4, "tail*": None}, **keywords)
    names = [name for group in spec.groups for name in group.names] + [skipped.name for skipped in spec.skipped]
    assert sorted(names) == sorted(params)
    assert {s.name: (s.shape, s.reason) for s in spec.skipped} == {
        "norm.weight": ((64,), "1-D"),
        "proj.bias": ((64,), "bias"),
        "experts.up_bias": ((4, 64), "bias"),
        "conv.weight": ((8, 8, 3, 3), "4-D"),
        "tail.weight": ((8, 64), "excluded by tail*"),
        "scale": ((), "0-D"),
    }


def test_biases_of_grouped_linears_are_not_experts():
    """Kills bias0..N-1 of a Transformer Engine GroupedLinear, or a stacked bias [E, out], quantized as matrices."""
    params = expert_list("experts.linear_fc1.weight{}", experts=2)
    params |= {
        "experts.linear_fc1.bias0": meta(48),
        "experts.linear_fc1.bias1": meta(48),
        "experts.up_proj_bias": meta(2, 48),
    }
    spec = select(params, {"experts.*": FP8})
    assert [group.key for group in spec.groups] == ["experts.linear_fc1.weight*"]
    assert [skipped.reason for skipped in spec.skipped] == ["bias"] * 3


def test_transposed_stacks_are_known_when_only_one_of_them_is_selected():
    """gate_up_proj and down_proj tell the layout by both shapes, also where a rule excludes one of them."""
    params = {"experts.gate_up_proj": meta(4, 64, 192), "experts.down_proj": meta(4, 96, 64)}
    for name in params:
        (group,) = select(params, {name: FP8}).groups
        assert group.transposed, name


def test_square_stacks_are_told_by_their_pair():
    """A square down_proj says nothing, but its gate_up_proj does: [E, n, 2 n] is transposed, [E, 2 n, n] is not."""
    for shape, transposed in (((4, 64, 128), True), ((4, 128, 64), False)):
        params = {"experts.gate_up_proj": meta(*shape), "experts.down_proj": meta(4, 64, 64)}
        spec = select(params, {"*": FP8})
        assert [(group.shape, group.transposed) for group in spec.groups] == [
            ((128, 64), transposed),
            ((64, 64), transposed),
        ]


def test_layers_are_told_apart_by_their_own_shapes():
    """Kills one layer's layout taken for another's."""
    params = {"a.experts.gate_up_proj": meta(4, 64, 192), "a.experts.down_proj": meta(4, 96, 64)}
    params |= {"b.experts.gate_up_proj": meta(4, 192, 64), "b.experts.down_proj": meta(4, 64, 96)}
    spec = select(params, {"*": FP8})
    assert [group.transposed for group in spec.groups] == [True, True, False, False]


def test_later_rules_win():
    """Each parameter takes the last rule that matches it, whatever came before; the order of rules is the only rank."""
    params = {"a.weight": meta(32, 32), "b.weight": meta(32, 32), "c.weight": meta(32, 32)}
    chosen = {g.key: g.format for g in select(params, {"*": FP8, "b.*": NVFP4, "[bc].*": MXFP4}).groups}
    assert chosen == {"a.weight": FP8, "b.weight": MXFP4, "c.weight": MXFP4}
    chosen = {g.key: g.format for g in select(params, {"[bc].*": MXFP4, "b.*": NVFP4, "*": FP8}).groups}
    assert chosen == {"a.weight": FP8, "b.weight": FP8, "c.weight": FP8}


def test_none_excludes_and_can_be_taken_back():
    """None is a choice like a format: it excludes what it matches, and a later rule includes it again."""
    params = {"a.weight": meta(32, 32), "b.weight": meta(32, 32), "c.weight": meta(32, 32)}
    spec = select(params, {"*": FP8, "[bc].*": None, "c.*": NVFP4})
    assert {g.key: g.format for g in spec.groups} == {"a.weight": FP8, "c.weight": NVFP4}
    assert [(s.name, s.reason) for s in spec.skipped] == [("b.weight", "excluded by [bc].*")]


def test_a_mapping_is_a_list_of_required_rules():
    """The two ways to write rules are one: a mapping is `Rule`s in its order."""
    params = {"a.weight": meta(32, 32), "b.weight": meta(32, 32)}
    wanted = select(params, {"*": FP8, "b.*": NVFP4})
    rules = [Rule("*", FP8), Rule("b.*", NVFP4)]
    assert select(params, rules) == select(params, tuple(rules)) == wanted


def test_globs_match_the_whole_name_in_its_case():
    """`*` crosses dots, a pattern without one is the exact name, and case counts."""
    params = {"a.b.weight": meta(32, 32), "A.b.weight": meta(32, 32), "a.b.weight.weight": meta(32, 32)}

    def keys(pattern):
        return [group.key for group in select(params, {pattern: FP8}).groups]

    assert keys("a*weight") == ["a.b.weight", "a.b.weight.weight"]
    assert keys("a.b.weight") == ["a.b.weight"]
    assert keys("A*") == ["A.b.weight"]


def test_a_rule_that_is_not_required_may_match_nothing():
    """A preset's exclusions hold for models that do not have what they exclude."""
    params = {"a.weight": meta(32, 32)}
    spec = select(params, [Rule("*", FP8), Rule("*lm_head*", None, required=False)])
    assert [group.key for group in spec.groups] == ["a.weight"]


def test_what_is_excluded_is_not_checked():
    """Kills a refusal of what nobody asked to quantize: a gap, a dtype, a 3-D shape, an odd width, emptiness."""
    params = {
        "a.weight": meta(32, 32),
        "x.experts.1.weight": meta(8, 8),
        "x.experts.3.weight": meta(8, 7),
        "x.table.weight": meta(8, 8, dtype=torch.int8),
        "x.conv.weight": meta(8, 8, 3),
        "x.empty.weight": meta(0, 8),
    }
    for rules in ({"a.*": NVFP4}, {"*": NVFP4, "x.*": None}):
        spec = select(params, rules)
        assert [group.key for group in spec.groups] == ["a.weight"]
        assert [skipped.name for skipped in spec.skipped] == [name for name in params if name != "a.weight"]


def test_blocks_lie_along_in_whatever_the_layout():
    """Kills a block held against the stored axis: of [64, 48] stored [in, out], blocks of 32 fit in, not out."""
    stored = {"experts.w1": meta(4, 64, 48)}
    (group,) = select(stored, {"*": INT4_BLOCK32}, transposed="*").groups
    assert group.shape == (48, 64)
    message = message_of(ValueError, select, stored, {"*": INT4_BLOCK32})
    assert_names(message, "experts.w1", (64, 48), "multiple of 32", "INT4_BLOCK32")


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_only_blocks_of_columns_must_divide_in(format):
    """Square blocks, channels and tensors take any shape; (1, n) blocks refuse a ragged `in`, naming both."""
    params = {"layer.weight": meta(3, 200)}
    if format.block[0] == 1 and format.block[1] is not None and 200 % format.block[1]:
        message = message_of(ValueError, select, params, {"*": format})
        assert_names(message, "layer.weight", (3, 200), f"multiple of {format.block[1]}", format.name, "exclude")
    else:
        assert select(params, {"*": format}).groups[0].format == format


def experts_with(**changes):
    """Four experts of a role, some of them changed: `_2=meta(...)`, or None to remove one."""
    params = {f"layers.0.experts.{i}.w1.weight": meta(32, 64) for i in range(4)}
    for number, change in changes.items():
        name = f"layers.0.experts.{number[1:]}.w1.weight"
        params[name] = change
        if change is None:
            del params[name]
    return params


KEY = "layers.0.experts.*.w1.weight"
THIRD = "layers.0.experts.2.w1.weight"
FIRST = "layers.0.experts.0.w1.weight"
ALL_FP8 = {"*": FP8}

# name -> (parameters, rules, keywords, what the message must say)
REFUSALS = {
    "a rule that matches nothing": (
        experts_with(),
        {"*.experts.*": FP8, "*.expert.*": NVFP4},
        {},
        ["'*.expert.*'", "found none", "4 weights", "layers.0.experts.0.w1.weight", "correct the pattern"],
    ),
    "an exclusion that matches nothing": (
        experts_with(),
        {"*": FP8, "*lm_haed*": None},
        {},
        ["'*lm_haed*'", "found none", "4 weights"],
    ),
    "a rule that matches only biases": (
        experts_with() | {"layers.0.experts.up_bias": meta(4, 64)},
        {"*": FP8, "*_bias": NVFP4},
        {},
        ["'*_bias'", "found only 'layers.0.experts.up_bias'", "no weight"],
    ),
    "a rule that matches only vectors": (
        experts_with() | {"norm.weight": meta(64)},
        {"*": FP8, "norm.*": NVFP4},
        {},
        ["'norm.*'", "found only 'norm.weight'", "no weight"],
    ),
    "a rule in another case": (experts_with(), {"*.Experts.*": FP8}, {}, ["'*.Experts.*'", "found none"]),
    "unequal shapes": (
        experts_with(_2=meta(32, 128)),
        ALL_FP8,
        {},
        [KEY, THIRD, (32, 128), FIRST, (32, 64), "one shape"],
    ),
    "unequal dtypes": (
        experts_with(_2=meta(32, 64, dtype=torch.float32)),
        ALL_FP8,
        {},
        [KEY, THIRD, "torch.float32", FIRST, "torch.bfloat16", "dtype"],
    ),
    "a gap": (experts_with(_2=None), ALL_FP8, {}, [KEY, "found experts 0-1, 3", "wanted 0-3", "2 missing"]),
    "no expert 0": (experts_with(_0=None), ALL_FP8, {}, [KEY, "found experts 1-3", "wanted 0-3", "0 missing"]),
    "another rank's experts": (
        {f"experts.linear.weight{i}": meta(32, 64) for i in (4, 5, 6)},
        ALL_FP8,
        {},
        ["experts.linear.weight*", "found experts 4-6", "wanted 0-", "missing"],
    ),
    "mixed formats": (
        experts_with(),
        {"*": FP8, "*.experts.2.*": NVFP4},
        {},
        [KEY, "different formats", f"'{FIRST}': FP8", f"'{THIRD}': NVFP4"],
    ),
    "one expert excluded": (
        experts_with(),
        {"*": FP8, "*.experts.2.*": None},
        {},
        [KEY, "different formats", f"'{FIRST}': FP8", f"'{THIRD}': None"],
    ),
    "one expert matched": (
        experts_with(),
        {"*.experts.2.*": FP8},
        {},
        [KEY, "different formats", f"'{FIRST}': None", f"'{THIRD}': FP8"],
    ),
    "3-D, not known to be experts": (
        {"conv.weight": meta(8, 32, 64)},
        ALL_FP8,
        {},
        ["'conv.weight'", "3-D", (8, 32, 64), "exclude", "experts="],
    ),
    "a list of 3-D experts": (
        {f"experts.{i}.conv.weight": meta(8, 32, 64) for i in range(2)},
        ALL_FP8,
        {},
        ["'experts.0.conv.weight'", "3-D", (8, 32, 64), "exclude"],
    ),
    "a block that does not divide in": (
        {"layer.weight": meta(64, 40)},
        {"*": NVFP4},
        {},
        ["'layer.weight'", (64, 40), "multiple of 16", "NVFP4", "exclude"],
    ),
    "a block that does not divide in, stacked": (
        {"experts.gate_up_proj": meta(4, 64, 40)},
        {"*": MXFP4},
        {},
        ["'experts.gate_up_proj'", (64, 40), "multiple of 32", "MXFP4"],
    ),
    "int8": (
        experts_with(_2=meta(32, 64, dtype=torch.int8)),
        ALL_FP8,
        {},
        [THIRD, "torch.int8", "bfloat16, float16 or float32"],
    ),
    "float64": (
        {"layer.weight": meta(8, 8, dtype=torch.float64)},
        ALL_FP8,
        {},
        ["'layer.weight'", "torch.float64", "bfloat16, float16 or float32"],
    ),
    "already quantized": (
        {"layer.weight": meta(8, 8, dtype=torch.float8_e4m3fn)},
        ALL_FP8,
        {},
        ["'layer.weight'", "torch.float8_e4m3fn", "bfloat16, float16 or float32"],
    ),
    "no rows": ({"layer.weight": meta(0, 8)}, ALL_FP8, {}, ["'layer.weight'", (0, 8), "empty"]),
    "no columns": ({"layer.weight": meta(8, 0)}, ALL_FP8, {}, ["'layer.weight'", (8, 0), "empty"]),
    "no experts": ({"experts.down_proj": meta(0, 8, 8)}, ALL_FP8, {}, ["'experts.down_proj'", (0, 8, 8), "empty"]),
    "no rule": (experts_with(), {}, {}, ["no weight", "4 parameters"]),
    "everything excluded": (experts_with(), {"*": FP8, "*.w1.*": None}, {}, ["no weight", "4 parameters", "*.w1.*"]),
    "no parameter": ({}, [Rule("*", FP8, required=False)], {}, ["no weight", "0 parameters"]),
    "a typo in experts=": (
        experts_with(),
        ALL_FP8,
        {"experts": r".*expert_(?P<expert>\d+)"},
        ["experts=", "expert_(?P<expert>", "matches no weight", "layers.0.experts.0.w1.weight"],
    ),
    "experts= that matches a part only": (
        {"net.moe_kernel": meta(3, 32, 64)},
        ALL_FP8,
        {"experts": "moe_kernel"},
        ["experts='moe_kernel'", "matches no weight", "net.moe_kernel"],
    ),
    "experts= that is no regular expression": (experts_with(), ALL_FP8, {"experts": "(.*"}, ["experts='(.*'"]),
    "experts= whose group is no number": (
        {"net.up": meta(32, 64)},
        ALL_FP8,
        {"experts": r"net\.(?P<expert>\w+)"},
        ["experts=", "net.up", "up"],
    ),
    "a typo in transposed=": (
        experts_with(),
        ALL_FP8,
        {"transposed": ["*.w1.*", "*.w7.*"]},
        ["transposed='*.w7.*'", "matches no weight", "layers.0.experts.0.w1.weight"],
    ),
}


@pytest.mark.parametrize("mistake", REFUSALS)
def test_a_mistake_is_refused_by_name(mistake):
    """Each error of `select` names the parameter or the pattern, what was found, what was wanted, and the fix."""
    params, rules, keywords, fragments = REFUSALS[mistake]
    assert_names(message_of(ValueError, select, params, rules, **keywords), *fragments)


def test_the_first_bad_group_of_many_is_the_one_named():
    """Kills an error that names layer 0 for a mistake in layer 3."""
    params = {f"layers.{n}.experts.{i}.w1.weight": meta(32, 64) for n in range(5) for i in range(4)}
    params["layers.3.experts.1.w1.weight"] = meta(16, 64)
    message = message_of(ValueError, select, params, {"*": FP8})
    assert_names(message, "layers.3.experts.*.w1.weight", "layers.3.experts.1.w1.weight")
    assert "layers.0" not in message


def cpu_experts(dtype=torch.float32):
    """Two experts with values, and their group."""
    params = {f"experts.{i}.weight": torch.ones(8, 4, dtype=dtype) for i in range(2)}
    (group,) = select(params, {"*": FP8}).groups
    return params, group


def test_weights_come_in_the_order_of_the_experts():
    """Kills experts in the order of the dict."""
    params, group = cpu_experts()
    shuffled = dict(reversed(params.items())) | {"norm.weight": torch.ones(3)}
    found = weights_of(shuffled, group)
    assert [weight is params[f"experts.{i}.weight"] for i, weight in enumerate(found)] == [True, True]


# name -> (expert 1's weight, the error, what its message must say)
MISFITS = {
    "missing": (None, KeyError, ["'experts.1.weight'", "'experts.*.weight'", "not in params"]),
    "another shape": (
        torch.ones(4, 8),
        ValueError,
        ["'experts.1.weight'", "found shape (4, 8)", "wants (8, 4)", "select again"],
    ),
    "one dimension more": (torch.ones(1, 8, 4), ValueError, ["'experts.1.weight'", "(1, 8, 4)", "(8, 4)"]),
    "float64": (
        torch.ones(8, 4).double(),
        ValueError,
        ["'experts.1.weight'", "torch.float64", "bfloat16, float16 or float32"],
    ),
    "int8": (
        torch.ones(8, 4).to(torch.int8),
        ValueError,
        ["'experts.1.weight'", "torch.int8", "bfloat16, float16 or float32"],
    ),
    "another dtype": (
        torch.ones(8, 4).bfloat16(),
        ValueError,
        ["'experts.1.weight'", "found torch.bfloat16", "wanted torch.float32", "'experts.0.weight'"],
    ),
    "another device": (
        torch.ones(8, 4, device="meta"),
        ValueError,
        ["'experts.1.weight'", "on meta", "on cpu", "'experts.0.weight'"],
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_weights_that_do_not_fit_the_spec_are_refused(misfit):
    """Each error of `weights_of` names the parameter, what was found and what the spec wants."""
    weight, error, fragments = MISFITS[misfit]
    params, group = cpu_experts()
    params["experts.1.weight"] = weight
    if weight is None:
        del params["experts.1.weight"]
    assert_names(message_of(error, weights_of, params, group), *fragments)


def test_a_transposed_group_wants_the_stored_shape():
    """Kills a check of [out, in] against a parameter that is stored [in, out]."""
    params = {"experts.w1": torch.ones(2, 4, 8)}
    (group,) = select(params, {"*": FP8}, transposed="*").groups
    assert (group.shape, group.parameter_shape) == ((8, 4), (2, 4, 8))
    assert weights_of(params, group)[0] is params["experts.w1"]
    message = message_of(ValueError, weights_of, {"experts.w1": torch.ones(2, 8, 4)}, group)
    assert_names(message, "'experts.w1'", (2, 8, 4), (2, 4, 8))


def some_spec(format=FP8):
    """A spec with each kind of group, and skipped parameters."""
    params = {f"experts.{i}.w1.weight": meta(32, 128) for i in range(3)}
    params |= {"moe.experts.gate_up_proj": meta(4, 128, 256), "moe.experts.down_proj": meta(4, 128, 128)}
    params |= {"attn.weight": meta(32, 128), "norm.weight": meta(32), "lm_head.weight": meta(64, 128)}
    return select(params, {"*": format, "lm_head.*": None})


def test_a_spec_is_frozen():
    """A spec is static: neither it nor what it holds can be changed."""
    spec = some_spec()
    for value, field in (
        (spec, "groups"),
        (spec.groups[0], "key"),
        (spec.skipped[0], "reason"),
        (spec.groups[0].format, "block"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(value, field, None)


def test_a_spec_is_a_value():
    """Equal by what it says, hashable accordingly (torch.compile guards and caches by it), and unequal by any field."""
    spec, same = some_spec(), some_spec()
    assert spec is not same
    assert spec == same
    assert hash(spec) == hash(same)
    assert {spec: 1}[same] == 1
    group = spec.groups[0]
    different = (
        {"key": "other"},
        {"names": group.names[::-1]},
        {"format": NVFP4},
        {"experts": 2},
        {"shape": (128, 32)},
        {"stacked": True},
        {"transposed": True},
    )
    for change in different:
        assert replace(spec, groups=(replace(group, **change), *spec.groups[1:])) != spec
    assert replace(spec, skipped=()) != spec


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_json_holds_the_whole_spec(format):
    """from_json(to_json(spec)) == spec for every format, on one line: a checkpoint can say what it holds."""
    spec = some_spec(format)
    text = spec.to_json()
    again = Spec.from_json(text)
    assert "\n" not in text
    assert again == spec
    assert hash(again) == hash(spec)
    assert str(again) == str(spec)
    assert again.groups[0].format == FORMATS[format.name]


def test_json_holds_numbers_and_not_names():
    """Kills a spec that looks its formats up: a format of the user's own comes back whole."""
    own = replace(FP8, name="INT8", unit_scale_below=1e-5)
    spec = some_spec(own)
    assert Spec.from_json(spec.to_json()).groups[0].format == own != FORMATS["INT8"]


def broken(change):
    """A stored spec with one change, as JSON."""
    data = json.loads(some_spec().to_json())
    change(data)
    return json.dumps(data)


GARBAGE = {
    "nothing": "",
    "no JSON": "groups: []",
    "cut off": some_spec().to_json()[:-7],
    "null": "null",
    "a number": "7",
    "a list": "[]",
    "a string": '"groups"',
    "another object": '{"weights": []}',
    "no skipped": '{"groups": []}',
    "groups are a number": '{"groups": 7, "skipped": []}',
    "a group is a number": '{"groups": [7], "skipped": []}',
    "a field is missing": broken(lambda data: data["groups"][0].pop("experts")),
    "a field is unknown": broken(lambda data: data["groups"][0].update(zero_point=1)),
    "a format is a name": broken(lambda data: data["groups"][0].update(format="FP8")),
    "a format is missing": broken(lambda data: data["groups"][0].pop("format")),
    "an element is a name": broken(lambda data: data["groups"][0]["format"].update(element="E4M3")),
    "a block is a number": broken(lambda data: data["groups"][0]["format"].update(block=16)),
    "a block that no format has": broken(lambda data: data["groups"][0]["format"].update(block=[3, 3])),
    "a shape is a number": broken(lambda data: data["groups"][0].update(shape=16)),
    "a skipped parameter without a reason": broken(lambda data: data["skipped"][0].pop("reason")),
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_is_no_stored_spec_is_refused(garbage):
    """Whatever a file holds, from_json raises ValueError and says that it is no stored spec and how it begins."""
    text = GARBAGE[garbage]
    assert_names(message_of(ValueError, Spec.from_json, text), "not a stored Spec", repr(text[:20])[1:-1])


def small_model():
    """Two layers with a dense attention, a router, stacked and separate experts."""
    params = {"model.embed_tokens.weight": meta(64, 32)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        params[f"{prefix}self_attn.q_proj.weight"] = meta(32, 32)
        params[f"{prefix}self_attn.q_proj.bias"] = meta(32)
        params[f"{prefix}mlp.gate.weight"] = meta(4, 32)
        params[f"{prefix}mlp.experts.gate_up_proj"] = meta(4, 64, 32)
        params[f"{prefix}mlp.experts.down_proj"] = meta(4, 32, 32)
        params |= {f"{prefix}side.experts.{i}.w1.weight": meta(16, 32) for i in range(3)}
        params[f"{prefix}norm.weight"] = meta(32)
    return params | {"lm_head.weight": meta(64, 32)}


TABLE = """\
quantized                                    format               experts  out x in  layout
model.layers.{0-1}.self_attn.q_proj.weight   INT8_PER_CHANNEL           1  32 x 32   dense
model.layers.{0-1}.mlp.experts.gate_up_proj  NVFP4                      4  64 x 32   stacked
model.layers.{0-1}.mlp.experts.down_proj     NVFP4                      4  32 x 32   stacked
model.layers.0.side.experts.*.w1.weight      NVFP4                      3  16 x 32   separate
model.layers.1.side.experts.*.w1.weight      FP8                        3  16 x 32   separate
not quantized                                why                           shape
model.embed_tokens.weight                    no rule                       64 x 32
model.layers.{0-1}.self_attn.q_proj.bias     bias                          32
model.layers.{0-1}.mlp.gate.weight           excluded by *gate.*           4 x 32
model.layers.{0-1}.norm.weight               1-D                           32
lm_head.weight                               no rule                       64 x 32
8 groups, 24 weights: 86.9 % of 34,176 parameters"""


def test_the_table_of_a_small_model():
    """print(spec): what is quantized and how, what is not and why, layers as a range, the share of all parameters."""
    rules = {"*.layers.*": INT8_PER_CHANNEL, "*.experts.*": NVFP4, "*.1.side.*": FP8, "*gate.*": None}
    spec = select(small_model(), rules)
    # Quantized are 2 * (32 * 32 + 4 * 64 * 32 + 4 * 32 * 32 + 3 * 16 * 32) = 29,696; the rest is 2 * 64 * 32 and
    # 2 * (32 + 4 * 32 + 32).
    share = 29_696 / (29_696 + 4_096 + 384)
    assert TABLE.endswith(f"{100 * share:.1f} % of {29_696 + 4_096 + 384:,} parameters")
    assert str(spec) == TABLE


def rows_of(spec):
    """The rows of a printed table, as (first column, the rest)."""
    return [tuple(line.split("  ", 1)) for line in str(spec).splitlines()]


def test_layers_collapse_to_ranges():
    """Twenty-eight equal layers are one row, {0-27}; layers that differ are rows of their own, {0, 2-4} and 1."""
    params = {f"model.layers.{n}.mlp.up.weight": meta(32, 32) for n in range(28)}
    (row,) = [name for name, *_ in rows_of(select(params, {"*": FP8})) if "mlp" in name]
    assert row == "model.layers.{0-27}.mlp.up.weight"
    params = {f"model.layers.{n}.mlp.up.weight": meta(64 if n == 1 else 32, 32) for n in range(5)}
    rows = [name for name, *_ in rows_of(select(params, {"*": FP8})) if "mlp" in name]
    assert rows == ["model.layers.{0, 2-4}.mlp.up.weight", "model.layers.1.mlp.up.weight"]


@pytest.mark.parametrize(
    ("params", "keywords", "layout"),
    [
        ({"a.weight": meta(8, 8)}, {}, "dense"),
        ({"a.weight": meta(8, 8)}, {"transposed": "*"}, "dense, transposed"),
        ({f"experts.{i}.weight": meta(8, 8) for i in range(2)}, {}, "separate"),
        ({f"experts.{i}.weight": meta(8, 8) for i in range(2)}, {"transposed": "*"}, "separate, transposed"),
        ({"experts.0.weight": meta(8, 8)}, {}, "separate"),
        ({"experts.w1": meta(2, 8, 8)}, {}, "stacked"),
        ({"experts.w1": meta(2, 8, 8)}, {"transposed": "*"}, "stacked, transposed"),
    ],
)
def test_the_table_names_the_layout(params, keywords, layout):
    """The last column says how a group is stored: dense, separate or stacked, and whether it is transposed."""
    row = str(select(params, {"*": FP8}, **keywords)).splitlines()[1]
    assert row.split("8 x 8")[1].strip() == layout


def test_the_table_lists_everything_not_quantized():
    """Each skipped parameter is in the lower half with its reason; an unquantized one cannot hide."""
    spec = select(small_model(), {"*gate_up_proj": NVFP4})
    lines = str(spec).splitlines()
    lower = lines[[line.split("  ")[0] for line in lines].index("not quantized") + 1 : -1]
    names = [line.split("  ")[0] for line in lower]
    listed = {name.replace("{0-1}", str(n)) for name in names for n in range(2)}
    assert listed == {re.sub(r"experts\.\d+", "experts.*", skipped.name) for skipped in spec.skipped}
    reasons = {skipped.reason for skipped in spec.skipped}
    assert all(any(reason in line for reason in reasons) for line in lower)


def test_the_table_of_a_spec_that_quantizes_everything():
    """Without skipped parameters there is no lower half, and the share is all of it; one is not "1 groups"."""
    spec = select({"a.weight": meta(8, 8)}, {"*": FP8})
    assert str(spec).splitlines()[-1] == "1 group, 1 weight: 100.0 % of 64 parameters"
    assert "not quantized" not in str(spec)


def test_a_notebook_shows_the_table_as_text():
    """_repr_html_ is the table in <pre>, its characters escaped."""
    spec = Spec((Group("a<b&c>", ("a<b&c>",), FP8, 1, (8, 8)),))
    html = spec._repr_html_()
    assert html.startswith("<pre>")
    assert html.endswith("</pre>")
    assert "a&lt;b&amp;c" in html
    assert "<b" not in html


FORTY_SIX_LAYERS = """\
quantized                                             format   experts  out x in  layout
decoder.layers.{0-45}.mlp.experts.linear_fc1.weight*  NVFP4        128  64 x 32   separate
decoder.layers.{0-45}.mlp.experts.linear_fc2.weight*  NVFP4        128  32 x 32   separate
not quantized                                         why               shape
decoder.layers.{0-45}.mlp.router.weight               no rule           128 x 32"""


def test_forty_six_layers_of_128_experts_are_selected_at_once():
    """Kills a quadratic search: 11,776 weights of Transformer Engine names in far less than five seconds."""
    params = {
        f"decoder.layers.{layer}.mlp.experts.{role}.weight{i}": meta(*shape)
        for layer in range(46)
        for role, shape in (("linear_fc1", (64, 32)), ("linear_fc2", (32, 32)))
        for i in range(128)
    } | {f"decoder.layers.{layer}.mlp.router.weight": meta(128, 32) for layer in range(46)}
    start = time.perf_counter()
    spec = select(params, {"*.experts.*": NVFP4})
    table = str(spec)
    seconds = time.perf_counter() - start
    assert seconds < 2.5
    assert len(spec.groups) == 92
    assert [group.experts for group in spec.groups] == [128] * 92
    assert spec.groups[0].names[127] == "decoder.layers.0.mlp.experts.linear_fc1.weight127"
    assert table.splitlines()[:-1] == FORTY_SIX_LAYERS.splitlines()
    assert table.endswith(": 99.0 % of 18,276,352 parameters")


CHANGED_IN_PLACE = {
    "shape": lambda w: setattr(w, "data", torch.ones(16, 32)),
    "transposed": lambda w: setattr(w, "data", w.data.T),
    "dtype": lambda w: setattr(w, "data", w.data.double()),
    "mixed": lambda w: setattr(w, "data", w.data.bfloat16()),
}


@pytest.mark.parametrize("change", CHANGED_IN_PLACE.values(), ids=CHANGED_IN_PLACE)
def test_a_parameter_that_changes_in_place_is_checked_again(change):
    """A group that passed once is compared with what it was, and a parameter that became another tensor is refused."""
    params = {f"experts.{i}.w1.weight": torch.nn.Parameter(torch.ones(8, 32)) for i in range(4)}
    (group,) = select(params, {"*": FP8}).groups
    for _ in range(2):
        assert weights_of(params, group) == list(params.values())
    change(params["experts.2.w1.weight"])
    with pytest.raises(ValueError, match=r"experts\.2\.w1\.weight"):
        weights_of(params, group)
    params["experts.2.w1.weight"] = torch.nn.Parameter(torch.ones(8, 32))
    assert weights_of(params, group) == list(params.values())


def of_inputs():
    """Weights of each layout; inputs by tensor, an expert and shared, by token, and in blocks."""
    params = (
        expert_list("layers.0.experts.{}.w1.weight")
        | expert_list("layers.0.experts.{}.w2.weight", shape=(64, 48))
        | {"layers.0.experts.down_proj": meta(4, 64, 32), "layers.0.q.weight": meta(64, 64), "norm.weight": meta(64)}
    )
    inputs = {"*": FP8, "*.w2.*": NVFP4, "*down_proj": INT8_PER_CHANNEL, "*.q.*": MXFP4}
    return params, select(params, {"*.experts.*": NVFP4}, inputs=inputs, per_expert=["*.w2.*"])


def test_inputs_are_groups_of_their_own():
    """Their key is the weights' with `.input`; a format by channel and MX keep nothing, others amax and tokens."""
    _, spec = of_inputs()
    assert [group.key for group in spec.groups] == [
        "layers.0.experts.*.w1.weight", "layers.0.experts.*.w2.weight", "layers.0.experts.down_proj"
    ]  # fmt: skip
    assert {i.key: (i.format.name, i.names[-1], i.shape, i.leaf_shapes) for i in spec.inputs} == {
        "layers.0.experts.*.w1.weight.input": (
            "FP8", "layers.0.experts.3.w1.weight", (48, 64), {"amax": (1,), "tokens": (4,)},
        ),
        "layers.0.experts.*.w2.weight.input": (
            "NVFP4", "layers.0.experts.3.w2.weight", (64, 48), {"amax": (4,), "tokens": (4,)},
        ),
        "layers.0.experts.down_proj.input": ("INT8_PER_CHANNEL", "layers.0.experts.down_proj", (64, 32), {}),
        "layers.0.q.weight.input": ("MXFP4", "layers.0.q.weight", (64, 64), {}),
    }  # fmt: skip


def test_a_spec_with_inputs_is_a_value_and_json():
    """Equal, hashable, through JSON; a stored spec without inputs is one of an older version."""
    params, spec = of_inputs()
    again = Spec.from_json(spec.to_json())
    assert (again, hash(again), str(again)) == (spec, hash(spec), str(spec))
    assert [i.leaf_shapes for i in again.inputs] == [i.leaf_shapes for i in spec.inputs]
    without = replace(spec, inputs=())
    assert without == select(params, {"*.experts.*": NVFP4}) != spec
    assert "inputs" not in json.loads(without.to_json())
    assert Spec.from_json(without.to_json()) == without


def test_the_table_has_inputs():
    _, spec = of_inputs()
    assert "\n".join(str(spec).splitlines()[4:9]) == (
        "inputs                              format            experts  in        scales\n"
        "layers.0.experts.*.w1.weight.input  FP8                     4  64        one amax\n"
        "layers.0.experts.*.w2.weight.input  NVFP4                   4  48        an amax an expert\n"
        "layers.0.experts.down_proj.input    INT8_PER_CHANNEL        4  32        a scale a token\n"
        "layers.0.q.weight.input             MXFP4                   1  64        a scale a block"
    )


def test_a_preset_has_rules_for_both():
    """`inputs` beside a preset replaces its own; rules alone have none."""
    params, _ = of_inputs()
    preset = Preset((Rule("*", FP8),), (Rule("*", FP8), Rule("*.q.*", None)))
    assert [i.format.name for i in select(params, preset).inputs] == ["FP8"] * 3
    assert [i.key for i in select(params, preset, inputs={"*.q.*": MXFP4}).inputs] == ["layers.0.q.weight.input"]
    assert select(params, preset, inputs={}).inputs == select(params, preset.rules).inputs == ()
    assert [g.key for g in select(params, {}, inputs={"*.q.*": FP8}).all_groups] == ["layers.0.q.weight.input"]


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"inputs": {"*nothing*": FP8}}, ["rule '*nothing*' matches no weight"]),
        ({"inputs": {"*.q.*": FP8_BLOCK}}, ["inputs of 'layers.0.q.weight': found FP8_BLOCK", "(128, 128)"]),
        ({"inputs": {"*.q.*": INT4_BLOCK32}}, ["inputs of 'layers.0.q.weight': found INT4_BLOCK32", "static scales"]),
        ({"inputs": {"*.q.*": NVFP4_STATIC}}, ["found NVFP4_STATIC", "of dynamic blocks such as NVFP4"]),
        ({"inputs": {"*.0.w1.*": FP8}}, ["'layers.0.experts.*.w1.weight': its experts get different formats"]),
        ({"inputs": {"*.odd.*": MXFP4}}, ["'layers.0.odd.weight'", "`in` to be a multiple of 32"]),
        ({"inputs": {"*.q.*": FP8}, "per_expert": "*.w1.*"}, ["per_expert='*.w1.*' matches no weight with inputs"]),
        ({"inputs": {"*.w1.*": FP8}, "per_expert": "*.0.w1.*"}, ["per_expert= matches 1 of 4 experts"]),
        ({"inputs": {"clash": FP8}}, ["inputs of 'clash': found a parameter 'clash.input'"]),
        ({"inputs": {}}, ["the rules select no weight"]),
    ],
)
def test_mistakes_in_inputs_are_refused_by_name(options, fragments):
    params, _ = of_inputs()
    params |= {"layers.0.odd.weight": meta(8, 33), "clash": meta(8, 32), "clash.input": meta(8, 32)}
    assert_names(message_of(ValueError, select, params, {}, **options), *fragments)


def test_what_has_no_place_for_inputs_says_so(tmp_path):
    """Kills scales of inputs that are left out in silence: packing, export, modules of other engines' checkpoints."""
    params = {"experts.0.w1.weight": torch.ones(32, 32)}
    model = torch.nn.Linear(1, 1)
    fq = fqt.transform(fqt.select(params, {"*": FP8}, inputs={"*": FP8}))
    spec, state = fq.spec, fq.init(params)
    packed = fqt.transform(replace(spec, inputs=())).pack(params, fqt.calibrate(params, spec=replace(spec, inputs=())))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    doors = {
        "pack": lambda: fq.pack(params, state),
        "export": lambda: fqt.export.compressed_tensors(params, state, tmp_path, spec=spec, config=config),
        "checkpoint.megatron": lambda: fqt.checkpoint.megatron.sharded_state_dict(state, spec, {}),
        "checkpoint.megatron ": lambda: fqt.checkpoint.megatron.load_state({}, spec, state),
        "checkpoint.megatron  ": lambda: fqt.checkpoint.megatron.verify(tmp_path, spec, {}),
        "checkpoint.modelopt": lambda: fqt.checkpoint.modelopt.read({}, spec),
        "checkpoint.modelopt ": lambda: fqt.checkpoint.modelopt.write(
            state | {"experts.*.w1.weight.input": InputAmax(torch.ones(1), torch.ones(1).double())}, spec
        ),
        "layerwise": lambda: fqt.layerwise(model, state, spec=spec).__enter__(),
        "packed weights": lambda: fqt.checkpoint.save(packed, tmp_path / "packed", spec=spec),
    }
    for what, door in doors.items():
        assert_names(
            message_of(ValueError, door), what.strip(), "the inputs of 1 groups in the spec", "wanted weights only"
        )
