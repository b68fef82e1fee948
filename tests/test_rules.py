"""Rules as values and as text: what a rule can be, JSON and YAML that lead back to it, and each refusal."""

import json
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.fsdp._common_utils import FSDP_PREFIX

from fq_transforms import presets
from fq_transforms.formats import FORMATS, FP8, FP8_BLOCK, INT4_BLOCK32, INT8, NVFP4, NVFP4_STATIC
from fq_transforms.rules import Rule, as_rules, from_json, from_yaml, to_json, to_yaml, unwrapped
from fq_transforms.select import select
from tests.cases import assert_names, message_of, meta
from tests.hostile import watched

OWN = replace(INT8, name="FP8", unit_scale_below=1e-5)  # of a name that is another format's
OF_INPUTS = [format for format in FORMATS.values() if format.dynamic or format.block in ((None, None), (1, None))]

# pattern, weights, inputs, keywords -> what the message must say
NO_RULES = {
    "no pattern": ((None,), {}, ["rule None", "found NoneType", "wanted a glob pattern"]),
    "a format for a pattern": ((FP8,), {}, ["found Format", "wanted a glob pattern"]),
    "a format by its name": (("*.x", "NVFP4"), {}, ["rule '*.x': found weights='NVFP4', wanted a Format", "fqt.NVFP4"]),
    "inputs by their name": (("*.x", FP8, "FP8"), {}, ["rule '*.x': found inputs='FP8', wanted a Format"]),
    "a flag that is none": (("*.x", FP8), {"required": None}, ["found required=None, wanted True or False"]),
    "a pattern for a flag": (("*.x", FP8, FP8), {"per_expert_inputs": "*"}, ["found per_expert_inputs='*'"]),
    "an amax of no inputs": (("*.x", FP8), {"per_expert_inputs": True}, ["rule '*.x'", "without inputs"]),
    "square blocks of inputs": (("*.x", FP8, FP8_BLOCK), {}, ["rule '*.x'", "inputs=FP8_BLOCK", "(128, 128)"]),
    "static blocks of inputs": (
        ("*.x", None, INT4_BLOCK32),
        {},
        ["inputs=INT4_BLOCK32", "static scales", "such as FP8"],
    ),
    "static NVFP4 inputs": (("*.x", None, NVFP4_STATIC), {}, ["NVFP4_STATIC", "of dynamic blocks such as NVFP4"]),
}


@pytest.mark.parametrize("mistake", NO_RULES)
def test_a_rule_that_cannot_be_is_refused_when_it_is_made(mistake):
    """Each error names the pattern, the argument, what was found and what was wanted."""
    arguments, keywords, fragments = NO_RULES[mistake]
    assert_names(message_of(ValueError, Rule, *arguments, **keywords), *fragments)


@pytest.mark.parametrize(
    "rules",
    [FP8, "*", "FP8_DEFAULT_CFG", None, 7, [("*", FP8)], [FP8], {"*"}, iter([Rule("*", FP8)])],
    ids=lambda rules: type(rules).__name__,
)
def test_what_is_no_rules_is_refused(rules):
    """A format, a pattern, a preset's name, pairs: the error shows what select takes."""
    for door in (as_rules, to_json, to_yaml, presets.weights_only, lambda rules: select({"a": meta(8, 8)}, rules)):
        assert_names(
            message_of(ValueError, door, rules),
            "rules: found",
            "wanted a mapping from patterns to formats",
            "a list of fqt.Rule(pattern, weights, inputs)",
            "a preset such as fqt.presets.FP8_DEFAULT_CFG",
        )


def test_a_format_in_place_of_rules_is_refused_with_the_line_to_write():
    """The constant, its name, a preset's name; a format of one's own has no name to write."""
    assert_names(
        message_of(ValueError, as_rules, NVFP4),
        "rules: found the format NVFP4, wanted",
        "write {'*.experts.*': fqt.formats.NVFP4}, or {'*': fqt.formats.NVFP4} for every matrix",
    )
    assert_names(message_of(ValueError, as_rules, "NVFP4"), "write {'*.experts.*': fqt.formats.NVFP4}")
    assert_names(message_of(ValueError, as_rules, "FP8_DEFAULT_CFG"), "; write fqt.presets.FP8_DEFAULT_CFG")
    assert_names(message_of(ValueError, as_rules, OWN), "found the format FP8", "{'*': the format}")


def test_a_rule_alone_is_refused_with_the_fix():
    assert_names(message_of(ValueError, as_rules, Rule("*", FP8)), "found Rule(", "put it into a list")


