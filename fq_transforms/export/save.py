"""The one door of exports: a folder in a layout, for a reader."""

import os
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from fq_transforms.export.layouts import compressed_tensors, fp8, modelopt
from fq_transforms.export.layouts.plan import ExportPlan, Target, export
from fq_transforms.export.readers import engine_of
from fq_transforms.formats import Layout, check_layout
from fq_transforms.state import State
from fq_transforms.transform import Transform

__all__ = ["LAYOUTS", "save"]


def _config_alone(plan: ExportPlan) -> dict[str, Any]:
    return {"config.json": plan.config}


LAYOUTS: dict[str, Target] = {
    "compressed-tensors": compressed_tensors.TARGET,
    "modelopt": modelopt.TARGET,
    "fp8": fp8.TARGET,
    "plain": Target("plain", "plain", _config_alone),
}


def save(
    path: str | os.PathLike[str],
    fq: Transform,
    params: Mapping[str, Tensor],
    state: State,
    *,
    config: Any,
    layout: Layout = "compressed-tensors",
    reader: Literal["vllm", "transformers"] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a folder that an engine loads to `fq.fakequant`'s weights: shards, their index, config.json.

    Args:
        path: A new name, or an empty directory. It appears whole or not at all.
        fq: What is packed.
        params: The whole `model.state_dict()`, buffers too. What is not selected is written as it is.
        state: From `calibrate`. Roles that engines fuse are tied: see `tie`.
        config: `model.config` of transformers, or what config.json holds, with `model_type` and `architectures`.
        layout: "compressed-tensors", "modelopt" (its HF export), "fp8" (DeepSeek's), "plain": fake weights, any format.
            Of formats that are not its own (`transform(spec, layout=)`) a warning counts what is read otherwise.
        reader: Who must load it: what it does not load is refused, and files are spelled as it wants them.
        max_shard_size: Of a file: bytes, or such as "5GB".

    Raises:
        KeyError: A parameter or a group of the state is missing.
        ValueError: The layout or the reader does not take a format; fused roles are not tied; a name or shape is
            not one of this model's files; `path` is taken. All but NaN before a write.
        ImportError, OSError: tqdm is not installed; a file cannot be written.

    Example:
        >>> import tempfile, torch, fq_transforms as fqt
        >>> params = {f"mlp.experts.{i}.up_proj.weight": torch.ones(4, 16) for i in range(2)}
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.NVFP4}))
        >>> config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     save(f"{parent}/model", fq, params, fq.calibrate(params), config=config, reader="vllm")
        ...     sorted(os.listdir(f"{parent}/model"))
        ['config.json', 'model.safetensors']
    """
    export(LAYOUTS[check_layout(layout)], engine_of(layout, reader), path, fq, params, state, config, max_shard_size)
