"""The state as a value: its shapes, the laws of merge, flat names, the tree libraries, and every refusal by name.

Also what stands between weights and state: `calibrate` and `fakequant` refuse what does not fit or is not finite.
"""

import io
import itertools
from dataclasses import replace
from math import isnan

import optree
import pytest
import torch
from torch.utils import _pytree as pytree

from fq_transforms.formats import FORMATS, FP8, FP8_BLOCK, FP8_PER_CHANNEL, INT8_PER_CHANNEL, MXFP4, NVFP4, NVFP4_STATIC
from fq_transforms.rules import Rule
from fq_transforms.select import select
from fq_transforms.state import check, flatten, merge, tie, unflatten
from fq_transforms.transform import transform
from tests.cases import (
    ALL_FORMATS,
    CORE_FORMATS,
    DTYPES,
    assert_names,
    experts,
    message_of,
    name_of,
    same_bits,
    shapes_of,
)
from tests.full import FULL

STATEFUL = [format for format in ALL_FORMATS if format.scale != "e8m0"]
every_format = pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
every_stateful_format = pytest.mark.parametrize("format", STATEFUL, ids=name_of)


def separate(format, weights):
    """Weights as a list of experts, and their transform."""
    params = {f"experts.{i}.weight": weight for i, weight in enumerate(weights)}
    return params, transform(select(params, {"*": format}))


def stacked(format, weights):
    """Weights as one parameter [E, out, in], and their transform."""
    params = {"experts.w2": torch.stack(weights)}
    return params, transform(select(params, {"*": format}))


def transposed(format, weights):
    """Weights as one parameter [E, in, out], and their transform."""
    params = {"experts.w2": torch.stack(weights).mT.contiguous()}
    return params, transform(select(params, {"*": format}, transposed="*"))


LAYOUTS = [separate, stacked, transposed]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def drawn(format, *, seed=0, dtype=torch.float32):
    """Three experts of the last shape that the format's table has."""
    return experts(3, shapes_of(format)[-1], dtype, seed=seed)


def every_kind():
    """Parameters of one expert list a format, and their transform: a state with every kind of group."""
    params = {
        f"{format.name}.experts.{i}.weight": weight
        for n, format in enumerate(ALL_FORMATS)
        for i, weight in enumerate(experts(3, (5, 128), seed=n))
    }
    return params, transform(select(params, {f"{format.name}.*": format for format in ALL_FORMATS}))


def same_states(a, b):
    """Equal keys and bits; NaN equals NaN."""
    return (
        a.keys() == b.keys()
        and all(list(a[key]) == list(b[key]) for key in a)
        and all(same_bits(leaf, b[key][name]) for key in a for name, leaf in a[key].items())
    )


# Leaves of three experts of (out, in) = (130, 256), by the name of the format; conventions have those of their format.
LEAVES = {
    "INT8": {"amax": (3,)},
    "INT8_PER_CHANNEL": {"amax": (3, 130, 1)},
    "INT4_BLOCK32": {"amax": (3, 130, 8)},
    "INT4_BLOCK128": {"amax": (3, 130, 2)},
    "FP8": {"amax": (3,)},
    "FP8_PER_CHANNEL": {"amax": (3, 130, 1)},
    "FP8_BLOCK": {"amax": (3, 2, 2)},
    "NVFP4": {"amax": (3,)},
    "NVFP4_STATIC": {"amax": (3, 130, 16), "global_amax": (3,)},
    "MX": {},
}


@every_format
@every_layout
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_init_has_the_leaves_of_the_format(format, layout, device):
    """Each format's leaves have its shapes, whatever the layout; fp32 for bf16 weights; on the weights' device."""
    params, fq = layout(format, [torch.ones(130, 256, dtype=torch.bfloat16, device=device)] * 3)
    ((key, group),) = fq.init(params).items()
    assert key == fq.spec.groups[0].key
    base = max((name for name in LEAVES if format.name.startswith(name)), key=len)
    assert {name: tuple(leaf.shape) for name, leaf in group.items()} == LEAVES[base]
    assert type(group) is dict
    for leaf in group.values():
        assert leaf.dtype == torch.float32
        assert leaf.device.type == device
        assert device == "meta" or bool((leaf == -torch.inf).all())


@pytest.mark.parametrize(
    ("shape", "granules"),
    [((130, 257), (2, 3)), ((129, 127), (2, 1)), ((128, 128), (1, 1)), ((1, 1), (1, 1)), ((3, 300), (1, 3))],
)
def test_square_blocks_count_their_ragged_edges(shape, granules):
    """Kills floor where ceil is meant: a ragged 128 x 128 edge has a scale of its own, in init as in calibrate."""
    params, fq = separate(FP8_BLOCK, experts(2, shape))
    for state in (fq.init(params), fq.calibrate(params)):
        assert state["experts.*.weight"]["amax"].shape == (2, *granules)


@every_format
@every_layout
def test_calibrate_fills_what_init_announces(format, layout):
    """What init makes is the structure of what calibrate makes: keys, types, shapes, dtypes; so it is a template."""
    params, fq = layout(format, drawn(format, dtype=torch.bfloat16))
    announced, state = fq.init(params), fq.calibrate(params)
    assert optree.tree_structure(announced) == optree.tree_structure(state)
    for name, leaf in flatten(state).items():
        assert (leaf.shape, leaf.dtype) == (flatten(announced)[name].shape, torch.float32)
    check(state, fq.spec)