def test_a_mapping_with_a_name_for_a_format_is_refused():
    assert_names(message_of(ValueError, as_rules, {"*.x": "NVFP4"}), "rule '*.x': found weights='NVFP4'")
    assert_names(message_of(ValueError, as_rules, {3: FP8}), "rule 3: found int, wanted a glob pattern")


RULES = [
    Rule("*.experts.*", NVFP4, FP8, per_expert_inputs=True),
    Rule("*.q.*", inputs=FP8),
    Rule("*.0.*"),
    Rule("*lm_head*", required=False),
]


def test_rules_in_json_can_be_read():
    """One per line: weights always, so that null shows what is left out; the rest where it is no default."""
    assert to_json(RULES) == (
        "[\n"
        '  {"pattern": "*.experts.*", "weights": "NVFP4", "inputs": "FP8", "per_expert_inputs": true},\n'
        '  {"pattern": "*.q.*", "weights": null, "inputs": "FP8"},\n'
        '  {"pattern": "*.0.*", "weights": null},\n'
        '  {"pattern": "*lm_head*", "weights": null, "required": false}\n'
        "]"
    )


def test_rules_in_yaml_can_be_read():
    """The same keys."""
    assert to_yaml(RULES) == (
        "- pattern: '*.experts.*'\n"
        "  weights: NVFP4\n"
        "  inputs: FP8\n"
        "  per_expert_inputs: true\n"
        "- pattern: '*.q.*'\n"
        "  weights: null\n"
        "  inputs: FP8\n"
        "- pattern: '*.0.*'\n"
        "  weights: null\n"
        "- pattern: '*lm_head*'\n"
        "  weights: null\n"
        "  required: false"
    )


def test_a_format_of_no_constant_is_written_as_its_numbers():
    """Kills a user's own format that comes back as the constant whose name it has."""
    (entry,) = json.loads(to_json({"*": OWN}))
    assert entry["weights"]["element"] == {"qmax": 127, "low": -128, "high": 127}
    assert entry["weights"]["unit_scale_below"] == 1e-5
    for found in (from_json(to_json({"*": OWN})), from_yaml(to_yaml({"*": OWN}))):
        assert found[0].weights == OWN != FORMATS["FP8"]


def test_what_a_person_writes_is_short():
    """What has a default may be left out, and numbers of a format too; YAML's own ways of writing are read."""
    wanted = (Rule("*", INT8), Rule("a.*"), Rule("b", FP8, FP8, required=False))
    assert wanted == from_json(
        '[{"weights": "INT8", "pattern": "*"}, {"pattern": "a.*"}, '
        '{"pattern": "b", "weights": "FP8", "inputs": "FP8", "required": false}]'
    )
    assert wanted == from_yaml(
        "# the whole model\n- &all {pattern: '*', weights: INT8}\n- pattern: a.*\n"
        "- <<: *all\n  pattern: b\n  weights: FP8\n  inputs: FP8\n  required: no\n"
    )
    numbers = {"name": "INT8", "element": {"qmax": 127, "low": -128, "high": 127}, "block": [None, None]}
    numbers["dequantize"] = "divide"
    assert from_json(json.dumps([{"pattern": "*", "weights": numbers}])) == (Rule("*", INT8),)


@pytest.mark.parametrize("preset", [name for name in vars(presets) if name.endswith("_CFG")])
def test_presets_round_trip(preset):
    rules = getattr(presets, preset)
    assert from_json(to_json(rules)) == from_yaml(to_yaml(rules)) == rules


ANY_RULES = st.lists(
    st.builds(
        lambda pattern, weights, inputs, required, each: Rule(
            pattern, weights, inputs, required=required, per_expert_inputs=each and inputs is not None
        ),
        st.text(max_size=20) | st.text("*.?[]: #'\"\\-&!{}\n\t~", max_size=8) | st.sampled_from(["null", "yes", "1e3"]),
        st.sampled_from([None, OWN, *FORMATS.values()]),
        st.sampled_from([None, OWN, *OF_INPUTS]),
        st.booleans(),
        st.booleans(),
    ),
    max_size=4,
)


@example([Rule("\x85")])  # a line break to YAML
@given(ANY_RULES)
def test_json_and_yaml_lead_back(rules):
    """Law: reading what was written gives the same rules, whatever the pattern and the format; both hold the same."""
    assert from_json(to_json(rules)) == tuple(rules)
    assert from_yaml(to_yaml(rules)) == tuple(rules)
    assert yaml.safe_load(to_yaml(rules)) == json.loads(to_json(rules))


