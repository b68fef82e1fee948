"""ModelOpt's entries: every name and shape that real files have, what must not be misread, and what ModelOpt loads.

Entries are made by ModelOpt 0.47 itself wherever it can make them on a CPU. INT8 and INT4 are compared by weights too,
bit for bit, FP8 where every amax is a power of two; for NVFP4 and MX, ModelOpt's fake quantization needs a GPU.
"""

import copy
import warnings

import optree
import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

import fq_transforms as fqt
from fq_transforms.checkpoint import modelopt
from fq_transforms.formats import FORMATS, IntElement
from tests.cases import ALL_FORMATS, CORE_FORMATS, assert_names, experts, message_of, name_of, same_bits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    mtq = pytest.importorskip("modelopt.torch.quantization")
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # ModelOpt's, about packages that it would like to have

LAYER = "decoder.layers.1.mlp.experts."
TE = f"{LAYER}linear_fc1."
SEQUENTIAL = f"{LAYER}local_experts.{{i}}.linear_fc1."
LIST = "model.layers.0.mlp.experts.{i}.w1."
STACKED = "model.layers.0.mlp.experts.w13"
SHAPE = (160, 384)  # ragged square blocks; 384 holds blocks of 16, 32 and 128
STATEFUL = [format for format in CORE_FORMATS if not format.is_stateless]
formats = pytest.mark.parametrize("format", CORE_FORMATS, ids=name_of)


def attributes(format):
    """A format as the attributes of ModelOpt's TensorQuantizer."""
    element, (rows, columns) = format.element, format.block
    bits = {127: 8, 7: 4}[element.qmax] if isinstance(element, IntElement) else None
    config = {"num_bits": bits or (element.exponent_bits, element.mantissa_bits)}
    if columns is None:
        return config | {"axis": None if rows is None else 0}
    blocks = {-1: columns} | ({-2: rows} if rows != 1 else {})
    if format.scale != "fp32":
        scale = {"e4m3": (4, 3), "e8m0": (8, 0)}[format.scale]
        blocks |= {"type": "dynamic" if format.dynamic else "static", "scale_bits": scale}
    return config | {"block_sizes": blocks}


def quantize(model, *configs, pattern="*weight_quantizer*"):
    """The model, converted by ModelOpt and calibrated on its weights."""
    cfg = configs[0] if len(configs) == 1 else list(configs)
    rules = [{"quantizer_name": "*", "enable": False}, {"quantizer_name": pattern, "cfg": cfg}]
    return mtq.quantize(model, {"quant_cfg": rules, "algorithm": "max"}, None)