def test_init_wants_every_group():
    """Kills a state that lacks a group in silence: a parameter that is missing is a KeyError by its name."""
    _, fq = separate(FP8, drawn(FP8))
    assert_names(message_of(KeyError, fq.init, {}), "experts.0.weight")


def three_states(format):
    """The identity of merge, and states from three draws of the weights."""
    params, fq = separate(format, drawn(format))
    names = fq.spec.groups[0].names
    draws = [dict(zip(names, drawn(format, seed=seed), strict=True)) for seed in range(3)]
    return fq.init(params), [fq.calibrate(draw) for draw in draws]


@every_format
def test_merge_is_a_commutative_monoid(format):
    """Identity init, associative, commutative, idempotent: microbatches, ranks and resumed runs fold in any order."""
    identity, (a, b, c) = three_states(format)
    assert same_states(merge(identity, a), a)
    assert same_states(merge(a, identity), a)
    assert same_states(merge(identity, identity), identity)
    assert same_states(merge(a, b), merge(b, a))
    assert same_states(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert same_states(merge(a, a), a)
    assert format.is_stateless or not same_states(merge(a, b), a)


@every_format
def test_calibration_is_a_fold_over_parts_of_the_weights(format):
    """Any split of the values, calibrated in parts and merged, is the calibration of the whole: none is lost."""
    params, fq = separate(format, drawn(format))
    masks = {name: torch.rand(weight.shape) < 0.5 for name, weight in params.items()}
    parts = [
        fq.calibrate({name: weight * (masks[name] == keep) for name, weight in params.items()})
        for keep in (True, False)
    ]
    assert same_states(merge(*parts), fq.calibrate(params))


@every_stateful_format
def test_nan_wins(format):
    """Kills a maximum that drops NaN, on either side, in either leaf: merging cannot hide a broken calibration."""
    _, (a, b, _) = three_states(format)
    ((key, group),) = a.items()
    for name, leaf in group.items():
        broken = {key: group | {name: torch.full_like(leaf, torch.nan)}}
        for merged in (merge(broken, b), merge(b, broken)):
            assert merged[key][name].isnan().all()
            assert all(not merged[key][other].isnan().any() for other in group if other != name)


def test_merge_is_associative_and_commutative_on_every_value():
    """All triples of NaN, infinities, zero, the smallest, ordinary and the largest fp32, in one state."""
    values = [torch.nan, torch.inf, -torch.inf, 0.0, 2.0**-149, 1.0, 3.4e38]
    triples = torch.tensor(list(itertools.product(values, repeat=3)))
    x, y, z = ({"w": {"amax": column.contiguous()}} for column in triples.unbind(1))
    assert same_states(merge(x, y), merge(y, x))
    assert same_states(merge(merge(x, y), z), merge(x, merge(y, z)))
    assert same_states(merge(x, x), x)


@every_format
def test_merge_changes_no_input(format):
    """The result is new: writing to it leaves both inputs as they were, and merging writes to neither."""
    _, (a, b, _) = three_states(format)
    leaves = [*flatten(a).values(), *flatten(b).values()]
    before = [(leaf._version, leaf.clone()) for leaf in leaves]
    for leaf in flatten(merge(a, b)).values():
        leaf.fill_(7.0)
    for leaf in flatten(merge(a, a)).values():
        leaf.fill_(7.0)
    assert all(leaf._version == version for leaf, (version, _) in zip(leaves, before, strict=True))
    assert all(same_bits(leaf, copy) for leaf, (_, copy) in zip(leaves, before, strict=True))


def test_merge_works_on_meta():
    """A plan of a merge needs no memory."""
    params, fq = every_kind()
    ghost = fq.init({name: param.to("meta") for name, param in params.items()})
    merged = merge(ghost, ghost)
    assert optree.tree_structure(merged) == optree.tree_structure(ghost)
    assert all(leaf.is_meta for leaf in flatten(merged).values())


def test_merge_maps():
    """Under vmap, merge of two stacked states is merge of each pair: a state is a pytree to torch.func."""
    params, fq = every_kind()
    other = {name: 3 * param.flip(-1) for name, param in params.items()}
    pairs = [
        (fq.calibrate(params), fq.calibrate(other)),
        (fq.calibrate(other), fq.init(params)),
    ]
    a, b = (optree.tree_map(lambda *leaves: torch.stack(leaves), *side) for side in zip(*pairs, strict=True))
    merged = torch.func.vmap(merge)(a, b)
    for n, pair in enumerate(pairs):
        assert same_states(optree.tree_map(lambda leaf, n=n: leaf[n], merged), merge(*pair))


AMAX, WIDE = {"amax": torch.ones(2)}, {"amax": torch.ones(3)}
BLOCKS = {"amax": torch.ones(2, 4, 1), "global_amax": torch.ones(2)}

# name -> (two states that cannot be merged, what the message must say)
UNMERGEABLE = {
    "a group is missing": ({"w": AMAX, "v": AMAX}, {"w": AMAX}, ["v.amax"]),
    "a stateless group is missing": ({"w": AMAX, "v": {}}, {"w": AMAX}, ["groups ['v'] in one state only"]),
    "a leaf less": ({"w": AMAX}, {"w": {}}, ["w.amax"]),
    "a leaf more": ({"w": AMAX}, {"w": BLOCKS}, ["w.global_amax"]),
    "another shape": ({"v": AMAX, "w": AMAX}, {"v": AMAX, "w": WIDE}, ["w.amax", "(2,)", "(3,)"]),
    "a shape that broadcasts": ({"w": AMAX}, {"w": {"amax": torch.ones(1)}}, ["w.amax", "(2,)", "(1,)"]),
    "another dtype": ({"w": AMAX}, {"w": {"amax": torch.ones(2).double()}}, ["w.amax", "float64", "float32"]),
    "another device": ({"w": AMAX}, {"w": {"amax": torch.ones(2, device="meta")}}, ["'w.amax'", "meta", "cpu"]),
    "a tensor for a group": ({"w": AMAX}, {"w": torch.ones(2)}, ["'w'", "Tensor"]),
}


@pytest.mark.parametrize("difference", UNMERGEABLE)
def test_states_that_differ_are_not_merged(difference):
    """Structure errors name the leaf, in whichever order the states come: refusal commutes too."""
    a, b, fragments = UNMERGEABLE[difference]
    assert_names(message_of(ValueError, merge, a, b), *fragments)
    assert_names(message_of(ValueError, merge, b, a), *fragments)


def test_flat_names_are_key_and_field():
    """The flat name is what a checkpoint stores: group key, a dot, the field; stateless groups have none."""
    params, fq = every_kind()
    names = list(flatten(fq.calibrate(params)))
    for format in ALL_FORMATS:
        fields = [] if format.is_stateless else ["amax"]
        fields += ["global_amax"] if format.has_global_amax else []
        key = f"{format.name}.experts.*.weight"
        assert [name for name in names if name.startswith(f"{format.name}.")] == [f"{key}.{field}" for field in fields]


def test_unflatten_is_the_inverse_of_flatten():
    """unflatten(flatten(s), like) is s: keys in order, and the very tensors; `like` may be on meta."""
    params, fq = every_kind()
    state = fq.calibrate(params)
    like = fq.init({name: param.to("meta") for name, param in params.items()})
    for template in (like, fq.init(params), state):
        again = unflatten(dict(reversed(flatten(state).items())), template)
        assert list(again) == list(state)
        assert same_states(again, state)
        assert all(leaf is state[key][name] for key, group in again.items() for name, leaf in group.items())


def test_flat_leaves_go_through_a_file():
    """Kills leaves that share memory or are views, which safetensors refuses: save, load, unflatten is the identity."""
    safetensors = pytest.importorskip("safetensors.torch")
    params, fq = every_kind()
    state = fq.calibrate(params)
    loaded = safetensors.load(safetensors.save(flatten(state)))
    assert same_states(unflatten(loaded, fq.init(params)), state)


def test_a_state_goes_through_torch_save():
    """Plain dicts of tensors: what torch.load(weights_only=True) gives back is the state, groups without leaves too."""
    params, fq = every_kind()
    state = fq.calibrate(params)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert list(again) == list(state)
    assert same_states(again, state)


def test_every_verb_maps_over_states():
    """Under vmap over a batch of whole states, fakequant, tie and flatten are what they are for each."""
    params = tied_params()
    fq = transform(select(params, {"*.w1.*": NVFP4_STATIC, "*.w3.*": NVFP4_STATIC, "*.w2.*": MXFP4}))
    states = [optree.tree_map(lambda leaf, f=factor: leaf * f, fq.calibrate(params)) for factor in (1.0, 0.5)]

    def verbs(state):
        tied = tie(state, [("w1", "w3")])
        return fq.fakequant(params, tied), flatten(tied)

    batch = optree.tree_map(lambda *leaves: torch.stack(leaves), *states)
    found = torch.func.vmap(verbs)(batch)
    for n, state in enumerate(states):
        assert equal(optree.tree_map(lambda leaf, n=n: leaf[n], found), verbs(state))


def flat_and_like():
    """Flat leaves of two groups, and their structure."""
    state = {"v": AMAX, "w": {"amax": torch.ones(2, 4, 3), "global_amax": torch.ones(2)}, "x": {}}
    return flatten(state), state


# name -> (change to the flat leaves, what the message must say)
UNFLATTENABLE = {
    "missing": (lambda leaves: leaves.pop("w.global_amax"), ["missing", "w.global_amax"]),
    "unexpected": (lambda leaves: leaves.update({"w.scale": torch.ones(2)}), ["unexpected", "w.scale"]),
    "of a stateless group": (lambda leaves: leaves.update({"x.amax": torch.ones(2)}), ["unexpected", "x.amax"]),
    "of another shape": (
        lambda leaves: leaves.update({"w.amax": torch.ones(2, 3, 4)}),
        ["w.amax", "found (2, 3, 4)", "wanted (2, 4, 3)"],
    ),
    "flattened": (lambda leaves: leaves.update({"w.amax": torch.ones(24)}), ["w.amax", "found (24,)", "(2, 4, 3)"]),
    "for all experts": (
        lambda leaves: leaves.update({"v.amax": torch.ones(())}),
        ["v.amax", "found ()", "wanted (2,)"],
    ),
    "float64": (lambda leaves: leaves.update({"v.amax": torch.ones(2).double()}), ["v.amax", "float64", "float32"]),
    "bfloat16": (lambda leaves: leaves.update({"v.amax": torch.ones(2).bfloat16()}), ["v.amax", "bfloat16", "float32"]),
}


@pytest.mark.parametrize("leaf", UNFLATTENABLE)
def test_leaves_that_do_not_fit_are_refused(leaf):
    """A leaf that is missing, unexpected or of another shape or dtype is named, never broadcast, cast or dropped."""
    change, fragments = UNFLATTENABLE[leaf]
    leaves, like = flat_and_like()
    change(leaves)
    assert_names(message_of(ValueError, unflatten, leaves, like), "unflatten", *fragments)


@pytest.mark.parametrize("tree_map", [optree.tree_map, pytree.tree_map], ids=["optree", "torch pytree"])
def test_tree_maps_keep_the_structure(tree_map):
    """A state is a plain pytree to both libraries, dicts without leaves included, and without registration."""
    params, fq = every_kind()
    state = fq.calibrate(params)
    doubled = tree_map(lambda leaf: 2 * leaf, state)
    assert list(doubled) == list(state)
    assert [(type(group), list(group)) for group in doubled.values()] == [(dict, list(g)) for g in state.values()]
    assert {len(group) for group in doubled.values()} == {0, 1, 2}
    for name, leaf in flatten(doubled).items():
        assert same_bits(leaf, 2 * flatten(state)[name])
    check(doubled, fq.spec)


def test_optree_accessors_are_the_flat_names():
    """A path of optree leads to the leaf that flatten gives: errors and loops over leaves can name them."""
    params, fq = every_kind()
    state = fq.calibrate(params)
    paths = {".".join(accessor.path): accessor for accessor in optree.tree_accessors(state)}
    assert paths.keys() == flatten(state).keys()
    assert all(accessor(state) is flatten(state)[name] for name, accessor in paths.items())


def test_optree_names_what_differs():
    """Mapping over two states of different structure fails and says where."""
    state = {"layers.0.experts.*.w1.weight": AMAX, "layers.1.experts.*.w1.weight": AMAX}
    other = {"layers.0.experts.*.w1.weight": AMAX}
    assert_names(message_of(ValueError, optree.tree_map, torch.add, state, other), "layers.1.experts.*.w1.weight")


def checked():
    """A state of three kinds of group, and its transform."""
    params = {f"a.experts.{i}.weight": weight for i, weight in enumerate(experts(3, (4, 32)))}
    params |= {"b.experts.w2": torch.stack(experts(3, (4, 32))), "c.weight": torch.ones(4, 32)}
    fq = transform(select(params, {"a.*": FP8, "b.*": NVFP4_STATIC, "c.*": MXFP4}))
    return fq.calibrate(params), fq


A, B, C = "a.experts.*.weight", "b.experts.w2", "c.weight"


def with_leaf(key, name, leaf):
    """The checked state with one leaf replaced."""

    def change(state):
        state[key] = state[key] | {name: leaf}

    return change


def with_value(key, name, index, value):
    """The checked state with one number replaced."""

    def change(state):
        state[key][name][index] = value

    return change


# name -> (change to the state, the error, what the message must say)
STRUCTURE = {
    "a group is missing": (lambda state: state.pop(A), KeyError, [A, "calibrate"]),
    "a stateless group is missing": (lambda state: state.pop(C), KeyError, [C]),
    "a group is unknown": (lambda state: state.update(d=AMAX), ValueError, ["'d'", "unexpected"]),
    "blocks for a tensor": (
        lambda state: state.update({A: state[B]}),
        ValueError,
        [A, "['amax', 'global_amax']", "FP8 wants ['amax']"],
    ),
    "a tensor for blocks": (
        lambda state: state.update({B: AMAX}),
        ValueError,
        [B, "['amax']", "wants ['amax', 'global_amax']"],
    ),
    "state for a stateless group": (
        lambda state: state.update({C: AMAX}),
        ValueError,
        [C, "['amax']", "MXFP4 wants []"],
    ),
    "a stateless group for state": (lambda state: state.update({A: {}}), ValueError, [A, "found leaves []", "FP8"]),
    "a tensor, not a group": (lambda state: state.update({A: torch.ones(3)}), ValueError, [A, "Tensor", "a dict"]),
    "a list, not a group": (lambda state: state.update({A: [torch.ones(3)]}), ValueError, [A, "list", "a dict"]),
    "a leaf of another name": (
        lambda state: state.update({A: {"scale": torch.ones(3)}}),
        ValueError,
        [A, "found leaves ['scale']", "FP8 wants ['amax']"],
    ),
    "another number of experts": (
        with_leaf(A, "amax", torch.ones(2)),
        ValueError,
        [f"{A}.amax", "found (2,)", "wanted (3,)"],
    ),
    "one value for all experts": (
        with_leaf(A, "amax", torch.ones(())),
        ValueError,
        [f"{A}.amax", "found ()", "wanted (3,)"],
    ),
    "another block": (
        with_leaf(B, "amax", torch.ones(3, 4, 1)),
        ValueError,
        [f"{B}.amax", "found (3, 4, 1)", "wanted (3, 4, 2)"],
    ),
    "another global shape": (
        with_leaf(B, "global_amax", torch.ones(3, 1)),
        ValueError,
        [f"{B}.global_amax", "found (3, 1)", "wanted (3,)"],
    ),
    "float64": (with_leaf(A, "amax", torch.ones(3).double()), ValueError, [f"{A}.amax", "float64", "float32"]),
    "int8": (with_leaf(A, "amax", torch.ones(3).to(torch.int8)), ValueError, [f"{A}.amax", "int8", "float32"]),
    "a list": (with_leaf(A, "amax", [1.0, 1.0, 1.0]), ValueError, [f"{A}.amax", "list", "tensor"]),
    "None": (with_leaf(B, "global_amax", None), ValueError, [f"{B}.global_amax", "None", "tensor"]),
}

# name -> (change to the state, what the message must say)
VALUES = {
    "NaN": (with_value(A, "amax", 1, torch.nan), [f"'{A}.amax'", "found nan", "'a.experts.1.weight'"]),
    "infinity": (with_value(A, "amax", 2, torch.inf), [f"'{A}.amax'", "found inf", "'a.experts.2.weight'"]),
    "negative": (with_value(A, "amax", 0, -1.5), [f"'{A}.amax'", "found -1.5", "'a.experts.0.weight'"]),
    "negative and tiny": (with_value(A, "amax", 0, -1e-40), [f"'{A}.amax'", "'a.experts.0.weight'"]),
    "never calibrated": (
        with_value(A, "amax", 1, -torch.inf),
        [f"'{A}.amax'", "found -inf", "'a.experts.1.weight'", "never calibrated", "calibrate"],
    ),
    "one block": (
        with_value(B, "amax", (1, 3, 1), torch.nan),
        [f"'{B}.amax'", "found nan", f"'{B}[1]'", "[3, 1]"],
    ),
    "the global amax": (with_value(B, "global_amax", 2, torch.inf), [f"'{B}.global_amax'", "found inf", f"'{B}[2]'"]),
}


def test_a_fitting_state_passes():
    """What calibrate gives is accepted, zeros too, in any order of groups; each refusal below changes one thing."""
    state, fq = checked()
    check(state, fq.spec)
    check(dict(reversed(state.items())), fq.spec)
    check(optree.tree_map(torch.zeros_like, state), fq.spec)


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("misfit", STRUCTURE)
def test_a_state_of_another_structure_is_refused(misfit, values):
    """Each error names the group or the leaf, what was found and what the spec wants; no value is read for it."""
    change, error, fragments = STRUCTURE[misfit]
    state, fq = checked()
    change(state)
    assert_names(message_of(error, check, state, fq.spec, values=values), *fragments)


@pytest.mark.parametrize("value", VALUES)
def test_an_amax_that_cannot_be_is_refused(value):
    """Each error names the leaf, the expert, where in it, the value, what is wanted, and what to do."""
    change, fragments = VALUES[value]
    state, fq = checked()
    change(state)
    assert_names(message_of(ValueError, check, state, fq.spec), *fragments, "wanted a finite amax >= 0", "calibrate")


@pytest.mark.parametrize("value", VALUES)
def test_values_are_read_only_on_request(value):
    """check(values=False) does not wait for a device: it holds types and shapes alone, also on meta."""
    state, fq = checked()
    VALUES[value][0](state)
    check(state, fq.spec, values=False)
    check(optree.tree_map(lambda leaf: leaf.to("meta"), state), fq.spec, values=False)


@every_stateful_format
def test_an_uncalibrated_state_is_refused(format):
    """A state from init is no calibration: fakequant says so and what to call, in place of a model of zeros."""
    params, fq = separate(format, drawn(format))
    message = message_of(ValueError, fq.fakequant, params, fq.init(params))
    assert_names(message, "'experts.*.weight.amax'", "'experts.0.weight'", "-inf", "never calibrated", "call calibrate")


def test_a_format_without_state_needs_no_calibration():
    """MX formats quantize from init as from calibrate: there is nothing to calibrate."""
    for format in (format for format in ALL_FORMATS if format.is_stateless):
        params, fq = separate(format, drawn(format))
        a, b = (fq.fakequant(params, make(params)) for make in (fq.init, fq.calibrate))
        assert all(same_bits(a[name], b[name]) for name in params)


@pytest.mark.parametrize("format", STATEFUL if FULL else [f for f in CORE_FORMATS if f in STATEFUL], ids=name_of)
@every_layout
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_an_invalid_amax_is_refused_on_the_cpu(format, layout, value):
    """Every leaf is read to its last granule; the message names key, leaf, expert, value, and what is wanted."""
    params, fq = layout(format, drawn(format))
    state = fq.calibrate(params)
    ((key, group),) = state.items()
    expert = {"experts.*.weight": "experts.1.weight"}.get(key, f"{key}[1]")
    for name, leaf in group.items():
        bad = leaf.clone()
        bad[1].reshape(-1)[-1] = value
        message = message_of(ValueError, fq.fakequant, params, {key: group | {name: bad}})
        assert_names(message, f"'{key}.{name}'", f"'{expert}'", f"found {value}", "wanted a finite amax >= 0")


@every_stateful_format
def test_an_amax_of_zero_is_valid(format):
    """Kills a check of `> 0`: an expert of zeros is calibrated to 0 and stays zeros, and disturbs no other expert."""
    weights = drawn(format)
    params, fq = separate(format, [torch.zeros_like(weights[0]), *weights[1:]])
    state = fq.calibrate(params)
    assert all(bool((leaf[0] == 0).all()) for leaf in flatten(state).values())
    quantized = fq.fakequant(params, state)
    assert not quantized["experts.0.weight"].any()
    assert quantized["experts.1.weight"].any()
    assert all(weight.isfinite().all() for weight in quantized.values())


@pytest.mark.parametrize("format", ALL_FORMATS if FULL else CORE_FORMATS, ids=name_of)  # nothing depends on numbers
@every_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_weights_that_are_not_finite_are_not_calibrated(format, layout, dtype):
    """Each format, MX too, refuses one NaN or infinity wherever it is, naming the parameter and the expert."""
    weights = experts(3, (5, 256), dtype)
    params, fq = layout(format, weights)
    fq.calibrate(params)
    for value, (expert, place) in itertools.product((torch.nan, torch.inf, -torch.inf), ((0, -1), (1, 700), (2, 0))):
        broken = [weight.clone() for weight in weights]
        broken[expert].view(-1)[place] = value
        params, fq = layout(format, broken)
        name = f"'experts.{expert}.weight'" if layout is separate else f"'experts.w2[{expert}]'"
        message = message_of(ValueError, fq.calibrate, params)
        assert_names(message, name, f"expert {expert}", "nan" if isnan(value) else "inf", "finite")


def test_the_broken_weight_of_many_groups_is_the_one_named():
    """Kills an error that names the first group for a NaN in the last; stateless groups come in between."""
    params, fq = every_kind()
    for group in fq.spec.groups:
        broken = dict(params)
        broken[group.names[2]] = params[group.names[2]].clone().index_fill_(1, torch.tensor([127]), torch.nan)
        message = message_of(ValueError, fq.calibrate, broken)
        assert_names(message, f"'{group.names[2]}'", "expert 2", f"'{group.key}'")


def test_weights_outside_the_spec_may_hold_anything():
    """Only what the spec names is read: a NaN elsewhere, another dtype, further names are none of its business."""
    params, fq = separate(FP8, drawn(FP8))
    more = params | {"norm.weight": torch.full((3,), torch.nan), "table": torch.ones(3, dtype=torch.int64)}
    state = fq.calibrate(more)
    assert same_states(state, fq.calibrate(params))
    quantized = fq.fakequant(more, state)
    assert quantized["norm.weight"] is more["norm.weight"]
    assert quantized["table"] is more["table"]


# name -> (expert 1's weight or None to remove it, the error, what the message must say)
MISFITS = {
    "missing": (None, KeyError, ["'experts.1.weight'", "not in params"]),
    "of another shape": (torch.ones(32, 16), ValueError, ["'experts.1.weight'", "(32, 16)", "(16, 32)"]),
    "float64": (torch.ones(16, 32).double(), ValueError, ["'experts.1.weight'", "float64", "float32"]),
    "int8": (torch.ones(16, 32).to(torch.int8), ValueError, ["'experts.1.weight'", "int8", "float32"]),
    "of another dtype": (torch.ones(16, 32).half(), ValueError, ["'experts.1.weight'", "float16", "float32"]),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("format", [FP8, FP8_PER_CHANNEL, NVFP4, NVFP4_STATIC, MXFP4], ids=name_of)
def test_weights_that_do_not_fit_the_spec_are_refused(format, misfit):
    """Both calibrate and fakequant hold each weight against the spec, and never skip or cast one."""
    weight, error, fragments = MISFITS[misfit]
    params, fq = separate(format, experts(3, (16, 32)))
    state = fq.calibrate(params)
    params["experts.1.weight"] = weight
    if weight is None:
        del params["experts.1.weight"]
    assert_names(message_of(error, fq.calibrate, params), *fragments)
    assert_names(message_of(error, fq.fakequant, params, state), *fragments)


@pytest.mark.parametrize("misfit", STRUCTURE)
def test_fakequant_refuses_a_state_of_another_structure(misfit):
    """What check refuses, fakequant refuses in the same words, before any weight is computed."""
    change, error, fragments = STRUCTURE[misfit]
    state, fq = checked()
    params = {f"a.experts.{i}.weight": weight for i, weight in enumerate(experts(3, (4, 32)))}
    params |= {"b.experts.w2": torch.stack(experts(3, (4, 32))), "c.weight": torch.ones(4, 32)}
    change(state)
    assert_names(message_of(error, fq.fakequant, params, state), *fragments)


def test_a_state_on_another_device_is_refused():
    """Kills a crash deep inside: the message names the group, both devices, and how to move the state."""
    params, fq = separate(FP8, drawn(FP8))
    state = optree.tree_map(lambda leaf: leaf.to("meta"), fq.calibrate(params))
    message = message_of(ValueError, fq.fakequant, params, state)
    assert_names(message, "'experts.*.weight'", "found on meta", "wanted on cpu", "optree.tree_map")


def test_every_format_is_in_the_tables():
    """A new format must get its leaves in this file's table: no format falls to the wrong prefix."""
    bases = {name: max((base for base in LEAVES if name.startswith(base)), key=len) for name in FORMATS}
    assert bases["NVFP4_STATIC"] == "NVFP4_STATIC"
    assert {base for name, base in bases.items() if FORMATS[name].is_stateless} == {"MX"}
    assert set(bases.values()) == set(LEAVES)


def tied_params():
    names = [
        f"layers.{layer}.experts.{e}.{role}.weight" for layer in (0, 1) for e in (0, 1) for role in ("w1", "w2", "w3")
    ]
    return dict(zip(names, experts(12, (128, 128)), strict=True))


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_tie_takes_the_larger_of_each_expert(format):
    """Leaves of one number an expert become equal in both roles; all else, and the input, stay as they are."""
    params = tied_params()
    fq = transform(select(params, {"*": format}))
    state = fq.calibrate(params)
    before = optree.tree_map(torch.clone, state)
    tied = tie(state, [("w1", "w3")])
    assert optree.tree_all(optree.tree_map(torch.equal, state, before))
    check(tied, fq.spec)
    for layer in (0, 1):
        w1, w2, w3 = (f"layers.{layer}.experts.*.w{i}.weight" for i in (1, 2, 3))
        assert tied[w2] is state[w2]
        for name in state[w1]:
            old, other, new = (group[name] for group in (state[w1], state[w3], tied[w1]))
            assert torch.equal(new, torch.maximum(old, other) if old.dim() == 1 else old)
            if old.dim() == 1:
                assert torch.equal(new, tied[w3][name])
                assert not torch.equal(old, other)


def test_tie_names_what_has_no_partner():
    params = tied_params()
    fq = transform(select(params, {"*.w1.*": FP8, "*.w2.*": FP8, "*.w3.*": INT8_PER_CHANNEL}))
    state = fq.calibrate(params)
    first, third = "layers.0.experts.*.w1.weight", "layers.0.experts.*.w3.weight"
    assert_names(message_of(ValueError, tie, state, [("gate_proj", "up_proj")]), "gate_proj", "up_proj", first)
    assert_names(message_of(ValueError, tie, state, [("w1", "w3")]), first, third)
    without = {key: group for key, group in state.items() if "w3" not in key}
    assert_names(message_of(ValueError, tie, without, [("w1", "w3")]), third, "missing")


def with_inputs(device="cpu"):
    """Weights, and inputs that experts share, that each has, and that keep nothing."""
    params = {f"experts.{i}.{role}.weight": torch.ones(4, 32, device=device) for i in range(3) for role in ("w1", "w2")}
    params |= {"q.weight": torch.ones(4, 32, device=device)}
    rules = [Rule("*.w1.*", FP8, FP8), Rule("*.w2.*", FP8, NVFP4, per_expert_inputs=True)]
    return params, transform(select(params, [*rules, Rule("q.*", inputs=FP8_PER_CHANNEL)]))


def of_inputs(seed):
    """A state of `with_inputs` whose second expert has seen no token."""
    params, fq = with_inputs()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 2**40, (3,), generator=generator).double()
    amax = torch.rand(3, generator=generator)
    amax[1], tokens[1] = -torch.inf, 0.0
    return calibrate_weights(params, fq) | {
        "experts.*.w1.weight.input": {"amax": amax.amax().reshape(1), "tokens": tokens},
        "experts.*.w2.weight.input": {"amax": amax, "tokens": tokens},
        "q.weight.input": {},
    }


def calibrate_weights(params, fq):
    return replace(fq, spec=replace(fq.spec, inputs=())).calibrate(params)


def equal(a, b):
    return optree.tree_structure(a) == optree.tree_structure(b) and optree.tree_all(optree.tree_map(torch.equal, a, b))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_init_has_inputs(device):
    """An amax of -inf and no token; counts are fp64, exact far beyond any calibration."""
    params, fq = with_inputs(device)
    state = fq.init(params)
    check(state, fq.spec, values=False)
    leaves = flatten(state)
    assert leaves["experts.*.w1.weight.input.amax"].shape == (1,)
    assert leaves["experts.*.w2.weight.input.amax"].shape == (3,)
    assert leaves["experts.*.w2.weight.input.tokens"].dtype == torch.float64
    assert {leaf.device.type for leaf in leaves.values()} == {device}
    if device == "cpu":
        assert equal(merge(of_inputs(0), state), of_inputs(0))


def test_merge_of_inputs_is_a_commutative_monoid():
    """The amax by maximum, tokens by sum, exactly: any order of any parts."""
    a, b, c = map(of_inputs, range(3))
    assert equal(merge(a, b), merge(b, a))
    assert equal(merge(merge(a, b), c), merge(a, merge(b, c)))
    both = merge(a, b)["experts.*.w2.weight.input"]
    x, y = (s["experts.*.w2.weight.input"] for s in (a, b))
    assert torch.equal(both["amax"], torch.maximum(x["amax"], y["amax"]))
    assert torch.equal(both["tokens"], x["tokens"] + y["tokens"])


def test_flat_leaves_of_inputs_go_back():
    params, fq = with_inputs()
    state = of_inputs(0)
    assert equal(unflatten(flatten(state), fq.init(params)), state)


def test_tied_roles_share_their_inputs_too():
    """Gate and up get the same tokens: their inputs' scales are tied as the weights' are."""
    params = {f"experts.{i}.{role}.weight": torch.ones(4, 32) for i in range(2) for role in ("w1", "w3")}
    fq = transform(select(params, [Rule("*", FP8, FP8)]))
    tokens = torch.ones(2, dtype=torch.float64)
    state = calibrate_weights(params, fq) | {
        f"experts.*.{role}.weight.input": {"amax": torch.tensor([amax]), "tokens": tokens}
        for role, amax in (("w1", 1.0), ("w3", 2.0))
    }
    tied = tie(state, [("w1", "w3")])
    assert [tied[f"experts.*.{role}.weight.input"]["amax"].item() for role in ("w1", "w3")] == [2.0, 2.0]
    assert tied["experts.*.w1.weight.input"]["tokens"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda e: e | {"amax": torch.tensor([1.0, torch.nan, 1.0])}, ["found nan for expert 1 of 3"]),
        (lambda e: e | {"amax": torch.tensor([1.0, 1.0, -2.0])}, ["found -2.0 for expert 2 of 3"]),
        (lambda e: e, ["found no token for expert 1 of 3", "fq.fill_unseen(state, unseen=...)"]),
        (
            lambda e: {"amax": torch.ones(3), "tokens": torch.tensor([1.0, -1.0, 0.0]).double()},
            ["tokens': found -1.0", "counts >= 0"],
        ),
        (
            lambda e: {"amax": torch.ones(3), "tokens": torch.ones(3)},
            ["tokens': found (3,) torch.float32, wanted (3,) torch.float64"],
        ),
        (lambda e: e | {"amax": torch.ones(1)}, ["amax': found (1,) torch.float32, wanted (3,)"]),
        (lambda e: {"amax": torch.ones(3)}, ["found leaves ['amax']", "['amax', 'tokens']"]),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, fragments):
    _, fq = with_inputs()
    key = "experts.*.w2.weight.input"
    state = of_inputs(0)
    state["experts.*.w1.weight.input"] = {"amax": torch.ones(1), "tokens": torch.ones(3, dtype=torch.float64)}
    state[key] = change(state[key])
    assert_names(message_of(ValueError, check, state, fq.spec), f"state '{key}", *fragments)


