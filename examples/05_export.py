# %% [markdown]
"""# Export: files that other libraries load, with the weights that were simulated

A small Mixtral of transformers, with random weights, is calibrated and written in two layouts: compressed-tensors',
which is read back by that library and by transformers with the same logits, and ModelOpt's, whose scales and codes are
multiplied back by ModelOpt itself.

    python examples/05_export.py

It takes seconds on two cores, after `pip install -e '.[test]'`.
"""

# %%
import json
import shutil

import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM, MixtralConfig

import fq_transforms as fqt
import tiny_moe

options = tiny_moe.options(__doc__)  # it is small as it is
HIDDEN, INNER, EXPERTS, VOCABULARY = 128, 256, 8, 64
torch.manual_seed(0)
folder = options.out / "export"
shutil.rmtree(folder, ignore_errors=True)  # of the last time: nothing is written over

# %% [markdown]
# ## The model
# transformers 5 keeps the experts of a layer in two stacked parameters, gate and up as one. Files keep them apart.

# %%
config = MixtralConfig(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_local_experts=EXPERTS,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    architectures=["MixtralForCausalLM"],
)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
params = model.state_dict()
tokens = torch.randint(VOCABULARY, (2, 32))

# %% [markdown]
# ## Select, calibrate, tie
# The fused gate_up has one amax per expert, so gate and up are tied by construction. Queries, keys and values, which
# engines fuse too, are tied by hand. Untied, they are refused. With the layout of the files the formats have the order
# of operations of its library, which reads what was simulated.

# %%
rules = {"*.experts.*": fqt.NVFP4, "*self_attn*": fqt.NVFP4}
spec = fqt.select(params, rules)
fq = fqt.transform(spec, layout="compressed-tensors")
tiny_moe.show(fq.spec)
state = fq.calibrate(params)
try:
    fqt.export.save(folder / "untied", fq, params, state, config=model.config)
except ValueError as error:
    print("refused:", error)
state = fqt.tie(state, [("q_proj", "k_proj"), ("q_proj", "v_proj")])

with torch.no_grad():
    wanted = functional_call(model, fq.fakequant(params, state), (tokens,)).logits

# %% [markdown]
# ## compressed-tensors
# What transformers 5.23 loads of it by itself depends on the format, and NVFP4 experts are silently incorrect. So
# compressed-tensors' own decompressors write an ordinary checkpoint first. vLLM and SGLang take the compressed one.

# %%
fqt.export.save(folder / "compressed", fq, params, state, config=model.config, max_shard_size="500KB")
fqt.export.folder(folder / "compressed", folder / "plain", layout="plain")
loaded = AutoModelForCausalLM.from_pretrained(folder / "plain")
with torch.no_grad():
    found = loaded(tokens).logits
assert torch.equal(found, wanted)

size = {name: sum(file.stat().st_size for file in (folder / name).iterdir()) for name in ("compressed", "plain")}
shards = len(list((folder / "compressed").glob("*.safetensors")))
print(f"compressed-tensors: {size['compressed']:,} bytes in {shards} files, {size['plain']:,} as bf16; the same logits")

# %% [markdown]
# ## ModelOpt
# Its unified export has another order of operations, and the same state. Its tensor class gives the fake-quantized
# weight of an expert.

# %%
fq = fqt.transform(spec, layout="modelopt")
fqt.export.save(folder / "modelopt", fq, params, state, config=model.config, layout="modelopt")
stored = load_file(folder / "modelopt" / "model.safetensors")
name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
weight = NVFP4QTensor((HIDDEN, INNER), torch.bfloat16, stored[name]).dequantize(
    dtype=torch.float32,
    scale=stored[f"{name}_scale"],
    double_scale=stored[f"{name}_scale_2"],
    block_sizes={-1: 16, "scale_bits": (4, 3)},
)
simulated = fq.fakequant(params, state)["model.layers.1.mlp.experts.down_proj"][5]
assert torch.equal(weight.bfloat16(), simulated)
about = json.loads((folder / "modelopt" / "hf_quant_config.json").read_text())["quantization"]
print(f"ModelOpt: {about['quant_algo']}, {len(stored)} tensors; the same weights")

# %% [markdown]
# ## What it found

# %%
print(
    f"\ntransformers gave the same {wanted.numel():,} logits from the exported files as the simulation, from "
    f"{size['compressed'] / size['plain']:.0%} of the bytes of bf16."
)
print(
    f"ModelOpt's own tensor class gave the same {simulated.numel():,} weights of an expert from {len(stored)} tensors."
)
