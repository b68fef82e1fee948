"""What presets select in a class of transformers, beside ModelOpt, and what each step makes of it: docs/classes.md.

To write the page's tables anew: `TRITON_INTERPRET=1 python -m tests.class_tables`, in the environment of the tests.
"""

import contextlib
import copy
import functools
import io
import re
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

import fq_transforms as fqt
from fq_transforms.export.names import families
from fq_transforms.presets import experts_only, whole_model
from fq_transforms.spec import Inputs
from tests.cases import assert_names
from tests.classes import OWN, VOCABULARY, batch, classes, smaller, tiny, transformers
from tests.export.models import read

PAGE = Path(__file__).parents[1] / "docs" / "classes.md"
# Ours, ModelOpt's: of formats that refuse no width, as blocks along `in` would.
PRESETS = (("FP8_DEFAULT_CFG", "FP8_DEFAULT_CFG"), ("FP8_EXPERTS_ONLY_CFG", "NVFP4_EXPERTS_ONLY_CFG"))
# What differs and why, by a letter: who selects (neither: we refuse), a pattern of names, a reason.
REASONS = {
    "a": (
        "ModelOpt",
        r".*conv[^.]*(\.\*)*\.weight",
        "A convolution. Kernels of three and more dims are no matrices, and no reader of files loads codes of one.",
    ),
    "b": (
        "we",
        r".*\.self_attn\.o_a_proj\.weight",
        "A block-diagonal linear of a class that ModelOpt does not know. Its matrix is one as others are.",
    ),
    "c": (
        "we",
        r".*\.experts\.(gate_up_proj|down_proj|(in|out)put_linear\.weight)",
        "Experts of a class that ModelOpt does not know, as it has no `num_experts`, or other names.",
    ),
    "d": (
        "neither",
        r".*\.((in|out)put_linear\.weight|experts\.mlp\.(w1|v1|w2))",
        "Experts that names do not show, or all in one matrix: refused, until `experts=` names them or a rule leaves "
        "them out.",
    ),
}


def model_of(name):
    """A class with few layers and experts, at its own widths, on the meta device."""
    cls = getattr(transformers, name)
    return families.model_of(smaller(cls.config_class(**OWN.get(name, {})).to_dict()) | {"architectures": [name]})


def layouts_of(name, params):
    """How stacks are stored, as a class at its own widths shows it: one that is cut to squares shows nothing."""
    whole = dict(model_of(name).named_parameters())
    try:
        groups = fqt.select(whole, {"*": None, "*.experts.*": fqt.FP8}).groups
    except ValueError:
        return {}
    return {group.key: group.transposed for group in groups if group.stacked and group.key in params}


def ours(name, preset):
    """The names of weights and of inputs that a preset of ours selects, and the name of what it refuses."""
    try:
        spec = fqt.select(dict(model_of(name).named_parameters()), getattr(fqt.presets, preset))
    except ValueError as error:
        (refused,) = re.findall(r"^parameter '([^']+)': found the (?:3-D shape|matrix)|$", str(error))[:1]
        if not refused and "select no weight" not in str(error):
            raise
        return set(), set(), refused
    weights, inputs = ({each for group in groups for each in group.names} for groups in (spec.groups, spec.inputs))
    return weights, inputs, ""


def theirs(name, preset):
    """The names of weights and of inputs that have an enabled quantizer of ModelOpt's."""
    mtq = pytest.importorskip("modelopt.torch.quantization")
    model = model_of(name)
    names = {each for each, _ in model.named_parameters(remove_duplicate=False)}
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            mtq.quantize(model, {**getattr(mtq, preset), "algorithm": None}, None)
        except RuntimeError as error:
            if "nothing would be quantized" not in str(error):
                raise
            return set(), set()
    found = {"weight": set(), "input": set()}
    for path, module in model.named_modules():
        # One for a module's weight, for a parameter of its own name, or for each expert of one.
        match = re.fullmatch(r"(.*\.)?(?:(\w+)_)?(weight|input)_quantizers?(?:\.\d+)?", path)
        if match and isinstance(module, mtq.nn.TensorQuantizer) and module.is_enabled:
            # It has DBRX's experts as linears, w1_linear.0 and on.
            owner = re.sub(r"\.([wv][12])_linear\.\d+\.$", r".\1.", match[1] or "")
            parameter = f"{owner}{match[2] or 'weight'}"
            found[match[3]].add(parameter if parameter in names else owner.removesuffix("."))
    return found["weight"], found["input"]


