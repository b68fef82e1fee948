"""vLLM reads what `tests.engines.write` has written: python tests/engines/read_vllm.py FOLDER, in vLLM's environment.

Everything but the arithmetic of quantized layers is vLLM's own: it parses config.json and chooses a method, makes the
parameters, and its loaders fill them. Kernels of quantized layers want a GPU. In their place a layer's weights are
dequantized from its parameters, and computed as vLLM's CPU kernels compute plain ones; what its kernels do to inputs is
left out. Parameters are filled with a number that no file has before they are loaded, so that one that is left out is
seen. Prints one line per folder, and fails unless each is right.
"""

import importlib
import json
import os
import pkgutil
import re
import sys
from pathlib import Path
from unittest.mock import MagicMock

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_MLA_DISABLE": "1",  # whose CPU kernels want bf16, or heads of 576
    "HF_HUB_OFFLINE": "1",
}

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm import tqdm
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import fp8, modelopt  # noqa: F401 (imported so that `without_kernels` finds it)
from vllm.model_executor.layers.quantization.compressed_tensors import (
    compressed_tensors,
    compressed_tensors_moe,  # noqa: F401 (imported so that `without_kernels` finds it)
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import base_loader

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
KERNELS = re.compile(r"select_\w+_moe_backend|select_linear_kernel|init_\w+_kernel|choose_mp_linear_kernel")
PLAIN = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
QUANTIZED = re.compile(r"(w13_|w2_)?(weight|input)(_|$)")
INPUT_SCALE = re.compile(r"input(_global)?_scale$")
UNSET = 123456789.0
LIMIT = 2e-5  # of log-probabilities in fp32
# Not of the files: of a cache of keys and values, and inputs where a method leaves them in 16 bits.
NOT_IN_FILES = re.compile(r"\.attn\.|\.mla_attn\.")


def chooser(key):
    """What answers in place of one of vLLM's choices of kernels."""
    if key == "choose_mp_linear_kernel":
        return lambda *_, **__: type("Kernel", (MagicMock,), {})
    if "moe_backend" in key:
        backend = WNA16MoEBackend.MARLIN if "wna16" in key else MagicMock()
        return lambda *_, **__: (backend, None)
    return MagicMock()


def without_kernels():
    """No kernel is chosen: a GPU's would be refused here."""
    package = compressed_tensors.__name__.rpartition(".")[0]
    for module in pkgutil.walk_packages(sys.modules[package].__path__, f"{package}."):
        if not module.name.endswith("flydsl"):  # AMD's
            importlib.import_module(module.name)
    for name, module in list(sys.modules.items()):
        if not name.startswith("vllm.model_executor.layers.quantization"):
            continue
        for config in vars(module).values():
            if isinstance(config, type) and "get_supported_act_dtypes" in vars(config):
                config.get_supported_act_dtypes = lambda *_: [torch.bfloat16, torch.float16, torch.float32]
        for key in dir(module):
            if KERNELS.fullmatch(key):
                setattr(module, key, chooser(key))
            elif key == "check_moe_marlin_supports_config":
                setattr(module, key, lambda *_, **__: True)
            elif key == "get_marlin_input_dtype":
                setattr(module, key, lambda *_, **__: None)


def unpacked(codes, columns):
    """Codes [..., rows, packed] as numbers [..., rows, columns]."""
    if codes.dtype == torch.int32:
        bits = 32 * codes.shape[-1] // columns
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        parts = (codes[..., None] >> shifts) & (2**bits - 1)
        return parts.flatten(-2).float() - 2 ** (bits - 1)
    if codes.dtype == torch.uint8 and codes.shape[-1] * 2 == columns:
        nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()
        return E2M1[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
    return codes.float()


def dequantized(get, columns, widths):
    """A module's weight, from its parameters by their last names; `widths` are the rows of what is fused in it."""
    codes = get("weight_packed", "weight")
    values = unpacked(codes.data, columns)
    scale = get("weight_scale", "weight_scale_inv").data
    scale = torch.pow(2.0, scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    rows = values.shape[-2]
    if scale.dim() < values.dim() or scale.numel() == len(widths):  # one per matrix, of which some are fused
        scale = per_row(scale, widths, values.shape[:-2])
    elif scale.shape[-2] != rows:  # square blocks
        size = 128
        scale = scale.repeat_interleave(size, -2)[..., :rows, :].repeat_interleave(size, -1)[..., :columns]
    elif scale.shape[-1] > 1:
        scale = scale.repeat_interleave(columns // scale.shape[-1], -1)
    whole = get("weight_global_scale")
    if whole is not None:
        scale = scale / per_row(whole.data.float(), widths, values.shape[:-2])
    whole = get("weight_scale_2")
    if whole is not None:
        scale = scale * per_row(whole.data.float(), widths, values.shape[:-2])
    return values * scale


def per_row(scale, widths, experts):
    """[experts, fused] numbers as [experts, rows, 1]."""
    scale = scale.reshape(*experts, -1)
    if scale.shape[-1] == 1:
        return scale[..., None]
    return torch.repeat_interleave(scale, torch.tensor(widths), -1)[..., None]


def finish(model, model_config, target_device):
    """In place of vLLM's own: plain weights for what is quantized."""
    params = dict(model.named_parameters())
    model.unset = [name for name, p in params.items() if p.is_floating_point() and bool((p.float() == UNSET).any())]
    model.inputs = of_places({name: p for name, p in params.items() if INPUT_SCALE.search(name)})
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(module, RoutedExperts) and not isinstance(method, UnquantizedFusedMoEMethod):
            hidden, inner = module.moe_config.hidden_dim, module.moe_config.intermediate_size_per_partition
            widths = [inner] * (2 if module.moe_config.is_act_and_mul else 1)
            plain = {
                "w13_weight": dequantized(of(module, "w13_"), hidden, widths),
                "w2_weight": dequantized(of(module, "w2_"), inner, [hidden]),
            }
            replace(module, plain, UnquantizedFusedMoEMethod(module.moe_config))
        elif isinstance(module, ParallelLMHead) and not isinstance(method, PLAIN):
            weight = dequantized(of(module), module.embedding_dim, [module.num_embeddings_per_partition])
            replace(module, {"weight": weight}, UnquantizedEmbeddingMethod())
        elif isinstance(module, LinearBase) and not isinstance(method, PLAIN):
            widths = getattr(module, "output_partition_sizes", None) or [module.output_size_per_partition]
            weight = dequantized(of(module), module.input_size_per_partition, widths)
            replace(module, {"weight": weight}, UnquantizedLinearMethod())
        if hasattr(getattr(module, "quant_method", None), "process_weights_after_loading"):
            module.quant_method.process_weights_after_loading(module)
    for module in model.modules():
        if type(module).__name__ in ("Attention", "MLAAttention"):
            module.process_weights_after_loading(model_config.dtype)


def of(module, prefix=""):
    """The first of some parameters that a module has; None if it has none."""
    own = dict(module.named_parameters(recurse=False))
    return lambda *names: next((own[prefix + name] for name in names if prefix + name in own), None)


def replace(module, plain, method):
    for key in [key for key, _ in module.named_parameters(recurse=False) if QUANTIZED.match(key)]:
        delattr(module, key)
    for key, weight in plain.items():
        setattr(module, key, torch.nn.Parameter(weight, requires_grad=False))
    module.quant_method = method


def emptied(make):
    def made(*args, **kwargs):
        model = make(*args, **kwargs)
        with torch.no_grad():
            for name, p in model.named_parameters():
                # A loader asks whether an input scale is still 1.
                if p.dtype in (torch.float32, torch.bfloat16, torch.float16) and not name.endswith("input_scale"):
                    p.fill_(UNSET)
        return model

    return made


def read(folder, tokens):
    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=1,
        max_logprobs=64,
        disable_log_stats=True,
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=len(tokens), detokenize=False)
    (out,) = llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
    found = torch.full((len(tokens) - 1, len(tokens)), torch.nan)
    for place, row in enumerate(out.prompt_logprobs[1:]):
        for token, value in row.items():
            found[place, token] = value.logprob
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    return found, model.unset, model.inputs


def of_places(scales):
    """The numbers of some scales by layer and place: of experts what goes in and what comes between, or the module."""
    found = {}
    for name, scale in scales.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        is_between = re.search(r"w2_|\.w2\.|down_proj", name)
        place = ("experts", bool(is_between)) if "experts" in name else ("linears", "o_proj" in name)
        numbers = found.setdefault((layer and layer[1], *place), set())
        numbers |= {float(value) for value in scale.data.float().flatten()}
    return found


def stored_inputs(folder):
    """The scales of inputs that the files of a folder hold."""
    found = {}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a file of safetensors is no dict)
                if INPUT_SCALE.search(name):
                    found[name] = file.get_tensor(name)
    return of_places(found)


def said_of(folder):
    """What is wrong with a folder, as vLLM reads it; the largest difference of log-probabilities if nothing is."""
    wanted = load_file(f"{folder}.safetensors")["logprobs"][:-1]
    tokens = list(range(wanted.shape[-1]))
    try:
        found, unset, inputs = read(str(folder), tokens)
        if Path(f"{folder}.plain").exists():
            wanted, *_ = read(f"{folder}.plain", tokens)
    except Exception as error:  # whatever vLLM raises is what it says of the folder
        return {"raises": f"{type(error).__name__}: {' '.join(str(error).split())}"[-500:]}
    said = {"worst": float((found - wanted).abs().max())}
    stored = stored_inputs(folder)
    if missing := {str(place): sorted(of - inputs.get(place, set())) for place, of in stored.items()}:
        missing = {place: of for place, of in missing.items() if of}
        said |= {"input scales not loaded": missing} if missing else {}
    # Of weights alone vLLM makes the parameters all the same.
    unset = [name for name in unset if not NOT_IN_FILES.search(name)]
    if unset := [name for name in unset if stored or not INPUT_SCALE.search(name)]:
        said["unset"] = unset[:4]
    return said


def main(root):
    without_kernels()
    base_loader.process_weights_after_loading = finish
    base_loader.initialize_model = emptied(base_loader.initialize_model)
    cases = json.loads((root / "cases.json").read_text())
    assert cases, f"no folder to read in {root}"
    wrong = 0
    for case in tqdm(cases, desc="vLLM"):
        said = said_of(root / case["folder"])
        is_right = list(said) == ["worst"] and said["worst"] <= LIMIT
        wrong += not is_right
        print("right" if is_right else "WRONG", case["folder"], json.dumps(said), flush=True)
    print(f"{len(cases) - wrong} of {len(cases)} folders are read as fakequant simulates them", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
