"""Rules for whole models, by ModelOpt's names, with its exclusions. Pass one to `select`.

    spec = select(params, presets.FP8_DEFAULT)                    # a Preset: weights, and what they are multiplied with
    spec = select(params, presets.NVFP4_EXPERTS_ONLY_CFG)         # rules for weights only
    spec = select(params, [*presets.FP8_DEFAULT_CFG, Rule("*layers.0.*", None)])

`*_DEFAULT_CFG` and `*_WEIGHT_ONLY_CFG` take every matrix but the excluded; `*_EXPERTS_ONLY_CFG` only routed experts.
A name without `_CFG` is a `Preset`, the whole of ModelOpt 0.47's configuration of the name with `_CFG`: the same
weights and inputs, in the same formats. Those of a name that says weights, or A16, have no inputs.

NOTE only what a matrix is multiplied with: where a model has `nn.LayerNorm`, batch norms or pooling, ModelOpt's
configurations quantize their inputs as well. RMSNorm, which mixtures of experts have, has none there.

Where ModelOpt 0.47 has a configuration of the name, its weight format is the same; the other experts-only names are
made after its NVFP4_EXPERTS_ONLY_CFG.
"""

from fq_transforms import formats
from fq_transforms.formats import Format
from fq_transforms.select import Preset, Rule

# ModelOpt 0.47, configs/ptq/units/default_disabled_quantizers.
_MODELOPT = (
    "*lm_head*",
    "*output_layer*",
    "output.*",
    "*proj_out.*",
    "*router*",
    "*mlp.gate.*",
    "*block_sparse_moe.gate*",
    "*mlp.shared_expert_gate.*",
    "*mixer.conv1d*",
    "*linear_attn.conv1d*",
    "*self_attention.conv1d*",
    "*linear_attn.in_proj_a*",
    "*linear_attn.in_proj_b*",
    "mtp.*",
    "*embed_vision*",
    "*vision_tower*",
    "*vision_model*",
    "*visual*",
    "*multi_modal_projector*",
)
# What ModelOpt leaves out by the class of the module, which a name has to tell here: embeddings, and gates and
# convolutions that are parameters of their own. Norms and biases are never weights (`select`).
_BY_CLASS = (
    "*embed*",
    "*wte.*",
    "*wpe.*",
    "*conv1d*",
    "*feed_forward.gate.*",
    "*shared_expert_gate*",
    "*shared_experts.gate_weight",
)
# A model need not have any of these, so none is required.
EXCLUDED = tuple(Rule(pattern, None, required=False) for pattern in (*_MODELOPT, *_BY_CLASS))


def whole_model(format: Format) -> tuple[Rule, ...]:
    """Every matrix but the excluded.

    Example:
        >>> rule = whole_model(formats.FP8)[0]
        >>> rule.pattern, rule.format.name
        ('*', 'FP8')
    """
    return (Rule("*", format), *EXCLUDED)


def experts_only(format: Format) -> tuple[Rule, ...]:
    """Routed experts: module lists, Megatron's local_experts, TE's grouped linears, stacked parameters.

    Example:
        >>> [rule.pattern for rule in experts_only(formats.NVFP4)][:2]
        ['*.experts.*', '*.local_experts.*']
    """
    patterns = ("*.experts.*", "*.local_experts.*", "experts.*", "local_experts.*")
    rules = tuple(Rule(pattern, format, required=False) for pattern in patterns)
    return (*rules, *EXCLUDED)


NVFP4_DEFAULT_CFG = whole_model(formats.NVFP4)
NVFP4_EXPERTS_ONLY_CFG = experts_only(formats.NVFP4)
FP8_DEFAULT_CFG = whole_model(formats.FP8)
FP8_EXPERTS_ONLY_CFG = experts_only(formats.FP8)
FP8_PER_CHANNEL_PER_TOKEN_CFG = whole_model(formats.FP8_PER_CHANNEL)
FP8_PER_CHANNEL_EXPERTS_ONLY_CFG = experts_only(formats.FP8_PER_CHANNEL)
FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG = whole_model(formats.FP8_BLOCK)
FP8_2D_BLOCKWISE_EXPERTS_ONLY_CFG = experts_only(formats.FP8_BLOCK)
INT8_DEFAULT_CFG = whole_model(formats.INT8_PER_CHANNEL)
INT8_WEIGHT_ONLY_CFG = whole_model(formats.INT8_PER_CHANNEL)
INT8_EXPERTS_ONLY_CFG = experts_only(formats.INT8_PER_CHANNEL)
INT4_BLOCKWISE_WEIGHT_ONLY_CFG = whole_model(formats.INT4_BLOCK128)
INT4_BLOCKWISE_EXPERTS_ONLY_CFG = experts_only(formats.INT4_BLOCK128)
MXFP8_DEFAULT_CFG = whole_model(formats.MXFP8)
MXFP8_EXPERTS_ONLY_CFG = experts_only(formats.MXFP8)
MXFP6_DEFAULT_CFG = whole_model(formats.MXFP6_E3M2)
MXFP6_EXPERTS_ONLY_CFG = experts_only(formats.MXFP6_E3M2)
MXFP4_DEFAULT_CFG = whole_model(formats.MXFP4)
MXFP4_EXPERTS_ONLY_CFG = experts_only(formats.MXFP4)

# Whole presets. Inputs by channel have a scale a token.
FP8_DEFAULT = Preset(FP8_DEFAULT_CFG, whole_model(formats.FP8))
FP8_PER_CHANNEL_PER_TOKEN = Preset(FP8_PER_CHANNEL_PER_TOKEN_CFG, whole_model(formats.FP8_PER_CHANNEL))
FP8_2D_BLOCKWISE_WEIGHT_ONLY = Preset(FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG)
INT8_DEFAULT = Preset(INT8_DEFAULT_CFG, whole_model(formats.INT8))
INT8_WEIGHT_ONLY = Preset(INT8_WEIGHT_ONLY_CFG)
INT4_BLOCKWISE_WEIGHT_ONLY = Preset(INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
NVFP4_DEFAULT = Preset(NVFP4_DEFAULT_CFG, whole_model(formats.NVFP4))
NVFP4_EXPERTS_ONLY = Preset(NVFP4_EXPERTS_ONLY_CFG, experts_only(formats.NVFP4))
W4A16_NVFP4 = Preset(NVFP4_DEFAULT_CFG)
MXFP8_DEFAULT = Preset(MXFP8_DEFAULT_CFG, whole_model(formats.MXFP8))
MXFP6_DEFAULT = Preset(MXFP6_DEFAULT_CFG, whole_model(formats.MXFP6_E3M2))
MXFP4_DEFAULT = Preset(MXFP4_DEFAULT_CFG, whole_model(formats.MXFP4))
