"""`fq.input_hessians`: by hand, by forward hooks, a fold over batches and ranks; which groups share their tensors."""

import gc
import warnings

import pytest
import torch
from torch import nn

import fq_transforms as fqt
from fq_transforms.activations.hessians import _Seen
from tests.cases import assert_names, message_of
from tests.models import TOP_K, language_model, tokens

BATCHES = [tokens(1, 1 + seed, seed=seed) for seed in range(8)]  # the first leaves experts without tokens
W1, W2, W3 = (f"layers.0.mlp.experts.*.w{i}.weight" for i in (1, 2, 3))


def weighted(params, rules, **options):
    return fqt.transform(fqt.select(params, rules, **options))


def prepared(dtype=torch.float32):
    """A model of expert modules, whose transform has experts' and dense weights and no inputs."""
    model, _ = language_model()
    model.to(dtype)
    params = dict(model.named_parameters())
    return model, params, weighted(params, {"*.experts.*": fqt.INT4_BLOCK32, "*.proj.weight": fqt.INT4_BLOCK32})


def hooked(model, batches):
    """What each linear layer gets, by the name of its weight: fp64 [tokens, in]."""
    found = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: found.setdefault(f"{name}.weight", []).append(
                args[0].flatten(0, -2).clone()
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            model(*batch) if isinstance(batch, tuple) else model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def assert_means_of(leaves, e, x, inputs_error=0.0):
    """The mean of x x^T over fp64 [T, in], symmetric to the bit.

    Sums of T fp32 products in any order are within T * 2**-24 of the sum of magnitudes; one more is the mean's own
    rounding. `inputs_error` is how far the inputs themselves may be, relative to the largest of their channel.
    """
    hessian = leaves["hessian"][e]
    assert hessian.dtype == torch.float32
    assert leaves["tokens"].dtype == torch.float64
    assert leaves["tokens"][e] == len(x)
    largest = x.abs().amax(0)
    bound = (len(x) + 1) * 2.0**-24 * (x.abs().T @ x.abs()) / len(x) + inputs_error * torch.outer(largest, largest)
    assert ((hessian.double() - x.T @ x / len(x)).abs() <= bound).all()
    assert torch.equal(hessian, hessian.T)


def test_a_linear_layer_by_hand():
    """Rows (1, 0, -2), (3, 2, 0.5) and (2, 1, 0) over two batches, with leading dimensions."""
    model = nn.Linear(3, 2)
    params = dict(model.named_parameters())
    fq = weighted(params, {"weight": fqt.INT8})
    batches = [torch.tensor([[[1.0, 0.0, -2.0]], [[3.0, 2.0, 0.5]]]), torch.tensor([2.0, 1.0, 0.0])]
    found = fq.input_hessians(params, batches, model=model)
    assert list(found) == ["weight"]
    assert list(found["weight"]) == ["hessian", "tokens"]
    wanted = torch.tensor([[[14.0, 8.0, -0.5], [8.0, 5.0, 1.0], [-0.5, 1.0, 4.25]]])
    assert torch.equal(found["weight"]["hessian"], wanted / 3)
    assert torch.equal(found["weight"]["tokens"], torch.tensor([3.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_list_of_experts_by_hooks(dtype):
    """Each expert over its own tokens, dense weights over all; tokens are counted."""
    model, params, fq = prepared(dtype)
    seen = hooked(model, BATCHES)
    found = fq.input_hessians(params, BATCHES, model=model)
    assert list(found) == [group.key for group in fq.spec.groups]
    for group in fq.spec.groups:
        for e, name in enumerate(group.names):
            assert_means_of(found[group.key], e, seen[name])
    assert found[W1]["tokens"].sum() == TOP_K * sum(batch.numel() for batch in BATCHES)
    assert not any(leaf.requires_grad for leaves in found.values() for leaf in leaves.values())


def test_its_diagonal_is_input_second_moments():
    """Law: to fp32 sums; with experts without tokens, too, by each policy."""
    model, params, fq = prepared()
    for batches, unseen in ((BATCHES, "raise"), (BATCHES[0], "ones"), (BATCHES[0], "mean-of-peers")):
        found = fq.input_hessians(params, batches, model=model, unseen=unseen)
        wanted = fq.input_second_moments(params, batches, model=model, unseen=unseen)
        assert found.keys() == wanted.keys()
        most = sum(batch.numel() for batch in BATCHES)
        for key, leaves in found.items():
            diagonal = leaves["hessian"].diagonal(dim1=1, dim2=2)
            torch.testing.assert_close(diagonal, wanted[key], rtol=(most + 8) * 2.0**-24, atol=0)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_fused_experts_by_a_loop(implementation):
    """Mixtral of transformers: stacked experts, in each of its implementations, are as a loop over tokens has them."""
    from tests.peers.test_transformers import CASES, build

    model, params = build(CASES[0])
    model.eval()
    batches = [tokens(2, 9, seed=seed) for seed in range(3)]
    chosen, entered = {}, {}

    def keep(module, args, number):
        entered.setdefault(number, []).append(args[0].flatten(0, -2).clone())
        chosen.setdefault(number, []).append(args[1])

    model.config._experts_implementation = "eager"
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda module, args, number=number: keep(module, args, number))
        for number, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    for handle in handles:
        handle.remove()
    fq = weighted(params, {"*.experts.*": fqt.NVFP4_STATIC})
    model.config._experts_implementation = implementation
    found = fq.input_hessians(params, [{"input_ids": batch} for batch in batches], model=model)
    for number, layer in enumerate(model.model.layers):
        x, experts = torch.cat(entered[number]), torch.cat(chosen[number])
        for e in range(fq.spec.groups[0].experts):
            own = x[(experts == e).any(-1)]
            gate, up = (own @ layer.mlp.experts.gate_up_proj[e].T).chunk(2, dim=-1)
            down = (nn.functional.silu(gate) * up).detach()
            for role, inputs in (("gate_up_proj", own), ("down_proj", down)):
                leaves = found[f"model.layers.{number}.mlp.experts.{role}"]
                # Products in another order give inputs that differ in fp32.
                assert_means_of(leaves, e, inputs.double(), inputs_error=1e-5)


class TimesZero(nn.Module):
    """Experts as in Llama 4: each gets all tokens, times 0 where they are not routed to it."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        self.experts.w = nn.Parameter(torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x, expert):
        is_own = nn.functional.one_hot(expert, 3).T[..., None].to(x)
        return torch.bmm(x.expand(3, *x.shape) * is_own, self.experts.w.mT).sum(0)


def test_tokens_times_zero_are_not_the_experts():
    """Nor rows of zeros in buffers of a fixed size: neither counts, nor means, nor who has seen none, in any statistic.

    A bug: all experts had all tokens, so that one without any had an amax of 0, and `unseen` was never asked.
    """
    model, x = TimesZero(), torch.randn(10, 8, generator=torch.Generator().manual_seed(1))
    params, transposed = dict(model.named_parameters()), {"experts.w": False}
    batches = [(x[:6], torch.tensor([0, 0, 2, 0, 0, 2])), (x[6:], torch.full((4,), 2))]
    own = [x[[0, 1, 3, 4]].double(), x[:0].double(), x[[2, 5, 6, 7, 8, 9]].double()]
    fq = weighted(params, {"*": fqt.INT8}, transposed=transposed)
    leaves = fq.input_hessians(params, batches, model=model, unseen="ones")["experts.w"]
    assert leaves["tokens"].tolist() == [4, 0, 6]
    for e in (0, 2):
        assert_means_of(leaves, e, own[e])
    squares = fq.input_second_moments(params, batches, model=model, unseen="ones")["experts.w"]
    torch.testing.assert_close(squares[[0, 2]], torch.stack([own[e].square().mean(0) for e in (0, 2)]).float())
    for statistics in (fq.input_hessians, fq.input_second_moments):
        assert_names(message_of(ValueError, statistics, params, batches, model=model), "found no token for expert 1")
    spec = fqt.select(params, [fqt.Rule("*", fqt.INT8, fqt.FP8, per_expert_inputs=True)], transposed=transposed)
    inputs = fqt.transform(spec).calibrate(params, batches, model=model)["experts.w.input"]
    assert inputs["tokens"].tolist() == [4, 0, 6]
    assert inputs["amax"].tolist() == [own[0].abs().max(), -torch.inf, own[2].abs().max()]


class Packed(nn.Module):
    """One weight as two, each with an input of its own or both with the same."""

    def __init__(self):
        super().__init__()
        self.kv = nn.Linear(8, 6, bias=False)

    def forward(self, k, v):
        weight = self.kv.weight
        return nn.functional.linear(k, weight[:3]).sum() + nn.functional.linear(v, weight[3:]).sum()


def test_all_parts_of_a_weight_are_seen():
    """On the same tokens they are seen once, on others each; a bug: the inputs of all but the first were dropped."""
    model, x = Packed(), torch.randn(15, 8, generator=torch.Generator().manual_seed(1))
    params = dict(model.named_parameters())
    fq = weighted(params, {"*": fqt.INT8})
    for batch, own in (((x[:6], x[6:]), x), ((x, x), x), ((x[:6], x[:6].clone()), x[:6])):
        assert_means_of(fq.input_hessians(params, [batch], model=model)["kv.weight"], 0, own.double())
        found = fq.input_second_moments(params, [batch], model=model)["kv.weight"]
        torch.testing.assert_close(found[0], own.double().square().mean(0).float())


def tensors_of(found, *keys):
    """How many Hessians, and counts of tokens, these groups have between them, by memory."""
    counts = [len({found[key][name].data_ptr() for key in keys}) for name in ("hessian", "tokens")]
    assert counts[0] == counts[1]
    return counts[0]


def test_groups_with_the_same_inputs_share_one_tensor():
    """Gate and up of a layer do, in a list of modules too; down and other layers do not."""
    model, params, fq = prepared()
    found = fq.input_hessians(params, BATCHES, model=model)
    assert tensors_of(found, W1, W3) == 1
    assert tensors_of(found, *found) == 2 * 3
    assert tensors_of(found, W1, W1.replace("layers.0", "layers.1")) == 2
    alone = fq.input_hessians(params, BATCHES[:1], model=model, unseen="ones")
    assert tensors_of(alone, W1, W3) == 1
    assert tensors_of(alone, W1, W2) == 2


class Pair(nn.Module):
    """Gate and up on an input that the batch says: the same one, or up's on another, or changed in place between."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Linear(4, 3, bias=False) for _ in range(2))

    def forward(self, x, way="same"):
        x = x * 1.0
        if way == "up only":
            return self.up(x)
        gate = self.gate(x)
        if way == "in place":
            x.mul_(2.0)
        elif way == "through a view":
            x.view(-1)[::2] += 1.0
        elif way == "behind its back":
            x.detach().numpy()[...] *= 3.0
        elif way == "other":
            x = x * 2.0
        elif way == "other in its place":  # where the memory of the first may be, free again
            shape = x.shape
            del x
            x = torch.full(shape, 7.0)
        if way == "gate only":
            return gate
        up = self.up(x)
        if way == "afterwards":
            x.zero_()
        return gate + up


class Inferring(Pair):
    @torch.inference_mode()
    def forward(self, x, way="same"):
        return super().forward(x, way)


WAYS = [
    "same",
    "other",
    "in place",
    "through a view",
    "behind its back",
    "other in its place",
    "afterwards",
    "gate only",
    "up only",
]


@pytest.mark.parametrize("kind", [Pair, Inferring])
@pytest.mark.parametrize("first", ["same", "other", "gate only"])
@pytest.mark.parametrize("way", WAYS)
def test_sharing_is_undone_where_inputs_differ(kind, first, way):
    """Law: each group has the sums of its own inputs, whenever they part; alike they share, in inference mode too.

    Bug: an input that the model wrote to after gate had seen it was counted for gate as it was then.
    """
    model = kind()
    params = dict(model.named_parameters())
    fq = weighted(params, {"*": fqt.INT8})
    ways = [first, way, "same"]
    batches = [(torch.randn(5, 4, generator=torch.Generator().manual_seed(i)), of) for i, of in enumerate(ways)]
    seen = hooked(model, batches)
    found = fq.input_hessians(params, batches, model=model)
    for name, x in seen.items():
        assert_means_of(found[name], 0, x)
    is_same = all(of_batch in ("same", "afterwards") for of_batch in ways)
    assert tensors_of(found, "gate.weight", "up.weight") == (1 if is_same else 2)


def test_groups_that_are_alike_by_chance_go_apart():
    """Two dense layers of one size, of which a batch gives the other nothing: neither has the other's sums."""
    model = Pair()
    params = dict(model.named_parameters())
    fq = weighted(params, {"*": fqt.INT8})
    x = torch.randn(6, 4)
    for first, then in (("gate only", "up only"), ("up only", "gate only")):
        found = fq.input_hessians(params, [(x[:2], first), (x[2:], then)], model=model)
        of_first, of_then = (f"{way.split()[0]}.weight" for way in (first, then))
        assert_means_of(found[of_first], 0, x[:2].double())
        assert_means_of(found[of_then], 0, x[2:].double())
    found = fq.input_hessians(params, [(x[:2], "same"), (x[2:4], "gate only"), (x[2:4], "up only")], model=model)
    for leaves in found.values():
        assert_means_of(leaves, 0, x[:4].double())


class Deep(nn.Module):
    """As MLA: two layers on one input, with another between; many times."""

    def __init__(self, layers):
        super().__init__()
        sizes = {"q_a": (4, 3), "q_b": (3, 4), "kv_a": (4, 4)}
        self.layers = nn.ModuleList(
            nn.ModuleDict({role: nn.Linear(*size, bias=False) for role, size in sizes.items()}) for _ in range(layers)
        )
        self.held = []

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["q_b"](layer["q_a"](x)) + layer["kv_a"](x)
        self.held.append(sum(type(one) is _Seen for one in gc.get_objects()))
        return x


def test_inputs_of_two_layers_are_held_at_most():
    """Bug: those of the whole model were, until the batch was at its end. Who sees one again meanwhile still shares.

    Bug: so did the first layer's alone, of groups whose first input came in one call.
    """
    model = Deep(4)
    params = dict(model.named_parameters())
    fq = weighted(params, {"*": fqt.INT8})
    x = torch.randn(3, 5, 4)
    seen = hooked(model, x)
    gc.collect()
    model.held.clear()
    found = fq.input_hessians(params, list(x), model=model)
    assert max(model.held) == 2
    for name, own in seen.items():
        assert_means_of(found[name], 0, own)
    for i in range(4):
        assert tensors_of(found, f"layers.{i}.q_a.weight", f"layers.{i}.kv_a.weight") == 1
    assert tensors_of(found, *found) == 8


def test_it_is_a_fold():
    """However sequences are split into batches, in any order: the same mean, not a mean of means."""
    model, params, fq = prepared()
    one = tokens(6, 5, seed=9)
    options = {"model": model, "unseen": "ones"}
    whole = fq.input_hessians(params, one, **options)
    for parts in ((1, 5), (4, 1, 1), (1,) * 6):
        batches = one.split(parts)
        for order in (batches, batches[::-1]):
            found = fq.input_hessians(params, list(order), **options)
            for key, leaves in found.items():
                assert torch.equal(leaves["tokens"], whole[key]["tokens"])
                size = whole[key]["hessian"].diagonal(dim1=1, dim2=2).amax().item()
                # Products of fewer rows are other sums in fp32, of what is multiplied here and in the layers before.
                torch.testing.assert_close(leaves["hessian"], whole[key]["hessian"], rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sums_are_fp32_whatever_the_default_is(dtype):
    """Bug: sums took PyTorch's default dtype, which those who load models set."""
    model = nn.Linear(3, 2)
    params = dict(model.named_parameters())
    fq = weighted(params, {"weight": fqt.INT8})
    x = torch.randn(5, 3)
    torch.set_default_dtype(dtype)
    try:
        found = fq.input_hessians(params, x, model=model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_means_of(found["weight"], 0, x.double())


def test_under_autocast():
    """The model's own mode, within `forward` or around the call: sums stay fp32, and so does the mean of peers."""
    model, params, fq = prepared()
    model.forward = lambda x: [
        expert.w1(layer.proj(model.embed(x))) for layer in model.layers for expert in layer.mlp.experts[:2]
    ]
    fq = weighted(params, {W1: fqt.INT8, "layers.0.proj.weight": fqt.INT8})

    def forward(call, batch):
        with torch.autocast("cpu", torch.bfloat16):
            call(batch)

    options = {"model": model, "unseen": "mean-of-peers"}
    within = fq.input_hessians(params, BATCHES, forward=forward, **options)
    with torch.autocast("cpu", torch.bfloat16):
        seen = hooked(model, BATCHES)
        around = fq.input_hessians(params, BATCHES, **options)
    for found in (within, around):
        assert_means_of(found["layers.0.proj.weight"], 0, seen["layers.0.proj.weight"])
        assert_means_of(found[W1], 1, seen["layers.0.mlp.experts.1.w1.weight"])
        assert torch.equal(found[W1]["hessian"][2:], found[W1]["hessian"][:2])  # experts 0 and 1 see the same


def test_what_unseen_experts_get():
    """By default an error that names them, and what is chosen otherwise; those that have seen tokens keep theirs."""
    model, params, fq = prepared()
    seen = hooked(model, BATCHES[:1])
    (group,) = (g for g in fq.spec.groups if g.key == W1)
    unseen = [e for e, name in enumerate(group.names) if name not in seen]
    assert len(unseen) == 2
    message = message_of(ValueError, fq.input_hessians, params, BATCHES[0], model=model)
    assert_names(message, "input_hessians", W1, f"found no token for expert {unseen[0]}", "unseen='mean-of-peers'")
    products = [seen[name].T @ seen[name] / len(seen[name]) for name in group.names if name in seen]
    for choice, filled in (("mean-of-peers", sum(products) / len(products)), ("ones", torch.eye(32).double())):
        found = fq.input_hessians(params, BATCHES[0], unseen=choice, model=model)
        for e, name in enumerate(group.names):
            if e in unseen:
                assert found[W1]["tokens"][e] == 0
                atol = 2.0**-22 * filled.abs().max().item()
                torch.testing.assert_close(found[W1]["hessian"][e].double(), filled, rtol=0, atol=atol)
            else:
                assert_means_of(found[W1], e, seen[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of experts that are as well rounded to the nearest
            assert fqt.gptq(fq, params, fq.calibrate(params), found)


def test_without_peers_only_ones_help():
    """No expert of a layer has a token, as on a rank whose experts nobody chose."""
    model, params, fq = prepared()
    model.forward = lambda x: [layer.proj(torch.ones(1, 32)) for layer in model.layers]
    for choice in ("raise", "mean-of-peers"):
        message = message_of(ValueError, fq.input_hessians, params, BATCHES[0], model=model, unseen=choice)
        assert_names(message, W1, "found no token for expert 0-3 of 4", "choose by unseen='ones'")
    found = fq.input_hessians(params, BATCHES[0], model=model, unseen="ones")
    assert torch.equal(found[W1]["hessian"], torch.eye(32).expand(4, -1, -1))
    assert torch.equal(found[W1]["tokens"], torch.zeros(4, dtype=torch.float64))


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


def test_mistakes_are_named_and_nothing_stays_on_the_model():
    """NaN by batch and layer; and neither hooks, modes nor buffers after an exception."""
    model = Layers()
    before = {name: (t, t.clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    params = dict(model.named_parameters())
    fq = weighted(params, {"first.weight": fqt.INT8, "second.weight": fqt.INT8})
    for batch, fragment in [
        (None, "batches: found None, wanted some for 'first.weight': input_hessians(params, batches)"),
        ([], "batches: found no batch in list, wanted at least one"),
        ([3], "batches: found int as one of them"),
    ]:
        assert_names(message_of(ValueError, fq.input_hessians, params, batch, model=model), fragment)
    for bad, layer, number in ((torch.nan, "first", "nan"), (torch.inf, "first", "inf"), (-1.0, "second", "nan")):
        batches = [torch.ones(1, 4), torch.zeros(1, 4), torch.tensor([[1.0, 1.0, bad, 1.0]]), torch.full((1, 4), bad)]
        message = message_of(ValueError, fq.input_hessians, params, batches, model=model)
        assert_names(message, f"input_hessians: batch 2: the input of '{layer}.weight' is the first", number, "finite")
    every = weighted(params, {"*.weight": fqt.INT8})
    message = message_of(ValueError, every.input_hessians, params, torch.ones(1, 4), model=model)
    assert_names(message, "'idle.weight'", "never ran in 1 batches (1 of 3 groups did not)", "with a rule to None")
    for options, fragments in [
        ({"model": None}, ["model: found None", "'first.weight'"]),
        ({"unseen": "max"}, ["unseen: found 'max', wanted one of ('raise', 'mean-of-peers', 'ones')"]),
        ({"group": "world"}, ["group: found 'world', wanted None or a process group"]),
    ]:
        message = message_of(ValueError, fq.input_hessians, params, torch.ones(1, 4), **{"model": model, **options})
        assert_names(message, *fragments)
    for name, tensor in model.state_dict(keep_vars=True).items():
        was, value, version = before[name]
        assert tensor is was, name
        assert torch.equal(tensor, value), name
        assert tensor._version == version, name
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()
    del params["first.weight"]
    assert_names(message_of(KeyError, fq.input_hessians, params, torch.ones(1, 4), model=model), "first.weight")


def test_inputs_of_the_spec_are_not_read():
    """The statistics are of the weights, whatever the spec says of inputs; one without weights has none."""
    model, params, fq = prepared()
    rules = [fqt.Rule("*", inputs=fqt.FP8), fqt.Rule("*.experts.*", fqt.INT4_BLOCK32, fqt.FP8, per_expert_inputs=True)]
    both = weighted(params, rules)
    found = both.input_hessians(params, BATCHES, model=model)
    wanted = fq.input_hessians(params, BATCHES, model=model)
    assert list(found) == [group.key for group in both.spec.groups]
    assert all(torch.equal(leaves["hessian"], wanted[key]["hessian"]) for key, leaves in found.items())
    only = fqt.transform(fqt.Spec((), inputs=both.spec.inputs))
    assert only.input_hessians(params, BATCHES, model=model) == {}


def _over_ranks(rank, size):
    torch.set_num_threads(1)
    model, params, fq = prepared()
    world = torch.distributed.group.WORLD
    found = fq.input_hessians(params, BATCHES[rank::size], model=model, group=world)
    seen = hooked(model, BATCHES)
    for group in fq.spec.groups:
        for e, name in enumerate(group.names):
            assert_means_of(found[group.key], e, seen[name])
    assert tensors_of(found, W1, W3) == 1
    assert tensors_of(found, *found) == 2 * 3
    # On rank 1 gate and up see other inputs, so on no rank do they share.
    pair = Pair()
    of_pair = dict(pair.named_parameters())
    both = weighted(of_pair, {"*": fqt.INT8})
    ways = ("same", "other")[rank]
    x = torch.arange(8.0).view(2, 4)
    apart = both.input_hessians(of_pair, [(x, ways)], model=pair, group=world)
    assert tensors_of(apart, *apart) == 2
    assert_means_of(apart["gate.weight"], 0, torch.cat([x, x]).double())
    assert_means_of(apart["up.weight"], 0, torch.cat([x, 2 * x]).double())
    bad = BATCHES if rank else []
    return found, message_of(ValueError, fq.input_hessians, params, bad, model=model, group=world)


@pytest.mark.dist
def test_batches_split_over_ranks_give_the_same_means(ranks):
    """Bit for bit the same on all ranks, shared where all share; where one fails, the others say so and do not wait."""
    one, other = ranks(_over_ranks, size=2)
    for key, leaves in one[0].items():
        assert all(torch.equal(leaf, other[0][key][name]) for name, leaf in leaves.items())
    assert_names(one[1], "batches: found no batch in list")
    assert_names(other[1], "rank 0 of the group failed", one[1])


@pytest.mark.gpu
def test_a_gpu_observes_what_a_cpu_does():
    """Of the first layer, whose input no product of experts has made."""
    found = []
    for device in ("cpu", "cuda"):
        model, _ = language_model()
        model.to(device)
        params = dict(model.named_parameters())
        fq = weighted(params, {W1: fqt.INT8, W3: fqt.INT8})
        leaves = fq.input_hessians(params, [batch.to(device) for batch in BATCHES], model=model)
        assert leaves[W1]["hessian"].device.type == device
        assert tensors_of(leaves, W1, W3) == 1
        found.append(leaves[W1]["hessian"].cpu())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5 * found[0].abs().max().item())
