"""The spec as a value, a table, JSON and a difference; and who has no place for its inputs."""

import json
import re
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fq_transforms as fqt
from fq_transforms import presets, rules
from fq_transforms.formats import FORMATS, FP8, INT8_PER_CHANNEL, MXFP4, NVFP4
from fq_transforms.rules import Rule
from fq_transforms.select import select
from fq_transforms.spec import Group, Skipped, Spec
from tests.cases import ALL_FORMATS, assert_names, expert_list, message_of, meta, name_of


def of_inputs():
    """Weights of each layout; inputs per tensor, shared and per expert, per token, and in blocks."""
    params = (
        expert_list("layers.0.experts.{}.w1.weight")
        | expert_list("layers.0.experts.{}.w2.weight", shape=(64, 48))
        | {"layers.0.experts.down": meta(4, 64, 32), "layers.0.q.weight": meta(64, 64), "norm.weight": meta(64)}
    )
    rules = [
        Rule("*.w1.*", NVFP4, FP8),
        Rule("*.w2.*", NVFP4, NVFP4, per_expert_inputs=True),
        Rule("*.experts.down", NVFP4, INT8_PER_CHANNEL),
        Rule("*.q.*", inputs=MXFP4),
        Rule("*lm_head*", required=False),
    ]
    return params, select(params, rules)


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


def padded(names):
    """The same experts, under other names."""
    return tuple(re.sub(r"experts\.0?(\d)\.", r"experts.0\1.", name) for name in names)


def test_a_spec_is_a_value():
    """Equal by what it says, hashable accordingly (torch.compile guards and caches by it), and unequal by any field."""
    spec, same = some_spec(), some_spec()
    assert spec is not same
    assert spec == same
    assert hash(spec) == hash(same)
    assert {spec: 1}[same] == 1
    group = spec.groups[0]
    different = (
        {"key": f"other.{group.key}", "names": tuple(f"other.{name}" for name in group.names)},
        {"names": padded(group.names)},
        {"format": NVFP4},
        {"experts": 2, "names": group.names[:2]},
        {"shape": (128, 32)},
        {"stacked": True, "names": group.names[:1]},
        {"transposed": True},
    )
    for change in different:
        assert replace(spec, groups=(replace(group, **change), *spec.groups[1:])) != spec
    assert replace(spec, skipped=()) != spec


def test_rules_are_a_record():
    """Other rules that lead to the same groups give an equal spec: states and checkpoints fit, nothing recompiles."""
    params = {"a.weight": meta(32, 32), "b.weight": meta(32, 32)}
    one, other = select(params, {"*": FP8}), select(params, {"a.*": FP8, "b.*": FP8})
    assert one.rules != other.rules
    assert one == other
    assert hash(one) == hash(other)
    assert repr(one) == repr(other)


@pytest.mark.parametrize("write", ["json", "yaml"])
def test_the_rules_of_a_spec_are_sent_as_text(write):
    """A colleague reads them, selects with them, and has the same spec; so does whoever has the spec as JSON."""
    params, spec = of_inputs()
    to_text, from_text = getattr(rules, f"to_{write}"), getattr(rules, f"from_{write}")
    for sent in (spec, Spec.from_json(spec.to_json())):
        found = from_text(to_text(sent.rules))
        assert found == spec.rules
        assert select(params, found) == spec


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_json_holds_the_whole_spec(format):
    """from_json(to_json(spec)) == spec for every format, on one line: a checkpoint can say what it holds."""
    spec = some_spec(format)
    text = spec.to_json()
    again = Spec.from_json(text)
    assert "\n" not in text
    assert again == spec
    assert again.rules == spec.rules
    assert hash(again) == hash(spec)
    assert str(again) == str(spec)
    assert again.groups[0].format == FORMATS[format.name]


def test_json_holds_numbers_and_not_names():
    """Kills a spec that looks its formats up: a format of the user's own comes back whole."""
    own = replace(FP8, name="INT8", unit_scale_below=1e-5)
    spec = Spec.from_json(some_spec(own).to_json())
    assert spec.groups[0].format == spec.rules[0].weights == own != FORMATS["INT8"]


BEYOND = {"exponent_bits": 2, "mantissa_bits": 1, "max": 6.5}


def broken(change):
    """A stored spec with one change, as JSON."""
    data = json.loads(of_inputs()[1].to_json())
    change(data)
    return json.dumps(data)