def pattern_of(name):
    """A parameter's name with numbers as `*`: of layers, of experts, and of what else stands in a list."""
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", name)


@functools.cache
def differing(name, preset, modelopts):
    """How many weights both select; of the others (who selects, pattern) to their number; weights without inputs."""
    own, own_inputs, refused = ours(name, preset)
    their, their_inputs = theirs(name, modelopts)
    found = Counter(("we", pattern_of(each)) for each in own - their)
    found += Counter(("ModelOpt", pattern_of(each)) for each in their - own) if not refused else Counter()
    found += Counter([("neither", pattern_of(refused))] if refused else [])
    both = own & their
    return len(both), found, {each for each in both if each not in own_inputs or each not in their_inputs}


def row(name):
    """A line of the table."""
    cells, letters = [f"`{name}`"], set()
    for preset in PRESETS:
        both, found, _ = differing(name, *preset)
        cells.append(str(both))
        parts = []
        for (who, pattern), number in sorted(found.items()):
            why = next((letter for letter, (w, p, _) in REASONS.items() if w == who and re.fullmatch(p, pattern)), "?")
            letters.add(why)
            parts.append(f"{who}: `{pattern}` {number}" if who != "neither" else f"refused: `{pattern}`")
        cells.append("<br>".join(parts))
    return f"| {' | '.join([*cells, ', '.join(sorted(letters))])} |"


# Formats of weights, formats of inputs.
WEIGHTS = {"experts": experts_only(fqt.NVFP4), "all": whole_model(fqt.INT8_PER_CHANNEL)}
INPUTS = {"experts": experts_only(fqt.FP8, fqt.FP8), "all": whole_model(fqt.INT8_PER_CHANNEL, fqt.INT8)}