def numbers(**changes):
    return json.dumps([{"pattern": "*.x", "weights": {**FP8.to_dict(), **changes}}])


# name -> (JSON, which is YAML too, what the message must say)
GARBAGE = {
    "nothing": ("null", ["found None, wanted a list of rules"]),
    "a number": ("7", ["found 7, wanted a list"]),
    "a mapping": ('{"*.x": "FP8"}', ["found {'*.x': 'FP8'}, wanted a list of rules such as {'pattern'"]),
    "a pattern alone": ('["*.x"]', ["rules[0]: found '*.x', wanted an object with pattern, weights"]),
    "no pattern": ('[{"weights": "FP8"}]', ["rules[0]: found no 'pattern'"]),
    "a pattern that is a number": ('[{"pattern": 7}]', ["rules[0]: found pattern=7, wanted text"]),
    "an unknown key": (
        '[{"pattern": "*"}, {"pattern": "*.x", "weight": "FP8"}]',
        ["rules[1], pattern '*.x': found the unknown key 'weight' (did you mean 'weights'?), wanted pattern, weights"],
    ),
    "a key twice": (
        '[{"pattern": "*.x", "weights": "FP8", "weights": "NVFP4"}]',
        ["found the key 'weights' twice", "'pattern': '*.x'"],
    ),
    "an unknown format": (
        '[{"pattern": "*.x", "weights": "NVFP4_STATICS"}]',
        ["rules[0], pattern '*.x': found weights='NVFP4_STATICS', wanted a format's name such as NVFP4_STATIC or"],
    ),
    "a format in another case": ('[{"pattern": "*.x", "inputs": "fp8"}]', ["found inputs='fp8'", "such as FP8 or"]),
    "a format of bits": ('[{"pattern": "*.x", "weights": 8}]', ["found weights=8, wanted a format"]),
    "a flag of text": ('[{"pattern": "*.x", "required": "no"}]', ["found required='no', wanted true or false"]),
    "a flag that is a number": ('[{"pattern": "*.x", "required": 1}]', ["found required=1, wanted true or false"]),
    "inputs with static scales": (
        '[{"pattern": "*.x", "inputs": "FP8_BLOCK"}]',
        ["rules[0], pattern '*.x'", "found inputs=FP8_BLOCK"],
    ),
    "an amax of no inputs": ('[{"pattern": "*.x", "per_expert_inputs": true}]', ["rules[0]", "without inputs"]),
    "a format without an element": (
        '[{"pattern": "*.x", "weights": {"name": "FP9", "block": [null, null]}}]',
        ["rules[0], pattern '*.x': weights: format 'FP9': found no 'element'"],
    ),
    "a format with an unknown number": (numbers(zero_point=1), ["format 'FP8': found the unknown key 'zero_point'"]),
    "a format with a wrong scale": (numbers(scale="e5m2"), ["format 'FP8'", "'e5m2', wanted fp32, e4m3 or e8m0"]),
    "a block of text": (numbers(block="all"), ["found block='all', wanted two sides"]),
    "an element beyond fp32": (
        numbers(element={"exponent_bits": 10**9, "mantissa_bits": 3, "max": 448.0}),
        ["rules[0], pattern '*.x': weights: format 'FP8'", "exponent_bits=1000000000", "within fp32"],
    ),
    "an element beyond any float": (
        numbers(element={"exponent_bits": 4, "mantissa_bits": 3, "max": 10**400}),
        ["format 'FP8', element: found max=1000", "wanted a number"],
    ),
}


@pytest.mark.parametrize("language", ["JSON", "YAML"])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_is_no_rule_is_refused_by_name(language, garbage):
    """Each error says which rule, which key, what was found and what was wanted, and is the same in both languages."""
    text, fragments = GARBAGE[garbage]
    read = {"JSON": from_json, "YAML": from_yaml}[language]
    assert_names(message_of(ValueError, read, text), f"not rules in {language}", *fragments)


@pytest.mark.parametrize("read", [from_json, from_yaml])
def test_what_is_no_text_is_refused(read, tmp_path):
    assert_names(message_of(ValueError, read, tmp_path), "found PosixPath", "wanted the text itself", "read_text()")
    assert_names(message_of(ValueError, read, b"[]"), "found bytes")
    assert_names(message_of(ValueError, read, "[" * 100_000), "not rules in")


