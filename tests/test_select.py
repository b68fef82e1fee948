"""Which parameters are quantized: each naming convention, what rules decide, and each refusal."""

import re
import time
from fnmatch import fnmatchcase

import numpy as np
import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fq_transforms import presets
from fq_transforms.formats import FP8, INT4_BLOCK32, INT8_PER_CHANNEL, MXFP4, NVFP4
from fq_transforms.rules import Rule
from fq_transforms.select import select
from tests.cases import ALL_FORMATS, assert_names, expert_list, message_of, meta, name_of
from tests.hostile import watched

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
    "module dict of Switch and NLLB": (
        expert_list("encoder.block.1.layer.1.mlp.experts.expert_{}.wi.weight", experts=12),
        [("encoder.block.1.layer.1.mlp.experts.expert_*.wi.weight", 12, (48, 64), False, False)],
        {},
    ),
    "stacked without a gate, beside a router": (
        {
            "layers.0.mixer.experts.up_proj": meta(4, 96, 64),
            "layers.0.mixer.experts.down_proj": meta(4, 64, 96),
            "layers.0.mixer.gate.weight": meta(4, 64),
        },
        [
            ("layers.0.mixer.experts.up_proj", 4, (96, 64), True, False),
            ("layers.0.mixer.experts.down_proj", 4, (64, 96), True, False),
            ("layers.0.mixer.gate.weight", 1, (4, 64), False, False),
        ],
        {},
    ),
    "stacked without a gate, transposed, beside a router": (
        {
            "layers.0.experts.up_proj": meta(4, 64, 96),
            "layers.0.experts.down_proj": meta(4, 96, 64),
            "layers.0.router.layer.weight": meta(6, 64),
        },
        [
            ("layers.0.experts.up_proj", 4, (96, 64), True, True),
            ("layers.0.experts.down_proj", 4, (64, 96), True, True),
            ("layers.0.router.layer.weight", 1, (6, 64), False, False),
        ],
        {},
    ),
    "stacked, told": (
        {"a.experts.down_proj": meta(4, 96, 64), "b.experts.down_proj": meta(4, 96, 64)},
        [("a.experts.down_proj", 4, (96, 64), True, False), ("b.experts.down_proj", 4, (64, 96), True, True)],
        {"transposed": {"*": False, "b.*": True}},
    ),
    "a single matrix among experts, told": (
        {"experts.w1": meta(48, 64)},
        [("experts.w1", 1, (48, 64), False, False)],
        {"experts": "experts.w1"},
    ),
    "dense, transposed, beside its bias": (
        {"c_fc.weight": meta(64, 48)},
        [("c_fc.weight", 1, (48, 64), False, True)],
        {"transposed": {"c_fc.weight": True}},
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


def test_a_bias_shows_how_its_stack_lies():
    """A bias [E, out] beside a stack alone; and a router does not outweigh it."""
    for matrix, is_transposed in (((96, 64), True), ((64, 96), False)):
        params = {"experts.down_proj": meta(4, *matrix), "experts.down_proj_bias": meta(4, 64)}
        for others in ({}, {"router.weight": meta(4, 96)}):
            (group,) = select(params | others, {"experts.*": FP8}).groups
            assert (group.shape, group.transposed) == ((64, 96), is_transposed)


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


@pytest.mark.parametrize(
    "name",
    [
        *("mixer.conv1d.weight", "a.conv_qk_grouped.weight", "stem.convs.0.weight", "conv.weight", "mixer.conv_weight"),
        *("module.mixer.dwConv._orig_mod.weight", "mixer.conv1d.base_layer.weight", "a.convolution.weight"),
    ],
)
def test_kernels_of_convolutions_are_never_weights(name):
    """3-D as 4-D ones: no rule takes them, and one that asks for nothing else says so; linears beside them stay."""
    params = {"conv.in_proj.weight": meta(32, 32), "conv.experts.w1": meta(4, 32, 32), name: meta(64, 1, 4)}
    spec = select(params, {"*": FP8})
    assert [group.key for group in spec.groups] == ["conv.in_proj.weight", "conv.experts.w1"]
    assert [(skipped.name, skipped.reason) for skipped in spec.skipped] == [(name, "convolution")]
    assert_names(message_of(ValueError, select, params, {name: FP8}), name, "which is no weight")


@pytest.mark.parametrize(
    "name", ["convert.weight", "conversation.0.weight", "conv_moe.experts", "experts.0.conv.weight"]
)
def test_what_may_be_experts_is_not_taken_for_a_convolution(name):
    """Its name has the letters, or experts too: a 3-D weight that is not known is refused, never left in silence."""
    message = message_of(ValueError, select, {"a.weight": meta(8, 8), name: meta(4, 8, 8)}, {"*": FP8})
    assert_names(message, name, "3-D shape", "experts=")


ADAPTED = {
    "a layer": ("q_proj.base_layer.weight", ["q_proj.lora_A.default.weight", "q_proj.hada_w1_a.default"]),
    "an embedding": ("wte.base_layer.weight", ["wte.lora_embedding_A.default"]),
    "an expert": ("experts.0.up.base_layer.weight", ["experts.0.up.lora_B.default.weight"]),
    "a stack, twice": (
        "experts.base_layer.base_layer.w1",
        ["experts.lora_A.default.weight", "experts.base_layer.lora_A.default.weight"],
    ),
    "Megatron-Bridge": ("linear_fc1.to_wrap.weight", ["linear_fc1.adapter.linear_in.weight"]),
    "the root": ("base_layer.weight", ["lora_A.default.weight"]),
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters_are_never_weights(kind):
    """What stands beside a `base_layer` is the adapter's, whatever its kind calls it; what it wraps is a weight."""
    base, adapters = ADAPTED[kind]
    params = {base: meta(4, 32, 32) if kind == "a stack, twice" else meta(32, 32), "k.base_layer.weight": meta(32, 32)}
    if base == "base_layer.weight":
        del params["k.base_layer.weight"]
    spec = select(params | {name: meta(8, 32) for name in adapters}, {"*": FP8})
    assert {name for group in spec.groups for name in group.names} == params.keys()
    assert {skipped.name: skipped.reason for skipped in spec.skipped} == dict.fromkeys(adapters, "adapter")


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
    """The ways to write rules are one: a mapping is `Rule`s of weights in its order, and so is a preset."""
    params = {"a.weight": meta(32, 32), "b.weight": meta(32, 32)}
    wanted = select(params, {"*": FP8, "b.*": NVFP4, "a.*": None})
    rules = [Rule("*", FP8), Rule("b.*", NVFP4), Rule("a.*")]
    for same in (rules, tuple(rules)):
        spec = select(params, same)
        assert spec == wanted
        assert spec.rules == wanted.rules == tuple(rules)
    assert select(params, presets.FP8_DEFAULT_CFG).rules is presets.FP8_DEFAULT_CFG


NAMES = ["a.x.weight", "a.y.weight", "b.x.weight", "b.y.weight"]
RULES = st.lists(
    st.builds(
        Rule,
        st.sampled_from(["*", "a.*", "b.*", "*.x.*", "*.y.*", *NAMES]),
        st.sampled_from([None, FP8, NVFP4, MXFP4]),
        st.sampled_from([None, FP8, NVFP4, INT8_PER_CHANNEL]),
    ),
    max_size=5,
)


@given(RULES)
def test_the_last_rule_that_matches_decides_weights_and_inputs(rules):
    """Law: each name has the formats of its last rule alone, both of them; without one, or with None, it has none."""
    params = {name: meta(32, 32) for name in NAMES}
    last = {name: next((r for r in reversed(rules) if fnmatchcase(name, r.pattern)), Rule("")) for name in NAMES}
    if not any(rule.weights or rule.inputs for rule in last.values()):
        assert_names(message_of(ValueError, select, params, rules), "the rules select no weight")
        return
    spec = select(params, rules)
    assert {g.key: g.format for g in spec.groups} == {name: r.weights for name, r in last.items() if r.weights}
    assert {i.key: i.format for i in spec.inputs} == {f"{name}.input": r.inputs for name, r in last.items() if r.inputs}
    assert {s.name for s in spec.skipped} == {name for name, rule in last.items() if not rule.weights}
    assert spec.rules == tuple(rules)


@given(RULES)
def test_weights_only_selects_the_same_weights(rules):
    """Law: without inputs the rules select the same groups, in the same formats, or nothing where there were none."""
    params = {name: meta(32, 32) for name in NAMES}
    of_weights = presets.weights_only(rules)
    try:
        groups = select(params, rules).groups
    except ValueError:
        groups = ()
    if groups:
        spec = select(params, of_weights)
        assert spec.groups == groups
        assert not spec.inputs
    else:
        assert_names(message_of(ValueError, select, params, of_weights), "the rules select no weight")


def test_what_is_skipped_says_why():
    """Left out by a rule, without a rule, or multiplied with quantized inputs while it stays as it is itself."""
    params = {f"{name}.weight": meta(32, 32) for name in "abcd"}
    spec = select(params, [Rule("a.*", FP8), Rule("b.*", inputs=FP8), Rule("c.*")])
    assert {skipped.name: skipped.reason for skipped in spec.skipped} == {
        "b.weight": "inputs only by b.*",
        "c.weight": "excluded by c.*",
        "d.weight": "no rule",
    }


def test_inputs_are_groups_of_their_own():
    """Their key is the weights' with `.input`; a format by channel and MX keep nothing, others amax and tokens."""
    params = (
        expert_list("layers.0.experts.{}.w1.weight")
        | expert_list("layers.0.experts.{}.w2.weight", shape=(64, 48))
        | {"layers.0.experts.down": meta(4, 64, 32), "layers.0.q.weight": meta(64, 64), "norm.weight": meta(64)}
    )
    rules = [
        Rule("*.w1.*", NVFP4, FP8),
        Rule("*.w2.*", NVFP4, NVFP4, per_expert_inputs=True),
        Rule("*.down", NVFP4, INT8_PER_CHANNEL),
        Rule("*.q.*", inputs=MXFP4),
    ]
    spec = select(params, rules)
    assert [group.key for group in spec.groups] == [
        "layers.0.experts.*.w1.weight", "layers.0.experts.*.w2.weight", "layers.0.experts.down"
    ]  # fmt: skip
    assert {i.key: (i.format.name, i.names[-1], i.shape, i.leaf_shapes) for i in spec.inputs} == {
        "layers.0.experts.*.w1.weight.input": (
            "FP8", "layers.0.experts.3.w1.weight", (48, 64), {"amax": (1,), "tokens": (4,)},
        ),
        "layers.0.experts.*.w2.weight.input": (
            "NVFP4", "layers.0.experts.3.w2.weight", (64, 48), {"amax": (4,), "tokens": (4,)},
        ),
        "layers.0.experts.down.input": ("INT8_PER_CHANNEL", "layers.0.experts.down", (64, 32), {}),
        "layers.0.q.weight.input": ("MXFP4", "layers.0.q.weight", (64, 64), {}),
    }  # fmt: skip
    assert [g.key for g in select(params, [Rule("*.q.*", inputs=FP8)]).all_groups] == ["layers.0.q.weight.input"]


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
    spec = select(params, [Rule("*", FP8), Rule("*lm_head*", required=False)])
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


def test_what_is_written_in_place_of_a_mistake_is_right():
    """What the errors and the hint of the table say to write does what was meant: globs, the regex, the flat dict."""
    bracketed = {"net.ffn[7].up": meta(32, 64), "net.ffn[8].up": meta(32, 64)}
    assert [g.key for g in select(bracketed, {"*ffn[[]7].*": FP8}).groups] == ["net.ffn[7].up"]
    assert select(expert_list("experts.{}.w1.weight"), {"experts.*": FP8}).groups[0].experts == 4
    params = {f"layers.{i}.ffn_{e}.{w}": meta(32, 64) for i in range(3) for e in range(12) for w in ("w1", "w2")}
    spec = select(params, {"*": FP8})
    *_, hint = str(spec).splitlines()
    assert "layers.0.ffn_[0-11].w1 are 12 groups" in hint
    regex = re.search("experts=r'(.*)'", hint)[1]
    found = select(params, {"*": FP8}, experts=regex)
    assert [(g.key, g.experts) for g in found.groups] == [
        (f"layers.{i}.ffn_*.{w}", 12) for i in range(3) for w in ("w1", "w2")
    ]
    nested = {"layers": [{"weight": meta(32, 64)}, {"weight": meta(32, 64)}]}
    message = message_of(ValueError, select, {"net": nested}, {"*": FP8})
    assert_names(message, "params: found a dict at 'net'", "one flat dict", "pass {'.'.join")
    line = message.partition("pass ")[2]
    flat = eval(line, {"optree": optree, "params": {"net": nested}})
    assert [g.key for g in select(flat, {"*": FP8}).groups] == ["net.layers.0.weight", "net.layers.1.weight"]


@pytest.mark.parametrize(
    ("pattern", "count", "is_hinted"),
    [
        ("net.ffn_{}.up", 12, True),
        ("layers.0.moe.{}.up", 2, True),
        ("layers.0.mlp.{}.up", 8, True),
        ("expert{}.up", 2, True),
        ("layers.0.mlp.{}.up", 3, False),  # what a Sequential may hold
        ("layers.{}.ffn.up", 12, False),
        ("stages.0.blocks.{}.up", 12, False),
        ("transformer.h.{}.mlp.up", 12, False),
        ("layers.0.attn.heads.{}.up", 12, False),
        ("layers.0.experts.{}.up", 12, False),  # is a group
        ("layers.0.moe.w{}", 1, False),
    ],
)
def test_the_table_hints_at_experts_that_were_not_grouped(pattern, count, is_hinted):
    """Numbers within a layer from 0 on, or beside a word for experts; layers, blocks and heads are none."""
    spec = select({pattern.format(i): meta(32, 64) for i in range(count)}, {"*": FP8})
    assert ("hint: " in str(spec)) == is_hinted


def test_the_table_hints_at_stacks_that_nothing_showed_the_way_round():
    """Kills blocks along the wrong side, in silence. Roles that are known to be stored either way are asked for."""
    stacks = {f"blk.{i}.bank.gu": meta(4, 32, 64) for i in range(2)}
    given = {"experts": r"blk\.\d+\.bank\.gu"}
    text = str(select(stacks, {"*": FP8}, **given))
    assert text.rpartition("pass ")[2] == "transposed={'blk.*.bank.gu': True}"
    for way in (True, False):
        assert "hint" not in str(select(stacks, {"*": FP8}, **given, transposed={"*": way}))
    assert "hint" not in str(select(stacks | {f"{name}_bias": meta(4, 32) for name in stacks}, {"*": FP8}, **given))
    layer = {"experts.gate_up_proj": meta(4, 64, 16), "experts.down_proj": meta(4, 16, 32)}
    assert "hint" not in str(select(layer, {"*": FP8}))


def test_a_regex_without_the_group_still_tells_single_matrices():
    """Kills a refusal of what `experts=` is for: stacks, a matrix among experts, what a weight is computed from."""
    for name in ("layers.{}.moe_kernel", "layers.{}.experts.w1", "layers.{}.parametrizations.weight.original"):
        shape = (4, 32, 64) if name.endswith("kernel") else (32, 64)
        params = {name.format(i): meta(*shape) for i in range(3)}
        assert len(select(params, {"*": FP8}, experts=name.replace("{}", r"\d+")).groups) == 3


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
        {"stem.weight": meta(8, 32, 64)},
        ALL_FP8,
        {},
        ["'stem.weight'", "3-D", (8, 32, 64), "exclude", "experts="],
    ),
    "a list of 3-D experts": (
        {f"experts.{i}.stem.weight": meta(8, 32, 64) for i in range(2)},
        ALL_FP8,
        {},
        ["'experts.0.stem.weight'", "3-D", (8, 32, 64), "exclude"],
    ),
    "a block that does not divide in": (
        {"layer.weight": meta(64, 40)},
        {"*": NVFP4},
        {},
        ["'layer.weight'", (64, 40), "multiple of 16", "NVFP4", "exclude"],
    ),
    "a block that does not divide in, stacked": (
        {"experts.w13": meta(4, 64, 40)},
        {"*": MXFP4},
        {},
        ["'experts.w13'", (64, 40), "multiple of 32", "MXFP4", "'experts.w13': None"],
    ),
    "a block that does not divide in, of integers": (
        {"layer.weight": meta(64, 48)},
        {"*": INT4_BLOCK32},
        {},
        ["'layer.weight'", (64, 48), "multiple of 32", "as many bits that fits, NVFP4"],
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
    "inputs that match nothing": (
        experts_with(),
        [Rule("*", FP8, FP8), Rule("*.expert.*", FP8, INT8_PER_CHANNEL)],
        {},
        ["rule '*.expert.*' matches no weight", "found none"],
    ),
    "mixed inputs": (
        experts_with(),
        [Rule("*", FP8, FP8), Rule("*.experts.2.*", FP8, NVFP4)],
        {},
        [KEY, "different formats of inputs", f"'{FIRST}': FP8", f"'{THIRD}': NVFP4"],
    ),
    "inputs of one expert": (
        experts_with(),
        [Rule("*.experts.2.*", inputs=FP8)],
        {},
        [KEY, "its experts get different formats of inputs", f"'{FIRST}': None", f"'{THIRD}': FP8"],
    ),
    "an amax of its own for one expert's inputs": (
        experts_with(),
        [Rule("*", FP8, FP8), Rule("*.experts.2.*", FP8, FP8, per_expert_inputs=True)],
        {},
        [KEY, "different per_expert_inputs", f"'{FIRST}': False", f"'{THIRD}': True", "let the rules treat them alike"],
    ),
    "a block that does not divide in, of inputs": (
        {"layer.weight": meta(64, 40)},
        [Rule("*", FP8, MXFP4)],
        {},
        ["'layer.weight'", (64, 40), "`in` to be a multiple of 32", "MXFP4"],
    ),
    "a parameter with the inputs' name": (
        {"clash": meta(8, 32), "clash.input": meta(8, 32)},
        [Rule("clash", inputs=FP8)],
        {},
        ["inputs of 'clash': found a parameter 'clash.input'"],
    ),
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
    "experts= without the group, on a list": (
        expert_list("net.ffn_{}.up", experts=12),
        ALL_FP8,
        {"experts": r"net\.ffn_(\d+)\.up"},
        ["found no group (?P<expert>", "net.ffn_[0-11].up", r"pass experts=r'net\.ffn_(?P<expert>\d+)\.up'"],
    ),
    "experts that begin the name": (
        expert_list("experts.{}.w1.weight"),
        {"*.experts.*": FP8},
        {},
        ["'*.experts.*' matches no weight", "`*.` wants a dot", "write 'experts.*'"],
    ),
    "a glob with the brackets of a name": (
        {"net.ffn[7].up": meta(32, 64), "net.ffn[8].up": meta(32, 64)},
        {"*": FP8, "*ffn[7].*": NVFP4},
        {},
        ["'*ffn[7].*' matches no weight", "one character of a set", "write '*ffn[[]7].*'"],
    ),
    "transposed= with the brackets of a name": (
        {"net.ffn[7].up": meta(32, 64)},
        ALL_FP8,
        {"transposed": "*ffn[7].*"},
        ["transposed='*ffn[7].*' matches no weight", "write '*ffn[[]7].*'"],
    ),
    "a key that is no name": ({3: meta(8, 8)}, ALL_FP8, {}, ["params: found the key 3, wanted the name"]),
    "NumPy": ({"layer.weight": np.ones((8, 8))}, ALL_FP8, {}, ["'layer.weight'", "found ndarray", "torch.from_numpy"]),
    "a stack that nothing shows the layout of": (
        {"layers.3.experts.down_proj": meta(4, 96, 64)},
        ALL_FP8,
        {},
        ["'layers.3.experts.down_proj'", (4, 96, 64), "transposed={'layers.*.experts.down_proj': False}", "or True"],
    ),
    "square matrices beside a bias and a router": (
        {
            "experts.up_proj": meta(4, 64, 64),
            "experts.up_proj_bias": meta(4, 64),
            "router.weight": meta(4, 64),
        },
        ALL_FP8,
        {},
        ["'experts.up_proj'", (4, 64, 64), "transposed={'experts.up_proj': False}"],
    ),
    "a router of another width": (
        {"experts.up_proj": meta(4, 48, 64), "router.weight": meta(4, 96)},
        ALL_FP8,
        {},
        ["'experts.up_proj'", "nothing that shows"],
    ),
    "stacks that fit together neither way": (
        {"experts.up_proj": meta(4, 48, 64), "experts.down_proj": meta(4, 64, 96), "router.weight": meta(4, 64)},
        ALL_FP8,
        {},
        ["'experts.up_proj'", "nothing that shows"],
    ),
    "all experts below each other": (
        {"blocks.0.ffn.experts.mlp.w1": meta(192, 64)},
        ALL_FP8,
        {},
        [
            "'blocks.0.ffn.experts.mlp.w1'",
            (192, 64),
            "the rule 'blocks.*.ffn.experts.mlp.w1': None",
            "experts=r'blocks.\\d+.ffn.experts.mlp.w1'",
        ],
    ),
    "experts numbered behind their role": (
        {"l.0.experts.w1.3.weight": meta(48, 64)},
        ALL_FP8,
        {},
        ["pass experts=r'l.\\d+.experts.w1.(?P<expert>\\d+).weight'"],
    ),
    "a stack that is named otherwise": (
        {"layers.0.mlp.input_linear.weight": meta(4, 48, 64)},
        ALL_FP8,
        {},
        [
            "(4, 48, 64)",
            "the rule 'layers.*.mlp.input_linear.weight': None",
            "experts=r'layers.\\d+.mlp.input_linear.weight'",
        ],
    ),
    "a matrix whose bias is of its other side": (
        {"h.0.c_fc.weight": meta(64, 48), "h.0.c_fc.bias": meta(48)},
        ALL_FP8,
        {},
        ["'h.0.c_fc.weight'", (64, 48), "transposed={'h.*.c_fc.weight': True}", "else False"],
    ),
    "a parametrized weight": (
        {"layers.0.experts.0.w1.parametrizations.weight.original": meta(48, 64)},
        ALL_FP8,
        {},
        [
            "w1.parametrizations.weight.original'",
            "remove_parametrizations",
            "the rule 'layers.*.experts.*.w1.parametrizations.weight.original': None",
        ],
    ),
    "weight_norm": (
        {"fc.weight_g": meta(48, 1), "fc.weight_v": meta(48, 64)},
        ALL_FP8,
        {},
        ["'fc.weight_g'", "the rule 'fc.weight_g': None"],
    ),
    "a pruned weight": ({"fc.weight_orig": meta(48, 64)}, ALL_FP8, {}, ["'fc.weight_orig'", "remove_"]),
    "transposed= of no bool": ({"w": meta(48, 64)}, ALL_FP8, {"transposed": {"w": None}}, ["found no bool"]),
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


@pytest.mark.parametrize("number", ["1000000", "9" * 30, "9" * 990])
def test_a_number_in_a_name_is_not_so_many_experts(number):
    """Kills a list of a trillion missing experts, made for a message."""
    with watched():
        message = message_of(ValueError, select, {f"experts.{number}.w": torch.empty(8, 32, device="meta")}, {"*": FP8})
    assert_names(message, f"found expert {number}", "at most 1000000")


@pytest.mark.parametrize("part", ["base_layer.", "experts.1.", "module.", "a", "conv.0."])
def test_a_name_of_megabytes_is_no_name(part):
    """Names come from files; what looks for wrappers and experts in one takes time that grows with its square."""
    with watched():
        message = message_of(ValueError, select, {part * 40_000 + "w": torch.empty(8, 32, device="meta")}, {"*": FP8})
    assert_names(message, "wanted at most 1000")
    assert len(message) < 1000


def test_what_is_told_of_layouts_sees_through_wrappers():
    """As rules do: a model that was compiled since is the same model."""
    name = "module._orig_mod.mlp.experts.down_proj"
    for told in (False, True):
        (group,) = select({name: meta(4, 32, 64)}, {"*": FP8}, transposed={"mlp.experts.down_proj": told}).groups
        assert group.transposed == told
