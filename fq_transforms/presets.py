"""Rules for whole models, by ModelOpt's names, with its exclusions. Pass one to `select`, or build on it.

    spec = select(params, presets.FP8_DEFAULT_CFG)                          # weights, and what they are multiplied with
    spec = select(params, presets.weights_only(presets.FP8_DEFAULT_CFG))    # weights only
    spec = select(params, presets.per_expert_inputs(presets.FP8_DEFAULT_CFG))  # an amax of each expert's own inputs
    spec = select(params, [*presets.FP8_DEFAULT_CFG, Rule("*layers.0.*")])  # all but a layer
    spec = select(params, presets.for_layout(presets.NVFP4_DEFAULT_CFG, "compressed-tensors"))

A name that ModelOpt 0.47 has is its whole configuration: the same weights and inputs, in the same formats. As there,
the experts of a group share the amax of their inputs, unless `per_expert_inputs` is asked for.
`*_DEFAULT_CFG` and `*_WEIGHT_ONLY_CFG` take the weights of modules but the excluded, and routed experts;
`*_EXPERTS_ONLY_CFG` routed experts alone. docs/classes.md holds both libraries beside each other, class by class.
ModelOpt has one of the latter, NVFP4's. The others are ours, made after it: each is the rule of a whole model's
configuration, weights and inputs, for the routed experts.

NOTE only what a matrix is multiplied with: where a model has `nn.LayerNorm`, batch norms or pooling, ModelOpt's
configurations quantize their inputs as well. RMSNorm, which mixtures of experts have, has none there.
"""

from dataclasses import replace

from fq_transforms import formats
from fq_transforms.formats import Format
from fq_transforms.rules import Rule, Rules, as_rules

# What modules call their weight, also Transformer Engine's grouped linears. ModelOpt quantizes modules, so a parameter
# of another name (a state matrix, a hyper-connection, a table of positions) is left alone, unless it is of experts.
_WEIGHTS = ("*.weight", "*.weight[0-9]*", "weight", "weight[0-9]*")
_EXPERTS = ("*.experts.*", "*.local_experts.*", "experts.*", "local_experts.*")

# ModelOpt 0.47, configs/ptq/units/default_disabled_quantizers. Convolutions are never weights (`select`).
_MODELOPT = (
    "*lm_head*",
    "*output_layer*",
    "output.*",
    "*proj_out.*",
    "*router*",
    "*mlp.gate.*",
    "*block_sparse_moe.gate*",
    "*mlp.shared_expert_gate.*",
    "*linear_attn.in_proj_a*",
    "*linear_attn.in_proj_b*",
    "mtp.*",
    "*embed_vision*",
    "*vision_tower*",
    "*vision_model*",
    "*visual*",
    "*multi_modal_projector*",
)
# What ModelOpt leaves out by the class of the module, which a name has to tell here: routers by the block that they are
# the gate of, embeddings (a patch *embedder* projects, but is one if the weight is its own), and LoRA without PEFT.
_BY_CLASS = (
    "*moe.gate.*",
    "*ffn.gate.*",
    "*feed_forward.gate.*",
    "*mixer.gate.*",
    "*shared_expert_gate*",
    "*embed[._s]*",
    "*embedding*",
    "*embedder.weight",
    "*wte.*",
    "*wpe.*",
    "shared.weight",
    "*.shared.weight",
    "*_bias.weight",
    "*.lora_*",
)
# A model need not have any of these, so none is required.
EXCLUDED = tuple(Rule(pattern, required=False) for pattern in (*_MODELOPT, *_BY_CLASS))


def whole_model(weights: Format | None, inputs: Format | None = None) -> tuple[Rule, ...]:
    """What modules call `weight`, and routed experts, but the excluded: routers, embeddings, heads, vision.

    Example:
        >>> rule = whole_model(formats.FP8)[0]
        >>> rule.pattern, rule.weights.name, rule.inputs
        ('*.weight', 'FP8', None)
    """
    return _rules((*_WEIGHTS, *_EXPERTS), weights, inputs)


def experts_only(weights: Format | None, inputs: Format | None = None) -> tuple[Rule, ...]:
    """Routed experts: module lists, Megatron's local_experts, TE's grouped linears, stacked parameters.

    Example:
        >>> [rule.pattern for rule in experts_only(formats.NVFP4)][:2]
        ['*.experts.*', '*.local_experts.*']
    """
    return _rules(_EXPERTS, weights, inputs)