def parameters(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def equal(a, b):
    leaves, others = fqt.state.flatten(a), fqt.state.flatten(b)
    return leaves.keys() == others.keys() and all(same_bits(leaves[name], others[name]) for name in leaves)


def other_values(state):
    """Another valid state of the same structure, whose numbers bf16 cannot hold."""
    return optree.tree_map(lambda leaf: leaf * 0.7 + 0.01, state)


def grouped(format, count=4, shape=SHAPE):
    params = {f"{TE}weight{i}": weight for i, weight in enumerate(experts(count, shape))}
    fq = fqt.transform(fqt.select(params, {"*": format}))
    return params, fq, fq.calibrate(params)


class Linears(torch.nn.Module):
    """Linear layers by dotted name."""

    def __init__(self, weights):
        super().__init__()
        for name, weight in weights.items():
            module, (*path, last) = self, name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight.clone()
            module.add_module(last, linear)


def sequential(shape=SHAPE, name=LAYER + "local_experts.{i}.linear_fc1"):
    return Linears({name.format(i=i): weight for i, weight in enumerate(experts(3, shape))})


class GroupedLinear(torch.nn.Module):
    """What ModelOpt makes of Transformer Engine's GroupedLinear, which needs a GPU: its container, its quantizers."""

    def __init__(self, weights, format):
        super().__init__()
        self.weight_quantizer = mtq.nn.GroupedQuantizer(
            *(mtq.nn.TensorQuantizer(mtq.config.QuantizerAttributeConfig(**attributes(format))) for _ in weights)
        )
        for i, weight in enumerate(weights):
            self.register_parameter(f"weight{i}", torch.nn.Parameter(weight.clone()))
            calibrate = mtq.model_calib.max_calibrate
            calibrate(self.weight_quantizer[i], lambda quantizer, w=weight: quantizer(w), distributed_sync=False)


@formats
def test_modelopt_makes_and_loads_lists_of_experts(format):
    """Law, SequentialMLP: read(its state dict) is calibrate's; what is written it loads strictly, and then holds."""
    model = sequential()
    params = parameters(model)
    fq = fqt.transform(fqt.select(params, {"*": format}))
    model = quantize(model, attributes(format))
    state = fq.calibrate(params)
    assert equal(modelopt.read(model.state_dict(), fq), state)

    state = other_values(state)
    model.load_state_dict(model.state_dict() | modelopt.write(fq, state))
    assert equal(modelopt.read(model.state_dict(), fq), state)
    quantizers = [module.get_submodule("weight_quantizer") for module in model.modules() if hasattr(module, "weight")]
    for group in state.values():
        for name, leaf in group.items():
            for expert, quantizer in zip(leaf, quantizers, strict=True):
                assert same_bits(getattr(quantizer, f"_{name}").flatten(), expert.flatten())
    if isinstance(format.element, IntElement):
        weights = fq.fakequant(params, state)
        for weight, quantizer, name in zip(params.values(), quantizers, params, strict=True):
            assert same_bits(quantizer(weight), weights[name])


@pytest.mark.parametrize("name", ["FP8", "FP8_PER_CHANNEL"])
def test_fp8_weights_equal_modelopt_at_powers_of_two(name):
    """FP8 on ModelOpt's CPU path rounds as its CUDA kernel where the scale is a power of two: weights are equal."""
    weights = {}
    for i, weight in enumerate(experts(3, SHAPE)):
        clipped = weight.clamp(-(2.0**-i), 2.0**-i)
        clipped[:, 3] = 2.0**-i
        weights[f"local_experts.{i}.linear_fc1"] = clipped
    model = Linears(weights)
    params = parameters(model)
    fq = fqt.transform(fqt.select(params, {"*": FORMATS[name]}))
    model = quantize(model, attributes(FORMATS[name]))
    quantized = fq.fakequant(params, modelopt.read(model.state_dict(), fq))
    for i, weight in enumerate(weights.values()):
        theirs = model.local_experts.get_submodule(str(i)).linear_fc1.weight_quantizer(weight)
        assert torch.equal(theirs, quantized[f"local_experts.{i}.linear_fc1.weight"])


@pytest.mark.parametrize("format", [f for f in CORE_FORMATS if f.scale != "e8m0"], ids=name_of)
def test_modelopt_makes_and_loads_grouped_quantizers(format):
    """The same of ModelOpt's GroupedQuantizer, as it stands in a TEGroupedLinear: `weight_quantizer.{i}._amax`."""
    weights = experts(3, SHAPE)
    params = {f"weight{i}": weight for i, weight in enumerate(weights)}
    fq = fqt.transform(fqt.select(params, {"*": format}))
    state, module = fq.calibrate(params), GroupedLinear(weights, format)
    entries = module.state_dict()
    if format.has_global_amax:  # the container here is bare: what promotes a quantizer to static NVFP4 walks a model
        entries |= {f"weight_quantizer.{i}._global_amax": weight.abs().max() for i, weight in enumerate(weights)}
    assert equal(modelopt.read(entries, fq), state)
    state = other_values(state)
    written = modelopt.write(fq, state)
    module.load_state_dict(module.state_dict() | {k: v for k, v in written.items() if "global" not in k})
    for i, expert in enumerate(state["weight*"]["amax"]):
        assert same_bits(module.weight_quantizer[i]._amax.flatten(), expert.flatten())


ONE_BLOCK = [
    ("INT4_BLOCK32", (1, 32)),
    ("INT8_PER_CHANNEL", (1, 32)),
    ("FP8_BLOCK", (96, 64)),
    ("INT4_BLOCK128", (1, 128)),
]


@pytest.mark.parametrize(("name", "shape"), ONE_BLOCK)
def test_one_number_has_no_axes_in_modelopt(name, shape):
    """Bug: an amax of one number is [] in ModelOpt whatever its format; [1, 1] and [1, 1, 1, 1] are refused there."""
    model = sequential(shape)
    params = parameters(model)
    fq = fqt.transform(fqt.select(params, {"*": FORMATS[name]}))
    state = other_values(fq.calibrate(params))
    model = quantize(model, attributes(FORMATS[name]))
    model.load_state_dict(model.state_dict() | modelopt.write(fq, state))
    assert equal(modelopt.read(model.state_dict(), fq), state)


def test_mx_needs_no_entry_and_reads_none():
    """Bug: ModelOpt keeps an `_amax` of MX formats too, that means nothing; it is no unexpected weight."""
    model = sequential()
    fq = fqt.transform(fqt.select(parameters(model), {"*": fqt.MXFP4}))
    entries = quantize(model, attributes(fqt.MXFP4)).state_dict()
    assert any(key.endswith("_amax") for key in entries)
    assert modelopt.read(entries, fq) == {fq.spec.groups[0].key: {}}
    assert modelopt.write(fq, fq.calibrate(parameters(sequential()))) == {}


# How the weights are held, and the names of their quantizers: by number of the expert, or one name of all.
ROWS = {
    "own": (TE, f"{TE}weight_quantizer.{{i}}._"),
    "first commits": (TE, f"{TE}weight_quantizer_{{i}}._"),
    "torch_dist": (TE, f"{LAYER}{{i}}.linear_fc1.weight_quantizer._"),
    # Bug: below `mlp.experts` Megatron's keys have `experts` once more, as ModelOpt's issue 2209 shows them.
    "torch_dist, experts twice": (TE, f"{LAYER}experts.{{i}}.linear_fc1.weight_quantizer._"),
    "expert axis": (TE, f"{TE}weight_quantizer._"),
    "grouped (pull request 1717)": (TE, f"{TE}_modelopt_per_expert_weight_quantizer_"),
    "sequential": (SEQUENTIAL, f"{SEQUENTIAL}weight_quantizer._"),
    "sequential, torch_dist": (SEQUENTIAL, f"{LAYER}{{i}}.linear_fc1.weight_quantizer._"),
    "sequential, torch_dist, experts twice": (SEQUENTIAL, f"{LAYER}experts.{{i}}.linear_fc1.weight_quantizer._"),
    "sequential, expert axis": (SEQUENTIAL, f"{LAYER}linear_fc1.weight_quantizer._"),
    "list": (LIST, f"{LIST}weight_quantizer._"),
    "stacked": (STACKED, f"{STACKED}_weight_quantizers.{{i}}._"),
}


def held(layout, weights):
    """Weights as the parameters of a layout."""
    if layout == STACKED:
        return {STACKED: torch.stack(weights)}
    return {
        f"{TE}weight{i}" if layout == TE else f"{layout.format(i=i)}weight": weight for i, weight in enumerate(weights)
    }


@pytest.mark.parametrize("format", STATEFUL, ids=name_of)
def test_every_row_is_read(format):
    """Each row of the table, spelled by hand, in the leaf's own shape and with one number as [1]; halves by ranks."""
    weights = experts(4, SHAPE)
    for row, (layout, name) in ROWS.items():
        params = held(layout, weights)
        fq = fqt.transform(fqt.select(params, {"*": format}))
        state = fq.calibrate(params)
        others = {"model.norm.weight": torch.ones(3), "x.input_quantizer._amax": torch.tensor(7.0)}
        for one in ((), (1,)):
            entries = dict(others)
            for leaf_name, leaf in fqt.state.flatten(state).items():
                field = leaf_name.rpartition(".")[2]
                if "{i}" in name:
                    amaxes = [amax.reshape(one) if amax.numel() == 1 else amax for amax in leaf]
                    entries |= {f"{name.format(i=i)}{field}": amax for i, amax in enumerate(amaxes)}
                else:
                    entries[name + field] = leaf
            assert equal(modelopt.read(entries, fq), state), row
            for start in (0, 2):
                half = fqt.transform(fqt.select(held(layout, weights[start : start + 2]), {"*": format}))
                wanted = optree.tree_map(lambda leaf, start=start: leaf[start : start + 2], state)
                assert equal(modelopt.read(entries, half, expert_offset=start, experts=4), wanted), row


@pytest.mark.parametrize("format", STATEFUL, ids=name_of)
def test_a_rank_reads_its_own_entries(format):
    """A rank of EP=2 reads what only it has, counted from 0 as its modules are, or by the number among all."""
    _, fq, state = grouped(format)
    half = fqt.transform(fqt.select({name: torch.empty(SHAPE) for name in fq.spec.groups[0].names[:2]}, {"*": format}))
    for start in (0, 2):
        wanted = optree.tree_map(lambda leaf, start=start: leaf[start : start + 2], state)
        of_all = {
            f"{LAYER}{i}.linear_fc1.weight_quantizer._{name.rpartition('.')[2]}": leaf[i]
            for name, leaf in fqt.state.flatten(state).items()
            for i in (start, start + 1)
        }
        for entries in (modelopt.write(half, wanted), of_all):
            assert equal(modelopt.read(entries, half, expert_offset=start, experts=4), wanted)


def test_a_vector_and_a_shared_number_are_told_apart_by_length():
    """Pull request 1671's [E] is one per expert; one value is of all experts, and taken so only if asked for."""
    _, fq, state = grouped(fqt.FP8)
    key = f"{TE}weight_quantizer._amax"
    (leaf,) = fqt.state.flatten(state).values()
    assert equal(modelopt.read({key: leaf}, fq), state)
    for one in (torch.tensor(3.0), torch.tensor([3.0])):
        assert_names(message_of(ValueError, modelopt.read, {key: one}, fq), key, "4 experts", "expand")
        (group,) = modelopt.read({key: one}, fq, shared="expand").values()
        assert torch.equal(group["amax"], torch.full((4,), 3.0))


def test_refusals_name_the_entry():
    """A short or long list, two kinds, no entry, another shape, and entries of nobody; nothing is guessed."""
    _, fq, state = grouped(fqt.INT8_PER_CHANNEL)
    entries, name = modelopt.write(fq, state), f"{TE}weight_quantizer.2._amax"

    def message(error, found, **options):
        return message_of(error, modelopt.read, found, fq, **options)

    short = {key: value for key, value in entries.items() if key != name}
    assert_names(message(KeyError, short), "linear_fc1.weight*", "found 3 experts", "missing [2]")
    assert_names(message(ValueError, entries | {f"{TE}weight_quantizer.4._amax": torch.ones(160, 1)}), "unknown [4]")
    assert_names(message(KeyError, {}), "linear_fc1.weight*", "no entry", "weight_quantizer.{i}._amax")
    both = entries | modelopt.write(fq, state, layout="grouped")
    assert_names(message(ValueError, both), "weight_quantizer.{i}._amax", "_modelopt_per_expert_weight_quantizer_amax")
    longer = entries | {name: torch.ones(161, 1)}
    assert_names(message(ValueError, longer), name, "(161, 1)", "160", "INT8_PER_CHANNEL")
    wrong = {f"{TE}weight_quantizer._amax": torch.ones(3, 4, 160, 1)}
    assert_names(message(ValueError, wrong), "(3, 4, 160, 1)", "(4, 160, 1)", "slice a layer")
    bad = entries[name].clone()
    bad[5] = torch.nan
    assert_names(message(ValueError, entries | {name: bad}), "nan", f"{TE}weight2")
    other = entries | {"decoder.layers.0.self_attention.linear_qkv.weight_quantizer._amax": torch.tensor(1.0)}
    assert_names(message(ValueError, other), "linear_qkv", "strict=False")
    assert equal(modelopt.read(other, fq, strict=False), state)


def test_global_numbers_are_never_taken_for_a_ranks_own():
    """Bug: torch_dist keys of experts 0 and 1 were read as those of the rank that has 2 and 3."""
    _, fq, _ = grouped(fqt.FP8, count=2)
    for stem in (f"{LAYER}experts.{{}}.linear_fc1", f"{LAYER}{{}}.linear_fc1"):
        entries = {f"{stem.format(i)}.weight_quantizer._amax": torch.tensor(i + 1.0) for i in range(2)}
        message = message_of(KeyError, modelopt.read, entries, fq, expert_offset=2, experts=4)
        assert_names(message, f"{TE}weight*", f"{stem.format(0)}.weight_quantizer._amax", "missing [2, 3]")
    # Names that count from 0 on every rank do mean the rank's own.
    own = {f"{TE}weight_quantizer.{i}._amax": torch.tensor(i + 1.0) for i in range(2)}
    (group,) = modelopt.read(own, fq, expert_offset=2, experts=4).values()
    assert group["amax"].tolist() == [1.0, 2.0]


WRONG_SHAPES = [
    ("INT8_PER_CHANNEL", (64, 64), (1, 64)),  # by input channel
    ("FP8_PER_CHANNEL", (64, 64), (1, 64, 1)),
    ("INT4_BLOCK32", (8, 128), (4, 8)),  # blocks of the transposed matrix
    ("INT4_BLOCK32", (8, 128), (2, 16)),
    ("FP8_BLOCK", (256, 384), (3, 2)),
    ("FP8", (8, 128), (8, 1)),
    ("NVFP4", (8, 128), (64, 1)),  # static blocks for a dynamic format
]


@pytest.mark.parametrize(("name", "shape", "stored"), WRONG_SHAPES)
def test_shapes_of_the_right_length_are_not_enough(name, shape, stored):
    """Bug: an amax along `in`, or of the transposed matrix, has as many numbers and was reshaped to another meaning."""
    _, fq, _ = grouped(FORMATS[name], count=3, shape=shape)
    listed = {f"{TE}weight_quantizer.{i}._amax": torch.ones(stored) for i in range(3)}
    of_all = {f"{TE}weight_quantizer._amax": torch.ones(3, *stored)}
    for entries, found in ((listed, stored), (of_all, (3, *stored))):
        message = message_of(ValueError, modelopt.read, entries, fq)
        assert_names(message, next(iter(entries)), f"found shape {found}", name, f"{TE}weight*")


def test_quantizers_in_sequence_are_refused():
    """W4A8's weight passes two quantizers, whose names end as a grouped list's; a list of two is told by its shapes."""
    sequence = attributes(fqt.INT4_BLOCK32), attributes(fqt.FP8)
    model = sequential()
    fq = fqt.transform(fqt.select(parameters(model), {"*": fqt.INT4_BLOCK32}))
    message = message_of(ValueError, modelopt.read, quantize(model, *sequence).state_dict(), fq)
    assert_names(message, f"{LAYER}local_experts.0.linear_fc1.weight_quantizer.0._amax", "in sequence", "W4A8")

    dense = Linears({"linear_qkv": experts(1, SHAPE)[0]})
    fq = fqt.transform(fqt.select(parameters(dense), {"*": fqt.INT4_BLOCK32}))
    entries = quantize(dense, *sequence).state_dict()
    assert_names(message_of(ValueError, modelopt.read, entries, fq), "linear_qkv.weight_quantizer.0._amax", "W4A8")

    for count, error in ((2, ValueError), (3, KeyError)):
        _, fq, _ = grouped(fqt.INT4_BLOCK32, count=count)
        pair = {TE + key.removeprefix("linear_qkv."): value for key, value in entries.items()}
        assert_names(message_of(error, modelopt.read, pair, fq), f"{TE}weight_quantizer.", "in sequence", "W4A8")
    nested = {f"{TE}weight_quantizer.{i}.{k}._amax": torch.tensor(1.0) for i in range(3) for k in range(2)}
    assert_names(message_of(ValueError, modelopt.read, nested, fq), f"{TE}weight_quantizer.0.0._amax", "W4A8")


def test_layers_are_taken_apart_by_the_caller():
    """Megatron's homogeneous layers are the first axis of a key without a number; the message says what to do."""
    _, fq, state = grouped(fqt.FP8)
    key = "decoder.layers.mlp.experts.experts.linear_fc1.weight_quantizer._amax"
    (group,) = state.values()
    message = message_of(ValueError, modelopt.read, {key: group["amax"].expand(3, -1)}, fq)
    assert_names(message, key, "layers", f"{LAYER}experts.linear_fc1.weight_quantizer._amax")
    sliced = {f"{LAYER}experts.linear_fc1.weight_quantizer._amax": group["amax"]}
    assert equal(modelopt.read(sliced, fq), state)


def test_a_global_amax_that_the_format_has_not_is_another_format():
    """A file of static NVFP4 is not read as anything else, whatever its shapes."""
    _, static, state = grouped(fqt.NVFP4_STATIC)
    entries = modelopt.write(static, state)
    for format in (fqt.NVFP4, fqt.MXFP4):
        _, fq, _ = grouped(format)
        message = message_of(ValueError, modelopt.read, entries, fq, strict=False)
        assert_names(message, f"{TE}weight_quantizer.0._global_amax", format.name, f"{TE}weight*")
    only = {key: value for key, value in entries.items() if not key.endswith("_global_amax")}
    assert_names(message_of(KeyError, modelopt.read, only, static), f"{TE}weight*", "no entry for its global_amax")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0, -torch.inf])