# name -> (text, what the message must say)
GARBAGE = {
    "nothing": ("", ["Expecting value"]),
    "no JSON": ("groups: []", ["Expecting value"]),
    "cut off": (some_spec().to_json()[:-7], []),
    "nested too deeply": ("[" * 100_000, ["nested too deeply"]),
    "null": ("null", ["found None", "wanted an object with groups, skipped"]),
    "a number": ("7", ["found 7"]),
    "a list": ("[]", ["found []"]),
    "a string": ('"groups"', ["found 'groups'"]),
    "another object": ('{"weights": []}', ["unknown key 'weights'"]),
    "no skipped": ('{"groups": []}', ["found no 'skipped'"]),
    "an unknown key": ('{"groups": [], "skiped": []}', ["unknown key 'skiped' (did you mean 'skipped'?)"]),
    "a key twice": ('{"groups": [], "skipped": [], "groups": []}', ["the key 'groups' twice"]),
    "groups are a number": ('{"groups": 7, "skipped": []}', ["found groups=7, wanted a list"]),
    "a group is a number": ('{"groups": [7], "skipped": []}', ["groups[0]: found 7, wanted an object with key, names"]),
    "a field is missing": (broken(lambda data: data["groups"][1].pop("experts")), ["groups[1], key", "no 'experts'"]),
    "a field is unknown": (
        broken(lambda data: data["groups"][0].update(zero_point=1)),
        ["groups[0], key 'layers.0.ex", "unknown key 'zero_point'"],
    ),
    "a format is a name": (broken(lambda data: data["groups"][0].update(format="FP8")), ["format='FP8'", "an object"]),
    "a format is missing": (broken(lambda data: data["groups"][0].pop("format")), ["found no 'format'"]),
    "an element is a name": (
        broken(lambda data: data["groups"][0]["format"].update(element="E4M3")),
        ["format 'NVFP4': found element='E4M3', wanted an object"],
    ),
    "an element of text": (
        broken(lambda data: data["groups"][0]["format"]["element"].update(max="6")),
        ["format 'NVFP4', element: found max='6', wanted a number"],
    ),
    "an element that no memory holds": (
        broken(lambda data: data["groups"][0]["format"]["element"].update(exponent_bits=10**9)),
        ["groups[0]", "exponent_bits=1000000000"],
    ),
    "a block is a number": (broken(lambda data: data["groups"][0]["format"].update(block=16)), ["found block=16"]),
    "a block that no format has": (
        broken(lambda data: data["groups"][0]["format"].update(block=[3, 3])),
        ["block (3, 3), wanted"],
    ),
    "a scale that is no number": (
        broken(lambda data: data["groups"][0]["format"].update(min_scale=float("nan"))),
        ["found min_scale=nan, wanted a number"],
    ),
    "a shape is a number": (broken(lambda data: data["groups"][0].update(shape=16)), ["shape=16, wanted two counts"]),
    "a shape of three": (broken(lambda data: data["groups"][0].update(shape=[1, 2, 3])), ["shape=[1, 2, 3]"]),
    "experts are true": (broken(lambda data: data["groups"][0].update(experts=True)), ["experts=True, wanted a count"]),
    "a name in place of names": (
        broken(lambda data: data["groups"][0].update(names="abcd")),
        ["wanted a list of text"],
    ),
    "fewer names than experts": (
        broken(lambda data: data["groups"][0]["names"].pop()),
        ["groups[0]", "found 3 names of 4 experts"],
    ),
    "names of a stack": (
        broken(lambda data: data["groups"][2]["names"].append("b")),
        ["groups[2]", "found 2 names of 4 experts"],
    ),
    "a flag of weights": (
        broken(lambda data: data["groups"][0].update(per_expert=True)),
        ["groups[0]", "unknown key 'per_expert'"],
    ),
    "a flag that is a number": (
        broken(lambda data: data["inputs"][1].update(per_expert=1)),
        ["inputs[1], key", "found per_expert=1, wanted true or false"],
    ),
    "a group twice": (
        broken(lambda data: data["groups"].append(data["groups"][0])),
        ["the group 'layers.0.experts.*.w1.weight' 2 times"],
    ),
    "no experts": (
        broken(lambda data: data["groups"][0].update(experts=0, names=[])),
        ["groups[0]", "found 0 names of 0 experts"],
    ),
    "experts below zero": (broken(lambda data: data["groups"][0].update(experts=-1)), ["experts=-1, wanted a count"]),
    "experts in another order": (
        broken(lambda data: data["groups"][0]["names"].reverse()),
        ["groups[0]", "w1.weight' for expert 0"],
    ),
    "a name twice in a group": (
        broken(lambda data: data["groups"][0]["names"].__setitem__(1, data["groups"][0]["names"][0])),
        ["groups[0]", "for expert 1"],
    ),
    "a name in two groups": (
        broken(lambda data: data["groups"].append(data["groups"][2] | {"key": "other"})),
        ["the parameter", "2 times"],
    ),
    "a name that is skipped too": (
        broken(lambda data: data["skipped"].append({"name": data["groups"][0]["names"][0], "shape": [], "reason": ""})),
        ["the parameter 'layers.0.experts.0.w1.weight' 2 times"],
    ),
    "no rows": (broken(lambda data: data["groups"][0].update(shape=[0, 32])), ["groups[0]", "(0, 32)"]),
    "blocks that do not fit": (broken(lambda data: data["groups"][0].update(shape=[8, 24])), ["(8, 24)", "multiple"]),
    "a name of a megabyte": (
        broken(lambda data: data["groups"][0].update(key="k" * 10**6)),
        ["a name of 1000000 characters"],
    ),
    "an unknown key of a megabyte": (broken(lambda data: data["groups"][0].update({"k" * 10**6: 1})), ["unknown key"]),
    "an element of no range": (
        broken(lambda data: data["groups"][0]["format"]["element"].update(max=0)),
        ["format 'NVFP4': found FloatElement(exponent_bits=2, mantissa_bits=1, max=0)"],
    ),
    "an element beyond its bits": (
        broken(lambda data: data["groups"][0]["format"].update(element=BEYOND, scale="fp32", dynamic=False)),
        ["max=6.5"],
    ),
    "a scale below zero": (
        broken(lambda data: data["groups"][0]["format"].update(min_scale=-1)),
        ["found min_scale=-1, wanted an E4M3 scale"],
    ),
    "a skipped name of digits": (
        broken(lambda data: data["skipped"][0].update(name="9" * 5000)),
        ["a name of 5000 characters"],
    ),
    "a nested list of a megabyte": ("[" * 10**6, ["nested too deeply"]),
    "a skipped parameter without a reason": (
        broken(lambda data: data["skipped"][0].pop("reason")),
        ["skipped[0]", "no 'reason'"],
    ),
    "a skipped parameter of no shape": (
        broken(lambda data: data["skipped"][0].update(shape=None)),
        ["skipped[0]: found shape=None, wanted a list of counts"],
    ),
    "a rule of an unknown format": (
        broken(lambda data: data["rules"][1].update(weights="NVFP3")),
        ["rules[1], pattern '*.w2.*': found weights='NVFP3', wanted a format's name such as NVFP4"],
    ),
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_is_no_stored_spec_is_refused(garbage):
    """Whatever a file holds, from_json raises ValueError and says what is wrong where, and how the text begins."""
    text, fragments = GARBAGE[garbage]
    assert_names(message_of(ValueError, Spec.from_json, text), "not a stored Spec", repr(text[:20])[1:-1], *fragments)


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


def test_a_notebook_shows_the_cells_of_the_table():
    """_repr_html_ has each cell of the printed table, escaped, in styles of its own, which no page's overrule."""
    spec = Spec((Group("a<b&c>", ("a<b&c>",), FP8, 1, (8, 8)),), (Skipped("quantized", (3,), "1-D"),))
    page = spec._repr_html_()
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    cells = [re.findall(r"<t[hd] style='[^']*'>(.*?)</t[hd]>", row) for row in rows]
    lines = str(spec).splitlines()
    assert [[cell for cell in row if cell] for row in cells] == [
        re.split(r"  +", line.replace("a<b&c>", "a&lt;b&amp;c&gt;")) for line in lines[:4]
    ]
    assert [row.count("<th ") for row in rows] == [5, 0, 5, 0]  # a parameter named as a header is none
    assert lines[4] in page
    assert "<b&" not in page


def test_the_repr_of_many_weights_is_a_line():
    """In a traceback or a notebook's tuple; 64 weights were 41 KB."""
    params = {f"layers.{i}.experts.{e}.w1.weight": meta(8, 32) for i in range(8) for e in range(64)}
    spec = select(params, {"*": NVFP4})
    assert repr(spec) == f"Spec({spec.summary})"
    assert repr(spec.groups[0]) == "Group('layers.0.experts.*.w1.weight': NVFP4, 64 experts, 8 x 32 separate)"
    assert repr(of_inputs()[1].inputs[0]).startswith("Inputs('")


def test_a_spec_with_inputs_is_a_value_and_json():
    """Equal, hashable, through JSON; a spec without inputs is that of the weights alone."""
    params, spec = of_inputs()
    again = Spec.from_json(spec.to_json())
    assert (again, hash(again), str(again)) == (spec, hash(spec), str(spec))
    assert [i.leaf_shapes for i in again.inputs] == [i.leaf_shapes for i in spec.inputs]
    without = replace(spec, inputs=())
    assert without.groups == select(params, presets.weights_only(spec.rules)).groups
    assert without != spec
    assert "inputs" not in json.loads(without.to_json())
    assert Spec.from_json(without.to_json()) == without


def test_the_table_has_inputs():
    _, spec = of_inputs()
    assert "\n".join(str(spec).splitlines()[4:9]) == (
        "inputs                              format                experts  in        scales\n"
        "layers.0.experts.*.w1.weight.input  FP8                         4  64        one amax\n"
        "layers.0.experts.*.w2.weight.input  NVFP4                       4  48        one amax per expert\n"
        "layers.0.experts.down.input         INT8_PER_CHANNEL            4  32        one scale per token\n"
        "layers.0.q.weight.input             MXFP4                       1  64        one scale per block"
    )


DIFFERENCE = """\
name                                           what           self                      other
model.layers.{0-1}.self_attn.q_proj.weight     quantized      FP8, 32 x 32 dense        -
model.layers.{0-1}.mlp.experts.gate_up_proj    format         FP8                       NVFP4
model.layers.1.side.experts.*.w1.weight        shape          16 x 32                   32 x 16
model.layers.1.side.experts.*.w1.weight        transposed     False                     True
model.layers.{0-1}.mlp.experts.down_proj       quantized      -                         FP8, 4 experts, 32 x 32 stacked
model.layers.0.side.experts.*.w1.weight.input  per_expert     False                     True
model.layers.1.side.experts.*.w1.weight.input  inputs         FP8, 3 experts, one amax  -
model.layers.{0-1}.mlp.experts.down_proj       not quantized  4 x 32 x 32: no rule      -
lm_head.weight                                 reason         no rule                   excluded by lm_head*
model.layers.{0-1}.self_attn.q_proj.weight     not quantized  -                         32 x 32: no rule"""


def test_the_difference_of_two_specs():
    """Groups of one only, formats, layouts, inputs and what is left out, a row each, layers as a range."""
    params = small_model()
    one = select(params, [Rule("*q_proj*", FP8), Rule("*gate_up*", FP8), Rule("*.side.*", FP8, FP8)])
    two = select(
        params,
        [
            Rule("*gate_up*", NVFP4),
            Rule("*down*", FP8),
            Rule("*.side.*", FP8, FP8),
            Rule("*.0.side.*", FP8, FP8, per_expert_inputs=True),
            Rule("*.1.side.*", FP8),
            Rule("lm_head*"),
        ],
        transposed="*.1.side.*",
    )
    assert one.diff(two) == DIFFERENCE
    assert rows_of_difference(two.diff(one)) == {(n, w, b, a) for n, w, a, b in rows_of_difference(one.diff(two))}


def rows_of_difference(text):
    return {tuple(re.split(r"  +", line)) for line in text.splitlines()[1:]}


def test_a_difference_is_of_two_specs(pytestconfig):
    error = Exception if pytestconfig.getoption("--shape-checks") else ValueError  # a type checker stands before it
    with pytest.raises(error, match="other: found str, wanted a Spec|Type-check error"):
        SPEC.diff(SPEC.to_json())


def test_formats_of_one_name_differ_in_their_numbers():
    own = replace(FP8, element=replace(FP8.element, max=240.0))
    text = some_spec().diff(some_spec(own))
    assert "FP8 with element=" in text
    assert "'max': 448.0" in text
    assert "'max': 240.0" in text


def first(role, changes=None, **fields):
    """A change of the first group, input or skipped parameter, if there is one; `changes` are made from it."""

    def change(spec):
        found = getattr(spec, role)
        changed = (replace(entry, **fields, **(changes(entry) if changes else {})) for entry in found[:1])
        return replace(spec, **{role: (*changed, *found[1:])})

    return change


SPEC = of_inputs()[1]
CHANGES = {
    "key": first("groups", lambda g: {"key": f"o.{g.key}", "names": tuple(f"o.{name}" for name in g.names)}),
    "names": first("groups", lambda g: {"names": padded(g.names)}),
    "format": first("groups", format=FP8),
    "a number of the format": first("groups", format=replace(NVFP4, min_scale=0.0)),
    "experts": first("groups", lambda g: {"experts": 2, "names": g.names[: 1 if g.stacked else 2]}),
    "shape": first("groups", shape=(64, 48)),
    "stacked": first("groups", lambda g: {"stacked": True, "names": g.names[:1]}),
    "transposed": first("groups", transposed=True),
    "one group less": lambda spec: replace(spec, groups=spec.groups[1:]),
    "another order": lambda spec: replace(spec, groups=spec.groups[::-1]),
    "format of inputs": first("inputs", format=NVFP4),
    "per_expert": first("inputs", per_expert=True),
    "no inputs": lambda spec: replace(spec, inputs=()),
    "nothing skipped": lambda spec: replace(spec, skipped=()),
    "one skipped": lambda spec: replace(
        spec, skipped=(*(one for one in spec.skipped if one.name != "b"), Skipped("b", (), "0-D"))
    ),
    "reason": first("skipped", reason="1-D"),
    "rules": lambda spec: replace(spec, rules=()),
}


@given(st.lists(st.sampled_from(list(CHANGES)), max_size=4), st.lists(st.sampled_from(list(CHANGES)), max_size=4))
def test_a_difference_is_empty_only_of_equal_specs(here, there):
    """Law: diff is "" if and only if the specs are equal, whatever is changed in either; no change goes unseen."""
    one = two = SPEC
    for change in here:
        one = CHANGES[change](one)
    for change in there:
        two = CHANGES[change](two)
    assert (one.diff(two) == "") == (one == two) == (two.diff(one) == "")


@pytest.mark.parametrize("change", CHANGES)
def test_a_difference_names_what_was_changed(change):
    """Each change is seen, but for the rules, which do not make a spec another."""
    text = SPEC.diff(CHANGES[change](SPEC))
    assert bool(text) == (change != "rules")
    if change in ("names", "format", "experts", "shape", "stacked", "transposed", "per_expert", "reason"):
        assert f"  {change}  " in text


def test_what_has_no_place_for_inputs_says_so(tmp_path):
    """Kills scales of inputs that are left out in silence: packing, export, modules of other engines' checkpoints."""
    params = {"experts.0.w1.weight": torch.ones(32, 32)}
    model = torch.nn.Linear(1, 1)
    both = [Rule("*", FP8, FP8)]
    fq = fqt.transform(select(params, both))
    state = fq.init(params)
    weights_only = fqt.transform(select(params, presets.weights_only(both)))
    packed = weights_only.pack(params, weights_only.calibrate(params))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    doors = {
        "pack": lambda: fq.pack(params, state),
        "export": lambda: fqt.export.save(tmp_path, fq, params, state, config=config, layout="plain"),
        "checkpoint.megatron": lambda: fqt.checkpoint.megatron.sharded_state_dict(fq, state, {}),
        "checkpoint.megatron ": lambda: fqt.checkpoint.megatron.load_state(fq, {}, state),
        "checkpoint.megatron  ": lambda: fqt.checkpoint.megatron.verify(tmp_path, fq, {}),
        "checkpoint.modelopt": lambda: fqt.checkpoint.modelopt.read({}, fq),
        "checkpoint.modelopt ": lambda: fqt.checkpoint.modelopt.write(fq, state),
        "layerwise": lambda: fqt.layerwise(fq, model, state).__enter__(),
        "packed weights": lambda: fqt.checkpoint.save(tmp_path / "packed", fq, packed),
    }
    for what, door in doors.items():
        assert_names(
            message_of(ValueError, door), what.strip(), "the inputs of 1 groups in the spec", "wanted weights only"
        )
