"""What of torch.func and torch.compile works with which verb: docs/matrix.md, every cell of it run.

A row is a function of one tree, the weights, the state or the inputs, with a stand-in: plain PyTorch of the same value
at one place and the derivative that the documented rule gives. A column is a transform of such a function. A cell
holds if the column makes of the verb what it makes of the stand-in.

To write the page's tables anew: `TRITON_INTERPRET=1 python -m tests.matrix`, in the environment of the tests.
"""

import re
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import optree
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fq_transforms as fqt
from fq_transforms.ops.quantize.reference import fake_quantize_reference
from tests.cases import assert_names

PAGE = Path(__file__).parents[1] / "docs" / "matrix.md"
EXPERTS, OUT, IN, TOKENS = 2, 3, 32, 4


class Row(NamedTuple):
    """A verb as a function of one tree. `stand_in(x0)` is that of plain PyTorch near x0; None for a constant.

    `captures` is False for a verb that a CUDA graph cannot hold, as it reads values on the host.
    """

    of: str
    x: Any
    function: Callable[[Any], Any]
    stand_in: Callable[[Any], Callable[[Any], Any]] | None = None
    captures: bool = True
    multiplies: bool = False  # as a model does, whose mapped products have another order


class Model(torch.nn.Module):
    """Two experts, of which each sees its own half of the tokens, and a head that is not selected."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(IN, OUT, bias=False) for _ in range(EXPERTS))
        self.head = torch.nn.Linear(OUT, 2, bias=False)

    def forward(self, x):
        half = TOKENS // 2
        return self.head(torch.cat([expert(x[i * half : (i + 1) * half]) for i, expert in enumerate(self.experts)]))


def numbers(*shape, scale=1.0):
    """Odd multiples of 1/64 within 1, each another: no ties, no zeros, and exact in sums."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 37 % 127 - 63).view(shape) * 2 + 1) / 128 * scale


def weights():
    return {f"experts.{i}.weight": numbers(OUT, IN, scale=2.0**i) for i in range(EXPERTS)}


def halves(state):
    """A state by which half of the range is clipped."""
    return optree.tree_map(lambda leaf: leaf * 0.5, state)


KEY = "experts.*.weight"


def straight(value, slope, x0):
    """The function value + slope * (x - x0): the stand-in of an elementwise rule."""
    return lambda x: value + slope * (x - x0)


def each(value, slope):
    """`straight` of every weight: of a function of weights, and of the slope of one of an expert."""

    def at(x0):
        made = value(x0)
        return lambda x: {
            name: straight(made[name].detach(), slope(w, int(name.split(".")[1])), w)(x[name])
            if name.startswith("experts")
            else x[name]
            for name, w in x0.items()
        }

    return at


def within(amax):
    """The rule of "clip": 1 where abs(w) is within its expert's amax, else 0."""
    return lambda w, expert: (w.abs() <= amax[expert if len(amax) > 1 else 0]).float()


def one(w, expert):
    """The rule of "pass_through"."""
    return torch.ones_like(w)


@cache
def rows(device="cpu"):
    """Row by its name and what it is a function of."""
    found = [*rows_of_weights(device), *rows_of_models(device)]
    return {(name, row.of): row for name, row in found}


