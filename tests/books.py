"""The `books` fixture: how many bytes of fake weights are alive, and how often they were made."""

import weakref

import pytest


class Books:
    """Bytes of fake weights: now, and at most since it was last set."""

    def __init__(self):
        self.now = self.most = self.calls = 0

    def open(self, tensors):
        self.calls += 1
        for storage in {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}.values():
            self.now += storage.nbytes()
            weakref.finalize(storage, self.close, storage.nbytes())
        self.most = max(self.most, self.now)

    def close(self, size):
        self.now -= size


@pytest.fixture
def books(monkeypatch):
    # Not above: `tests.conftest` imports this file before --shape-checks can look at what the package imports.
    from fq_transforms.ops.quantize import autograd

    found, original = Books(), autograd._run_fake_quantize

    def counting(*args):
        outs = original(*args)
        found.open(outs)
        return outs

    monkeypatch.setattr(autograd, "_run_fake_quantize", counting)
    return found
