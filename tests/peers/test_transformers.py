"""The real classes of transformers, built tiny from their configs: what is selected, calibrated, quantized, and learns.

Sizes tell the axes apart: gate_up is (out, in) = (192, 64) and down (64, 96) in every class, in either layout.
"""

from typing import NamedTuple

import optree
import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 (PyTorch's own name for it)

import fq_transforms as fqt
from fq_transforms import presets
from fq_transforms.formats import FORMATS
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from tests.cases import name_of, same_bits

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

VOCABULARY, HIDDEN, INNER, EXPERTS = 64, 64, 96, 4
SHAPES = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


class Case(NamedTuple):
    """One architecture: its classes, its own config entries, and where its experts and routers are."""

    name: str
    model: str
    config: str
    options: dict
    moe: str = "mlp"
    router: str = "gate"
    layers: tuple[int, ...] = (0, 1)
    top_k: int = 2
    transposed: bool = False


CASES = [
    Case("Mixtral", "MixtralForCausalLM", "MixtralConfig", {"intermediate_size": INNER, "num_local_experts": EXPERTS}),
    Case(
        "Qwen3-MoE",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {"moe_intermediate_size": INNER, "num_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    Case(
        "OLMoE",
        "OlmoeForCausalLM",
        "OlmoeConfig",
        {"intermediate_size": INNER, "num_experts": EXPERTS, "num_experts_per_tok": 2},
    ),
    Case(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "intermediate_size": 64,
            "moe_intermediate_size": INNER,
            "n_routed_experts": EXPERTS,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        layers=(1,),
    ),
    Case(
        "gpt-oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        {"intermediate_size": INNER, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 8},
        router="router",
        transposed=True,
    ),
    Case(
        "Llama-4",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            "intermediate_size": INNER,
            "intermediate_size_mlp": INNER,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 1,
            "head_dim": 8,
        },
        moe="feed_forward",
        router="router",
        top_k=1,
        transposed=True,
    ),
]

# One format a granularity: tensor, channel, static block, square block (ragged here), the two-level ones, MX.
GRANULARITIES = [
    FORMATS[name] for name in ("FP8", "INT8_PER_CHANNEL", "INT4_BLOCK32", "FP8_BLOCK", "NVFP4", "NVFP4_STATIC", "MXFP4")
]

# Each class with each way to compute its experts; Llama-4 has only one.
IMPLEMENTATIONS = [(case, "eager") for case in CASES] + [(case, "grouped_mm") for case in CASES[:-1]]

cases = pytest.mark.parametrize("case", CASES, ids=name_of)
granularities = pytest.mark.parametrize("format", GRANULARITIES, ids=name_of)


def build(case, **options):
    """The tiny model, its weights drawn here (no two experts of one magnitude), and its parameters by name."""
    common = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    # The fused attention has other kernels under torch.func than outside; the eager one has the same, bit for bit.
    options = {"num_key_value_heads": 2, "attn_implementation": "eager"} | case.options | options
    model = getattr(transformers, case.model)(getattr(transformers, case.config)(**common, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(("norm" in name) + 0.1 * torch.randn(param.shape, generator=generator))
            if param.dim() == 3:
                param.mul_(2.0 ** torch.arange(EXPERTS)[:, None, None])
    return model, dict(model.named_parameters())


def expert_keys(case):
    """The names of the stacked experts' weights, in the order of the model."""
    return [f"model.layers.{i}.{case.moe}.experts.{role}" for i in case.layers for role in SHAPES]


def plain_matrix(case, expert):
    """One expert's weight as [out, in]."""
    return (expert.transpose(0, 1) if case.transposed else expert).detach()


def plain_amax(matrix, format):
    """The largest absolute value of each granule of one expert's [out, in], in a loop; and of the whole expert."""
    magnitude = matrix.float().abs()
    whole = magnitude.max()
    if format.block == (None, None) or format.dynamic:
        return whole, whole
    out_features, in_features = matrix.shape
    rows, columns = format.block[0] or out_features, format.block[1] or in_features
    granules = [
        [magnitude[r : r + rows, c : c + columns].max() for c in range(0, in_features, columns)]
        for r in range(0, out_features, rows)
    ]
    return torch.tensor(granules), whole


def plain_fakequant(case, param, format):
    """Each expert of a stacked parameter by the reference, on the explicitly transposed matrix, from its own amax."""
    outs = []
    for expert in param:
        matrix = plain_matrix(case, expert)
        amax, whole = plain_amax(matrix, format)
        out = fake_quantize_reference(
            matrix.contiguous(),
            None if format.is_stateless else amax,
            whole if format is FORMATS["NVFP4_STATIC"] else None,
            format=format,
            out_dtype=param.dtype,
        )
        outs.append(out.transpose(0, 1) if case.transposed else out)
    return torch.stack(outs)


def tokens_of(count):
    """`count` sequences of 32 tokens, or for 0 a single token."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(VOCABULARY, (count, 32) if count else (1, 1), generator=generator)


def loss_of(logits):
    """A loss that every logit moves."""
    return logits.float().square().mean()


class Routing:
    """Which experts got a token, by layer: top-k of the router's logits, computed here from what the router saw."""

    def __init__(self, case, model):
        self.hit = {}
        self.hooks = [
            model.model.layers[i].get_submodule(f"{case.moe}.{case.router}").register_forward_hook(self.record(case, i))
            for i in case.layers
        ]

    def record(self, case, layer):
        def hook(router, args, _):
            logits = F.linear(args[0].detach().reshape(-1, HIDDEN), router.weight, getattr(router, "bias", None))
            self.hit[layer] = set(logits.topk(case.top_k).indices.flatten().tolist())

        return hook

    def __enter__(self):
        return self.hit

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@cases
@pytest.mark.parametrize("rules", [presets.NVFP4_EXPERTS_ONLY_CFG, {"*.experts.*": fqt.FP8}], ids=["NVFP4", "FP8"])
def test_the_experts_are_found_as_they_are_stored(case, rules):
    """Kills: experts missed or miscounted, and [in, out] storage taken for [out, in] or the other way round."""
    _, params = build(case)
    format = fqt.FP8 if isinstance(rules, dict) else fqt.NVFP4
    spec = fqt.select(params, rules)
    found = [(g.key, g.names, g.format, g.experts, g.shape, g.stacked, g.transposed) for g in spec.groups]
    wanted = [
        (key, (key,), format, EXPERTS, SHAPES[key.rpartition(".")[2]], True, case.transposed)
        for key in expert_keys(case)
    ]
    assert found == wanted


@cases
def test_what_is_not_an_expert_is_listed_with_its_reason(case):
    """Kills a preset that quantizes the router or the head, and a parameter that is in neither list."""
    _, params = build(case)
    spec = fqt.select(params, presets.NVFP4_EXPERTS_ONLY_CFG)
    excluded = {
        "lm_head.": "*lm_head*",
        ".embed_tokens.": "*embed[._s]*",
        ".mlp.gate.": "*mlp.gate.*",
        ".router.": "*router*",
    }

    def why(name):
        if name.endswith("bias"):
            return "bias"
        if params[name].dim() == 1:
            return "1-D"
        patterns = [pattern for part, pattern in excluded.items() if part in f"{name}."]
        return f"excluded by {patterns[0]}" if patterns else "no rule"

    wanted = {name: why(name) for name in params if name not in expert_keys(case)}
    assert {skipped.name: skipped.reason for skipped in spec.skipped} == wanted
    assert all(skipped.shape == tuple(params[skipped.name].shape) for skipped in spec.skipped)
    # The cases mean something only if the model has each of these.
    routers = {f"model.layers.{i}.{case.moe}.{case.router}.weight" for i in case.layers}
    assert routers | {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} < wanted.keys()
    assert all(wanted[name].startswith("excluded by") for name in routers)


@cases
def test_a_model_on_meta_gives_the_same_spec(case):
    """Selection reads names and shapes only: a model without storage has the spec of the real one."""
    model, params = build(case)
    with torch.device("meta"):
        ghost = dict(type(model)(model.config).named_parameters())
    assert all(param.is_meta for param in ghost.values())
    assert fqt.select(ghost, presets.FP8_EXPERTS_ONLY_CFG) == fqt.select(params, presets.FP8_EXPERTS_ONLY_CFG)


@cases
@granularities
def test_calibration_is_the_largest_magnitude_of_each_granule_of_out_by_in(case, format):
    """Kills an amax along the stored axes of a transposed expert, over the wrong extent, or shared by two experts."""
    _, params = build(case)
    state = fqt.transform(fqt.select(params, {"*.experts.*": format})).calibrate(params)
    assert list(state) == expert_keys(case)
    for key, group in state.items():
        plain = [plain_amax(plain_matrix(case, expert), format) for expert in params[key]]
        if format.is_stateless:
            assert group == {}
            continue
        assert same_bits(group["amax"], torch.stack([amax for amax, _ in plain]))
        if format is FORMATS["NVFP4_STATIC"]:
            assert same_bits(group["global_amax"], torch.stack([whole for _, whole in plain]))
        else:
            assert list(group) == ["amax"]


@cases
@granularities
def test_each_expert_is_quantized_as_its_own_matrix_out_by_in(case, format):
    """Fake quantization of a stacked parameter is the reference on each (transposed) expert alone, bit for bit."""
    _, params = build(case)
    fq = fqt.transform(fqt.select(params, {"*.experts.*": format}))
    quantized = fq.fakequant(params, fq.calibrate(params))
    for key in expert_keys(case):
        assert same_bits(quantized[key].detach(), plain_fakequant(case, params[key], format))


@cases
@granularities
def test_functional_call_is_the_model_with_its_experts_overwritten(case, format):
    """Logits and gradients are those of a model that holds the quantized weights; and they are not the originals.

    Pass-through: the gradient at the original weight is the one at the quantized weight. Kills a quantized weight that
    does not reach the forward, and a gradient that is lost or scaled on its way.
    """
    model, params = build(case)
    tokens = tokens_of(4)
    with torch.no_grad():
        original = model(tokens).logits
    fq = fqt.transform(fqt.select(params, {"*.experts.*": format}))
    logits = functional_call(model, fq.fakequant(params, fq.calibrate(params)), (tokens,)).logits
    loss_of(logits).backward()
    assert logits.isfinite().all()
    assert not torch.equal(logits, original)

    overwritten, theirs = build(case)
    with torch.no_grad():
        for key in expert_keys(case):
            theirs[key].copy_(plain_fakequant(case, params[key], format))
    wanted = overwritten(tokens).logits
    loss_of(wanted).backward()
    assert torch.equal(logits, wanted)
    assert all(torch.equal(params[key].grad, theirs[key].grad) for key in expert_keys(case))


@pytest.mark.parametrize(("case", "experts_implementation"), IMPLEMENTATIONS, ids=name_of)
def test_layerwise_and_value_and_grad_are_functional_call(case, experts_implementation):
    """Logits and gradients. What a class asks of a weight outside its layer, such as its dtype, is answered."""
    model, params = build(case)
    model.set_experts_implementation(experts_implementation)
    tokens = tokens_of(4)
    fq = fqt.transform(fqt.select(params, {"*.experts.*": fqt.NVFP4}))
    state = fq.calibrate(params)
    loss = loss_of(functional_call(model, fq.fakequant(params, state), (tokens,)).logits)
    wanted = dict(zip(params, torch.autograd.grad(loss, [*params.values()], allow_unused=True), strict=True))
    with fqt.layerwise(fq, model, state):
        found = loss_of(model(tokens).logits)
        found.backward()
    assert torch.equal(found, loss)
    (stepped,), grads = fqt.value_and_grad(lambda m, ids: loss_of(m(ids).logits), fq, model)(params, state, [tokens])
    assert torch.equal(stepped, loss)
    for name, grad in wanted.items():
        assert grad is None or torch.equal(params[name].grad, grad), name
        assert torch.equal(grads[name], torch.zeros_like(params[name]) if grad is None else grad), name


def test_dbrx_whose_parent_reads_its_experts_weights():
    """Named bug: under `layerwise` its logits were those of the unquantized model. `value_and_grad` is right."""
    ffn = {"moe_num_experts": EXPERTS, "moe_top_k": 2, "ffn_hidden_size": INNER}
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
    sizes = {"d_model": HIDDEN, "n_heads": 4, "n_layers": 2, "vocab_size": VOCABULARY, "max_seq_len": 32}
    config = transformers.DbrxConfig(ffn_config=ffn, attn_config=attention, attn_implementation="eager", **sizes)
    model = transformers.DbrxForCausalLM(config).eval()
    params, tokens = dict(model.named_parameters()), tokens_of(4)
    single = r".*experts\.mlp\.\w+"  # all experts in one matrix, taken as one
    fq = fqt.transform(fqt.select(params, {"*.experts.mlp.*": fqt.INT4_BLOCK32}, experts=single))
    state = fq.calibrate(params)
    with (
        pytest.raises(ValueError, match=r"experts\.mlp\..1'.*outside the forward of its layer, DbrxExpertGLU"),
        fqt.layerwise(fq, model, state),
    ):
        model(tokens)
    logits = functional_call(model, fq.fakequant(params, state), (tokens,)).logits
    assert not torch.equal(logits, model(tokens).logits)
    (loss,), _ = fqt.value_and_grad(lambda m, ids: loss_of(m(ids).logits), fq, model)(params, state, [tokens])
    assert torch.equal(loss, loss_of(logits))


@pytest.mark.parametrize(("case", "experts_implementation"), IMPLEMENTATIONS, ids=name_of)
@pytest.mark.parametrize("sequences", [8, 0], ids=["every_expert", "one_token"])
@granularities
def test_exactly_the_experts_that_got_a_token_get_a_gradient(case, experts_implementation, sequences, format):
    """Kills a gradient lost for one expert of a stack, or leaked to an expert that the router left out."""
    model, params = build(case)
    model.set_experts_implementation(experts_implementation)
    fq = fqt.transform(fqt.select(params, presets.experts_only(format)))
    with Routing(case, model) as hit:
        logits = functional_call(model, fq.fakequant(params, fq.calibrate(params)), (tokens_of(sequences),)).logits
        loss_of(logits).backward()
    assert set(hit) == set(case.layers)
    for key in expert_keys(case):
        routed = hit[int(key.split(".")[2])]
        # Precondition: many tokens reach every expert, and one token reaches top-k of them.
        assert routed == set(range(EXPERTS)) if sequences else len(routed) == case.top_k
        for expert, grad in enumerate(params[key].grad):
            assert grad.isfinite().all()
            assert bool((grad != 0).any()) == (expert in routed), f"{key}[{expert}], routed to {routed}"


@cases
@granularities
def test_torch_func_grad_is_backward(case, format):
    """torch.func.grad and .backward() through calibrate, fakequant and the model give the same bits."""
    model, params = build(case, hidden_act="relu")  # silu's backward has another formula under torch.func
    tokens = tokens_of(2)
    fq = fqt.transform(fqt.select(params, {"*.experts.*": format}), backward="clip")

    def loss(params):
        state = optree.tree_map(lambda amax: amax / 2, fq.calibrate(params))  # so that "clip" has something to clip
        return loss_of(functional_call(model, fq.fakequant(params, state), (tokens,)).logits)

    grads = torch.func.grad(loss)({name: param.detach() for name, param in params.items()})
    loss(params).backward()
    for name, param in params.items():
        backward = torch.zeros_like(param) if param.grad is None else param.grad
        assert same_bits(grads[name], backward), name


@cases
@granularities
def test_only_the_experts_are_new_and_no_input_is_changed(case, format):
    """Untouched entries are the same objects in the same order; weights, state and dicts stay as they were."""
    _, params = build(case)
    fq = fqt.transform(fqt.select(params, {"*.experts.*": format}))
    entries = [(name, id(param), param._version) for name, param in params.items()]
    state = fq.calibrate(params)
    leaves = [(leaf, leaf._version) for leaf in optree.tree_leaves(state)]
    quantized = fq.fakequant(params, state)
    assert entries == [(name, id(param), param._version) for name, param in params.items()]
    assert all(now is leaf for now, (leaf, _) in zip(optree.tree_leaves(state), leaves, strict=True))
    assert all(leaf._version == version for leaf, version in leaves)
    assert list(quantized) == list(params)
    new = [name for name in params if quantized[name] is not params[name]]
    assert new == expert_keys(case)
    storages = {params[name].untyped_storage().data_ptr() for name in params}
    assert all(quantized[name].untyped_storage().data_ptr() not in storages for name in new)
