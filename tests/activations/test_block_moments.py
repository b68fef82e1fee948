"""`fq.input_second_moments(..., blocks=True)`: x x^T of each block of inputs, by hand, by hooks, a fold, over ranks."""

import sys

import pytest
import torch
from torch import nn

import fq_transforms as fqt
from fq_transforms.methods import Max
from tests.activations.test_second_moments import BATCHES, W1, close, hooked, prepared, weighted
from tests.cases import assert_names, message_of
from tests.models import tokens


def blocks_of(x, columns):
    """Mean of x_b x_b^T for each block b of columns: fp64 [in / columns, columns, columns]."""
    x = x.double().unflatten(-1, (-1, columns))
    return torch.einsum("tbi,tbj->bij", x, x) / len(x)


def close_forms(found, wanted, part=2**-23):
    """Equal but for a part of what the diagonal lets a number be: float64 sums in another order, rounded once."""
    for key, moments in wanted.items():
        assert found[key].dtype == torch.float32
        assert torch.equal(found[key], found[key].mT), key
        roots = moments.diagonal(dim1=-2, dim2=-1).sqrt()
        slack = part * roots[..., :, None] * roots[..., None, :]
        assert ((found[key] - moments).abs() <= slack).all(), key


def test_a_linear_layer_by_hand():
    """Two blocks of two columns over two batches, with leading dimensions: sums of products over all three tokens."""
    model = nn.Linear(4, 2, bias=False)
    params = dict(model.named_parameters())
    format = fqt.formats.Format("INT4_BLOCK2", fqt.INT4_BLOCK32.element, (1, 2))
    fq = weighted(params, {"weight": format})
    batches = [torch.tensor([[[1.0, 0.0, -2.0, 1.0]], [[3.0, 2.0, 0.5, 0.0]]]), torch.tensor([2.0, 1.0, 0.0, 4.0])]
    found = fq.input_second_moments(params, batches, model=model, blocks=True)
    assert list(found) == ["weight"]
    wanted = torch.tensor([[[[14.0, 8.0], [8.0, 5.0]], [[4.25, -2.0], [-2.0, 17.0]]]]) / 3
    assert torch.equal(found["weight"], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_list_of_experts_by_hooks(dtype):
    """Each expert over its own tokens, dense weights over all; the diagonal is the other form's, exactly."""
    model, params, fq = prepared(dtype=dtype)
    seen = hooked(model, BATCHES)
    found = fq.input_second_moments(params, BATCHES, model=model, blocks=True)
    wanted = {g.key: torch.stack([blocks_of(seen[n], 32) for n in g.names]).float() for g in fq.spec.groups}
    assert found.keys() == wanted.keys()
    close_forms(found, wanted)
    for key, means in fq.input_second_moments(params, BATCHES, model=model).items():
        assert torch.equal(found[key].diagonal(dim1=-2, dim2=-1).flatten(1), means)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_fused_experts(implementation):
    """Mixtral of transformers: rows of all experts in one tensor go to the expert that they are of.

    Rows of no expert are nobody's; the diagonal is the other form's, exactly.
    """
    from tests.peers.test_transformers import CASES, build

    model, params = build(CASES[0])
    model.eval()
    model.config._experts_implementation = implementation
    fq = weighted(params, {"*.experts.*": fqt.NVFP4_STATIC})
    batches = [{"input_ids": tokens(2, 9, seed=seed)} for seed in range(3)]
    found = fq.input_second_moments(params, batches, model=model, blocks=True)
    means = fq.input_second_moments(params, batches, model=model)
    entered, chosen = {}, {}
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
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for number, parts in entered.items():
        x, experts = torch.cat(parts), torch.cat(chosen[number])
        key = f"model.layers.{number}.mlp.experts.gate_up_proj"
        wanted = torch.stack([blocks_of(x[(experts == e).any(-1)], 16) for e in range(len(found[key]))])
        close_forms(found, {key: wanted.float()})
    for key, diagonal in means.items():
        assert torch.equal(found[key].diagonal(dim1=-2, dim2=-1).flatten(1), diagonal)


def test_formats_without_blocks_along_in_have_the_diagonal():
    """Each group has what its format's sweep takes, and `calibrate` takes them all together."""
    model, params, _ = prepared()
    fq = weighted(params, {"*.w1.weight": fqt.INT4_BLOCK32, "*.w2.weight": fqt.INT8, "*.proj.weight": fqt.FP8_BLOCK})
    found = fq.input_second_moments(params, BATCHES, model=model, blocks=True)
    diagonal = fq.input_second_moments(params, BATCHES, model=model)
    for group in fq.spec.groups:
        is_block = group.format == fqt.INT4_BLOCK32
        assert found[group.key].dim() == (4 if is_block else 2), group.key
        assert is_block or torch.equal(found[group.key], diagonal[group.key])
    assert {moments.dim() for moments in found.values()} == {2, 4}
    fq.calibrate(params, statistics=found)


def test_it_is_a_fold(monkeypatch):
    """However sequences are split into batches, in any order, and a batch into parts: the same mean."""
    model, params, fq = prepared()
    one = tokens(6, 5, seed=9)
    options = {"model": model, "unseen": "ones", "blocks": True}
    whole = fq.input_second_moments(params, one, **options)
    for parts in ((1, 5), (4, 1, 1)):
        batches = list(one.split(parts))
        for order in (batches, batches[::-1]):
            found = fq.input_second_moments(params, order, **options)
            close_forms(found, whole, 1e-4)  # products of fewer rows are other sums in fp32
    monkeypatch.setattr(sys.modules["fq_transforms.activations.second_moments"], "MOST_ROWS", 3)
    close_forms(fq.input_second_moments(params, one, **options), whole)


def test_what_unseen_experts_get():
    """By default an error that names them; otherwise the mean of the others, or the identity."""
    model, params, fq = prepared()
    seen = hooked(model, BATCHES[:1])
    (group,) = (g for g in fq.spec.groups if g.key == W1)
    unseen = [e for e, name in enumerate(group.names) if name not in seen]
    assert len(unseen) == 2
    message = message_of(ValueError, fq.input_second_moments, params, BATCHES[0], model=model, blocks=True)
    assert_names(message, W1, f"found no token for expert {unseen[0]}", "of 4", "unseen='mean-of-peers'")
    peers = torch.stack([blocks_of(seen[name], 32) for name in group.names if name in seen])
    for choice, filled in (("mean-of-peers", peers.mean(0).float()), ("ones", torch.eye(32)[None])):
        statistics = fq.input_second_moments(params, BATCHES[0], unseen=choice, model=model, blocks=True)
        close_forms({"": statistics[W1][unseen]}, {"": filled.expand(2, 1, 32, 32)})
        assert fq.calibrate(params, statistics=statistics)


def test_errors_of_outputs_are_never_larger_than_maxs():
    """Law: for each expert's blocks under these statistics, in float64; and in four bits most are clearly smaller."""
    for format in (fqt.INT4_BLOCK32, fqt.NVFP4_STATIC):
        model, params, fq = prepared(format)
        moments = fq.input_second_moments(params, BATCHES, model=model, blocks=True)
        errors = {}
        for method, given in ((Max(), None), (fq.method, moments)):
            of_method = fqt.transform(fq.spec, method=method)
            fakes = of_method.fakequant(params, of_method.calibrate(params, statistics=given))
            for group in fq.spec.groups:
                for name, form in zip(group.names, moments[group.key].double(), strict=True):
                    d = (params[name].double() - fakes[name].double()).unflatten(-1, (-1, format.block[1]))
                    errors.setdefault(name, []).append(torch.einsum("obi,bij,obj->ob", d, form, d))
        assert all((mse <= most).all() for most, mse in errors.values()), format.name
        assert sum(mse.sum() < 0.9 * most.sum() for most, mse in errors.values()) > len(errors) / 2, format.name


def test_mistakes_are_named():
    model, params, fq = prepared()
    message = message_of(ValueError, fq.input_second_moments, params, BATCHES, model=model, blocks=16)
    assert_names(message, "blocks: found 16, wanted True or False")
    bad = [torch.zeros(1, 1, dtype=torch.int64)]
    model.layers[0].proj.weight.data[0, 0] = torch.nan
    message = message_of(ValueError, fq.input_second_moments, params, bad, model=model, blocks=True)
    assert_names(message, "input_second_moments: batch 0: the input of", "nan", "finite")


def _over_ranks(rank, size):
    torch.set_num_threads(1)
    model, params, fq = prepared()
    world = torch.distributed.group.WORLD
    found = fq.input_second_moments(params, BATCHES[rank::size], model=model, group=world, blocks=True)
    close_forms(found, fq.input_second_moments(params, BATCHES, model=model, blocks=True))
    options = {"model": model, "group": world}
    failed = message_of(ValueError, fq.input_second_moments, params, BATCHES if rank else [], blocks=True, **options)
    bad = {"blocks": True} if rank else {"blocks": 1}
    unknown = message_of(ValueError, fq.input_second_moments, params, BATCHES, **bad, **options)
    mixed = message_of(ValueError, fq.input_second_moments, params, BATCHES, blocks=bool(rank), **options)
    diagonal = fq.input_second_moments(params, BATCHES[rank::size], **options)
    close(diagonal, fq.input_second_moments(params, BATCHES, model=model))
    return found, failed, unknown, mixed


@pytest.mark.dist
def test_batches_split_over_ranks_give_the_same_moments(ranks):
    """Bit for bit the same on all ranks; where one fails or has another `blocks`, the others say so and do not wait."""
    outcomes = ranks(_over_ranks, size=4)
    for found, failed, unknown, mixed in outcomes[1:]:
        assert all(torch.equal(moments, outcomes[0][0][key]) for key, moments in found.items())
        assert_names(failed, "rank 0 of the group failed", outcomes[0][1])
        assert_names(unknown, "rank 0 of the group failed", outcomes[0][2])
        assert_names(mixed, "blocks: found True on 3 of 4 ranks")
    assert_names(outcomes[0][1], "batches: found no batch in list")
    assert_names(outcomes[0][2], "blocks: found 1, wanted True or False")
    assert_names(outcomes[0][3], "blocks: found True on 3 of 4 ranks")