def test_invalid_values_name_their_entry(value):
    """The entry is named, not only the leaf: in a list, in a tensor of all experts, and beside a valid rank's."""
    _, fq, _ = grouped(fqt.FP8)
    numbers = [torch.tensor(1.0)] * 4
    listed = {f"{TE}weight_quantizer.{i}._amax": n for i, n in enumerate(numbers)}
    key = f"{TE}weight_quantizer.2._amax"
    assert_names(message_of(ValueError, modelopt.read, listed | {key: torch.tensor(value)}, fq), key, value, "weight2")
    key, amax = f"{TE}weight_quantizer._amax", torch.ones(4)
    amax[3] = value
    assert_names(message_of(ValueError, modelopt.read, {key: amax}, fq), key, value, f"{TE}weight3")
    _, half, _ = grouped(fqt.FP8, count=2)
    assert modelopt.read({key: amax}, half, expert_offset=0, experts=4)
    message = message_of(ValueError, modelopt.read, {key: amax}, half, expert_offset=2, experts=4)
    assert_names(message, key, value, f"{TE}weight1")


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        (torch.tensor(1), "torch.int64"),
        (torch.tensor(1.0, dtype=torch.float64), "torch.float64"),
        (torch.tensor(1.0, device="meta"), "a meta tensor"),
        (1.0, "float"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_amax_is_refused(entry, what):
    """Bug: integers were read as if they were an amax; a meta tensor has no value."""
    _, fq, _ = grouped(fqt.FP8, count=1)
    key = f"{TE}weight_quantizer.0._amax"
    assert_names(message_of(ValueError, modelopt.read, {key: entry}, fq), key, what)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_exactly(stored):
    """A bf16 model's quantizers are bf16 (issue 2209); mixed dtypes keep each value."""
    _, fq, _ = grouped(fqt.FP8, count=2)
    fine = torch.tensor(1.0 + 2.0**-20)
    entries = {f"{TE}weight_quantizer.0._amax": torch.tensor(1.5, dtype=stored), f"{TE}weight_quantizer.1._amax": fine}
    (group,) = modelopt.read(entries, fq).values()
    assert same_bits(group["amax"], torch.stack([torch.tensor(1.5), fine]))


def test_modelopt_rounds_to_the_dtype_of_a_bf16_model():
    """What the docstring warns of: fp32 is written, and a bf16 model's quantizers keep bf16, silently."""
    model = sequential().to(torch.bfloat16)
    params = parameters(model)
    fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
    state = other_values(fq.calibrate(params))
    model = quantize(model, attributes(fqt.INT8))
    model.load_state_dict(model.state_dict() | modelopt.write(fq, state))
    (found,), (wanted,) = modelopt.read(model.state_dict(), fq).values(), state.values()
    assert same_bits(found["amax"], wanted["amax"].bfloat16().float())
    assert not torch.equal(found["amax"], wanted["amax"])


def test_an_uncalibrated_model_refuses_what_it_would_drop():
    """ModelOpt registers an amax when it calibrates. By the strict load of the docstring the loss is an error."""
    model = sequential()
    params = parameters(model)
    fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
    entries = modelopt.write(fq, fq.calibrate(params))
    rules = [{"quantizer_name": "*weight_quantizer", "cfg": attributes(fqt.INT8)}]
    model = mtq.quantize(model, {"quant_cfg": rules, "algorithm": None}, None)
    assert not any(key.endswith("_amax") for key in model.state_dict())
    with pytest.raises(RuntimeError, match="weight_quantizer._amax"):
        model.load_state_dict(model.state_dict() | entries)


FUSED = [
    ("q_proj", "k_proj", "v_proj"),
    ("experts.0.w1", "experts.1.w1", "experts.0.w3", "experts.1.w3"),
    ("mlp.gate_proj", "mlp.up_proj"),
]


@pytest.mark.parametrize("names", FUSED)
def test_what_modelopt_keeps_once_is_written_once(names):
    """Bug: q, k and v share one `_global_amax` too, and ModelOpt kept the last written. Refused, or the maximum."""
    model = Linears(dict(zip(names, experts(4, (32, 64)), strict=False)))
    params = parameters(model)
    fq = fqt.transform(fqt.select(params, {"*": fqt.NVFP4_STATIC}))
    state = fq.calibrate(params)
    message = message_of(ValueError, modelopt.write, fq, state)
    assert_names(message, "global_amax", "untied='maximum'", *(group.key for group in fq.spec.groups))

    state = {key: group | {"global_amax": group["global_amax"] * 1.25} for key, group in state.items()}
    largest = torch.stack([group["global_amax"] for group in state.values()]).amax(0)
    tied = {key: group | {"global_amax": largest} for key, group in state.items()}
    model = quantize(model, attributes(fqt.NVFP4_STATIC))
    model.load_state_dict(model.state_dict() | modelopt.write(fq, state, untied="maximum"))
    assert equal(modelopt.read(model.state_dict(), fq), tied)
    assert equal(modelopt.read(modelopt.write(fq, tied), fq), tied)


def stacked_model(family):
    """A tiny model with stacked experts, each of its own magnitude."""
    common = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    common |= {"num_key_value_heads": 2, "num_local_experts": 3, "intermediate_size": 96}
    torch.manual_seed(0)
    if family == "gpt-oss":
        config = transformers.GptOssConfig(**common, num_experts_per_tok=2, head_dim=16)
        model = transformers.GptOssForCausalLM(config)
    elif family == "Llama-4":
        config = transformers.Llama4TextConfig(**common, intermediate_size_mlp=96, num_experts_per_tok=1, head_dim=16)
        model = transformers.Llama4ForCausalLM(config)
    elif family == "Qwen3-MoE":
        common |= {"num_experts": 3, "moe_intermediate_size": 96, "head_dim": 16, "num_experts_per_tok": 2}
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**common))
    else:
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**common))
    model.config._experts_implementation = "eager"  # the only one whose linears ModelOpt sees
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() == 3:
                param.copy_(torch.stack(experts(3, param.shape[1:], seed=len(name))))
    return model.float()