def _rules(patterns: tuple[str, ...], weights: Format | None, inputs: Format | None) -> tuple[Rule, ...]:
    return (*(Rule(pattern, weights, inputs, required=False) for pattern in patterns), *EXCLUDED)


def weights_only(rules: Rules) -> tuple[Rule, ...]:
    """The same rules without inputs: they select the same weights, in the same formats.

    Example:
        >>> weights_only(FP8_DEFAULT_CFG) == whole_model(formats.FP8)
        True
    """
    return tuple(replace(rule, inputs=None, per_expert_inputs=False) for rule in as_rules(rules))


def per_expert_inputs(rules: Rules) -> tuple[Rule, ...]:
    """The same rules with an amax for each expert's inputs, in place of one that the experts of a group share.

    Example:
        >>> per_expert_inputs(FP8_DEFAULT_CFG)[0].per_expert_inputs, FP8_DEFAULT_CFG[0].per_expert_inputs
        (True, False)
    """
    return tuple(replace(rule, per_expert_inputs=rule.inputs is not None) for rule in as_rules(rules))


def for_layout(rules: Rules, layout: formats.Layout) -> tuple[Rule, ...]:
    """The same rules in a layout's own formats, which its library reads bit for bit: see `formats.own_format`.

    Raises:
        ValueError: There is no such layout, or these are no rules.

    Example:
        >>> for_layout(W4A16_NVFP4_CFG, "compressed-tensors")[0].weights.name
        'NVFP4_COMPRESSED_TENSORS'
    """
    formats.check_layout(layout)
    return tuple(rule.for_layout(layout) for rule in as_rules(rules))


# ModelOpt 0.47's. Weights first, then inputs; per-channel inputs have one scale per token.
NVFP4_DEFAULT_CFG = whole_model(formats.NVFP4, formats.NVFP4)
NVFP4_EXPERTS_ONLY_CFG = experts_only(formats.NVFP4, formats.NVFP4)
W4A16_NVFP4_CFG = whole_model(formats.NVFP4)
FP8_DEFAULT_CFG = whole_model(formats.FP8, formats.FP8)
FP8_PER_CHANNEL_PER_TOKEN_CFG = whole_model(formats.FP8_PER_CHANNEL, formats.FP8_PER_CHANNEL)
FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG = whole_model(formats.FP8_BLOCK)
INT8_DEFAULT_CFG = whole_model(formats.INT8_PER_CHANNEL, formats.INT8)
INT8_WEIGHT_ONLY_CFG = whole_model(formats.INT8_PER_CHANNEL)
INT4_BLOCKWISE_WEIGHT_ONLY_CFG = whole_model(formats.INT4_BLOCK128)
MXFP8_DEFAULT_CFG = whole_model(formats.MXFP8, formats.MXFP8)
MXINT8_DEFAULT_CFG = whole_model(formats.MXINT8, formats.MXINT8)
MXFP6_DEFAULT_CFG = whole_model(formats.MXFP6_E3M2, formats.MXFP6_E3M2)
MXFP4_DEFAULT_CFG = whole_model(formats.MXFP4, formats.MXFP4)

# Ours: ModelOpt has none of these names.
FP8_EXPERTS_ONLY_CFG = experts_only(formats.FP8, formats.FP8)
FP8_PER_CHANNEL_EXPERTS_ONLY_CFG = experts_only(formats.FP8_PER_CHANNEL, formats.FP8_PER_CHANNEL)
FP8_2D_BLOCKWISE_EXPERTS_ONLY_CFG = experts_only(formats.FP8_BLOCK)
INT8_EXPERTS_ONLY_CFG = experts_only(formats.INT8_PER_CHANNEL, formats.INT8)
INT4_BLOCKWISE_EXPERTS_ONLY_CFG = experts_only(formats.INT4_BLOCK128)
MXFP8_EXPERTS_ONLY_CFG = experts_only(formats.MXFP8, formats.MXFP8)
MXINT8_EXPERTS_ONLY_CFG = experts_only(formats.MXINT8, formats.MXINT8)
MXFP6_EXPERTS_ONLY_CFG = experts_only(formats.MXFP6_E3M2, formats.MXFP6_E3M2)
MXFP4_EXPERTS_ONLY_CFG = experts_only(formats.MXFP4, formats.MXFP4)
