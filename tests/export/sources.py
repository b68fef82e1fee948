"""Folders of tiny models for tests of `folder`, stored as others store them, written without this package."""

import json

import torch
from safetensors.torch import save_file

HIDDEN, INNER, EXPERTS = 256, 128, 3
CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 1,
    "num_experts": EXPERTS,
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INNER,
    "vocab_size": 32,
    "dtype": "bfloat16",
}
BLOCK = "model.layers.0.mlp"
SHAPES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
MODULES = {f"{BLOCK}.experts.{e}.{role}": shape for e in range(EXPERTS) for role, shape in SHAPES.items()}
STACKS = {"gate_up_proj": (EXPERTS, HIDDEN, 2 * INNER), "down_proj": (EXPERTS, INNER, HIDDEN)}  # [in, out], gpt-oss's
# What is stored plain in every folder here.
PLAIN = {
    "model.embed_tokens.weight": (32, HIDDEN),
    f"{BLOCK}.gate.weight": (EXPERTS, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (32, HIDDEN),
}


def plain():
    """What is not quantized, in bf16."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in PLAIN.items()}


def weights(shapes=MODULES, dtype=torch.bfloat16):
    """A weight for each module, no two of one magnitude."""
    generator = torch.Generator().manual_seed(2)
    drawn = (torch.randn(shape, generator=generator) for shape in shapes.values())
    return {name: (0.02 * 1.7**n * w).to(dtype) for n, (name, w) in enumerate(zip(shapes, drawn, strict=True))}


def write(folder, tensors, about=None, *, shards=1, config=CONFIG, **files):
    """A folder of safetensors with its config.json; `files` are other JSON files, by their names without the ending."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": about} if about else {})))
    for name, document in files.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    names = sorted(tensors)
    if shards == 1:
        save_file({name: tensors[name].contiguous() for name in names}, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for n in range(shards):
        file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[n::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