def stacked(family, format):
    model = stacked_model(family)
    params = {name: weight for name, weight in parameters(model).items() if weight.dim() == 3}
    fq = fqt.transform(fqt.select(params, {"*": format}))
    return quantize(model, attributes(format), pattern="*experts*weight_quantizer*"), params, fq


@pytest.mark.parametrize("family", ["Qwen3-MoE", "Mixtral"])
@pytest.mark.parametrize("format", [f for f in CORE_FORMATS if f.block[1] != 128], ids=name_of)
def test_fused_experts_both_ways(family, format):
    """Law, transformers: a list of quantizers per parameter; every format's amax, and integers' weights, both ways."""
    model, params, fq = stacked(family, format)
    state = fq.calibrate(params)
    assert equal(modelopt.read(model.state_dict(), fq), state)
    state = other_values(state)
    model.load_state_dict(model.state_dict() | modelopt.write(fq, state))
    assert equal(modelopt.read(model.state_dict(), fq), state)
    if isinstance(format.element, IntElement):
        for name, weight in fq.fakequant(params, state).items():
            quantizers = model.get_submodule(f"{name}_weight_quantizers")
            for plain, quantizer, ours in zip(params[name], quantizers, weight, strict=True):
                assert same_bits(quantizer(plain), ours)


def test_a_mixtral_computes_with_what_it_loaded():
    """A model that ModelOpt converted gives the logits of `functional_call` with our weights, bit for bit."""
    model, params, fq = stacked("Mixtral", fqt.INT4_BLOCK32)
    plain, tokens = stacked_model("Mixtral").eval(), torch.arange(64).reshape(1, 64)
    state = optree.tree_map(lambda leaf: leaf * 0.75, fq.calibrate(params))
    model.eval().load_state_dict(model.state_dict() | modelopt.write(fq, state))
    with torch.no_grad():
        wanted = functional_call(plain, fq.fakequant(params, state), (tokens,)).logits
        assert torch.equal(model(tokens).logits, wanted)
        assert not torch.equal(plain(tokens).logits, wanted)


