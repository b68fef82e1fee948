"""Two folders, number by number."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fq_transforms as fqt
from fq_transforms.export import folder
from tests.export.models import build

compare = fqt.export.compare
WEIGHTS = fqt.presets.weights_only(fqt.presets.NVFP4_EXPERTS_ONLY_CFG)


def write(path, tensors, config=()):
    """A folder of one file."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "toy", "architectures": ["Toy"]} | dict(config)))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def tensors_of():
    """One of each kind, no two numbers alike."""
    number = iter(range(1, 10**6))

    def some(*shape, dtype=torch.float32):
        return torch.tensor([next(number) for _ in range(math.prod(shape))]).reshape(shape).to(dtype)

    return {
        "head.weight": some(3, 5),
        "layers.0.norm.weight": some(4),
        "layers.1.norm.weight": some(4),
        "layers.0.mlp.experts.0.w1.weight": some(2, 4, dtype=torch.bfloat16),
        "layers.0.mlp.experts.1.w1.weight": some(2, 4, dtype=torch.bfloat16),
        "layers.1.mlp.experts.down_proj": some(3, 2, 4),
        "layers.0.conv1d.weight": some(6, 1, 4),
        "ids": some(7, dtype=torch.int64),
        "large": torch.full((2,), 2**60),
        "mask": torch.zeros(5, dtype=torch.bool),
        "complex": torch.zeros(3, dtype=torch.complex64),
        "codes": torch.zeros(8).to(torch.float8_e5m2),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }


WHERE = {  # name and place that is changed, to role and what it is called
    ("head.weight", (2, 4)): ("head.weight", "head.weight"),
    ("layers.1.norm.weight", (0,)): ("layers.*.norm.weight", "layers.1.norm.weight"),
    ("layers.0.mlp.experts.1.w1.weight", (1, 3)): (
        "layers.*.mlp.experts.*.w1.weight",
        "layers.0.mlp.experts.1.w1.weight",
    ),
    ("layers.1.mlp.experts.down_proj", (2, 0, 1)): (
        "layers.*.mlp.experts.down_proj",
        "layers.1.mlp.experts.down_proj[2]",
    ),
    ("layers.0.conv1d.weight", (5, 0, 3)): ("layers.*.conv1d.weight", "layers.0.conv1d.weight"),
    ("ids", (6,)): ("ids", "ids"),
    ("large", (1,)): ("large", "large"),
    ("mask", (4,)): ("mask", "mask"),
    ("complex", (2,)): ("complex", "complex"),
    ("codes", (7,)): ("codes", "codes"),
    ("scalar", ()): ("scalar", "scalar"),
}


@pytest.mark.parametrize(("name", "at"), WHERE, ids=[name for name, _ in WHERE])
@pytest.mark.parametrize("numbers", [3, 2**16])
def test_one_changed_number_is_found_and_named(name, at, numbers, tmp_path, monkeypatch):
    """Of each kind of tensor, the last ones of a cut too; all else is equal, and so is each folder to itself."""
    monkeypatch.setattr(sys.modules["fq_transforms.export.compare"], "NUMBERS", numbers)
    tensors = tensors_of()
    a = write(tmp_path / "a", tensors)
    changed = tensors[name].clone()
    changed[at] = changed[at] + 1 if changed.dtype.itemsize > 1 else torch.ones(()).to(changed.dtype)
    b = write(tmp_path / "b", tensors | {name: changed})
    for same in (a, b):
        assert compare(same, same).is_equal
    role, where = WHERE[name, at]
    found = compare(a, b)
    assert not found.is_equal
    assert {key: one.differ for key, one in found.roles.items() if one.differ} == {role: 1}
    assert found.roles[role].where == where
    assert where in str(found)
    assert found.roles[role].largest == (1.0 if name != "large" else 0.0)  # which fp64 does not hold


def test_every_number_is_counted_and_sqnr_is_its_formula(tmp_path):
    """Layers and experts of a role are one row; signal and noise are sums over all of them."""
    weights = {f"l.{n}.experts.{e}.w": torch.randn(4, 6) * 2.0**e for n in range(3) for e in range(2)}
    noisy = {name: weight + 1e-3 * torch.randn(4, 6) for name, weight in weights.items()}
    found = compare(write(tmp_path / "a", weights), write(tmp_path / "b", noisy))
    (role,) = found.roles.values()
    signal = sum(float(w.double().square().sum()) for w in weights.values())
    noise = sum(float((weights[name].double() - noisy[name].double()).square().sum()) for name in weights)
    assert (role.layers, role.weights) == ((0, 1, 2), 144)
    assert role.sqnr == pytest.approx(10 * math.log10(signal / noise), rel=1e-12)
    lowest = min(weights, key=lambda n: float(weights[n].square().sum() / (weights[n] - noisy[n]).square().sum()))
    assert role.where == lowest


