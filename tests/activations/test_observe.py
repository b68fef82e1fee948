"""Observing inputs in calibration: a fold over batches, ranks and experts; pure; what goes wrong is named."""

from collections import UserDict

import optree
import pytest
import torch
from torch import nn

import fq_transforms as fqt
from fq_transforms.activations.products import Use
from fq_transforms.activations.quantize import quantize_input
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from tests import cases
from tests.cases import assert_names, message_of, name_of, same_bits
from tests.models import TOP_K, language_model, tokens

INPUT_FORMATS = [fqt.FP8, fqt.INT8, fqt.FP8_PER_CHANNEL, fqt.INT8_PER_CHANNEL, fqt.NVFP4, fqt.MXFP8, fqt.MXFP4]


def prepared(per_expert=True, format=fqt.FP8):
    model, params = language_model()
    spec = fqt.select(params, [fqt.Rule("*.experts.*", fqt.INT8, format, per_expert_inputs=per_expert)])
    return model, params, fqt.transform(spec)


def same(a, b):
    return optree.tree_structure(a) == optree.tree_structure(b) and optree.tree_all(optree.tree_map(torch.equal, a, b))


BATCHES = [tokens(1, 1 + seed, seed=seed) for seed in range(8)]  # the first leaves experts without tokens


@pytest.mark.parametrize("per_expert", [False, True])
def test_the_state_is_what_the_layers_get(per_expert):
    """The amax and the tokens of each expert, by forward hooks on the linear layers."""
    model, params, fq = prepared(per_expert)
    state = fq.calibrate(params, BATCHES, model=model)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args, name=name: found.setdefault(f"{name}.weight", []).append(args[0])
            )
    with torch.no_grad():
        for batch in BATCHES:
            model(batch)
    for inputs in fq.spec.inputs:
        seen = [torch.cat(found[name]) for name in inputs.names]
        amax = torch.stack([x.abs().max() for x in seen])
        assert torch.equal(state[inputs.key]["amax"], amax if per_expert else amax.max().reshape(1))
        assert state[inputs.key]["tokens"].tolist() == [len(x) for x in seen]
        assert state[inputs.key]["tokens"].sum() == TOP_K * sum(batch.numel() for batch in BATCHES)


def test_calibration_is_a_fold():
    """Batches one by one, in any order and grouping, merged: the state of all, exactly; `init` changes nothing."""
    model, params, fq = prepared()
    whole = fq.calibrate(params, BATCHES, model=model)
    single = [fq.calibrate(params, batch, model=model) for batch in BATCHES]
    for order in (range(8), reversed(range(8)), (3, 1, 7, 0, 2, 6, 5, 4)):
        state = fq.init(params)
        for i in order:
            state = fqt.merge(state, single[i])
        assert same(state, whole)
    pairs = fqt.merge(*(fq.calibrate(params, half, model=model) for half in (BATCHES[4:], BATCHES[:4])))
    assert same(pairs, whole)
    amaxes = [state[inputs.key]["amax"] for state in single for inputs in fq.spec.inputs]
    assert any(bool((amax == -torch.inf).any()) for amax in amaxes)  # a real test of it


