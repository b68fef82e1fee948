"""Taking a model's tensors out and putting others in: by name, ties and buffers included."""

import pytest
import torch
from torch.func import functional_call
from torch.nn import BatchNorm1d, Embedding, Linear, Module, Sequential

from fq_transforms.training.slots import Places, slots_of


class Tied(Module):
    def __init__(self):
        super().__init__()
        self.embedding = Embedding(8, 4)
        self.norm = BatchNorm1d(4)
        self.head = Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.bare = torch.nn.Parameter(torch.ones(4))

    def forward(self, ids):
        return self.head(self.norm(self.embedding(ids)) * self.bare)


def test_as_functional_call():
    """A tied tensor is replaced everywhere, a buffer too; what is not named stays; all are back afterwards."""
    model, ids = Tied().eval(), torch.arange(8)
    before = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    new = {
        "embedding.weight": torch.randn(8, 4),
        "norm.running_mean": torch.randn(4),
        "bare": torch.randn(4),
    }
    slots = slots_of(model, new.keys())
    own = slots.take()
    assert own.keys() == new.keys()
    assert all(own[name] is before[name] for name in new)
    slots.put(new)
    assert model.head.weight is new["embedding.weight"]
    found = model(ids)
    slots.put(own)
    assert torch.equal(found, functional_call(model, new, (ids,)))
    after = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    assert all(after[name] is tensor for name, tensor in before.items())


def test_both_names_of_a_tie():
    """Refused: a gradient for each name would be a part of the tensor's. Also for a module under two names."""
    layer = Linear(2, 2, bias=False)
    for model, names in (
        (Tied(), {"embedding.weight", "head.weight"}),
        (Sequential(layer, layer), {"0.weight", "1.weight"}),
    ):
        with pytest.raises(ValueError, match="are one tensor") as error:
            slots_of(model, names)
        assert all(repr(name) in str(error.value) for name in names)


def test_torchscript_is_refused():
    with pytest.raises(ValueError, match="RecursiveScriptModule"):
        slots_of(torch.jit.script(Linear(2, 2)), {"weight"})


def test_a_module_under_two_names():
    layer = Linear(2, 2)
    model = Sequential(layer, layer)
    weight = torch.zeros(2, 2)
    slots = slots_of(model, {"0.weight"})
    slots.put({"0.weight": weight})
    assert model[1].weight is weight


def test_faults():
    model = Tied()
    with pytest.raises(KeyError, match="'absent' is not in the Tied"):
        slots_of(model, {"bare", "absent"})
    slots = slots_of(model, {"bare"})
    del model.bare
    with pytest.raises(KeyError, match="'bare' is not in Tied any more"):
        slots.take()


def test_places_are_looked_for_again_where_the_model_has_changed():
    """A module or a tensor that was replaced, a tie that came or went, a rename; else what was found before."""
    model = Tied()
    places = Places(model)
    names = ["embedding.weight", "bare"]
    slots = places.find(names)
    assert places.find(names) is slots

    def check(names):
        found = places.find(names)
        assert found.attributes == slots_of(model, names).attributes
        own = found.take()
        assert own.keys() == set(names)
        found.put({name: torch.zeros(1) for name in names})
        assert all(tensor is not own[name] for name, tensor in found.take().items())
        places.put_back()
        assert all(tensor is own[name] for name, tensor in found.take().items())

    check(["bare"])
    model.bare = torch.nn.Parameter(torch.zeros(4))
    check(["bare"])
    model.norm = BatchNorm1d(4)
    check(["norm.weight", "bare"])
    model.head.weight = torch.nn.Parameter(torch.randn(8, 4))  # tied no more
    check(names)
    assert (model.head, "_parameters") not in places.find(names).attributes
    model.head.weight = model.embedding.weight
    check(names)
    assert (model.head, "_parameters") in places.find(names).attributes
    model.other = model.bare
    check(["embedding.weight", "other"])
    with pytest.raises(KeyError, match="missing"):
        places.find(["missing"])
