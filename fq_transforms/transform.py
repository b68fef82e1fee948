"""`Transform`: everything static about a quantization, and the pure functions that follow from it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from fq_transforms.activations.apply import apply
from fq_transforms.activations.fill_unseen import fill_unseen
from fq_transforms.activations.hessians import input_hessians
from fq_transforms.activations.observe import Forward
from fq_transforms.activations.quantize import quantized_inputs
from fq_transforms.activations.second_moments import Unseen, input_second_moments
from fq_transforms.calibrate import calibrate, check_method
from fq_transforms.checks import DTYPES, check_state, is_read
from fq_transforms.fakequant import check_learnable, fakequant
from fq_transforms.formats import Layout
from fq_transforms.masters import Tensors
from fq_transforms.methods import MAX, Method
from fq_transforms.ops.quantize.autograd import Backward
from fq_transforms.pack import PackedTree, pack, unpack
from fq_transforms.pullback import pullback, take_grads
from fq_transforms.report.report import Report, report
from fq_transforms.rounding import Stochastic
from fq_transforms.sequential import LayerStore, calibrate_sequentially
from fq_transforms.spec import Spec
from fq_transforms.state import State, init
from fq_transforms.sync import sync

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Transform", "transform"]

BACKWARD: tuple[Backward, ...] = ("pass_through", "clip", "lsq")


@dataclass(frozen=True, repr=False)
class Transform:
    """What is quantized, and how: statics only, frozen and hashable.

    Its methods are pure functions, but for the two that write: `fakequant` with `out`, and `take_grads`.

    Tensors and models are given where they are used, so a Transform pickles, and is the same on all ranks. What takes a
    Transform takes no spec, backward rule, method or dtype besides.

    Attributes:
        spec: Which weights, by expert, and their formats; from `select`.
        method: How `calibrate` chooses an amax; see `fq_transforms.methods`.
        backward: The gradient of `fakequant`. "pass_through": that of the identity. "clip": zero where abs(w) > amax;
            dynamic formats pass every gradient. "lsq": as "clip", and a gradient to the state: see docs/learned-scales.
        out_dtype: bf16, fp16 or fp32 for fake-quantized weights; their own dtype if None.
        separate: Give each fake-quantized weight memory of its own on a GPU, and each gradient that `take_grads` casts.
            Without, those of a group share one allocation, which is faster to make, and which one that is kept alive
            keeps whole.

    Raises:
        ValueError: An option is not one of its choices, or a format has no amax that the method could choose.

    Example:
        >>> import fq_transforms as fqt
        >>> params = {f"experts.{i}.weight": torch.full((4, 32), i + 1.0) for i in range(2)}
        >>> fq = Transform(fqt.select(params, {"*": fqt.NVFP4}), backward="clip")
        >>> fq
        Transform(1 group, 2 weights: 100.0 % of 256 parameters; backward='clip')
        >>> fq.calibrate(params)
        {'experts.*.weight': {'amax': tensor([1., 2.])}}
    """

    spec: Spec
    _: KW_ONLY
    method: Method = MAX
    backward: Backward = "pass_through"
    out_dtype: torch.dtype | None = None
    separate: bool = False

    def __post_init__(self) -> None:
        spec, separate, out_dtype = (getattr(self, name) for name in ("spec", "separate", "out_dtype"))  # of any type
        if not isinstance(spec, Spec):
            raise ValueError(f"spec: found {type(spec).__name__}, wanted a Spec; call transform(select(params, rules))")
        if out_dtype is not None and out_dtype not in DTYPES:
            raise ValueError(f"out_dtype: found {out_dtype}, wanted bfloat16, float16 or float32")
        if self.backward not in BACKWARD:
            raise ValueError(f"backward: found {self.backward!r}, wanted 'pass_through', 'clip' or 'lsq'")
        if not isinstance(separate, bool):
            raise ValueError(f"separate: found {separate!r}, wanted True or False")
        check_method(self.method, self.spec)
        if self.backward == "lsq":
            check_learnable(self.spec)

    def __repr__(self) -> str:
        given = [f"{f.name}={value!r}" for f in fields(self)[1:] if (value := getattr(self, f.name)) != f.default]
        return f"Transform({'; '.join([self.spec.summary, *given])})"

    def __str__(self) -> str:
        return f"{self.spec}\n{self._options()}"

    def _repr_html_(self) -> str:
        return self.spec.to_html(self._options())

    def _options(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)[1:])

    def init(self, params: Mapping[str, Tensor]) -> State:
        """The state before calibration: every amax -inf, the identity of `merge`. Meta parameters give a meta state.

        Raises:
            KeyError: A parameter is missing.
            ValueError: A shape, dtype or device is not the spec's; a DTensor's shard cuts a block.

        Example:
            >>> import fq_transforms as fqt
            >>> params = {"experts.0.weight": torch.ones(4, 4)}
            >>> fqt.transform(fqt.select(params, {"*": fqt.FP8})).init(params)
            {'experts.*.weight': {'amax': tensor([-inf])}}
        """
        return init(params, spec=self.spec)

    def calibrate(
        self,
        params: Mapping[str, Tensor],
        batches: Any = None,
        *,
        model: Module | None = None,
        forward: Forward | None = None,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> State:
        """An amax for each granule of each expert's weight, as the method chooses it; with `Max`, max(abs(w)).

        Where the spec has inputs, the model runs on the batches, unquantized and without gradients, and their amax is
        max(abs(x)) over all tokens that a weight was multiplied with. States of parts of the batches `merge` to that
        of all, exactly. More on DTensors, checks of values and other methods: docs/calibration.

        Args:
            params: Names to tensors; may hold more than the spec names.
            batches: A tensor, a tuple of arguments or a dict of keyword arguments is one batch, any other iterable
                many. Read for inputs only.
            model: For inputs, the module whose parameters are `params`, in the mode that it shall run in.
            forward: For inputs, `forward(call, batch)`, if `call(batch)` is not how a batch is passed.
            statistics: For `Mse`, group key to what `input_second_moments` gives: mean squares, [E, in] or [in]; for
                formats with blocks of (1, B) also second moments, [E, in / B, B, B] or [in / B, B, B].

        Returns:
            A new state on the device of the weights, detached. An expert of zeros has amax 0; an expert without
            tokens keeps the input amax -inf: see `fill_unseen`.

        Raises:
            KeyError: A parameter is missing; statistics lack a group.
            ValueError: A weight or an input is NaN or infinite, and is named; a shape or dtype is not the spec's; a
                shard cuts a block; statistics do not fit; inputs lack a model or a batch, or a layer never ran.

        Source: ModelOpt 0.47 `MaxCalibrator`; of the other methods `fq_transforms.methods`.

        Example:
            >>> import fq_transforms as fqt
            >>> params = {"experts.0.w": torch.tensor([[1.0, -2.0]]), "experts.1.w": torch.tensor([[0.5, 0.0]])}
            >>> fqt.transform(fqt.select(params, {"*": fqt.INT8})).calibrate(params)
            {'experts.*.w': {'amax': tensor([2.0000, 0.5000])}}
        """
        return calibrate(
            params,
            batches,
            spec=self.spec,
            method=self.method,
            statistics=statistics,
            model=model,
            forward=forward,
        )

    def fakequant(
        self,
        params: Mapping[str, Tensor],
        state: State,
        *,
        rounding: Stochastic | None = None,
        out: Tensors | None = None,
        inplace: bool = False,
    ) -> dict[str, Tensor]:
        """The parameters with each selected weight quantized and dequantized by its own expert's scales.

        One launch per group; formulas: `fq_transforms.ops.quantize.reference.fake_quantize_reference`. Differentiable
        in `params`, and under "lsq" in `state`. With `out`, the write of a training step: docs/training.

        Args:
            params: Names to tensors; may hold more than the spec names. With `out`, the masters.
            state: From `calibrate`, or loaded.
            rounding: To the nearest if None, else `Stochastic(seed)`: up or down at random, unbiased, in every format.
            out: Tensors to write to, at least those of `params`, or a module, whose FSDP2 parts are resharded first.
                Not differentiable. Entries that are not selected are cast, but where they are the master itself.
            inplace: Allow `out` to be `params`. The unquantized values are gone then.

        Returns:
            A new dict in the order of `params`. Quantized entries are new tensors, all others the same objects; with
            `out` all are its tensors. A DTensor gives a DTensor placed alike, with no collective.

        Raises:
            KeyError: A parameter or a group of the state is missing.
            ValueError: A shape, dtype, device or placement is not as wanted; on a CPU an amax is NaN, infinite or
                negative (on a GPU its weights are NaN: see `state.check`); a tensor of `out` is not contiguous, or
                shares memory with another, or is the weight itself. Nothing is written then.

        Source: ModelOpt 0.47 `TensorQuantizer`, `pass_through_bwd` True or False; Esser et al. 2020 for "lsq".

        Example:
            >>> import fq_transforms as fqt
            >>> params = {"experts.0.weight": torch.tensor([[1.0, -2.01]]), "norm.weight": torch.ones(2)}
            >>> fq = fqt.transform(fqt.select(params, {"experts.*": fqt.INT8}))
            >>> fq.fakequant(params, fq.calibrate(params))["experts.0.weight"]
            tensor([[ 0.9971, -2.0100]])
        """
        return fakequant(
            params,
            state,
            spec=self.spec,
            out_dtype=self.out_dtype,
            backward=self.backward,
            separate=self.separate,
            rounding=rounding,
            out=out,
            inplace=inplace,
        )

    def pullback(
        self, masters: Mapping[str, Tensor], state: State, grads: Mapping[str, Tensor | None]
    ) -> tuple[dict[str, Tensor | None], dict[str, dict[str, Tensor | None]]]:
        """The gradients of masters and state from those of the fake weights: `fakequant`'s pullback, without a forward.

            pass_through    grad
            clip            grad where abs(master) <= amax, else 0
            lsq             that of clip, and of each amax: docs/learned-scales

        Args:
            masters: What `fakequant` was given.
            state: What `fakequant` was given.
            grads: Names of masters to gradients, in bf16, fp16 or fp32; None for an expert without tokens.

        Returns:
            Names to gradients in the dtype of the masters, placed as they are; None stays None. And, under "lsq", those
            of the state, nested as it is, else an empty dict. NaN passes through. A graph is kept only if a
            gradient requires one.

        Raises:
            KeyError: A gradient is of no master, or a group of the state is missing.
            ValueError: A gradient has another shape or device than its master, or another dtype than those.

        Example:
            >>> import fq_transforms as fqt
            >>> masters = {"w": torch.tensor([[1.0, -2.0]])}
            >>> fq = fqt.transform(fqt.select(masters, {"w": fqt.INT8}), backward="clip")
            >>> fq.pullback(masters, {"w": {"amax": torch.tensor([1.5])}}, {"w": torch.ones(1, 2).bfloat16()})
            ({'w': tensor([[1., 0.]])}, {})
        """
        return pullback(masters, state, grads, spec=self.spec, backward=self.backward, separate=self.separate)

    def take_grads(
        self, params: Tensors, masters: Mapping[str, Tensor], state: State, *, set_to_none: bool = True
    ) -> None:
        """Move the gradients of a model's parameters through `pullback` into `grad` of the masters, where they add up.

        Once per optimizer step, or once per microbatch, whose gradients then add up in the dtype of the masters. Under
        "lsq" those of the state add up in `grad` of its leaves; scales of frozen weights get none.

        Args:
            params: Names to parameters, or a module, whose `grad` is None afterwards. `main_grad`, where layers add
                gradients up themselves, is taken in its place, and is zero afterwards.
            masters: Names to masters. One that is the parameter itself keeps its `grad`, as do parameters of no master.
            state: What `fakequant` was given.
            set_to_none: False for gradients that must stay where they are, as a CUDA graph's: zeros instead.

        Raises:
            KeyError, ValueError: As `pullback`; a parameter is missing, or gathered by FSDP2. Nothing is moved then.

        Example:
            >>> import fq_transforms as fqt
            >>> params = {"w": torch.nn.Parameter(torch.ones(1, 2, dtype=torch.bfloat16))}
            >>> masters = fqt.masters(params)
            >>> fq = fqt.transform(fqt.select(masters, {"w": fqt.INT8}))
            >>> params["w"].sum().backward()
            >>> fq.take_grads(params, masters, fq.calibrate(masters))
            >>> params["w"].grad, masters["w"].grad
            (None, tensor([[1., 1.]]))
        """
        take_grads(
            params,
            masters,
            state,
            spec=self.spec,
            backward=self.backward,
            separate=self.separate,
            set_to_none=set_to_none,
        )

    def quantized_inputs(self, model: Module, state: State) -> AbstractContextManager[object]:
        """Within, a model computes with each input that the spec selects quantized: the inputs' half of `apply`.

        For training with masters, whose fake weights the model has already: around forward and backward, under DDP of
        the module within. Differentiable as `apply` is.

        Raises:
            KeyError: A group is missing from the state.
            ValueError: As `apply`; on leaving, for a layer that never ran.

        Example:
            >>> import fq_transforms as fqt
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> _ = model.weight.data.fill_(1.0)
            >>> fq = fqt.transform(fqt.select(dict(model.named_parameters()), [fqt.Rule("*", fqt.FP8, fqt.INT8)]))
            >>> state = fq.calibrate(dict(model.named_parameters()), torch.tensor([[1.0, -2.0]]), model=model)
            >>> with fq.quantized_inputs(model, state):
            ...     model(torch.tensor([[0.5, 3.0]]))
            tensor([[2.5039]], grad_fn=<MmBackward0>)
        """
        check_state(state, self.spec, values=is_read)
        params = dict(model.named_parameters())
        return quantized_inputs(model, params, state, spec=self.spec, backward=self.backward)

    def apply(self, model: Module, params: Mapping[str, Tensor], state: State, /, *args: Any, **kwargs: Any) -> Any:
        """`functional_call(model, fakequant(params, state), args, kwargs)`, inputs quantized where the spec has some.

        No module is changed, but for the time of the call by pre-hooks on Transformer Engine's and Megatron's layers.

        Args:
            model: The module whose parameters are `params`.
            params: Names to tensors; may hold more than the spec names.
            state: From `calibrate` or `fill_unseen`, or loaded.
            *args: The model's, as it takes them: of a batch that is a dict, give **batch.
            **kwargs: The model's.

        Returns:
            What the model returns; differentiable in `params` and in the arguments. "clip" stops the gradient of an
            input beyond a calibrated amax per tensor.

        Raises:
            KeyError: A parameter or a group of the state is missing.
            ValueError: As `fakequant`; an expert has seen no token; a selected weight is used in another way than a
                product with an input, or in a checkpointed layer; a layer with inputs never ran; with inputs DTensors,
                vmap over weights, or torch.compile that does not see each of them used: docs/matrix.

        Example:
            >>> import fq_transforms as fqt
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
            >>> _ = model[0].weight.data.copy_(torch.eye(2))
            >>> params = dict(model.named_parameters())
            >>> fq = fqt.transform(fqt.select(params, [fqt.Rule("*", fqt.FP8, fqt.INT8)]))
            >>> state = fq.calibrate(params, torch.tensor([[1.0, -2.0]]), model=model)
            >>> fq.apply(model, params, state, torch.tensor([[0.5, 3.0]]))
            tensor([[0.5039, 2.0000]], grad_fn=<MmBackward0>)
        """
        return apply(
            model,
            params,
            state,
            args,
            kwargs,
            spec=self.spec,
            out_dtype=self.out_dtype,
            backward=self.backward,
            separate=self.separate,
        )

    def pack(self, params: Mapping[str, Tensor], state: State) -> PackedTree:
        """The codes and scales of every selected weight: what deployment stores and `fakequant` simulates.

        `unpack(pack(params, state), dtype=dtype)` has the values of `fakequant`, bit for bit; a zero that `fakequant`
        gives a sign loses it in the integer formats. Layouts: `fq_transforms.ops.pack.reference`.

        Returns:
            Group key to new tensors `codes` [E, out, packed in], `scale` (one number per granule) and, for two-level
            formats, `global_scale` [E]; [out, in] whatever the weights' own layout is. A pytree, like the state. Meta
            weights and state give its shapes. DTensors give DTensors placed alike; nothing is communicated.

        Raises:
            KeyError: A parameter or a group of the state is missing.
            ValueError: As `fakequant`; the spec has inputs; a weight on a CPU has NaN or infinity; `in`, or a shard of
                it, is not a multiple of what shares a byte; the format has scales that no stored number stands for.

        Source: the layouts of compressed-tensors 0.20 and ModelOpt 0.47.

        Example:
            >>> import fq_transforms as fqt
            >>> params = {"experts.0.weight": torch.tensor([[1.0, -2.0]])}
            >>> fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
            >>> fq.pack(params, fq.calibrate(params))
            {'experts.*.weight': {'codes': tensor([[[  64, -127]]], dtype=torch.int8), 'scale': tensor([63.5000])}}
        """
        return pack(params, state, spec=self.spec)

    def unpack(self, packed: PackedTree, *, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """The weights that codes and scales stand for, by the names of the spec, in the layout of the parameters.

        Args:
            packed: From `pack`, or loaded.
            dtype: bf16, fp16 or fp32.

        Raises:
            KeyError: A group is missing.
            ValueError: A group is unexpected; a leaf has another shape or dtype than the spec's, or is a DTensor;
                `dtype` is another.

        Example:
            >>> import fq_transforms as fqt
            >>> fq = fqt.transform(fqt.select({"experts.0.weight": torch.ones(1, 2)}, {"*": fqt.INT8}))
            >>> codes = torch.tensor([[[64, -127]]], dtype=torch.int8)
            >>> packed = {"experts.*.weight": {"codes": codes, "scale": torch.tensor([63.5])}}
            >>> fq.unpack(packed, dtype=torch.float32)
            {'experts.0.weight': tensor([[ 1.0079, -2.0000]])}
        """
        return unpack(packed, spec=self.spec, dtype=dtype)

    def fill_unseen(
        self, state: State, *, unseen: str | float = "raise", params: Mapping[str, Tensor] | None = None
    ) -> State:
        """The state with an amax for the inputs of experts that have seen no token, once all is merged and synced.

            unseen            amax of an unseen expert e, among the experts p of its group that have seen tokens
            "raise"           none: ValueError, naming layers and experts
            "max-of-peers"    max(amax[p])
            "from-weights"    max(amax[p] / max(abs(w[p]))) * max(abs(w[e])), with w from `params`
            a number          the number

        A group that shares one amax has it as soon as one of its experts has seen a token. `tokens` is left as it is.

        Returns:
            A new state; entries without unseen experts are the same objects.

        Raises:
            KeyError: A group or a parameter is missing.
            ValueError: `unseen` is none of these, or no finite number > 0; the state does not fit the spec; "raise"
                found unseen experts; no expert of a group has seen a token; `params` is missing.

        Source: "max-of-peers": ModelOpt 0.47's export, `set_expert_quantizer_amax`. "from-weights" is our own.

        Example:
            >>> import fq_transforms as fqt
            >>> params = {f"experts.{i}.w": torch.full((2, 2), i + 1.0) for i in range(3)}
            >>> rule = fqt.Rule("*", fqt.FP8, fqt.FP8, per_expert_inputs=True)
            >>> fq = fqt.transform(fqt.select(params, [rule]))
            >>> state = fq.init(params) | {"experts.*.w": {"amax": torch.ones(3)}}
            >>> state["experts.*.w.input"]["amax"][:2] = torch.tensor([1.0, 3.0])
            >>> fq.fill_unseen(state, unseen="from-weights", params=params)["experts.*.w.input"]["amax"]
            tensor([1.0000, 3.0000, 4.5000])
        """
        return fill_unseen(state, spec=self.spec, unseen=unseen, params=params)

    def input_second_moments(
        self,
        params: Mapping[str, Tensor],
        batches: Any,
        *,
        model: Module,
        forward: Forward | None = None,
        unseen: Unseen = "raise",
        group: "ProcessGroup | None" = None,
        blocks: bool = False,
    ) -> dict[str, Tensor]:
        """m[e, i] = mean of x[t, i]**2 over the tokens t that expert e multiplies its weight with, x @ w[e].T.

        With `blocks`, for formats with blocks b of (1, B), m[e, b, i, j] = mean of x[t, b * B + i] * x[t, b * B + j].
        These are the `statistics` of `calibrate`. The model runs unquantized. More, and ranks: docs/calibration.

        Args:
            params: Names to tensors; may hold more than the spec names.
            batches: As `calibrate` takes them, as it does the next two.
            model: As there.
            forward: As there.
            unseen: For experts without tokens: "raise", "mean-of-peers", or "ones", the error of the weight itself.
            group: Ranks with the same weights and each its own batches, over which sums are added.
            blocks: The same on all ranks.

        Returns:
            Group key to fp32 [E, in] or [E, in / B, B, B] on the device of the weights; sums are fp64. Dense: E = 1.

        Raises:
            KeyError: A parameter is missing.
            ValueError: As `calibrate` with inputs; no token where `unseen` wants some; another rank failed.

        Source: diagonal or blocks of GPTQ's Hessian, Frantar et al., arXiv:2210.17323, section 3; `llama-imatrix`.

        Example:
            >>> import fq_transforms as fqt
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> params = dict(model.named_parameters())
            >>> fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}), method=fqt.methods.Mse())
            >>> batches = [torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 2.0]])]
            >>> fq.input_second_moments(params, batches, model=model)
            {'weight': tensor([[5., 2.]])}
        """
        return input_second_moments(
            params,
            batches,
            spec=self.spec,
            model=model,
            forward=forward,
            unseen=unseen,
            group=group,
            blocks=blocks,
        )

    def calibrate_sequentially(
        self,
        model: Module,
        batches: Any,
        *,
        gptq: Mapping[str, Any] | None = None,
        forward: Forward | None = None,
        layers: str | None = None,
        unseen: str | float = "raise",
        store: LayerStore | None = None,
    ) -> tuple[Mapping[str, Tensor], State]:
        """Parameters and state, each layer calibrated on what the quantized layers before it give: docs/calibration.

            for i in layers:  state[i] = calibrate(params[i], x);  params[i] = gptq(params[i], state[i])
                              x = apply(layer i, params[i], state[i], x)

        Args:
            model: With its own parameters; left as it is.
            batches: As `calibrate` takes them. A thread runs the model on each, one at a time, and waits at each layer.
            gptq: Options of `fqt.gptq`, and `unseen` of `input_hessians`; None to move no weight.
            forward: As `calibrate` takes it.
            layers: Path of the list of layers; None for the one ModuleList that holds selected weights. What lies
                outside is calibrated last, on the outputs of the quantized layers, or on what comes before them.
            unseen: As `fill_unseen` takes it.
            store: `fqt.export.LayerFiles`, for a model that is in files, and to go on after a kill.

        Returns:
            The model's parameters by name, the same tensors where nothing has moved them, and a state.

        Raises:
            KeyError, ValueError: As `calibrate` and `fill_unseen`; the model has no list of layers; a layer is not
                called, or twice, in a forward; there is no batch. What the model raises, with the batch's number.

        Example:
            >>> import fq_transforms as fqt
            >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(2)))
            >>> fq = fqt.transform(fqt.select(dict(model.named_parameters()), {"*": fqt.INT8}))
            >>> params, state = fq.calibrate_sequentially(model, torch.ones(1, 4), layers="")
            >>> params["1.weight"] is model[1].weight, sorted(state)
            (True, ['0.weight', '1.weight'])
        """
        return calibrate_sequentially(
            self,
            model,
            batches,
            gptq=gptq,
            forward=forward,
            layers=layers,
            unseen=unseen,
            store=store,
        )

    def input_hessians(
        self,
        params: Mapping[str, Tensor],
        batches: Any,
        *,
        model: Module,
        forward: Forward | None = None,
        unseen: Unseen = "raise",
        group: "ProcessGroup | None" = None,
    ) -> dict[str, dict[str, Tensor]]:
        """H[e] = mean of x[t] x[t]^T over the tokens t that expert e multiplies its weight with, x @ w[e].T.

        What `gptq` takes. The diagonal is `input_second_moments`. The model runs on each batch, unquantized.

        Args:
            params: Names to tensors; may hold more than the spec names.
            batches: As `calibrate` takes them.
            model: As `calibrate` takes it.
            forward: As `calibrate` takes it.
            unseen: For experts without tokens: "raise", "mean-of-peers", or "ones", the identity.
            group: Ranks with the same weights and each its own batches; sums are added over them.

        Returns:
            Group key to {"hessian": fp32 [E, in, in], "tokens": fp64 [E]} on the device of the weights. Groups that see
            the same inputs, as gate and up do, have the same tensors. Sums are fp32. Dense weights: E = 1.

        Raises:
            KeyError: A parameter is missing.
            ValueError: As `input_second_moments`.

        Source: Frantar et al., arXiv:2210.17323, section 3; without its factor of 2, which changes nothing.

        Example:
            >>> import fq_transforms as fqt
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> params = dict(model.named_parameters())
            >>> fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
            >>> batches = [torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 2.0]])]
            >>> fq.input_hessians(params, batches, model=model)["weight"]
            {'hessian': tensor([[[5., 3.],
                     [3., 2.]]]), 'tokens': tensor([2.], dtype=torch.float64)}
        """
        return input_hessians(params, batches, spec=self.spec, model=model, forward=forward, unseen=unseen, group=group)

    def report(
        self, params: Mapping[str, Tensor], state: State, *, tokens: Mapping[str, Tensor] | None = None
    ) -> Report:
        """What fake quantization does to each expert: SQNR, clipped and zeroed weights, scales that underflow, amax.

        One launch per group on a GPU. Definitions, per format: `fq_transforms.ops.report.reference`.

        Args:
            params: Names to tensors; may hold more than the spec names.
            state: From `calibrate`, or loaded.
            tokens: Group key to integers [E], the tokens that each expert saw; those in the state if None.

        Returns:
            A `Report` on the CPU, which prints as a table, worst group first, and plots. SQNR is in dB,
            10 log10(sum of w^2 / sum of (w - y)^2) with y in fp32 and sums in fp64; inf for experts of zeros; NaN for a
            NaN weight, which counts as the worst. Of DTensors each rank reports its own shard.

        Raises:
            KeyError: A parameter or a group of the state is missing.
            ValueError: As `fakequant`, on a GPU too for an invalid amax; the spec has no group; a tensor is on meta; a
                transform of torch.func looks on; `tokens` has an unexpected group or another shape than [E].

        Example:
            >>> import fq_transforms as fqt
            >>> params = {f"experts.{i}.w": torch.tensor([[1.0, -0.3, 0.001, 0.0]]) * (i + 1) for i in range(2)}
            >>> fq = fqt.transform(fqt.select(params, {"*": fqt.INT8}))
            >>> fq.report(params, fq.calibrate(params)).groups["experts.*.w"].sqnr
            tensor([58.2791, 58.2791], dtype=torch.float64)
        """
        return report(params, state, spec=self.spec, tokens=tokens)

    def sync(
        self,
        state: State,
        group: "ProcessGroup",
        *,
        split: Mapping[str, Literal["out", "in"]] | None = None,
        same_experts: bool = True,
    ) -> State:
        """One state of all ranks in `group`, for plain local tensors. Which call when: docs/calibration.

            ranks with                   weights                            input amax       tokens
            parts of each weight         max of leaves that lack the        max              kept: all see the same
            (split={...})                split dim
            different batches            kept                               max              summed
            (split=None)
            and with other experts       kept                               max if shared    kept
            (same_experts=False)

        Args:
            state: From `calibrate`, with leaves of the same names and shapes on all ranks.
            group: The ranks, this one among them.
            split: Globs over group keys to "out" (column parallel, fc1) or "in" (row parallel, fc2); the last match
                counts. The same on all ranks.
            same_experts: False for expert-parallel ranks with different batches.

        Returns:
            A new state. Entries without reduced leaves are the same objects. NaN wins; -inf is the identity.

        Raises:
            KeyError: A group is missing from the state.
            ValueError: `group` lacks this rank; the state does not fit the spec; a glob matches nothing; the split cuts
                a block; a leaf is a DTensor or on meta. All before anything is sent.

        Source: ModelOpt 0.47 `sync_amax_across_distributed_group` and `max_calibrate`.
        """
        return sync(state, group, spec=self.spec, split=split, same_experts=same_experts)


def transform(
    spec: Spec,
    *,
    method: Method = MAX,
    backward: Backward = "pass_through",
    out_dtype: torch.dtype | None = None,
    separate: bool = False,
    layout: Layout = "plain",
) -> Transform:
    """The `Transform` that quantizes by a spec; its options are documented there.

    Args:
        spec: From `select`.
        method: As in `Transform`, as are the next three.
        backward: As there.
        out_dtype: As there.
        separate: As there.
        layout: Of the files that will be exported: weights and inputs take its own formats, in which its library reads
            weights bit for bit. "compressed-tensors" has others for NVFP4 and integers, "modelopt" for integers.

    Raises:
        ValueError: As `Transform`; there is no such layout.

    Example:
        >>> import fq_transforms as fqt
        >>> from torch.func import functional_call
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 4, bias=False))
        >>> params = dict(model.named_parameters())
        >>> fq = fqt.transform(fqt.select(params, {"*": fqt.MXFP4}))
        >>> functional_call(model, fq.fakequant(params, fq.calibrate(params)), (torch.ones(2, 32),)).shape
        torch.Size([2, 4])
    """
    given: Any = spec
    spec = given.for_layout(layout) if isinstance(given, Spec) else given  # else Transform says so
    return Transform(spec, method=method, backward=backward, out_dtype=out_dtype, separate=separate)
