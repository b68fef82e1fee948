"""What a user of the wheel does first: run by `.ci/wheel`, in an environment that has the wheel and what it asks for.

Without the repository on the path, in an empty folder.
"""

import importlib.metadata
import importlib.resources
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from torch.func import functional_call

import fq_transforms as fqt

version = sys.argv[1]
site = Path(sysconfig.get_path("purelib"))
assert Path(fqt.__file__).is_relative_to(site), f"found {fqt.__file__}, wanted the wheel's, in {site}"
assert fqt.__version__ == importlib.metadata.version("fq_transforms") == version

files = [str(file) for file in importlib.metadata.files("fq_transforms")]
ours = [name for name in files if name.startswith("fq_transforms/")]
strange = [name for name in ours if not name.endswith((".py", ".pyc", "/py.typed"))]
assert not strange, f"found {strange}, wanted modules and py.typed only"
beside = {name.split("/")[0] for name in files} - {"fq_transforms", f"fq_transforms-{version}.dist-info", ".."}
assert not beside, f"found {beside}, wanted the package only"
assert (importlib.resources.files("fq_transforms") / "py.typed").is_file()

torch.manual_seed(0)
model = torch.nn.ModuleDict(
    {"experts": torch.nn.ModuleList(torch.nn.ModuleDict({"w1": torch.nn.Linear(128, 32)}) for _ in range(4))}
)
params = {f"layers.0.{name}": weight for name, weight in model.named_parameters()}
formats = [getattr(fqt, name) for name in fqt.__all__ if isinstance(getattr(fqt, name), fqt.Format)]
for format in formats:
    fq = fqt.transform(fqt.select(params, {"*.w1.weight": format}))
    state = fq.calibrate(params)
    weights = fq.fakequant(params, state)
    unpacked = fq.unpack(fq.pack(params, state), dtype=torch.float32)
    assert len(unpacked) == 4
    for name, weight in unpacked.items():
        assert torch.equal(weight, weights[name]), (format, name)
        assert not torch.equal(weight, params[name]), (format, name)

expert = model["experts"][0]["w1"]
loss = functional_call(expert, {"weight": weights["layers.0.experts.0.w1.weight"]}, (torch.ones(1, 128),)).sum()
loss.backward()  # pass-through, to the parameter
assert torch.equal(expert.weight.grad, torch.ones(32, 128))

fqt.checkpoint.save_file("state.safetensors", fq, state)
fqt.checkpoint.load_file("state.safetensors", fq, like=fq.init(params))

script = Path(sysconfig.get_path("scripts"), "fqt")
usage = subprocess.run([script, "--help"], check=True, capture_output=True, text=True).stdout
assert all(command in usage for command in ("quantize", "inspect", "report", "compare")), usage
print(f"fq_transforms {version}, torch {torch.__version__}, Python {sys.version.split()[0]}: {len(formats)} formats")
