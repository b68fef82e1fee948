"""What `.ci/engines` gives an engine to read: folders, and the log-probabilities that it shall compute from them.

python -m tests.engines.write FOLDER [MODEL ...]: writes {model}-{layout}-{place}-{formats}/, and beside each a
.safetensors of `logprobs` [tokens, vocabulary], of `functional_call` with `fakequant` of the weights in fp32; and
cases.json.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.func import functional_call
from tqdm import tqdm

import fq_transforms as fqt
from fq_transforms.export.layouts.plan import FormatKeys, format_key
from fq_transforms.export.readers import PLACES, READERS
from fq_transforms.formats import FORMATS, Format
from tests.export.models import TOKENS, build

RULES = {"experts": ["*.experts.*"], "linears": ["*self_attn.?_proj*"], "lm_head": ["lm_head*"]}
MODELS = ["qwen3_moe", "mixtral", "olmoe", "glm4_moe", "deepseek_v3"]
# With fused roles of which each has whole blocks.
WIDE = {"num_attention_heads": 4, "num_key_value_heads": 4}
# vLLM's CPU kernels want matrices of 32 columns.
OPTIONS = {
    "deepseek_v3": dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 32
    ),
}
# What transformers leaves out of DeepSeek's config, though it computes so.
DEEPSEEK = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
# Whose attention vLLM computes otherwise, of weights that are not quantized too: from the second token on 0.02 from
# transformers. It is compared with what vLLM makes of the plain fake weights.
PLAIN_BESIDE = ["deepseek_v3"]


def formats_of(keys: FormatKeys) -> tuple[Format, Format | None]:
    """The formats of weights and inputs that have some keys: the first of those with a name here."""
    known = {format_key(format): format for format in reversed(FORMATS.values())} | {
        ("int4", "1x64", "fp32"): Format("INT4_BLOCK64", fqt.INT4_BLOCK32.element, (1, 64)),
    }
    weights, inputs = keys
    return known[weights], known[inputs] if inputs else None


def cases(model):
    """(layout, place, {rule: formats}): each row of the table for vLLM; others than experts of one model only."""
    for layout, readers in READERS.items():
        loads = readers["vllm"].loads
        if loads is None:
            yield layout, "experts", {"*.experts.*": (fqt.MXFP6_E2M3, None)}
            continue
        for place in PLACES if model == MODELS[0] else PLACES[:1]:
            for keys in loads.get(place, ()):
                yield layout, place, dict.fromkeys(RULES[place], formats_of(keys))
    if model == MODELS[0]:
        yield (
            "compressed-tensors",
            "mixed",
            {
                "*.experts.*": (fqt.NVFP4, None),
                "*self_attn.?_proj*": (fqt.FP8_PER_CHANNEL, None),
                "lm_head*": (fqt.INT8_PER_CHANNEL, None),
            },
        )
        yield "compressed-tensors", "one-layer", {"*.1.mlp.experts.*": (fqt.FP8, None)}
        yield "fp8", "one-layer", {"*.1.mlp.experts.*": (fqt.FP8_BLOCK, None)}


def write(folder: Path, kind: str, layout: str, rules, options) -> torch.Tensor:
    model, params = build(kind, **options)
    model.float()
    params = {name: param.float() for name, param in params.items()}
    spec = fqt.select(params, [fqt.Rule(pattern, *formats) for pattern, formats in rules.items()])
    fq = fqt.transform(spec)
    state = fq.calibrate(params, [(TOKENS,)], model=model) if spec.inputs else fq.calibrate(params)
    if any("q_proj" in key for key in state):
        state = fqt.tie(state, [("q_proj", "k_proj"), ("q_proj", "v_proj")])
    config = model.config.to_dict() | (DEEPSEEK if kind == "deepseek_v3" else {})
    fqt.export.save(folder, fq, params, state, config=config, layout=layout, reader="vllm")
    weights, of_weights = fqt.transform(fqt.Spec(spec.groups)), {group.key: state[group.key] for group in spec.groups}
    if kind in PLAIN_BESIDE:
        plain = folder.with_name(f"{folder.name}.plain")
        fqt.export.save(plain, weights, params, of_weights, config=config, layout="plain", reader="vllm")
    fakes = weights.fakequant(params, of_weights)
    with torch.no_grad():
        return functional_call(model, fakes, (TOKENS,)).logits[0].log_softmax(-1)


def main(root: Path, models: list[str]) -> None:
    warnings.simplefilter("ignore")  # that vLLM quantizes inputs too
    done = []
    for kind in models:
        for layout, place, rules in tqdm(list(cases(kind)), desc=kind):
            names = sorted({"+".join(f.name for f in formats if f) for formats in rules.values()})
            name = f"{kind}-{layout}-{place}-{'-'.join(names)}"
            options = OPTIONS.get(kind, {}) | (WIDE if place == "linears" and "FP8_BLOCK" in name else {})
            logprobs = write(root / name, kind, layout, rules, options)
            save_file({"logprobs": logprobs.contiguous()}, root / f"{name}.safetensors")
            done.append({"folder": name, "model": kind, "layout": layout, "place": place, "formats": names})
            (root / "cases.json").write_text(json.dumps(done, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or MODELS)
