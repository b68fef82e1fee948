"""`fq.input_second_moments`: by hand, by forward hooks, a fold over batches and ranks; what `Mse` makes of them."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import fq_transforms as fqt
from fq_transforms.methods import Max, Mse
from tests.cases import assert_names, message_of
from tests.models import TOP_K, language_model, tokens

BATCHES = [tokens(1, 1 + seed, seed=seed) for seed in range(8)]  # the first leaves experts without tokens
W1 = "layers.0.mlp.experts.*.w1.weight"


def prepared(format=fqt.INT4_BLOCK32, dtype=torch.float32):
    """A model of expert modules, whose transform has experts' and dense weights and no inputs."""
    model, _ = language_model()
    model.to(dtype)
    params = dict(model.named_parameters())
    return model, params, weighted(params, {"*.experts.*": format, "*.proj.weight": format})


def weighted(params, rules, **options):
    """A transform whose method takes the statistics."""
    return fqt.transform(fqt.select(params, rules, **options), method=Mse())


def hooked(model, batches):
    """What each linear layer gets, by the name of its weight: fp64 [tokens, in]."""
    found = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: found.setdefault(f"{name}.weight", []).append(args[0].flatten(0, -2))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def close(found, wanted):
    """Equal, but for the order of float64 additions, which fp32 may round to a neighbour."""
    assert found.keys() == wanted.keys()
    for key, means in found.items():
        assert means.dtype == torch.float32
        torch.testing.assert_close(means, wanted[key], rtol=2**-23, atol=0)