def rows_of_weights(device):
    w = optree.tree_map(lambda t: t.to(device), weights())
    clip = fqt.transform(fqt.select(w, {"experts.*": fqt.FP8}), backward="clip")
    mx = fqt.transform(fqt.select(w, {"experts.*": fqt.MXFP4}))
    int8 = fqt.transform(fqt.select(w, {"experts.*": fqt.INT8}), backward="lsq")
    search = fqt.transform(clip.spec, method=fqt.methods.Mse())
    state = halves(clip.calibrate(w))
    amax = state[KEY]["amax"]
    other = torch.tensor([0.75, 0.25], device=device)
    packed = int8.pack(w, state)[KEY]
    cotangents = {name: p * 0.5 + 1 for name, p in w.items()}
    outs = {name: torch.zeros(OUT, IN, device=device) for name in w}
    params = {name: torch.zeros(OUT, IN, device=device, requires_grad=True) for name in w}
    leaves = {name: p.clone().requires_grad_() for name, p in w.items()}

    def as_state(amax):
        return {KEY: {"amax": amax}}

    def learned(amax0):
        """Esser et al. 2020, in units of amax: beyond it the end of the grid, within it the rounding error."""
        value = int8.fakequant(w, as_state(amax0))
        slopes = {
            name: torch.where(p.abs() <= amax0[i], (value[name] - p) / amax0[i], value[name] / amax0[i])
            for i, (name, p) in enumerate(w.items())
        }
        return lambda amax: {n: value[n] + slopes[n] * (amax[i] - amax0[i]) for i, n in enumerate(w)}

    def taken(grads):
        for name in w:
            params[name].grad, leaves[name].grad = grads[name], None
        clip.take_grads(params, leaves, state)
        return {name: leaf.grad for name, leaf in leaves.items()}

    def stochastic(x):
        return clip.fakequant(x, state, rounding=fqt.Stochastic(7))

    def fake(x):
        return clip.fakequant(x, state)

    def fake_mx(x):
        return mx.fakequant(x, {KEY: {}})

    def pulled(grads):
        return clip.pullback(w, state, grads)[0]

    def masked(x0):
        slope = within(amax)
        return lambda grads: {name: grads[name] * slope(p, i) for i, (name, p) in enumerate(w.items())}

    def tied(amax):
        return fqt.tie({"w1": {"amax": amax}, "w3": {"amax": other}}, [("w1", "w3")])

    def unpacked(scale):
        return int8.unpack({KEY: packed | {"scale": scale}}, dtype=torch.float32)

    return [
        ("`fakequant`", Row("weights", w, fake, each(fake, within(amax)))),
        ("`fakequant`, MX", Row("weights", w, fake_mx, each(fake_mx, one))),
        ("`fakequant`, lsq", Row("state", amax, lambda amax: int8.fakequant(w, as_state(amax)), learned)),
        ("`fakequant(rounding=)`", Row("weights", w, stochastic, each(stochastic, within(amax)))),
        ("`fakequant(out=)`", Row("weights", w, lambda x: clip.fakequant(x, state, out=outs))),
        ("`cast`", Row("weights", w, lambda x: fqt.cast(x, out=outs))),
        ("`pullback`", Row("gradients", cotangents, pulled, masked)),
        ("`take_grads`", Row("gradients", cotangents, taken)),
        ("`masters`", Row("weights", w, fqt.masters)),
        ("`init`", Row("weights", w, clip.init)),
        ("`calibrate`", Row("weights", w, clip.calibrate, captures=False)),
        ("`calibrate`, `Mse`", Row("weights", w, search.calibrate, captures=False)),
        ("`merge`", Row("state", amax, lambda a: fqt.merge(as_state(a), as_state(other)), lambda _: largest(other))),
        ("`tie`", Row("state", amax, tied, lambda _: lambda a: [torch.maximum(a, other)] * 2)),
        ("`pack`", Row("weights", w, lambda x: int8.pack(x, state))),
        ("`unpack`", Row("scales", packed["scale"], unpacked)),
        ("`report`", Row("weights", w, lambda x: clip.report(x, state).groups[KEY].sqnr, captures=False)),
    ]


def largest(other):
    return lambda a: torch.maximum(a, other)


def model_of():
    model = Model()
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.copy_(numbers(*param.shape, scale=2.0**i))
    return model.requires_grad_(False)


def rows_of_models(device):
    """Verbs that run a model: of its weights, and of what it is called with."""
    model = model_of().to(device)
    params, x = dict(model.named_parameters()), numbers(TOKENS, IN, scale=3).to(device)
    alone = fqt.transform(fqt.select(params, {"experts.*": fqt.FP8}), backward="clip")
    both, wide = (
        fqt.transform(
            fqt.select(params, [fqt.Rule("experts.*", fqt.FP8, fqt.FP8, per_expert_inputs=wide)]), backward="clip"
        )
        for wide in (False, True)
    )
    state = halves(both.calibrate(params, x, model=model))
    own = {KEY: state[KEY]}
    hessians = alone.input_hessians(params, x, model=model)
    of_experts = wide.calibrate(params, x, model=model)
    step = fqt.value_and_grad(lambda model, batch: model(batch).square().sum(), alone, model)
    amax, of_x = state[KEY]["amax"], state[f"{KEY}.input"]["amax"]

    def fakes(p):
        return alone.fakequant(p, own)

    straight_weights = each(fakes, within(amax))

    def straight_input(x0):
        value = fake_quantize_reference(x0, of_x[0], None, format=fqt.FP8, out_dtype=torch.float32)
        return straight(value.detach(), (x0.abs() <= of_x[0]).float(), x0)

    def as_input(x0):
        return lambda x: x

    def call(weights, x):
        return functional_call(model, weights, (x,))

    def stand_in(of_weights, inputs):
        """A model of plain PyTorch, in which what it is a function of is straight, and the rest is as computed."""
        if of_weights:
            return lambda p0: lambda p: call(straight_weights(p0)(p), inputs(x)(x))
        return lambda x0: lambda x: call(fakes(params), inputs(x0)(x))

    def inside(x):
        with both.quantized_inputs(model, state):
            return model(x)

    def around(x0):
        return lambda x: call(params, straight_input(x0)(x))

    def filled(amax):
        inputs = of_experts[f"{KEY}.input"] | {"amax": amax}
        return wide.fill_unseen(of_experts | {f"{KEY}.input": inputs}, unseen="max-of-peers")

    def layered(x):
        with fqt.layerwise(alone, model, own):
            return model(x)

    trained = {name: param.clone().requires_grad_() for name, param in params.items()}

    unread = partial(Row, captures=False, multiplies=True)
    return [
        (
            "`apply`",
            Row("weights", params, lambda p: alone.apply(model, p, own, x), stand_in(True, as_input), multiplies=True),
        ),
        (
            "`apply`",
            Row("inputs", x, lambda x: alone.apply(model, params, own, x), stand_in(False, as_input), multiplies=True),
        ),
        (
            "`apply`, inputs quantized",
            unread("weights", params, lambda p: both.apply(model, p, state, x), stand_in(True, straight_input)),
        ),
        (
            "`apply`, inputs quantized",
            unread("inputs", x, lambda x: both.apply(model, params, state, x), stand_in(False, straight_input)),
        ),
        ("`quantized_inputs`", unread("inputs", x, inside, around)),
        ("`calibrate`, batches", unread("inputs", x, lambda x: both.calibrate(params, x, model=model))),
        ("`input_second_moments`", unread("inputs", x, lambda x: alone.input_second_moments(params, x, model=model))),
        ("`input_hessians`", unread("inputs", x, lambda x: alone.input_hessians(params, x, model=model))),
        ("`gptq`", unread("weights", params, lambda p: fqt.gptq(alone, p, own, hessians))),
        ("`fill_unseen`", unread("state", torch.tensor([2.0, 3.0], device=device), filled)),
        ("`value_and_grad`", unread("weights", trained, lambda p: step(p, own, [x])[1])),
        ("`layerwise`", unread("inputs", x, layered)),
    ]