def test_inputs_of_a_group_that_is_missing_are_named():
    params, fq = with_inputs()
    state = of_inputs(0)
    del state["q.weight.input"]
    assert_names(
        message_of(KeyError, check, state, fq.spec, values=False), "group 'q.weight.input' is not in the state"
    )
    assert_names(message_of(ValueError, fq.fakequant, params, of_inputs(0)), "found no token for expert 1 of 3")


@pytest.mark.parametrize("pairs", [("w1", "w3"), [("w1", "w2", "w3")], "w1"])
def test_what_is_no_pair_is_not_tied(pairs):
    """One pair in place of a list of pairs is the slip that comes easily."""
    state = {f"experts.*.{role}.weight": {"amax": torch.ones(2)} for role in ("w1", "w2", "w3", "w")}
    assert_names(message_of(ValueError, tie, state, pairs), "pairs: found ", " as one of them, wanted pairs of words")


def test_a_role_is_not_tied_to_itself():
    """A slip of the pen that would tie nothing, and say nothing."""
    state = {"experts.*.w1.weight": {"amax": torch.ones(2)}}
    with pytest.raises(ValueError, match=r"\('w1', 'w1'\): found one word twice"):
        tie(state, [("w1", "w1")])


@pytest.mark.parametrize("pairs", list(itertools.permutations([("q", "k"), ("k", "v"), ("o", "p")])))
def test_pairs_that_share_a_role_tie_all_of_theirs(pairs):
    """Named bug: (q, k), then (k, v), left q with the scale of two of the three; in another order it did not."""
    sizes = {"q": 1.0, "k": 2.0, "v": 3.0, "o": 4.0, "p": 0.5}
    state = {f"layers.0.{role}.weight": {"amax": torch.tensor([size, -size])} for role, size in sizes.items()}
    tied = tie(state, pairs)
    for role, wanted in {
        "q": [3.0, -1.0],
        "k": [3.0, -1.0],
        "v": [3.0, -1.0],
        "o": [4.0, -0.5],
        "p": [4.0, -0.5],
    }.items():
        assert tied[f"layers.0.{role}.weight"]["amax"].tolist() == wanted
    assert state["layers.0.q.weight"]["amax"].tolist() == [1.0, -1.0]
