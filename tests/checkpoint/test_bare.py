"""A state or packed weights given to other stores as they are: nested plain dicts of tensors need nothing of ours."""

import io
import warnings

import optree
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import fq_transforms as fqt
from tests.cases import experts
from tests.checkpoint.samples import FORMATS, assert_same, packed_of, sharded, whole_params


@pytest.fixture(scope="module", params=["state", "packed"])
def tree(request):
    params = whole_params(3)
    fq = fqt.transform(fqt.select(params, FORMATS))
    return fq.calibrate(params) if request.param == "state" else packed_of(fq, params)


def test_torch_save(tree):
    """torch.load(weights_only=True), which refuses every type that is not on its list, gives the tree back."""
    stream = io.BytesIO()
    torch.save(tree, stream)
    stream.seek(0)
    assert_same(torch.load(stream, weights_only=True), tree)


def test_optree(tree):
    """Flattened and unflattened, mapped and compared: optree sees each tensor as a leaf, and nothing else."""
    leaves, structure = optree.tree_flatten(tree)
    assert [*map(id, leaves)] == [id(leaf) for key in sorted(tree) for _, leaf in sorted(tree[key].items())]
    assert_same(optree.tree_unflatten(structure, leaves), tree)
    assert_same(optree.tree_map(torch.clone, tree), tree)
    assert optree.tree_structure(tree) == structure


def _with_a_model(rank, size, folder):
    """In one `dcp.save`: a model, plain experts of each rank's own, under keys of their own, and shared DTensors."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    own = {f"layers.{rank}.experts.{i}.w": weight for i, weight in enumerate(experts(2, (8, 32), seed=rank))}
    shared = sharded(whole_params(2 * size), [Shard(0)], init_device_mesh("cpu", (size,)))
    own_fq = fqt.transform(fqt.select(own, {"*": fqt.NVFP4_STATIC}))
    shared_fq = fqt.transform(fqt.select(shared, FORMATS))
    trees = {
        "stage": own_fq.calibrate(own),
        "stage packed": packed_of(own_fq, own),
        "shared": shared_fq.calibrate(shared),
        "shared packed": packed_of(shared_fq, shared),
    }
    found = optree.tree_map(torch.zeros_like, {"model": model.state_dict(), **trees})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model.state_dict(), **trees}, checkpoint_id=folder)
        dcp.load(found, checkpoint_id=folder)
    assert all(torch.equal(found["model"][name], leaf) for name, leaf in model.state_dict().items())
    for name, tree in trees.items():
        assert_same(found[name], tree)
    return trees["stage"][f"layers.{rank}.experts.*.w"]["amax"].sum().item()


@pytest.mark.dist
def test_dcp_beside_a_model(ranks, tmp_path):
    """Bug: DCP pickled NamedTuples whole, so every rank loaded rank 0's state. Each rank gets its own numbers."""
    amax = ranks(_with_a_model, tmp_path / "all", size=2)
    assert amax[0] != amax[1]