def test_a_linear_layer_by_hand():
    """Columns (1, 0, -2) and (3, 2, 0.5) over two batches, with leading dimensions, of which none is a token more."""
    model = nn.Linear(3, 2)
    params = dict(model.named_parameters())
    fq = weighted(params, {"weight": fqt.INT8})
    batches = [torch.tensor([[[1.0, 0.0, -2.0]], [[3.0, 2.0, 0.5]]]), torch.tensor([2.0, 1.0, 0.0])]
    found = fq.input_second_moments(params, batches, model=model)
    assert list(found) == ["weight"]
    assert torch.equal(found["weight"], torch.tensor([[14.0, 5.0, 4.25]]) / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_list_of_experts_by_hooks(dtype):
    """Each expert over its own tokens, dense weights over all; squares are exact, so fp32 is rounded once."""
    model, params, fq = prepared(dtype=dtype)
    seen = hooked(model, BATCHES)
    found = fq.input_second_moments(params, BATCHES, model=model)
    wanted = {g.key: torch.stack([seen[name].square().mean(0) for name in g.names]).float() for g in fq.spec.groups}
    close(found, wanted)
    assert {len(means) for means in found.values()} == {1, 4}
    (names,) = (g.names for g in fq.spec.groups if g.key == W1)
    assert sum(len(seen[name]) for name in names) == TOP_K * sum(batch.numel() for batch in BATCHES)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_fused_experts_by_a_loop(implementation):
    """Mixtral of transformers: stacked experts, in each of its implementations, are as a loop over tokens has them."""
    from tests.peers.test_transformers import CASES, build

    model, params = build(CASES[0])
    model.eval()
    batches = [tokens(2, 9, seed=seed) for seed in range(3)]
    chosen, entered = {}, {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, args, number=number: (
                (
                    entered.setdefault(number, []).append(args[0].flatten(0, -2)),
                    chosen.setdefault(number, []).append(args[1]),
                )[2:]
                or None
            )
        )
    fq = weighted(params, {"*.experts.*": fqt.NVFP4_STATIC})
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    wanted = {}
    for number, layer in enumerate(model.model.layers):
        x, experts = torch.cat(entered[number]), torch.cat(chosen[number])
        ups, downs = [], []
        for e in range(fq.spec.groups[0].experts):
            own = x[(experts == e).any(-1)]
            gate, up = (own @ layer.mlp.experts.gate_up_proj[e].T).chunk(2, dim=-1)
            ups.append(own.double().square().mean(0).float())
            downs.append((nn.functional.silu(gate) * up).detach().double().square().mean(0).float())
        key = f"model.layers.{number}.mlp.experts."
        wanted |= {f"{key}gate_up_proj": torch.stack(ups), f"{key}down_proj": torch.stack(downs)}
    model.config._experts_implementation = implementation
    found = fq.input_second_moments(params, [{"input_ids": batch} for batch in batches], model=model)
    assert found.keys() == wanted.keys()
    for key, means in found.items():  # products in another order give inputs that differ in fp32
        torch.testing.assert_close(means, wanted[key], rtol=1e-5, atol=0)


def test_it_is_a_fold():
    """However sequences are split into batches, in any order: the same mean, not a mean of means."""
    model, params, fq = prepared()
    one = tokens(6, 5, seed=9)
    options = {"model": model, "unseen": "ones"}
    whole = fq.input_second_moments(params, one, **options)
    for parts in ((1, 5), (4, 1, 1), (1,) * 6):
        batches = one.split(parts)
        for order in (batches, batches[::-1]):
            found = fq.input_second_moments(params, list(order), **options)
            for key, means in found.items():  # products of fewer rows are other sums in fp32
                torch.testing.assert_close(means, whole[key], rtol=1e-4, atol=1e-12)


def test_sums_are_of_float64(monkeypatch):
    """A million small squares beside a large one are not lost, as they would be in fp32; nor at the edge of a part."""
    model = nn.Linear(1, 1, bias=False)
    params = dict(model.named_parameters())
    x = torch.full((1 << 16, 1), 2.0**-12)
    x[0] = 2.0**4
    fq = weighted(params, {"*": fqt.INT8})
    wanted = torch.tensor([[(2.0**8 + 65535 * 2.0**-24) / 65536]])
    assert torch.equal(fq.input_second_moments(params, x, model=model)["weight"], wanted)
    monkeypatch.setattr(sys.modules["fq_transforms.activations.second_moments"], "MOST_ROWS", 7)
    assert torch.equal(
        fq.input_second_moments(params, x[:100], model=model)["weight"],
        x[:100].double().square().mean(0)[None].float(),
    )


def test_weighted_errors_are_never_larger_than_maxs():
    """Law: with these statistics, by expert; and in four bits they are smaller for most."""
    for format in (fqt.INT8, fqt.FP8_PER_CHANNEL, fqt.INT4_BLOCK32, fqt.NVFP4_STATIC):
        model, params, fq = prepared(format)
        means = fq.input_second_moments(params, BATCHES, model=model)
        errors = {}
        for method, given in ((Max(), None), (Mse(), means)):
            of_method = replace(fq, method=method)
            fakes = fq.fakequant(params, of_method.calibrate(params, statistics=given))
            for group in fq.spec.groups:
                for name, weight in zip(group.names, means[group.key], strict=True):
                    squares = (params[name] - fakes[name]).double().square()
                    errors.setdefault(name, []).append((squares * weight).sum().item())
        assert all(mse <= most for most, mse in errors.values()), format.name
        if format.block[1]:
            assert sum(mse < most for most, mse in errors.values()) > len(errors) / 2, format.name


def test_what_unseen_experts_get():
    """By default an error that names them, and what is chosen otherwise; those that have seen tokens keep theirs."""
    model, params, fq = prepared()
    seen = hooked(model, BATCHES[:1])
    (group,) = (g for g in fq.spec.groups if g.key == W1)
    unseen = [e for e, name in enumerate(group.names) if name not in seen]
    assert len(unseen) == 2
    message = message_of(ValueError, fq.input_second_moments, params, BATCHES[0], model=model)
    assert_names(
        message, "input_second_moments", W1, f"found no token for expert {unseen[0]}", "of 4", "unseen='mean-of-peers'"
    )
    peers = torch.stack([seen[name].square().mean(0) for name in group.names if name in seen])
    for choice, filled in (("mean-of-peers", peers.mean(0).float()), ("ones", torch.ones(32))):
        statistics = fq.input_second_moments(params, BATCHES[0], unseen=choice, model=model)
        found = statistics[W1]
        for e, name in enumerate(group.names):
            wanted = filled if e in unseen else seen[name].square().mean(0).float()
            torch.testing.assert_close(found[e], wanted, rtol=2**-22, atol=0)
        assert fq.calibrate(params, statistics=statistics)


def test_without_peers_only_ones_help():
    """No expert of a layer has a token, as on a rank whose experts nobody chose."""
    model, params, fq = prepared()
    model.forward = lambda x: [layer.proj(torch.ones(1, 32)) for layer in model.layers]
    for choice in ("raise", "mean-of-peers"):
        message = message_of(ValueError, fq.input_second_moments, params, BATCHES[0], model=model, unseen=choice)
        assert_names(message, W1, "found no token for expert 0-3 of 4", "choose by unseen='ones'")
    found = fq.input_second_moments(params, BATCHES[0], model=model, unseen="ones")
    assert torch.equal(found[W1], torch.ones(4, 32))


class Mapped(nn.Module):
    """Maps its layer over the rows of its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return torch.func.vmap(self.layer)(x)


@pytest.mark.parametrize("observing", ["input_second_moments", "calibrate"])
def test_inputs_that_the_model_maps_are_refused(observing):
    """Their values cannot be read: said so, with the layer and the batch, in place of PyTorch's own error."""
    model = Mapped()
    params = dict(model.named_parameters())
    fq = weighted(params, [fqt.Rule("*", fqt.FP8, fqt.FP8)])
    message = message_of(ValueError, getattr(fq, observing), params, [torch.ones(2, 4)], model=model)
    key = "'layer.weight.input'" if observing == "calibrate" else "'layer.weight'"
    assert_names(message, key, "vmap", f"call {observing} outside")


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.register_buffer("calls", torch.zeros(()))
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(4))

    def forward(self, x):
        self.calls.add_(1)
        return self.second(torch.sqrt(self.first(x)))