class Steps:
    """What is done with a class, tiny, and one preset: a step holds its law or raises; it may have something to say.

    A ValueError is a refusal: it says what of this class it found, what was wanted, and a way out. All else is wrong.
    """

    def __init__(self, name, kind):
        self.kind = kind
        self.model, self.config = tiny(name)
        self.params = dict(self.model.named_parameters())
        self.layouts = layouts_of(name, self.params)
        self.batch = batch(
            self.model, torch.randint(1, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(2))
        )

    def select(self):
        self.fq = fqt.transform(fqt.select(self.params, WEIGHTS[self.kind], transposed=self.layouts))

    def calibrate(self):
        """A state of this spec, of which every amax is a number; each weight becomes another."""
        self.state = self.fq.calibrate(self.params)
        fqt.state.check(self.state, self.fq.spec)
        self.fakes = self.fq.fakequant(self.params, self.state)
        assert not [n for g in self.fq.spec.groups for n in g.names if torch.equal(self.fakes[n], self.params[n])]

    def run(self):
        """Under functional_call logits and gradients are those of a copy that holds the fake weights."""
        copied = copy.deepcopy(self.model)
        with torch.no_grad():
            original = self.model(**self.batch).logits
            for name, param in copied.named_parameters():
                param.copy_(self.fakes[name])
        logits = functional_call(self.model, self.fakes, (), self.batch).logits
        wanted = copied(**self.batch).logits
        assert logits.isfinite().all()
        assert torch.equal(logits, wanted)
        assert not torch.equal(logits, original)
        found, wanted = (
            torch.autograd.grad(out.square().mean(), [p for p in params if p.requires_grad], allow_unused=True)
            for out, params in ((logits, self.params.values()), (wanted, copied.parameters()))
        )
        names = [name for name, param in self.params.items() if param.requires_grad]
        for name, a, b in zip(names, found, wanted, strict=True):
            assert (a is None) == (b is None), name
            assert a is None or torch.equal(a, b), name
        moved = {name for name, grad in zip(names, found, strict=True) if grad is not None and grad.any()}
        still = [group.key for group in self.fq.spec.groups if not moved & {*group.names}]
        assert len(still) < len(self.fq.spec.groups)
        return [f"without a gradient: {each}" for each in _short(still)]

    def inputs(self):
        """A state of inputs from batches; a call with inputs quantized too has other logits."""
        fq = fqt.transform(fqt.select(self.params, INPUTS[self.kind], transposed=self.layouts))
        state = fq.calibrate(self.params, [self.batch], model=self.model)
        self.calibrated = fq, state
        state = fq.fill_unseen(state, unseen="max-of-peers")
        alone = fqt.transform(fqt.Spec(fq.spec.groups))
        with torch.no_grad():
            found = fq.apply(self.model, self.params, state, **self.batch).logits
            fakes = alone.fakequant(self.params, {group.key: state[group.key] for group in alone.spec.groups})
            wanted = functional_call(self.model, fakes, (), self.batch).logits
        assert found.isfinite().all()
        assert not torch.equal(found, wanted)

    def amax(self):
        """ModelOpt's, calibrated on the same tokens: of each row of the weights, of each layer's inputs."""
        mtq = pytest.importorskip("modelopt.torch.quantization")
        fq, state = getattr(self, "calibrated", (self.fq, self.state))
        theirs = copy.deepcopy(self.model)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = mtq.quantize(theirs, mtq.INT8_DEFAULT_CFG, lambda model: model(**self.batch))
        modules = dict(theirs.named_modules())
        same, differ = 0, []
        for group in fq.spec.all_groups:
            role = "input" if isinstance(group, Inputs) else "weight"
            found = [_amax(modules, path) for name in group.names for path in _quantizers(modules, group, name, role)]
            wanted = state[group.key]["amax"].flatten()
            if role == "input" and any(amax is not None for amax in found):  # it has none of experts without tokens
                found = [amax for amax in found if amax is not None]
            if any(amax is None for amax in found):
                differ.append(f"none: {pattern_of(group.key)}")
                continue
            amax = torch.cat(found)
            if role == "input":  # of a group's experts, which share the largest
                amax, wanted = amax.max(), wanted.max()
            if torch.equal(amax, wanted):
                same += 1
            else:
                is_near = amax.shape == wanted.shape and torch.allclose(amax, wanted, rtol=1e-6, atol=0)
                differ.append(f"{'near' if is_near else 'other'}: {pattern_of(group.key)}")
        assert same
        return sorted({*differ})

    def report(self):
        """Each group, each expert, a finite ratio."""
        found = self.fq.report(self.params, self.state).groups
        assert [*found] == [group.key for group in self.fq.spec.groups]
        for group in self.fq.spec.groups:
            assert len(found[group.key].sqnr) == group.experts
            assert found[group.key].sqnr.isfinite().all()

    def pack(self):
        """Codes and scales stand for the fake weights, bit for bit."""
        unpacked = self.fq.unpack(self.fq.pack(self.params, self.state), dtype=torch.float32)
        assert unpacked.keys() == {name for group in self.fq.spec.groups for name in group.names}
        assert all(torch.equal(unpacked[name], self.fakes[name]) for name in unpacked)

    def export(self, layout):
        """A folder. What compressed-tensors reads in its own is what the plain one has, rounded to bf16."""
        fq = fqt.transform(self.fq.spec, layout=layout)
        given = fq, self.model.state_dict(), fq.calibrate(self.params)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            fqt.export.save(folder / layout, *given, config=self.config, layout=layout)
            if layout == "compressed-tensors":
                fqt.export.folder(folder / layout, folder / "read", layout="plain")
                fqt.export.save(folder / "plain", *given, config=self.config, layout="plain")
                found, wanted = read(folder / "read"), read(folder / "plain")
                assert found.keys() == wanted.keys()
                assert all(torch.equal(_rounded(found[each]), _rounded(wanted[each])) for each in wanted)


def _rounded(tensor):
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


def _quantizers(modules, group, name, role):
    """Paths of ModelOpt's quantizers of a parameter: of its own, of each expert of a stack, of DBRX's linears."""
    owner, _, last = name.rpartition(".")
    own = f"{owner}." + ("" if last == "weight" else f"{last}_") + f"{role}_quantizer"
    if own in modules:
        return [own]
    stacked = [f"{own}s.{expert}" for expert in range(group.experts)]
    return stacked if stacked[0] in modules else [f"{owner}.{last}_linear.{e}.{role}_quantizer" for e in range(4)]


def _amax(modules, path):
    amax = getattr(modules.get(path), "amax", None)
    return None if amax is None else amax.flatten()


def _short(names):
    return sorted({pattern_of(name) for name in names})