# Columns: what each makes of a function of one tree.


def floats(tree):
    return [leaf for leaf in optree.tree_leaves(tree) if leaf.is_floating_point()]


def of_floats(function):
    return lambda x: floats(function(x))


def loss_of(function):
    """A number that moves with each result otherwise, and not in proportion."""

    def loss(x):
        results = [out.float() for out in floats(function(x))]
        return sum((out * vectors_like(out) + out.square()).nan_to_num(neginf=0.0).sum() for out in results)

    return loss


def vectors_like(tree):
    return optree.tree_map(lambda leaf: numbers(*leaf.shape, scale=4).to(leaf), tree)


def pulled(function, x):
    out, pull = vjp(of_floats(function), x)
    return pull(vectors_like(out))


def pushed(function, x):
    return jvp(of_floats(function), (x,), (vectors_like(x),))[1]


DERIVATIVES = {
    "grad": lambda function, x: grad(loss_of(function))(x),
    "vjp": pulled,
    "jvp": pushed,
    "jacrev": lambda function, x: jacrev(of_floats(function))(x),
    "jacfwd": lambda function, x: jacfwd(of_floats(function))(x),
    "hessian": lambda function, x: hessian(loss_of(function))(x),
}
# Name -> what it is for: a sentence of the page.
COLUMNS = {
    "grad": "`torch.func.grad`: the gradient of a loss, as a pure function.",
    "vjp": "`torch.func.vjp`: one forward, and a pullback for any number of cotangents.",
    "jvp": "`torch.func.jvp`: forward mode, the change of a result along one direction, without a graph.",
    "jacrev": "`torch.func.jacrev`: a Jacobian by rows, for few results of many numbers.",
    "jacfwd": "`torch.func.jacfwd`: a Jacobian by columns, for many results of few numbers.",
    "hessian": "`torch.func.hessian`: curvature, forward mode over reverse mode; of a rule that is straight, that of "
    "the loss behind it.",
    "vmap": "`torch.func.vmap`: ensembles of weights, of states and of seeds, in one launch per group.",
    "per sample": "`vmap(grad(f))`: a gradient for each element of a batch.",
    "compile": "`torch.compile(f)`: what cannot be traced runs eagerly between the graphs.",
    "fullgraph": "`torch.compile(f, fullgraph=True)`: one graph or an error.",
    "around": "`torch.compile(grad(f), fullgraph=True)`: a transform compiled with what it transforms.",
    "export": "`torch.export.export`: a program without Python.",
    "CUDA graph": "`torch.cuda.graph`: captured once, replayed with weights and state written in place.",
}


def batch_of(x):
    return [optree.tree_map(lambda leaf, f=f: leaf * f, x) for f in (1.0, 0.5, 1.5)]


def stacked(trees):
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