def test_nothing_stays_on_the_model():
    """Nor after an exception: no hook, mode or buffer, and no gradient."""
    model = Layers()
    before = {name: (t, t.clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    params = dict(model.named_parameters())
    fq = weighted(params, {"first.weight": fqt.INT8, "second.weight": fqt.INT8})
    found = fq.input_second_moments(params, torch.ones(2, 4), model=model)
    assert not any(means.requires_grad for means in found.values())
    message_of(ValueError, fq.input_second_moments, params, -torch.ones(2, 4), model=model)
    with pytest.raises(TypeError) as caught:
        fq.input_second_moments(params, [torch.ones(2, 4), ("text",)], model=model)
    assert "input_second_moments: in batch 1" in caught.value.__notes__
    for name, tensor in model.state_dict(keep_vars=True).items():
        was, value, version = before[name]
        assert tensor is was, name
        assert torch.equal(tensor, value), name
        assert tensor._version == version, name
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.is_grad_enabled()


def test_mistakes_are_named():
    model = Layers()
    params = dict(model.named_parameters())
    fq = weighted(params, {"first.weight": fqt.INT8, "second.weight": fqt.INT8})
    for batch, fragment in [
        (None, "batches: found None, wanted some for 'first.weight': input_second_moments(params, batches)"),
        ([], "batches: found no batch in list, wanted at least one"),
        (iter(()), "found no batch"),
        ([3], "batches: found int as one of them"),
    ]:
        assert_names(message_of(ValueError, fq.input_second_moments, params, batch, model=model), fragment)
    for bad, layer, number in ((torch.nan, "first", "nan"), (torch.inf, "first", "inf"), (-1.0, "second", "nan")):
        batches = [torch.ones(1, 4), torch.zeros(1, 4), torch.tensor([[1.0, 1.0, bad, 1.0]]), torch.full((1, 4), bad)]
        message = message_of(ValueError, fq.input_second_moments, params, batches, model=model)
        assert_names(
            message, f"input_second_moments: batch 2: the input of '{layer}.weight' is the first", number, "finite"
        )
    every = weighted(params, {"*.weight": fqt.INT8})
    message = message_of(ValueError, every.input_second_moments, params, torch.ones(1, 4), model=model)
    assert_names(message, "'idle.weight'", "never ran in 1 batches (1 of 3 groups did not)", "with a rule to None")
    message = message_of(ValueError, fq.input_second_moments, params, torch.ones(1, 4), model=None)
    assert_names(message, "model: found None", "'first.weight'")
    message = message_of(ValueError, fq.input_second_moments, params, torch.ones(1, 4), model=model, unseen="max")
    assert_names(message, "unseen: found 'max', wanted one of ('raise', 'mean-of-peers', 'ones')")
    message = message_of(ValueError, fq.input_second_moments, params, torch.ones(1, 4), model=model, group="world")
    assert_names(message, "group: found 'world', wanted None or a process group")
    del params["first.weight"]
    assert_names(message_of(KeyError, fq.input_second_moments, params, torch.ones(1, 4), model=model), "first.weight")


def test_inputs_of_the_spec_are_not_read():
    """The statistics are of the weights, whatever the spec says of inputs; one without weights has none."""
    model, params, fq = prepared()
    rules = [fqt.Rule("*", inputs=fqt.FP8), fqt.Rule("*.experts.*", fqt.INT4_BLOCK32, fqt.FP8, per_expert_inputs=True)]
    both = weighted(params, rules)
    found = both.input_second_moments(params, BATCHES, model=model)
    wanted = fq.input_second_moments(params, BATCHES, model=model)
    assert list(found) == [group.key for group in both.spec.groups]
    assert all(torch.equal(means, wanted[key]) for key, means in found.items())
    only = fqt.transform(fqt.Spec((), inputs=both.spec.inputs))
    assert only.input_second_moments(params, BATCHES, model=model) == {}


def _over_ranks(rank, size):
    torch.set_num_threads(1)
    model, params, fq = prepared()
    world = torch.distributed.group.WORLD
    found = fq.input_second_moments(params, BATCHES[rank::size], model=model, group=world)
    close(found, fq.input_second_moments(params, BATCHES, model=model))
    bad = BATCHES if rank else []
    return found, message_of(ValueError, fq.input_second_moments, params, bad, model=model, group=world)


@pytest.mark.dist
@pytest.mark.parametrize("size", [1, 4])
def test_batches_split_over_ranks_give_the_same_means(ranks, size):
    """Bit for bit the same on all ranks; and where one fails, the others say so and do not wait."""
    outcomes = ranks(_over_ranks, size=size)
    for found, _ in outcomes[1:]:
        assert all(torch.equal(means, outcomes[0][0][key]) for key, means in found.items())
    assert_names(outcomes[0][1], "batches: found no batch in list")
    for _, message in outcomes[1:]:
        assert_names(message, "rank 0 of the group failed", outcomes[0][1])


# What rank 1 alone is wrong in, and words of its error.
FAULTS = {
    "no parameters": (KeyError, "is not in params (0 entries)"),
    "a parameter of another shape": (
        ValueError,
        "parameter 'layers.0.proj.weight': found shape (3, 3), the spec wants",
    ),
    "a DTensor": (ValueError, "found the DTensor 'layers.0.proj.weight', wanted plain tensors"),
    "no model": (ValueError, "model: found None"),
    "another unseen": (ValueError, "unseen: found 'max', wanted one of ('raise', 'mean-of-peers', 'ones')"),
}


def _fails_on_rank_1(rank, size, fault):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.set_num_threads(1)
    model, params, fq = prepared()
    mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("data", "alone"))["alone"]
    options = {"model": model, "group": torch.distributed.group.WORLD}
    if rank:
        if fault == "no parameters":
            params = {}
        elif fault == "a parameter of another shape":
            params[fq.spec.groups[0].names[0]] = torch.ones(3, 3)
        elif fault == "a DTensor":
            params |= {name: distribute_tensor(params[name].detach(), mesh) for name in fq.spec.groups[0].names}
        else:
            options |= {"model": None} if fault == "no model" else {"unseen": "max"}
    return message_of(FAULTS[fault][0] if rank else ValueError, fq.input_second_moments, params, BATCHES[0], **options)


@pytest.mark.dist
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_is_wrong_on_one_rank_the_other_does_not_wait(ranks, fault):
    """Also where an error comes before any batch runs: that rank's own goes to the other."""
    other, own = ranks(_fails_on_rank_1, fault, size=2)
    assert_names(own, FAULTS[fault][1])
    assert_names(other, "rank 1 of the group failed", FAULTS[fault][1])


def _experts_and_dense_apart(rank, size):
    """Experts alike on both ranks and whole on each, dense layers over both."""
    torch.set_num_threads(1)
    model, params, both = prepared()
    experts, dense = (weighted(params, {rule: fqt.INT4_BLOCK32}) for rule in ("*.experts.*", "*.proj.weight"))
    whole = both.input_second_moments(params, BATCHES, model=model)
    of_experts = experts.input_second_moments(params, BATCHES, model=model)
    world = torch.distributed.group.WORLD
    of_dense = dense.input_second_moments(params, BATCHES[rank::size], model=model, group=world)
    close(of_experts | of_dense, {key: whole[key] for key in [*of_experts, *of_dense]})
    both.calibrate(params, statistics=of_experts | of_dense)


@pytest.mark.dist
def test_calls_for_experts_and_for_dense_layers_join(ranks):
    """Law: the statistics of two specs, each over its own ranks, are together those of one spec of both."""
    ranks(_experts_and_dense_apart, size=2)


@pytest.mark.gpu
def test_a_gpu_observes_what_a_cpu_does():
    """Of the first layer, whose input no product of experts has made."""
    found = []
    for device in ("cpu", "cuda"):
        model, _ = language_model()
        model.to(device)
        params = dict(model.named_parameters())
        fq = weighted(params, {W1: fqt.INT8})
        means = fq.input_second_moments(params, [batch.to(device) for batch in BATCHES], model=model)
        assert means[W1].device.type == device
        found.append(means[W1].cpu())
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)