def test_a_pattern_that_yaml_takes_for_an_alias_is_refused_with_the_fix():
    """A bare * is an alias in YAML, which is the mistake that everyone makes once."""
    for pattern in ("*.experts.*", "*experts", "*"):
        message = message_of(ValueError, from_yaml, f"- pattern: {pattern}\n  weights: FP8\n")
        assert_names(message, "not rules in YAML", "is each pattern quoted, as '*.experts.*' is?")


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir", "!mkdir"],
)
def test_yaml_runs_nothing(tag, tmp_path):
    """Law: reading makes plain values only; what asks for more is refused."""
    text = f"- pattern: {tag} ['{tmp_path / 'made'}']\n"
    assert_names(message_of(ValueError, from_yaml, text), "not rules in YAML", tag.split(":")[-1].removeprefix("!"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["- !!bool x", "- !!int ''", "- !!timestamp x", "- {[a]: b}", "- {? {a: 1} : b}", "- &a [*a]"]
)
def test_what_yaml_cannot_convert_is_refused(text):
    """Kills PyYAML's own KeyError, IndexError, AttributeError and TypeError, which say nothing about rules."""
    assert_names(message_of(ValueError, from_yaml, text), "not rules in YAML")


@given(st.text() | st.text("[]{}:-*&!'\"\\ \n\tabc01,.?|>#%@", max_size=40))
def test_any_text_is_read_or_refused(text):
    """No text gets another error than ValueError out of either reader."""
    for read in (from_json, from_yaml):
        try:
            rules = read(text)
        except ValueError:
            continue
        assert all(isinstance(rule, Rule) for rule in rules)


def test_yaml_without_pyyaml_says_what_to_install(monkeypatch):
    """It is imported when it is used, so that the package needs it for nothing else."""
    monkeypatch.setitem(sys.modules, "yaml", None)
    for door in (lambda: to_yaml(RULES), lambda: from_yaml("[]")):
        assert_names(message_of(ImportError, door), "PyYAML", "pip install pyyaml")
    assert from_json(to_json(RULES)) == tuple(RULES)


YAML_BOMBS = {
    "merges": "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(40)),
    "aliases": "a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40)) + "b: *a40\n",
    "a number": "- {pattern: 1" + ":1" * 100_000 + "}",
    "a name": "- {pattern: " + "x" * 10**5 + "}",
    "nesting": "[" * 10**5,
    "megabytes": "- {pattern: x}\n" * 200_000,
}


@pytest.mark.parametrize("case", YAML_BOMBS)
def test_yaml_takes_what_it_is(case):
    """A file of rules from others: what grows when it is read is refused, within seconds."""
    with watched():
        assert_names(message_of(ValueError, from_yaml, YAML_BOMBS[case]), "not rules in YAML")


WRAPPERS = ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_model.model"]
WRAPPERS += ["base_layer", "to_wrap", "original_module", "modules_to_save.default"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("pattern", ["output.*", "*mlp.gate.*", "*.mlp.gate.weight", "output.mlp.gate.weight"])
def test_a_pattern_sees_through_wrappers(wrapper, pattern):
    """Before any part of a name, within another: a pattern of the model's own names matches, as one of all of it."""
    parts = ["output", "mlp", "gate", "weight"]
    for at in range(len(parts)):
        name = ".".join([*parts[:at], wrapper, "module", *parts[at:]])
        assert unwrapped(name) == "output.mlp.gate.weight"
        assert Rule(pattern, FP8).matches(name)
        assert Rule(name, FP8).matches(name)
        assert not Rule(f"x{pattern}", FP8).matches(name)


def test_a_name_is_a_wrappers_only_as_a_whole_part():
    """A module of one's own may have such a name in its own; the parameter itself is nobody's wrapper."""
    for name in ("my_module.weight", "modules.0.weight", "base_model.mlp.weight", "gate.module", "_orig_mod"):
        assert unwrapped(name) == name


def test_the_wrappers_of_pytorch_are_known():
    """The names that PyTorch itself gives."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    names = [name for wrapped in (torch.nn.DataParallel(model), torch.compile(model)) for name in wrapped.state_dict()]
    names += [f"{prefix}0.weight" for prefix in (FSDP_PREFIX, checkpoint_wrapper._CHECKPOINT_PREFIX)]
    assert len(set(names)) == 4
    assert {unwrapped(name) for name in names} == {"0.weight"}


def test_a_pattern_of_megabytes_is_none():
    """Translating a glob takes time that grows with its square."""
    for pattern in ("[" * 10**6, "*" * 10**6):
        with watched():
            message_of(ValueError, from_json, json.dumps([{"pattern": pattern, "weights": "FP8"}]))
            message_of(ValueError, select, {"a.weight": meta(8, 32)}, {pattern: FP8})
