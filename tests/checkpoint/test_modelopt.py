"""ModelOpt's entries: each row of the table is read, what is unclear is refused, and ModelOpt itself agrees."""

import copy
import warnings

import pytest
import torch
from torch.func import functional_call

import fq_transforms as fqt
from fq_transforms.checkpoint import modelopt
from fq_transforms.formats import FORMATS
from tests.cases import CORE_FORMATS, assert_names, experts, message_of, name_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    mtq = pytest.importorskip("modelopt.torch.quantization")

EXPERTS, OUT, IN = 4, 64, 256
STATEFUL = [format for format in CORE_FORMATS if not format.is_stateless]
pytestmark = pytest.mark.filterwarnings("ignore")  # ModelOpt's, about packages that it would like to have

TE = "decoder.layers.0.mlp.experts.linear_fc1."
SEQUENTIAL = "decoder.layers.0.mlp.experts.local_experts.{i}.linear_fc1."
LIST = "model.layers.0.mlp.experts.{i}.w1."
FUSED = "model.layers.0.mlp.experts.gate_up_proj"


def params_of(layout):
    weights = experts(EXPERTS, (OUT, IN))
    if layout == FUSED:
        return {FUSED: torch.stack(weights)}
    names = [f"{TE}weight{i}" if layout == TE else f"{layout.format(i=i)}weight" for i in range(EXPERTS)]
    return dict(zip(names, weights, strict=True))


def spec_and_state(layout, format):
    params = params_of(layout)
    spec = fqt.select(params, {"*": format})
    return spec, fqt.calibrate(params, spec=spec)


def same(a, b):
    leaves, others = fqt.state.flatten(a), fqt.state.flatten(b)
    return leaves.keys() == others.keys() and all(torch.equal(leaves[name], others[name]) for name in leaves)


def local(spec, start, count):
    """The spec and the state of some experts of Transformer Engine's."""
    params = params_of(TE)
    mine = {f"{TE}weight{i}": params[f"{TE}weight{start + i}"] for i in range(count)}
    spec = fqt.select(mine, {"*": spec.groups[0].format})
    return spec, fqt.calibrate(mine, spec=spec)


@pytest.mark.parametrize("layout", [TE, SEQUENTIAL, LIST, FUSED])
@pytest.mark.parametrize("format", STATEFUL, ids=name_of)
def test_what_is_written_is_read(format, layout):
    """read(write(state)) is the state, for every format and layout; pull request 1717's for Transformer Engine."""
    spec, state = spec_and_state(layout, format)
    assert same(modelopt.read(modelopt.write(state, spec), spec), state)
    if layout == TE:
        assert same(modelopt.read(modelopt.write(state, spec, layout="pr1717"), spec), state)