class Program(torch.nn.Module):
    """A function as what torch.export takes."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def captured(function, x):
    """What a CUDA graph gives that was captured with other values in place of x."""
    held = optree.tree_map(lambda leaf: leaf * 0.5, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        function(held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), torch.no_grad():
        out = function(held)
    optree.tree_map_(lambda leaf, new: leaf.copy_(new), held, x)
    graph.replay()
    torch.cuda.synchronize()
    return out


def found_and_wanted(row, column):
    """What a column makes of a verb, and what it has to be."""
    function, x, batch = row.function, row.x, batch_of(row.x)
    if column in DERIVATIVES:
        return by_rule(row, DERIVATIVES[column](function, x), lambda: DERIVATIVES[column](row.stand_in(x), x))
    gradient = grad(loss_of(function))
    if column == "around":
        found = torch.compile(gradient, fullgraph=True, backend="eager")(x)
        return by_rule(row, found, lambda: grad(loss_of(row.stand_in(x)))(x))
    if column == "per sample":
        found = vmap(gradient)(stacked(batch))
        return by_rule(row, found, lambda: stacked([grad(loss_of(row.stand_in(x)))(x) for x in batch]))
    if column == "vmap":
        return vmap(function)(stacked(batch)), stacked([copied(function(x)) for x in batch])
    wanted = copied(function(x))
    if column == "export":
        found = torch.export.export(Program(function), (x,)).module()(x)
    elif column == "CUDA graph":
        found = captured(function, x)
    else:
        found = torch.compile(function, fullgraph=column == "fullgraph", backend="aot_eager")(x)
    return found, wanted


def by_rule(row, found, of_stand_in):
    """A derivative, and that of the stand-in; zeros for a constant."""
    return found, of_stand_in() if row.stand_in else optree.tree_map(torch.zeros_like, found)


def copied(tree):
    return optree.tree_map(lambda leaf: leaf.detach().clone(), tree)


# What is refused, by a letter: what is said, and why.
REFUSED = {
    "a": (
        "found a transform of torch.func|found a call under torch.func|found a torch.func transform",
        "It writes, makes leaves, or reads values; the error names the pure function to call in its place.",
    ),
    "b": (
        "found weights under torch.func.vmap|mapped by vmap|that vmap maps",
        "It searches, or follows a model's weights by their memory: one set of weights at a time.",
    ),
    "c": (
        "found torch.compile",
        "It reads values, or changes a model for the time of a call: not in one graph.",
    ),
}


def cell(row, column):
    """yes: as the stand-in, or as eager code. 0: a constant, whose derivative is zero. A letter: refused."""
    if column == "CUDA graph" and not row.captures:
        return "·"
    torch.compiler.reset()
    try:
        found, wanted = found_and_wanted(row, column)
    except (ValueError, torch._dynamo.exc.Unsupported) as error:
        return letter(str(error))
    is_derivative = column in DERIVATIVES or column in ("per sample", "around")
    assert_equal(found, wanted, exact=not is_derivative and not (column == "vmap" and row.multiplies))
    return "0" if is_derivative and row.stand_in is None else "yes"


def letter(message):
    for name, (pattern, _) in REFUSED.items():
        if re.search(pattern, message):
            assert_names(message, "found", "wanted")
            return name
    raise AssertionError(message)


def assert_equal(found, wanted, exact):
    """Bits of values; numbers of derivatives and of a mapped model, whose sums are added up in another order."""
    one, other = optree.tree_leaves(found), optree.tree_leaves(wanted)
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        near = 0.0 if exact else 1e-5 * float(b.abs().max())
        torch.testing.assert_close(a, b, equal_nan=True, check_dtype=exact, rtol=0, atol=near)


# The page.

HEAD = f"| verb | of | {' | '.join(COLUMNS)} |\n| --- | --- |{' --- |' * len(COLUMNS)}\n"
USES = "## Columns\n\n"


def line(key, cells):
    return f"| {' | '.join([*key, *cells])} |"


def uses():
    return "\n".join(f"- **{name}**: {use}" for name, use in COLUMNS.items())


def legend():
    return "\n".join(f"- {name}: refused by name. {why}" for name, (_, why) in REFUSED.items())


def write():
    """The page with a new table, legend and list of columns."""
    text = PAGE.read_text()
    lines = []
    for key, row in rows().items():
        graph = "gpu" if row.captures else "·"
        lines.append(line(key, [*(cell(row, column) for column in COLUMNS if column != "CUDA graph"), graph]))
    for head, new in ((HEAD, "\n".join(lines) + "\n\n" + legend()), (USES, uses())):
        before, _, rest = text.partition(head)
        after = rest.partition("\n## ")
        text = f"{before}{head}{new}\n" + (f"\n## {after[2]}" if after[1] else "")
    PAGE.write_text(text)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, of what it does not trace
        write()