def test_a_saved_mixtral_has_other_names(tmp_path):
    """Bug: transformers stores Mixtral's `mlp` as `block_sparse_moe`; its file is read by the names of the model."""
    model, params, fq = stacked("Mixtral", fqt.INT8_PER_CHANNEL)
    model.save_pretrained(tmp_path)
    entries = load_file(tmp_path / "model.safetensors")
    assert any(".block_sparse_moe.experts.down_proj_weight_quantizers.2._amax" in key for key in entries)
    assert equal(modelopt.read(entries, fq), fq.calibrate(params))


@pytest.mark.parametrize("family", ["gpt-oss", "Llama-4"])
@pytest.mark.parametrize("name", ["INT4_BLOCK32", "FP8_BLOCK"])
def test_one_quantizer_of_blocks_for_all_experts(family, name):
    """Bug: gpt-oss and Llama 4 have one quantizer for all experts; entries by expert were dropped there."""
    model, params, fq = stacked(family, FORMATS[name])
    state = fq.calibrate(params)
    assert equal(modelopt.read(model.state_dict(), fq), state)
    state = other_values(state)
    model.load_state_dict(model.state_dict() | modelopt.write(fq, state))
    assert equal(modelopt.read(model.state_dict(), fq), state)
    if name == "INT4_BLOCK32":
        for key, ours in fq.fakequant(params, state).items():
            theirs = model.get_submodule(f"{key}_weight_quantizer")(params[key].transpose(1, 2).contiguous())
            assert same_bits(theirs.transpose(1, 2).contiguous(), ours)


