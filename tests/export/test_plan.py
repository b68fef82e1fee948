"""Plans: refusals before a byte is written, and that one group is packed at a time."""

import weakref
from dataclasses import replace

import pytest
import torch

import fq_transforms as fqt
from fq_transforms.export.layouts import plan
from fq_transforms.formats import IntElement
from tests.cases import assert_names
from tests.export.models import (
    EXPERTS,
    HIDDEN,
    INNER,
    TARGETS,
    build,
    calibrated,
    exported,
    in_lists,
    megatron_of,
    to_compressed_tensors,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about what they would like to have


def test_one_group_is_packed_at_a_time(tmp_path, monkeypatch):
    """The packed model is never held: when a group is packed, at most one of the earlier ones is alive."""
    model, params = build(num_hidden_layers=6)
    alive, most = weakref.WeakSet(), []

    def counted(*args, **kwargs):
        packed = real(*args, **kwargs)
        if args[0][next(iter(args[0]))].is_meta:  # only types are asked for
            return packed
        alive.update(leaf for leaves in packed.values() for leaf in leaves.values())
        most.append(sum(leaf.nbytes for leaf in alive))
        return packed

    real = plan.pack
    monkeypatch.setattr(plan, "pack", counted)
    exported(to_compressed_tensors, tmp_path / "a", params, fqt.FP8, model.config, max_shard_size=1000)
    assert len(most) == 12
    assert max(most) <= 2 * EXPERTS * 2 * INNER * HIDDEN * 1.1


@TARGETS
def test_a_parameter_that_is_no_tensor(target, tmp_path):
    model, params = build()
    fq, state = calibrated(params, fqt.NVFP4)
    for wrong, found in ((None, "NoneType"), (torch.ones(2, 2).to_sparse(), "torch.sparse_coo")):
        with pytest.raises(ValueError) as caught:
            target(tmp_path / "a", fq, params | {"model.norm.weight": wrong}, state, config=model.config)
        assert_names(str(caught.value), "model.norm.weight", found, "wanted a dense tensor")
    assert not list(tmp_path.iterdir())


def faults():
    """Name to what is exported, and what the error must say."""
    model, params = build()
    lists = in_lists(params)
    deepseek_model, deepseek = build("deepseek_v3")
    config = model.config.to_dict()
    fq, nan = calibrated(params, fqt.NVFP4)
    nan["model.layers.1.mlp.experts.down_proj"]["amax"][2] = torch.nan
    int4 = replace(fqt.INT8, name="INT4", element=IntElement(7, -8, 7))
    odd = {"model.odd.weight": torch.ones(4, 5)}
    ours = {"format": fqt.NVFP4, "params": params, "rules": "*.experts.*", "config": config}
    small = {"vocab_size": 8, "hidden_size": 64, "moe_intermediate_size": 96}
    other_names = {"blocks.0.experts.w": torch.ones(2, 32, 32)}
    untold = {**config, "model_type": "gpt_oss"}
    return {
        "uncalibrated": (ours | {"state": fq.init(params)}, "gate_up_proj", "never calibrated"),
        "NaN amax": (ours | {"state": nan}, "model.layers.1.mlp.experts.down_proj", "nan", "finite amax"),
        "odd in": (ours | {"params": odd, "format": int4, "rules": "*"}, "model.odd.weight", (4, 5), "4 bits"),
        "no name for the format": (ours | {"format": fqt.MXFP6_E3M2}, "MXFP6_E3M2", "no name"),
        "no such names": (ours | {"params": other_names}, "blocks.0.experts.w", "one tensor for all of its 2 experts"),
        "unknown model": (ours | {"config": untold}, "gpt_oss", "qwen3_moe"),
        "no architectures": (ours | {"config": {"model_type": "qwen3_moe"}}, "architectures"),
        "quantized already": (ours | {"config": config | {"quantization_config": {"a": 1}}}, "quantization_config"),
        "a name twice": (
            ours | {"params": params | {"decoder.layers.0.mlp.router.weight": torch.ones(3, 256)}},
            "decoder.layers.0.mlp.router.weight",
            "two names",
        ),
        "Megatron's unknown": (
            ours | {"params": params | {"decoder.layers.0.mlp.odd.weight": torch.ones(3, 256)}},
            "decoder.layers.0.mlp.odd.weight",
            "mlp.router.weight",
        ),
        "halves that cut a block": (
            ours | {"params": build(**small)[1], "format": fqt.FP8_BLOCK},
            "gate_up_proj",
            "(192, 64)",
            "whole blocks",
        ),
        "heads in one block": (
            ours
            | {
                "params": megatron_of(params, model.config, "te"),
                "format": fqt.FP8_BLOCK,
                "rules": "*linear_qkv.weight",
            },
            "linear_qkv",
            "q_proj",
            "whole blocks",
        ),
        "another block": (
            ours | {"format": replace(fqt.NVFP4, name="NVFP4_BLOCK32", block=(1, 32))},
            "NVFP4_BLOCK32",
            "1x32",
            "no name",
        ),
        "a head that is the embedding": (
            ours | {"rules": "lm_head*", "config": config | {"tie_word_embeddings": True}},
            "lm_head",
            "tie_word_embeddings",
        ),
        "half of what is fused": (
            ours | {"params": lists, "rules": "*gate_proj*"},
            "gate_proj",
            "up_proj",
            "not quantized",
        ),
        "one rank's experts": (
            ours | {"params": {n: p for n, p in lists.items() if ".experts.2." not in n}, "rules": "*down_proj*"},
            "found 2 experts in layer 0",
            "wanted 3, as num_",
        ),
        "one stage's layers": (
            ours | {"params": {n: p for n, p in params.items() if ".layers.0." not in n}},
            "found no layer 0",
            "num_hidden_layers",
        ),
        "a padded vocabulary": (
            ours | {"params": params | {"model.embed_tokens.weight": torch.ones(64, HIDDEN)}},
            "model.embed_tokens.weight",
            "found 64 rows, wanted 32",
        ),
        "a head of its own, said to be tied": (
            ours | {"config": config | {"tie_word_embeddings": True}},
            "lm_head.weight",
            "model.embed_tokens.weight",
            "tie_word_embeddings=False",
        ),
        "parameters without buffers": (
            ours
            | {
                "params": {n: p for n, p in deepseek.items() if "e_score" not in n},
                "config": deepseek_model.config.to_dict(),
            },
            "e_score_correction_bias",
            "model.state_dict()",
        ),
        "a wrapper's names": (
            ours | {"params": {f"_orig_mod.{n}": p for n, p in params.items()}},
            "_orig_mod.model.",
            "a wrapper's prefix",
        ),
        "Megatron's other names": (
            ours | {"params": params | {"mtp.layers.0.eh_proj.weight": torch.ones(4, 4)}},
            "mtp.layers.0.eh_proj.weight",
            "a name of Megatron's",
        ),
        "a stack beside a list": (
            ours
            | {
                "params": params | {"model.layers.0.mlp.experts.1.down_proj.weight": torch.ones(4, 4)},
                "rules": "*.experts.down_proj",
            },
            "model.layers.0.mlp.experts.1.down_proj.weight",
            "two names",
        ),
        "two dtypes": (
            ours | {"params": {n: p.float() if ".0." in n else p for n, p in params.items()}},
            "torch.float32",
            "one dtype",
        ),
        "what JSON cannot hold": (ours | {"config": config | {"odd": torch.bfloat16}}, "odd=torch.bfloat16", "JSON"),
        "one architecture as a text": (ours | {"config": config | {"architectures": "X"}}, "architectures='X'", "list"),
        "latent attention that engines fuse": (
            ours
            | {
                "params": deepseek,
                "config": deepseek_model.config.to_dict(),
                "rules": "*q_a_proj*",
            },
            "q_a_proj",
            "kv_a_proj_with_mqa",
            "not quantized",
        ),
        "a meta tensor": (ours | {"params": params | {"model.norm.weight": torch.empty(4, device="meta")}}, "norm"),
        "a shard size that is none": (ours | {"max_shard_size": "5 apples"}, "max_shard_size", "5 apples"),
    }


@TARGETS
@pytest.mark.parametrize(
    ("case", "fragments"), [pytest.param(case, fragments, id=name) for name, (case, *fragments) in faults().items()]
)
def test_faults_are_found_before_a_byte_is_written(case, fragments, target, tmp_path):
    """Each names the thing, what was found and what was wanted; the folder is not made."""
    params, options = case["params"], {k: v for k, v in case.items() if k == "max_shard_size"}
    fq = fqt.transform(fqt.select(params, {case["rules"]: case["format"]}))
    state = case.get("state") or fq.calibrate(params)
    with pytest.raises(ValueError) as caught:
        target(tmp_path / "a", fq, params, state, config=case["config"], **options)
    assert_names(str(caught.value), *fragments, "found", "wanted")
    assert not list(tmp_path.iterdir())
