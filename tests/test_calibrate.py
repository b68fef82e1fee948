"""Methods on DTensors: each rank chooses for whole granules of its own shard, as one process does for all of them."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fq_transforms as fqt
from fq_transforms.methods import FourOverSix, Mse, Percentile
from fq_transforms.state import flatten
from tests.cases import assert_names, experts, message_of

E = 5
# Format, the axis of [E, out, in] that is sharded over four ranks, and methods: no granule is cut.
WHOLE = [
    (fqt.FP8, 0, (Mse(), Percentile(90))),
    (fqt.INT8_PER_CHANNEL, 0, (Mse(), Percentile(90))),
    (fqt.INT8_PER_CHANNEL, 1, (Mse(), Percentile(90))),
    (fqt.INT4_BLOCK32, 2, (Mse(), Percentile(90))),
    (fqt.NVFP4_STATIC, 0, (Mse(), Percentile(90), FourOverSix())),
    (fqt.NVFP4_STATIC, 1, (Mse(), Percentile(90), FourOverSix())),
    (fqt.NVFP4_STATIC, 2, (Mse(), Percentile(90), FourOverSix())),
]
CUT = [(fqt.FP8, 1), (fqt.FP8, 2), (fqt.INT8_PER_CHANNEL, 2)]


def sharded(axis, size):
    """One stacked parameter [5, 6, 128], sharded along an axis over all ranks: an expert, or two, or none each."""
    whole = torch.stack(experts(E, (6, 128), torch.bfloat16))
    mesh = init_device_mesh("cpu", (size,))
    placement = Replicate() if axis is None else Shard(axis)
    return {"experts.w": whole}, {"experts.w": distribute_tensor(whole, mesh, [placement])}


def every_method(rank, size):
    for format, axis, methods in WHOLE:
        whole, here = sharded(axis, size)
        spec = fqt.select(whole, {"*": format})
        for method in methods:
            fq = fqt.transform(spec, method=method)
            wanted, found = flatten(fq.calibrate(whole)), flatten(fq.calibrate(here))
            for name, leaf in wanted.items():
                assert torch.equal(found[name].full_tensor(), leaf), (format.name, axis, method)


def refusals(rank, size):
    found = []
    for format, axis in CUT:
        whole, here = sharded(axis, size)
        spec = fqt.select(whole, {"*": format})
        found.append(message_of(ValueError, fqt.transform(spec, method=Mse()).calibrate, here))
        fqt.transform(spec).calibrate(here)
    whole, here = sharded(0, size)
    fq = fqt.transform(fqt.select(whole, {"*": fqt.INT4_BLOCK32}), method=Mse())
    found.append(message_of(ValueError, fq.calibrate, here, statistics={"experts.w": torch.ones(128)}))
    return found


@pytest.mark.dist
def test_each_rank_chooses_for_its_own_granules(ranks):
    """Law: sharded along any axis that no granule spans, the state is the one of all weights in one process."""
    ranks(every_method, size=4)


@pytest.mark.dist
def test_a_cut_granule_is_refused_on_every_rank(ranks):
    """Before any collective, in the same words; Max is taken as before. Statistics of DTensors are refused too."""
    first, *others = ranks(refusals, size=2)
    assert all(messages == first for messages in others)
    for message, (format, _) in zip(first, CUT, strict=False):
        assert_names(message, "Mse", "experts.w", format.name, "mesh axis 0", "use Max")
    assert_names(first[-1], "statistics 'experts.w'", "DTensors", "plain")