@pytest.mark.parametrize("family", ["gpt-oss", "Llama-4"])
def test_one_number_for_all_experts_is_a_choice(family):
    """A tensor format's number is shared there: read only if expanded, written only if tied or by the maximum."""
    model, params, fq = stacked(family, fqt.INT8)
    key = fq.spec.groups[0].key
    message = message_of(ValueError, modelopt.read, model.state_dict(), fq)
    assert_names(message, f"{key}_weight_quantizer._amax", "for the 3 experts", "shared='expand'")
    state = fq.calibrate(params)
    largest = {k: group | {"amax": group["amax"].max().repeat(3)} for k, group in state.items()}
    assert equal(modelopt.read(model.state_dict(), fq, shared="expand"), largest)
    assert_names(message_of(ValueError, modelopt.write, fq, state), key, f"{key}[0]", "untied='maximum'")
    for entries in (modelopt.write(fq, state, untied="maximum"), modelopt.write(fq, largest)):
        model.load_state_dict(model.state_dict() | entries)
        assert equal(modelopt.read(model.state_dict(), fq, shared="expand"), largest)
    # By `axis=0` ModelOpt means the experts here: [E, 1, 1], which is one amax per expert, and no channels.
    model, _, _ = stacked(family, fqt.INT8_PER_CHANNEL)
    assert equal(modelopt.read(model.state_dict(), fq), state)
    _, _, channels = stacked(family, fqt.INT8_PER_CHANNEL)
    assert_names(message_of(ValueError, modelopt.read, model.state_dict(), channels), key, "(3, 1, 1)", "(3, 192, 1)")
    message = message_of(ValueError, modelopt.write, channels, channels.calibrate(params))
    assert_names(message, key, "INT8_PER_CHANNEL", "transposed")