# Rows of the table: names by number of the expert, or one name of all.
ROWS = {
    "ModelOpt main": (TE, f"{TE}weight_quantizer.{{i}}._"),
    "first commits": (TE, f"{TE}weight_quantizer_{{i}}._"),
    "torch_dist, TE": (TE, "decoder.layers.0.mlp.experts.{i}.linear_fc1.weight_quantizer._"),
    "torch_dist, sequential": (SEQUENTIAL, "decoder.layers.0.mlp.experts.{i}.linear_fc1.weight_quantizer._"),
    "SequentialMLP": (SEQUENTIAL, f"{SEQUENTIAL}weight_quantizer._"),
    "module list": (LIST, f"{LIST}weight_quantizer._"),
    "fused": (FUSED, f"{FUSED}_weight_quantizers.{{i}}._"),
    "expert axis, TE": (TE, f"{TE}weight_quantizer._"),
    "expert axis, sequential": (SEQUENTIAL, "decoder.layers.0.mlp.experts.linear_fc1.weight_quantizer._"),
    "pull request 1717": (TE, f"{TE}_modelopt_per_expert_weight_quantizer_"),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("format", STATEFUL, ids=name_of)
def test_every_row_is_read(format, row):
    """Spelled here by hand, in the leaf's own shape: each expert's amax comes to that expert."""
    layout, name = ROWS[row]
    spec, state = spec_and_state(layout, format)
    entries = {"model.norm.weight": torch.ones(3), "x.input_quantizer._amax": torch.tensor(7.0)}
    for leaf_name, leaf in fqt.state.flatten(state).items():
        field = leaf_name.rpartition(".")[2]
        if "{i}" in name:
            entries |= {f"{name.format(i=i)}{field}": value for i, value in enumerate(leaf)}
        else:
            entries[name + field] = leaf
    assert same(modelopt.read(entries, spec), state)


def test_flat_vector_and_shared_scalar_are_told_apart_by_length():
    """Pull request 1671's [N] is one an expert; one value is of all experts, and taken so only if asked for."""
    spec, state = spec_and_state(TE, fqt.FP8)
    (amax,) = fqt.state.flatten(state).values()
    assert same(modelopt.read({f"{TE}weight_quantizer._amax": amax}, spec), state)
    for one in (torch.tensor(3.0), torch.tensor([3.0])):
        entries = {f"{TE}weight_quantizer._amax": one}
        assert_names(
            message_of(ValueError, modelopt.read, entries, spec), "weight_quantizer._amax", "4 experts", "expand"
        )
        (expanded,) = fqt.state.flatten(modelopt.read(entries, spec, shared="expand")).values()
        assert torch.equal(expanded, torch.full((EXPERTS,), 3.0))
    spec, _ = spec_and_state(FUSED, fqt.FP8)  # gpt-oss and Llama 4
    entries = {f"{FUSED}_weight_quantizer._amax": torch.tensor(3.0)}
    assert "expand" in message_of(ValueError, modelopt.read, entries, spec)


@pytest.mark.parametrize("form", ["numbered", "axis", "pr1717", "local", "mine by global number"])
@pytest.mark.parametrize("format", STATEFUL, ids=name_of)
def test_slice_of_a_rank(format, form):
    """A rank of EP=2 reads its own half, from entries of all ranks or of its own."""
    spec, state = spec_and_state(TE, format)
    for start in (0, 2):
        mine, wanted = local(spec, start, 2)
        if form == "local":
            entries = modelopt.write(wanted, mine)
        elif form in ("numbered", "mine by global number"):
            name = "decoder.layers.0.mlp.experts.{i}.linear_fc1.weight_quantizer._"
            numbers = range(EXPERTS) if form == "numbered" else range(start, start + 2)
            leaves = fqt.state.flatten(state)
            entries = {
                f"{name.format(i=i)}{key.rpartition('.')[2]}": leaf[i] for key, leaf in leaves.items() for i in numbers
            }
        elif form == "axis":
            leaves = fqt.state.flatten(state)
            entries = {f"{TE}weight_quantizer._{key.rpartition('.')[2]}": leaf for key, leaf in leaves.items()}
        else:
            entries = modelopt.write(state, spec, layout="pr1717")
        assert same(modelopt.read(entries, mine, expert_offset=start, experts=EXPERTS), wanted)


def test_refusals_name_the_entry():
    """A short or long list, two kinds, no entry, another shape, NaN, and entries of nobody; nothing is guessed."""
    spec, state = spec_and_state(TE, fqt.INT8_PER_CHANNEL)
    entries = modelopt.write(state, spec)
    name = f"{TE}weight_quantizer.2._amax"

    def message(error, found, *args, **kwargs):
        return message_of(error, modelopt.read, found, spec, *args, **kwargs)

    short = {key: value for key, value in entries.items() if key != name}
    assert_names(message(KeyError, short), "linear_fc1.weight*", "found 3 experts", "missing [2]")
    assert_names(message(ValueError, entries | {f"{TE}weight_quantizer.4._amax": torch.ones(OUT, 1)}), "unknown [4]")
    assert_names(message(KeyError, {}), "linear_fc1.weight*", "no entry", "weight_quantizer.{i}._amax")
    both = entries | modelopt.write(state, spec, layout="pr1717")
    assert_names(message(ValueError, both), "weight_quantizer.{i}._amax", "_modelopt_per_expert_weight_quantizer_amax")
    assert_names(
        message(ValueError, entries | {name: torch.ones(OUT + 1, 1)}), name, "(65, 1)", "64", "INT8_PER_CHANNEL"
    )
    wrong = {f"{TE}weight_quantizer._amax": torch.ones(3, EXPERTS, OUT, 1)}
    assert_names(message(ValueError, wrong), "(3, 4, 64, 1)", "(4, 64, 1)", "slice a layer")
    bad = entries[name].clone()
    bad[5] = torch.nan
    assert_names(message(ValueError, entries | {name: bad}), "nan", f"{TE}weight2")
    other = entries | {"decoder.layers.0.self_attention.linear_qkv.weight_quantizer._amax": torch.tensor(1.0)}
    assert_names(message(ValueError, other), "linear_qkv", "strict=False")
    assert same(modelopt.read(other, spec, strict=False), state)
    assert_names(message(ValueError, entries, expert_offset=3, experts=5), "expert_offset 3", "experts 5")
    assert_names(message(ValueError, entries, shared="yes"), "shared", "'yes'")
    assert_names(message_of(ValueError, modelopt.write, state, spec, layout="hf"), "layout", "'hf'")
    listed, listed_state = spec_and_state(LIST, fqt.FP8)
    assert_names(
        message_of(ValueError, modelopt.write, listed_state, listed, layout="pr1717"), "w1", "Transformer Engine"
    )


def test_untied_pairs_are_refused():
    """ModelOpt keeps one global amax for w1 and w3 of an expert: of two, the last loaded would stay."""
    weights = experts(4, (OUT, IN))
    params = {f"experts.{i}.{w}.weight": weights[2 * i + (w == "w3")] for i in range(2) for w in ("w1", "w3")}
    spec = fqt.select(params, {"*": fqt.NVFP4_STATIC})
    state = fqt.calibrate(params, spec=spec)
    assert_names(message_of(ValueError, modelopt.write, state, spec), "experts.*.w1.weight", "experts.*.w3.weight")
    tied = torch.maximum(*(group.global_amax for group in state.values()))
    state = {key: group._replace(global_amax=tied) for key, group in state.items()}
    assert same(modelopt.read(modelopt.write(state, spec), spec), state)


class Experts(torch.nn.Module):
    """A list of experts, as Megatron's SequentialMLP and DeepSeek's models have; each sees every token."""

    def __init__(self):
        super().__init__()
        self.local_experts = torch.nn.ModuleList()
        for weight in experts(EXPERTS, (OUT, IN)):
            expert = torch.nn.ModuleDict({"linear_fc1": torch.nn.Linear(IN, OUT, bias=False)})
            expert["linear_fc1"].weight.data = weight
            self.local_experts.append(expert)

    def forward(self, x):
        return torch.stack([expert["linear_fc1"](x) for expert in self.local_experts])


ATTRIBUTES = {
    "INT8": {"num_bits": 8, "axis": None},
    "INT8_PER_CHANNEL": {"num_bits": 8, "axis": 0},
    "INT4_BLOCK32": {"num_bits": 4, "block_sizes": {-1: 32}},
    "INT4_BLOCK128": {"num_bits": 4, "block_sizes": {-1: 128}},
    "FP8": {"num_bits": (4, 3), "axis": None},
    "FP8_PER_CHANNEL": {"num_bits": (4, 3), "axis": 0},
}


def config_of(name, pattern):
    rules = [{"quantizer_name": "*", "enable": False}, {"quantizer_name": pattern, "cfg": ATTRIBUTES[name]}]
    return {"quant_cfg": rules, "algorithm": "max"}


def converted(format):
    """A model that ModelOpt has converted and calibrated, and its own weights."""
    config = config_of(format.name, "*weight_quantizer")
    model = Experts()
    params = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return mtq.quantize(model, config, lambda m: m(torch.ones(2, IN))), params


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_modelopt_writes_and_we_read(name):
    """A state dict made by ModelOpt: the amax that it calibrated is ours, and so are INT8's and INT4's weights."""
    format = FORMATS[name]
    model, params = converted(format)
    spec = fqt.select(params, {"*": format})
    fq = fqt.transform(spec)
    state = modelopt.read(model.state_dict(), spec)
    assert same(state, fq.calibrate(params))
    if name.startswith("INT"):  # for FP8, ModelOpt's CPU twin is not its CUDA kernel (test_peers.py)
        x = torch.randn(3, IN)
        assert torch.equal(model(x), functional_call(Experts(), fq.fakequant(params, state), (x,)))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_we_write_and_modelopt_reads(name):
    """Three quarters of each amax, loaded by ModelOpt: its quantizers hold it, and its outputs are ours."""
    format = FORMATS[name]
    model, params = converted(format)
    spec = fqt.select(params, {"*": format})
    fq = fqt.transform(spec)
    state = {key: group._replace(amax=group.amax * 0.75) for key, group in fq.calibrate(params).items()}
    entries = modelopt.write(state, spec)
    assert entries.keys() <= model.state_dict().keys()
    before = copy.deepcopy(model.state_dict())
    loaded = model.load_state_dict(entries, strict=False)
    assert not loaded.unexpected_keys
    assert same(modelopt.read(model.state_dict(), spec), state)
    assert not any(torch.equal(before[key], value) for key, value in entries.items())
    if name.startswith("INT"):
        x = torch.randn(3, IN)
        assert torch.equal(model(x), functional_call(Experts(), fq.fakequant(params, state), (x,)))


def mixtral():
    """A small Mixtral with fused experts, the same each time. ModelOpt quantizes the eager implementation only."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    config = transformers.MixtralConfig(**sizes, **heads)
    config._experts_implementation = "eager"
    return transformers.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("name", ["INT8", "INT8_PER_CHANNEL", "INT4_BLOCK32"])
def test_fused_experts_of_transformers(name):
    """ModelOpt's state dict of a Mixtral is read, gives its logits, and three quarters of it are loaded back alike."""
    plain, tokens = mixtral(), torch.arange(128).reshape(2, 64) % 64
    params = {key: weight.detach() for key, weight in plain.named_parameters()}
    model = mtq.quantize(mixtral(), config_of(name, "*experts*weight_quantizer*"), lambda m: m(tokens))
    spec = fqt.select(params, {"*.experts.*": FORMATS[name]})
    fq = fqt.transform(spec)
    state = modelopt.read(model.state_dict(), spec)
    assert same(state, fq.calibrate(params))

    def logits(state):
        return functional_call(plain, fq.fakequant(params, state), (tokens,)).logits

    with torch.no_grad():
        assert torch.equal(model(tokens).logits, logits(state))
        tuned = {key: group._replace(amax=group.amax * 0.75) for key, group in state.items()}
        assert not model.load_state_dict(modelopt.write(tuned, spec), strict=False).unexpected_keys
        assert torch.equal(model(tokens).logits, logits(tuned))
        assert not torch.equal(logits(tuned), logits(state))