FORMS = {
    "tensor": lambda batch: batch,
    "tuple": lambda batch: (batch,),
    "dict": lambda batch: {"tokens": batch},
    "mapping": lambda batch: UserDict({"tokens": batch}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_is_a_tensor_arguments_or_keywords(form):
    """One or many, in a list, a generator, or passed by a function of the user's."""
    model, params, fq = prepared()

    def calibrated(batches, **options):
        return fq.calibrate(params, batches, model=model, **options)

    wanted = calibrated(BATCHES[0])
    assert same(calibrated(FORMS[form](BATCHES[0])), wanted)
    assert same(calibrated(FORMS[form](batch) for batch in BATCHES[:1]), wanted)
    both = calibrated([BATCHES[1], FORMS[form](BATCHES[0])])
    assert same(both, fqt.merge(wanted, calibrated(BATCHES[1])))
    assert same(calibrated(["0"], forward=lambda call, batch: call(BATCHES[int(batch)])), wanted)


class Counting(nn.Module):
    """Writes into a buffer and a batch norm as it runs."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.norm(self.layer(x))


def test_calibration_changes_nothing():
    """Buffers that a layer writes in training are copies; parameters, gradients' mode and batches stay."""
    model = Counting()
    before = {
        name: (tensor, tensor.clone(), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, [fqt.Rule("layer.weight", fqt.FP8, fqt.FP8)]))
    state = fq.calibrate(params, [torch.ones(2, 4), torch.ones(3, 4)], model=model)
    assert state["layer.weight.input"]["tokens"].tolist() == [5]
    assert not any(leaf.requires_grad for leaf in fqt.state.flatten(state).values())
    for name, tensor in model.state_dict(keep_vars=True).items():
        was, value, version = before[name]
        assert tensor is was, name
        assert torch.equal(tensor, value), name
        assert tensor._version == version, name
    assert torch.is_grad_enabled()


def test_no_data_is_needed_where_nothing_is_calibrated():
    """Formats by token and MX make their scales when the model runs."""
    for format in (fqt.FP8_PER_CHANNEL, fqt.MXFP8):
        model, params, fq = prepared(False, format)
        state = fq.calibrate(params)
        assert all(state[i.key] == {} for i in fq.spec.inputs)
        fq.apply(model, params, state, BATCHES[0])


@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", INPUT_FORMATS, ids=name_of)
def test_each_row_is_quantized_by_its_experts_scale(format, dtype, per_expert, monkeypatch):
    """Rows of many experts at once, as grouped_mm has them, are bit for bit those of each expert alone."""
    monkeypatch.setattr("fq_transforms.activations.quantize.MOST_ROWS", 3)
    name = "mlp.experts.up"
    rule = fqt.Rule("*", inputs=format, per_expert_inputs=per_expert)
    (inputs,) = fqt.select({name: torch.ones(3, 2, 64)}, [rule]).inputs
    x = torch.stack(cases.experts(7, (64,), dtype))
    experts = torch.tensor([0, 0, 1, 2, 2, 2, 3])  # the last row is no expert's
    amax = torch.tensor([0.3, 1.0, 5.0] if per_expert else [0.7])
    scales = {"amax": amax, "tokens": torch.ones(3, dtype=torch.float64)} if inputs.leaf_shapes else {}
    for row, expert in enumerate(experts.tolist()[:-1]):
        own = amax[expert if per_expert else 0]
        alone = x[row : row + 1]
        if format.block == (1, None):
            own = alone.abs().max().float().reshape(1, 1)
        wanted = fake_quantize_reference(
            alone,
            own if inputs.leaf_shapes or format.block == (1, None) else None,
            None,
            format=format,
            out_dtype=dtype,
        )
        found = quantize_input(Use(inputs, experts, True), x, scales, backward="pass_through")
        assert found.shape == x.shape
        assert same_bits(found[row : row + 1], wanted)
        single = quantize_input(Use(inputs, expert, True), alone[None], scales, backward="pass_through")
        assert same_bits(single, wanted[None])
    empty = quantize_input(Use(inputs, 0, True), x[:0], scales, backward="pass_through")
    assert empty.shape == (0, 64)


@pytest.mark.parametrize("per_expert", [False, True])
def test_clipping_stops_the_gradient_of_an_input(per_expert):
    """Beyond the amax of the row's expert, for one expert and for many."""
    name = "mlp.experts.up"
    rule = fqt.Rule("*", inputs=fqt.INT8, per_expert_inputs=per_expert)
    (inputs,) = fqt.select({name: torch.ones(2, 2, 4)}, [rule]).inputs
    x = torch.tensor([[0.5, -3.0, 1.0, 2.0], [0.5, -3.0, 1.0, 2.0]], requires_grad=True)
    amax = torch.tensor([1.0, 2.0] if per_expert else [2.0])
    scales = {"amax": amax, "tokens": torch.ones(2, dtype=torch.float64)}
    for backward in ("clip", "pass_through"):
        y = quantize_input(Use(inputs, torch.tensor([0, 1]), True), x, scales, backward=backward)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        first = [1.0, 0.0, 1.0, 0.0] if per_expert else [1.0, 0.0, 1.0, 1.0]
        assert gradient.tolist() == ([first, [1.0, 0.0, 1.0, 1.0]] if backward == "clip" else [[1.0] * 4] * 2)


def split_over_ranks(rank, size, order):
    model, params, fq = prepared()
    _, _, shared = prepared(False)
    torch.set_num_threads(1)
    own = [BATCHES[i] for i in order[rank::size]]
    world = torch.distributed.group.WORLD
    states = []
    for each in (fq, shared):
        state = each.sync(each.calibrate(params, own, model=model), world)
        assert same(state, each.calibrate(params, BATCHES, model=model))
        states.append(fqt.state.flatten(state))
    return states


@pytest.mark.dist
@pytest.mark.parametrize("size", [1, 2, 4])
def test_batches_split_over_ranks_give_the_same_state(ranks, size):
    """Exactly, in any order: amax and tokens of every expert, whether they share one or not."""
    found = [
        one
        for order in ([0, 1, 2, 3, 4, 5, 6, 7], [6, 2, 7, 0, 5, 1, 3, 4])
        for one in ranks(split_over_ranks, order, size=size)
    ]
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert same(a, b)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.second(torch.sqrt(self.first(x)))


def test_mistakes_are_named():
    model, params, fq = prepared()
    key = "layers.0.mlp.experts.*.w1.weight.input"
    for batches, fragment in [
        (None, f"batches: found None, wanted some for {key!r}"),
        ([], "batches: found no batch in list, wanted at least one"),
        (3, "batches: found int, wanted a tensor"),
        ("text", "batches: found str, wanted a tensor"),
        (["text"], "batches: found str as one of them, wanted a tensor, a tuple of arguments or a dict"),
    ]:
        assert_names(message_of(ValueError, fq.calibrate, params, batches, model=model), fragment)
    message = message_of(ValueError, fq.calibrate, params, BATCHES)
    assert_names(message, "model: found None, wanted the module that reads 'layers.0.mlp.experts.0.w1.weight'")
    model = Layers()
    params = dict(model.named_parameters())
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.weight.copy_(torch.eye(4))
            layer.bias.zero_()
    fq = fqt.transform(fqt.select(params, [fqt.Rule("*weight", inputs=fqt.FP8)]))
    message = message_of(ValueError, fq.calibrate, params, torch.ones(1, 4), model=model)
    assert_names(message, "'idle.weight.input'", "never ran in 1 batches (1 of 3 groups did not)")
    fq = fqt.transform(
        fqt.select(params, [fqt.Rule("*t.weight", inputs=fqt.FP8), fqt.Rule("sec*weight", inputs=fqt.FP8)])
    )
    fq.calibrate(params, [torch.ones(1, 4)] * 2, model=model)
    for value, batch in ((-1.0, 2), (torch.inf, 2)):
        bad = [torch.ones(1, 4), torch.zeros(1, 4), torch.full((1, 4), value), torch.full((1, 4), value)]
        layer = "first" if value == torch.inf else "second"
        message = message_of(ValueError, fq.calibrate, params, bad, model=model)
        assert_names(message, f"calibrate: batch {batch}: the input of '{layer}.weight' is the first", "wanted finite")
    message = message_of(ValueError, fq.calibrate, params, torch.ones(1, 4, dtype=torch.float64), model=model)
    assert_names(message, "inputs 'first.weight.input': found torch.float64, wanted bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", INPUT_FORMATS, ids=name_of)
def test_a_gpu_quantizes_rows_as_the_reference_does(format, dtype, per_expert):
    """The kernels on [tokens, in], on one row an expert, and by row: bit for bit what the CPU gives."""
    name = "mlp.experts.up"
    weights = {name: torch.ones(3, 2, 64)}
    (inputs,) = fqt.select(weights, [fqt.Rule("*", inputs=format, per_expert_inputs=per_expert)]).inputs
    x = torch.stack(cases.experts(70, (64,), dtype))
    amax = torch.tensor([0.3, 1.0, 5.0] if per_expert else [0.7])
    for experts in (torch.arange(70) % 4, 1):
        found = []
        for device in ("cpu", "cuda"):
            leaves = {"amax": amax.to(device), "tokens": torch.ones(3, device=device).double()}
            scales = leaves if inputs.leaf_shapes else {}
            use = Use(inputs, experts if isinstance(experts, int) else experts.to(device), True)
            found.append(quantize_input(use, x.to(device), scales, backward="pass_through").cpu())
        assert same_bits(*found)


@pytest.mark.gpu
def test_a_gpu_observes_what_a_cpu_does():
    """Of the first layer, whose input no product has made: amax and tokens of each expert."""
    states = []
    for device in ("cpu", "cuda"):
        model, params, fq = prepared()
        model.to(device)
        params = dict(model.named_parameters())
        state = fq.calibrate(params, [batch.to(device) for batch in BATCHES], model=model)
        fq.apply(model, params, state, BATCHES[0].to(device))
        states.append({key: entry for key, entry in state.items() if key.endswith("0.mlp.experts.*.w1.weight.input")})
    (cpu,), (gpu,) = (list(state.values()) for state in states)
    assert torch.equal(cpu["tokens"], gpu["tokens"].cpu())
    torch.testing.assert_close(cpu["amax"], gpu["amax"].cpu(), rtol=1e-4, atol=0)


class Blocks(nn.Module):
    """A block-diagonal matrix as DeepSeek-V4's `o_a_proj` is: [groups * out, in], each group with rows of its own."""

    def __init__(self, groups):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.randn(groups * 4, 8))

    def forward(self, x):
        weight = self.weight.view(self.groups, -1, 8).transpose(1, 2)
        return torch.bmm(x.reshape(-1, self.groups, 8).transpose(0, 1), weight)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("largest", range(4))
def test_a_matrix_used_as_several_sees_the_inputs_of_all(groups, largest):
    """Of a block-diagonal weight 1 was found where 100 was wanted: that of the first block. A token counts once."""
    model = Blocks(groups)
    batch = torch.ones(5, groups, 8)
    batch[3, largest % groups, 2] = -100.0
    params = dict(model.named_parameters())
    fq = fqt.transform(fqt.select(params, [fqt.Rule("*", fqt.INT8, fqt.FP8)]), method=fqt.methods.Mse())
    state = fq.calibrate(params, batch, model=model)
    assert state["weight.input"]["amax"].tolist() == [100.0]
    assert state["weight.input"]["tokens"].tolist() == [5.0]
    moments = fq.input_second_moments(params, batch, model=model)["weight"]
    assert torch.equal(moments[0], batch.reshape(-1, 8).square().double().mean(0).float())
    out = fq.apply(model, params, state, batch)
    x = fake_quantize_reference(
        batch.reshape(1, -1, 8), state["weight.input"]["amax"], None, format=fqt.FP8, out_dtype=torch.float32
    )
    wanted = torch.func.functional_call(model, fq.fakequant(params, state), (x.view(batch.shape),))
    assert torch.equal(out, wanted)