def test_static_nvfp4_of_one_quantizer_shares_only_the_global_amax():
    """Blocks are each expert's own while the global amax is one: `shared` is asked for that field alone."""
    model, params, fq = stacked("gpt-oss", fqt.NVFP4_STATIC)
    key = fq.spec.groups[0].key
    message = message_of(ValueError, modelopt.read, model.state_dict(), fq)
    assert_names(message, f"{key}_weight_quantizer._global_amax", "found one global_amax")
    wanted = {
        k: group | {"global_amax": group["global_amax"].max().repeat(3)} for k, group in fq.calibrate(params).items()
    }
    assert equal(modelopt.read(model.state_dict(), fq, shared="expand"), wanted)
    assert equal(modelopt.read(modelopt.write(fq, wanted), fq, shared="expand"), wanted)


@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_round_trip_of_every_layout(format):
    """Law: read(write(state)) is the state, for every format there is, in each layout, with a dense weight beside."""
    dense = {"decoder.layers.1.self_attention.linear_qkv.weight": experts(1, SHAPE, seed=5)[0]}
    for layout in (TE, SEQUENTIAL, LIST, STACKED):
        params = held(layout, experts(3, SHAPE)) | dense
        fq = fqt.transform(fqt.select(params, {"*": format}))
        state = fq.calibrate(params)
        for written in ("modules", "grouped"):
            if written == "grouped" and layout != TE and not format.is_stateless:
                message = message_of(ValueError, modelopt.write, fq, state, layout=written)
                assert_names(message, fq.spec.groups[0].key, "Transformer Engine", "in layout 'grouped'")
                continue
            entries = modelopt.write(fq, state, layout=written)
            assert len({value.untyped_storage().data_ptr() for value in entries.values()}) == len(entries)
            assert all(value.dtype == torch.float32 and value.is_contiguous() for value in entries.values())
            assert equal(modelopt.read(entries, fq), state)