@pytest.mark.parametrize(
    ("a", "b", "differ", "largest", "sqnr"),
    [
        ([math.nan, 1.0], [math.nan, 1.0], 0, 0.0, math.inf),
        ([math.inf, -math.inf], [math.inf, -math.inf], 0, 0.0, math.inf),
        ([0.0, 1.0], [-0.0, 1.0], 0, 0.0, math.inf),
        ([2.0, 1.0], [math.nan, 1.0], 1, math.nan, math.nan),
        ([math.nan, 1.0], [2.0, 1.0], 1, math.nan, math.nan),
        ([math.inf, 1.0], [-math.inf, 1.0], 1, math.inf, -math.inf),
        ([2.0, 1.0], [math.inf, 1.0], 1, math.inf, -math.inf),
        ([0.0, 0.0], [1.0, 0.0], 1, 1.0, -math.inf),
    ],
)
def test_what_is_no_number_is_seen(a, b, differ, largest, sqnr, tmp_path):
    """NaN equals NaN and infinity itself; beside a number each is a difference that no maximum hides."""
    others = {"w2": torch.tensor([3.0])}
    paths = [write(tmp_path / n, {"w1": torch.tensor(x)} | others) for n, x in (("a", a), ("b", b))]
    role = compare(*paths).roles["w1"]
    assert role.differ == differ
    assert [role.largest, role.sqnr] == pytest.approx([largest, sqnr], nan_ok=True)
    assert role.where == ("w1" if differ else "")


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float64, 1e-200), (torch.float64, 1e200), (torch.float32, 1e-45)])
def test_gaps_whose_squares_vanish_or_overflow_are_counted(dtype, gap, tmp_path):
    """The smallest and the largest numbers of a dtype differ as others do."""
    a = write(tmp_path / "a", {"w": torch.zeros(3, dtype=dtype)})
    b = write(tmp_path / "b", {"w": torch.tensor([0.0, gap, 0.0], dtype=dtype)})
    role = compare(a, b).roles["w"]
    assert (role.differ, role.where) == (1, "w")
    assert role.largest == pytest.approx(torch.tensor(gap, dtype=dtype).item(), rel=1e-12)


def test_nan_is_worst_of_a_role(tmp_path):
    """A NaN in one layer is what the row names, in whichever order the layers come."""
    for bad in range(3):
        a = {f"l.{n}.w": torch.ones(4) for n in range(3)}
        b = {name: torch.full((4,), 100.0) for name in a} | {f"l.{bad}.w": torch.tensor([1.0, math.nan, 1.0, 1.0])}
        role = compare(write(tmp_path / f"a{bad}", a), write(tmp_path / f"b{bad}", b)).roles["l.*.w"]
        assert (role.where, math.isnan(role.largest), math.isnan(role.sqnr)) == (f"l.{bad}.w", True, True)


def test_names_and_shapes_that_are_not_in_both(tmp_path):
    """They are listed, and make folders unequal."""
    one = torch.ones(2, 3)
    a = write(tmp_path / "a", {"both": one, "mine": one, "shape": one})
    b = write(tmp_path / "b", {"both": one, "theirs": one, "shape": one.mT.contiguous()})
    found = compare(a, b)
    assert (found.only_a, found.only_b, found.shapes) == (("mine",), ("theirs",), {"shape": ((2, 3), (3, 2))})
    assert not found.is_equal
    assert all(word in str(found) for word in ("mine", "theirs", "(2, 3) and (3, 2)"))
    for others in ({"both": one, "mine": one}, {"both": one}):
        c = write(tmp_path / f"c{len(others)}", others | {"shape": one})
        assert compare(a, c).is_equal == ("mine" in others)


def test_numbers_are_compared_whatever_holds_them(tmp_path):
    """Numbers of bf16 are equal in fp32 and fp64; a folder in codes is equal to the plain weights it stands for."""
    w = torch.randn(4, 8).bfloat16()
    paths = [write(tmp_path / str(t)[6:], {"w": w.to(t)}) for t in (torch.bfloat16, torch.float32, torch.float64)]
    assert all(compare(a, b).is_equal for a in paths for b in paths)
    model, _ = build(hidden_size=64, moe_intermediate_size=32, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "src")
    folder(tmp_path / "src", tmp_path / "codes", WEIGHTS, jobs=1)
    folder(tmp_path / "codes", tmp_path / "plain", layout="plain", jobs=1)
    assert compare(tmp_path / "codes", tmp_path / "plain").is_equal
    found = compare(tmp_path / "src", tmp_path / "codes")
    assert {name for name, role in found.roles.items() if role.differ} == {
        f"model.layers.*.mlp.experts.*.{role}_proj.weight" for role in ("gate", "up", "down")
    }


def test_a_dtype_that_pytorch_does_not_have_is_compared_by_bytes(tmp_path):
    """A file may hold what safetensors knows and PyTorch does not, such as six bits."""
    for name, last in (("a", 0), ("b", 0), ("c", 1)):
        header = json.dumps({"w": {"dtype": "F6_E2M3", "shape": [8], "data_offsets": [0, 6]}}).encode()
        header += b" " * (-len(header) % 8)
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        content = np.array([*range(5), last], np.uint8).tobytes()
        file = tmp_path / name / "model.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header + content)
    assert compare(tmp_path / "a", tmp_path / "b").is_equal
    assert compare(tmp_path / "a", tmp_path / "c").roles["w"].differ == 1


def test_folders_stay_as_they_are(tmp_path):
    """Nothing is written, and nothing stays open that keeps a folder from being removed."""
    a = write(tmp_path / "a", tensors_of())
    before = {file.name: file.stat().st_mtime_ns for file in a.iterdir()}
    compare(a, a)
    assert {file.name: file.stat().st_mtime_ns for file in a.iterdir()} == before