STEPS = {
    **{step: getattr(Steps, step) for step in ("select", "calibrate", "run", "inputs", "amax", "report", "pack")},
    **{
        layout: functools.partial(Steps.export, layout=layout) for layout in ("plain", "compressed-tensors", "modelopt")
    },
}
WAYS_OUT = ("a rule to None", "layout='plain'", "experts=", "transposed=", "revert_weight_conversion")
# What steps say, by a letter: the steps, what is said, why.
_CODES, _FILES = "compressed-tensors|modelopt", "plain|compressed-tensors|modelopt"
NOTES = {
    "e": (
        "select",
        "found the (3-D shape|matrix)",
        "Experts that names do not show, or all in one matrix: `experts=` names them, or a rule leaves them out.",
    ),
    "f": (
        "run",
        "without a gradient: ",
        "Some layers have no gradient, nor in the model that holds the fake weights: those of sound and pictures, "
        "which text does not run; indexers, which choose and are no factor; experts that got no token.",
    ),
    "g": ("inputs", "its layer never ran", "Of the same layers. Inputs that were never seen have no amax."),
    "h": (
        "amax",
        r"(none|other): .*\.experts\.(gate_up|down)_proj(\.input)?$",
        "Experts stored [in, out], for which ModelOpt has one scale of all experts, or scales of columns for rows; or "
        "of a class that it does not know.",
    ),
    "i": (
        "amax",
        r"none: .*\.(dt_proj|o_a_proj)\.weight(\.input)?$",
        "The class multiplies with the weight itself, or is one that ModelOpt does not know.",
    ),
    "j": (
        "amax",
        r"near: .*\.input$",
        "Within 1e-6: ModelOpt multiplies with the experts by another kernel, and the next layers see its last bits.",
    ),
    "k": (_FILES, "that is not rows of it", "Files hold a weight otherwise than by rows: transformers converts it."),
    "l": (
        _FILES,
        "together in files",
        "Files hold weights together that are several in memory: transformers converts.",
    ),
    "m": (
        _CODES,
        r"stored \[in, out\] in files",
        "Files hold matrices as [in, out], and engines read codes of [out, in].",
    ),
    "n": (
        _CODES,
        "one tensor for all of its",
        "Files hold all experts of a layer in one tensor, engines read codes of one.",
    ),
    "o": (_CODES, "no module's weight in files", "Files hold parameters that are no module's weight."),
}


def done(name, kind):
    """Each step: what it says, or its refusal."""
    found, steps = {}, Steps(name, kind)
    for step, call in STEPS.items():
        if step == "amax" and kind == "experts":
            continue
        try:
            found[step] = call(steps) or []
        except ValueError as error:
            found[step] = [_checked(str(error), steps.params)]
            if step == "select":
                break
    return found


def _checked(message, params):
    """A refusal: it names a parameter, what was found and wanted, and a way out."""
    assert any(name in message for name in params), message
    assert_names(message, "found", "wanted")
    assert any(way in message for way in WAYS_OUT), message
    return message


def letters_of(step, said):
    """The letters of what a step said, or a dot for nothing."""
    found = {
        next((x for x, (steps, p, _) in NOTES.items() if re.fullmatch(steps, step) and re.search(p, each)), "?")
        for each in said
    }
    return "".join(sorted(found)) or "·"


def steps_row(name):
    """A line of the table of steps: with the experts' preset, and with that of the whole model where it is another."""
    by_kind = {kind: done(name, kind) for kind in WEIGHTS}
    cells = [f"`{name}`"]
    for step in STEPS:
        found = [letters_of(step, by_kind[kind][step]) if step in by_kind[kind] else "" for kind in WEIGHTS]
        found = [each or "-" for each in (found[1:] if step == "amax" else found)]
        cells.append(found[0] if len({*found}) == 1 else " / ".join(found))
    return f"| {' | '.join(cells)} |"


SELECTION = (
    "| class | whole model: both | one only | experts: both | one only | why |\n| --- | --- | --- | --- | --- | --- |\n"
)
OF_STEPS = f"| class | {' | '.join(STEPS)} |\n| --- |{' --- |' * len(STEPS)}\n"


def legend(reasons):
    """A line for each letter, below a table."""
    return "\n".join(f"- {letter}: {reason}" for letter, (_, _, reason) in reasons.items())


def write():
    """The page with new tables: rows end at an empty line, and so does the legend below them."""
    text = PAGE.read_text()
    for head, line, reasons in ((SELECTION, row, REASONS), (OF_STEPS, steps_row, NOTES)):
        before, _, rest = text.partition(head)
        _, _, after = rest.split("\n\n", 2) if rest.count("\n\n") > 1 else ("", "", "")
        rows = "\n".join(line(name) for name in classes())
        text = f"{before}{head}{rows}\n\n{legend(reasons)}\n" + (f"\n{after}" if after else "")
    PAGE.write_text(text)


if __name__ == "__main__":
    write()