def test_nothing_is_changed_or_shared():
    """Law: entries and states are read, never written, and no result is a view of an argument."""
    for layout in ("modules", "grouped"):
        for shared in ("refuse", "expand"):
            _, fq, state = grouped(fqt.NVFP4_STATIC)
            entries = modelopt.write(fq, state, layout=layout)
            before = copy.deepcopy((state, entries))
            found = modelopt.read(entries, fq, shared=shared)
            for leaf in [*fqt.state.flatten(found).values(), *entries.values()]:
                leaf.zero_()
            assert equal(state, before[0])
            entries = before[1]
            assert equal(modelopt.read(entries, fq), state)
    _, fq, _ = grouped(fqt.FP8)
    one = {f"{TE}weight_quantizer._amax": torch.tensor(2.0)}
    (group,) = modelopt.read(one, fq, shared="expand").values()
    group["amax"][0] = 5.0
    assert group["amax"].tolist() == [5.0, 2.0, 2.0, 2.0]
    assert one[f"{TE}weight_quantizer._amax"].item() == 2.0


def test_options_and_slices_that_do_not_fit():
    """A choice that does not exist, and a rank beyond the last expert, are named with what they may be."""
    _, fq, state = grouped(fqt.FP8, count=2)
    entries = modelopt.write(fq, state)
    assert_names(message_of(ValueError, modelopt.write, fq, state, untied="max"), "untied", "'max'", "'maximum'")
    assert_names(message_of(ValueError, modelopt.write, fq, state, layout="hf"), "layout", "'hf'", "'grouped'")
    assert_names(message_of(ValueError, modelopt.read, entries, fq, shared="yes"), "shared", "'yes'")
    for offset, count in ((2, None), (3, 4), (-1, 4), (0, 1)):
        message = message_of(ValueError, modelopt.read, entries, fq, expert_offset=offset, experts=count)
        assert_names(message, f"{TE}weight*", f"expert_offset {offset}", "2 experts")
