"""Formats as data: every number that defines a quantized weight, and nothing that computes.

A `Format` lies on four axes: the element (`IntElement` or `FloatElement`), the granule that shares one scale
(`block`), the type of that scale (`scale`), and who sets it (`dynamic`). Where the field's libraries disagree, the
disagreement is a number here too, and each library's choice is a constant with its name in it.

The formulas that use these numbers are in `fq_transforms.ops.quantize.reference`. To make a new format, make a new
constant. What goes together; anything else is refused when the format is made:

    scale   element                             block           dynamic         dequantize
    fp32    integers of at most 8 bits          any             False           multiply, divide
    fp32    floats with an exponent             any             False           multiply
    e4m3    E2M1                                along in        False, True     multiply, divide
    e8m0    floats, E0M7 for integers           along in        True            multiply

A block is (None, None), (1, None), or (rows, columns), powers of two with at most 2048 columns; "along in" is (1,
columns). `in` must be a multiple of such columns.
"""

import json
import struct
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from math import frexp
from typing import Any, Literal, TypeAlias, cast

from fq_transforms.parse import MOST_NAME, nearest, read_fields, shown


@dataclass(frozen=True)
class IntElement:
    """Signed integers `low..high`; the scale maps amax to `qmax`, which need not be an integer.

    Example:
        >>> IntElement(qmax=7, low=-8, high=7).high
        7
    """

    qmax: float
    low: int
    high: int


@dataclass(frozen=True)
class FloatElement:
    """A small float: sign, `exponent_bits`, `mantissa_bits`, subnormals, and the largest finite value `max`.

    Ties go to the even significand. Without a mantissa that is the larger value, above the smallest. Without an
    exponent all values are subnormals, evenly spaced below 2: OCP's INT8, with 6 bits behind the point, is `E0M7`.

    Example:
        >>> E4M3.min_exponent, E4M3.max
        (-6, 448.0)
        >>> 2.0 ** (E0M7.min_exponent - E0M7.mantissa_bits), E0M7.max
        (0.015625, 1.984375)
    """

    exponent_bits: int
    mantissa_bits: int
    max: float

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value; subnormals share its spacing."""
        return 2 - 2 ** (self.exponent_bits - 1) if self.exponent_bits else 1

    @property
    def has_max(self) -> bool:
        """True if `max` is one of the values that so many bits can have."""
        exponent = max(frexp(self.max)[1] - 1, self.min_exponent)
        steps = self.max * 2.0 ** (self.mantissa_bits - exponent)
        if self.exponent_bits == 0:
            return steps == int(steps) < 2**self.mantissa_bits
        return exponent <= 2 ** (self.exponent_bits - 1) and steps == int(steps)

    @property
    def max_bits(self) -> int:
        """The bits of `max` as fp32: exponent field from bit 23 on, significand below."""
        (bits,) = struct.unpack("<i", struct.pack("<f", self.max))
        return bits


E4M3 = FloatElement(4, 3, 448.0)
E5M2 = FloatElement(5, 2, 57344.0)
E3M2 = FloatElement(3, 2, 28.0)
E2M3 = FloatElement(2, 3, 7.5)
E2M1 = FloatElement(2, 1, 6.0)
E0M7 = FloatElement(0, 7, 127 / 64)


@dataclass(frozen=True)
class Format:
    """One way to quantize the weight [out, in] of an expert. Frozen, hashable, and equal by value.

    Attributes:
        name: What tables and checkpoints call it.
        element: What one quantized weight can be.
        block: (rows of `out`, columns of `in`) that share one scale; None is the whole extent. So (None, None) is
            per tensor, (1, None) per channel, (1, 16) a block of sixteen inputs, (128, 128) a square block.
        scale: "fp32"; "e4m3", an E4M3 scale per block under one fp32 scale per expert; or "e8m0", a power of two.
        dynamic: True if the amax of a block is taken from the weight at each call, False if it is state.
        dequantize: Integers: "multiply" codes by amax / qmax, as readers of files do, or "divide" them by qmax / amax.
            Two-level formats: "multiply" a block's scale by amax / 2688, or "divide" it by 1 / amax * 2688. These are
            the numbers that files hold; all are rounded, so the two give different weights.
        min_scale: Two-level formats: the smallest E4M3 scale. 2**-9, the smallest positive E4M3, is what deployment
            stores; 0 lets small scales underflow, and with them their block.
        unit_scale_below: Two-level formats: an effective scale under this is replaced by 1. Only ModelOpt's fake
            quantization kernel does so (1e-5); 0 is off.
        exponent_rounding: E8M0 scales: "up", the smallest power of two that clips nothing; "floor", OCP's
            floor(log2(amax)) minus the element's largest exponent; "even", floor after amax is rounded to the
            element's mantissa.

    Elements, blocks and scales that go together: the table above, in the module's docstring.

    Example:
        >>> from dataclasses import replace
        >>> FORMATS["FP8"].amax_shape(256, 512), FORMATS["INT4_BLOCK32"].amax_shape(256, 512)
        ((), (256, 16))
        >>> replace(FORMATS["FP8"], name="FP8_E5M2", element=E5M2).element.max
        57344.0
    """

    name: str
    element: IntElement | FloatElement
    block: tuple[int | None, int | None]
    scale: Literal["fp32", "e4m3", "e8m0"] = "fp32"
    dynamic: bool = False
    dequantize: Literal["multiply", "divide"] = "multiply"
    min_scale: float = 2.0**-9
    unit_scale_below: float = 0.0
    exponent_rounding: Literal["up", "floor", "even"] = "up"
    # Made once, as a field: torch.compile reads a frozen dataclass's fields as constants, but cannot call `asdict`.
    _json: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.block, tuple) and len(self.block) == 2):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"format {shown(self.name)}: found block {self.block!r}, wanted (rows, columns)")
        rows, columns = self.block
        choices = {
            f"scale {shown(self.scale)}, wanted fp32, e4m3 or e8m0": self.scale in ("fp32", "e4m3", "e8m0"),
            f"exponent_rounding {shown(self.exponent_rounding)}, wanted up, floor or even": self.exponent_rounding
            in ("up", "floor", "even"),
            f"dequantize {shown(self.dequantize)}, wanted multiply or divide": self.dequantize
            in ("multiply", "divide"),
            f"dequantize 'divide' with {self.element} under {self.scale} scales, wanted integers or e4m3 scales": (
                self.dequantize != "divide" or self.scale == "e4m3" or isinstance(self.element, IntElement)
            ),
            f"block {self.block}, wanted (None, None), (1, None) or powers of two (rows, columns), columns <= 2048": (
                self.block in ((None, None), (1, None))
                or (_is_power_of_two(rows) and _is_power_of_two(columns) and (columns or 0) <= 2048)
            ),
            f"block {self.block}, wanted (1, columns) under {self.scale} scales": self.scale == "fp32"
            or self.has_blocks_along_in,
            f"dynamic={self.dynamic}, wanted {self.scale == 'e8m0'} with {self.scale} scales": self.scale == "e4m3"
            or self.dynamic == (self.scale == "e8m0"),
            f"{self.element}, wanted an E2M1 element under e4m3 scales": self.scale != "e4m3" or self.element == E2M1,
            f"{self.element}, wanted a float element under {self.scale} scales, such as E0M7 for integers of 8 bits": (
                self.scale == "fp32" or isinstance(self.element, FloatElement)
            ),
            f"{self.element}, wanted integers of at most 8 bits": not isinstance(self.element, IntElement)
            or (-128 <= self.element.low <= 0 < self.element.high <= 127 and 0 < self.element.qmax <= 128),
            f"{self.element}, wanted a float within fp32, and its max": not isinstance(self.element, FloatElement)
            or (
                0 <= self.element.exponent_bits <= 8
                and 0 <= self.element.mantissa_bits <= 23
                and 0 < self.element.max < 2.0**128
                and self.element.has_max
            ),
            f"{self.element} under {self.scale} scales, wanted an IntElement, or e8m0 scales": self.scale == "e8m0"
            or isinstance(self.element, IntElement)
            or self.element.exponent_bits > 0,
            f"{self.element} under e8m0 scales, exponent_rounding {shown(self.exponent_rounding)}, wanted a max of "
            f"{1 + (self.exponent_rounding == 'even')} or more": self.scale != "e8m0"
            or isinstance(self.element, IntElement)
            or self.element.max >= 1 + (self.exponent_rounding == "even"),
            f"min_scale={self.min_scale}, wanted an E4M3 scale, 0 to 448": 0 <= self.min_scale <= E4M3.max,
            f"unit_scale_below={self.unit_scale_below}, wanted 0 or a scale": 0 <= self.unit_scale_below < 2.0**128,
            f"a name of {len(self.name)} characters, wanted 1 to {MOST_NAME}": 0 < len(self.name) <= MOST_NAME,
        }
        for found, is_right in choices.items():
            if not is_right:
                raise ValueError(f"format {shown(self.name)}: found {found}")
        object.__setattr__(self, "_json", json.dumps(self.to_dict()))

    def __hash__(self) -> int:
        """Of the name alone: formats are looked up at each call, and equal ones have equal names."""
        return hash(self.name)

    def to_dict(self) -> dict[str, Any]:
        """All of the format's numbers, ready for JSON; `from_dict` reads them."""
        return {name: value for name, value in asdict(self).items() if name != "_json"}

    def to_json(self) -> str:
        """`to_dict` as one line of JSON."""
        return self._json

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Format":
        """The format whose numbers are `data`, as read from JSON. Raises ValueError if they are not a format's.

        Example:
            >>> Format.from_dict(json.loads(NVFP4.to_json())) == NVFP4
            True
        """
        what = f"format {shown(data['name'])}" if isinstance(cast("Any", data), dict) and "name" in data else "format"
        numbers = read_fields(data, what, *_FIELDS)
        is_int = "qmax" in numbers["element"]
        element = read_fields(numbers["element"], f"{what}, element", _INT_FIELDS if is_int else _FLOAT_FIELDS)
        numbers["element"] = IntElement(**element) if is_int else FloatElement(**element)
        numbers["block"] = tuple(numbers["block"])
        return Format(**numbers)

    @property
    def has_blocks_along_in(self) -> bool:
        """True for blocks of (1, columns), which must divide `in`; square blocks may be ragged."""
        return self.block[0] == 1 and self.block[1] is not None

    @property
    def is_stateless(self) -> bool:
        """True if nothing is calibrated: the scale of each block comes from the weight alone."""
        return self.scale == "e8m0"

    @property
    def has_global_amax(self) -> bool:
        """True if the state keeps an expert's global amax beside its blocks'."""
        return self.scale == "e4m3" and not self.dynamic

    @property
    def clips(self) -> bool:
        """True if every scale is calibrated, so that weights beyond their amax have a clip gradient of zero.

        Dynamic formats pass every gradient, also where a stale global amax or OCP's exponent saturates a weight.
        """
        return not self.dynamic

    def granules(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Number of granules along `out` and `in` of a weight; ragged edges count as one."""
        rows, columns = self.block
        return -(-out_features // (rows or out_features)), -(-in_features // (columns or in_features))

    def amax_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of one expert's `amax` leaf. Dynamic two-level formats keep only the expert's global amax: ()."""
        if self.dynamic or self.block == (None, None):
            return ()
        return self.granules(out_features, in_features)


# What `Format.from_dict` reads: fields that a format must have, and others.
_FIELDS = (
    {"name": "text", "element": "an object", "block": "two sides, each a count or null"},
    {
        "scale": "text",
        "dynamic": "true or false",
        "dequantize": "text",
        "min_scale": "a number",
        "unit_scale_below": "a number",
        "exponent_rounding": "text",
    },
)
_INT_FIELDS = {"qmax": "a number", "low": "an integer", "high": "an integer"}
_FLOAT_FIELDS = {"exponent_bits": "a count", "mantissa_bits": "a count", "max": "a number"}


def code_bits(format: Format) -> int:
    """Bits that one code takes where it is stored: 4, 6 or 8; of floats wider than a byte, which are not, their own.

    Integers take 4 or 8. A float of another width lies in the next of the three, its sign in the highest bit.

    Example:
        >>> code_bits(INT4_BLOCK32), code_bits(MXFP6_E2M3)
        (4, 6)
        >>> code_bits(Format("FP5_E2M2", FloatElement(2, 2, 7.0), (1, 64)))
        6
    """
    return element_bits(format.element)


def element_bits(element: IntElement | FloatElement) -> int:
    """`code_bits` of a format with this element."""
    if isinstance(element, IntElement):
        return 4 if element.low >= -8 and element.high <= 7 else 8
    bits = 1 + element.exponent_bits + element.mantissa_bits
    return next((width for width in (4, 6, 8) if bits <= width), bits)


def _is_power_of_two(side: int | None) -> bool:
    return side is not None and side > 0 and side & (side - 1) == 0


# ModelOpt's full range, -128 and -8 included, and its fake quantization's order of operations.
_INT8, _INT4 = IntElement(127, -128, 127), IntElement(7, -8, 7)

INT8 = Format("INT8", _INT8, (None, None), dequantize="divide")
INT8_PER_CHANNEL = Format("INT8_PER_CHANNEL", _INT8, (1, None), dequantize="divide")
INT4_BLOCK32 = Format("INT4_BLOCK32", _INT4, (1, 32), dequantize="divide")
INT4_BLOCK128 = Format("INT4_BLOCK128", _INT4, (1, 128), dequantize="divide")
FP8 = Format("FP8", E4M3, (None, None))
FP8_PER_CHANNEL = Format("FP8_PER_CHANNEL", E4M3, (1, None))
FP8_BLOCK = Format("FP8_BLOCK", E4M3, (128, 128))
NVFP4 = Format("NVFP4", E2M1, (1, 16), scale="e4m3", dynamic=True)
# Equal to NVFP4 while the state is fresh from the same weights; it differs once the weights have moved on.
NVFP4_STATIC = Format("NVFP4_STATIC", E2M1, (1, 16), scale="e4m3")
MXFP8 = Format("MXFP8", E4M3, (1, 32), scale="e8m0", dynamic=True)
MXFP6_E3M2 = Format("MXFP6_E3M2", E3M2, (1, 32), scale="e8m0", dynamic=True)
MXFP6_E2M3 = Format("MXFP6_E2M3", E2M3, (1, 32), scale="e8m0", dynamic=True)
MXFP4 = Format("MXFP4", E2M1, (1, 32), scale="e8m0", dynamic=True)
MXINT8 = Format("MXINT8", E0M7, (1, 32), scale="e8m0", dynamic=True)

# Kimi-K2 and slime, whose files are those of compressed-tensors: a symmetric range.
INT4_BLOCK32_KIMI = Format("INT4_BLOCK32_KIMI", IntElement(7, -7, 7), (1, 32))

# compressed-tensors and torchao: half a step more than the largest integer. One definition, both names.
_INT8_HALF, _INT4_HALF = IntElement(127.5, -128, 127), IntElement(7.5, -8, 7)
INT8_COMPRESSED_TENSORS = Format("INT8_COMPRESSED_TENSORS", _INT8_HALF, (None, None))
INT8_PER_CHANNEL_COMPRESSED_TENSORS = Format("INT8_PER_CHANNEL_COMPRESSED_TENSORS", _INT8_HALF, (1, None))
INT4_BLOCK32_COMPRESSED_TENSORS = Format("INT4_BLOCK32_COMPRESSED_TENSORS", _INT4_HALF, (1, 32))
INT4_BLOCK128_COMPRESSED_TENSORS = Format("INT4_BLOCK128_COMPRESSED_TENSORS", _INT4_HALF, (1, 128))
INT8_PER_CHANNEL_TORCHAO = replace(INT8_PER_CHANNEL_COMPRESSED_TENSORS, name="INT8_PER_CHANNEL_TORCHAO")
INT4_BLOCK32_TORCHAO = replace(INT4_BLOCK32_COMPRESSED_TENSORS, name="INT4_BLOCK32_TORCHAO")

# What ModelOpt's own files stand for, unlike its fake quantization.
INT8_PER_CHANNEL_MODELOPT_FILES = Format("INT8_PER_CHANNEL_MODELOPT_FILES", _INT8, (1, None))

# compressed-tensors stores the reciprocal of an expert's scale.
NVFP4_COMPRESSED_TENSORS = replace(NVFP4, name="NVFP4_COMPRESSED_TENSORS", dequantize="divide")
NVFP4_STATIC_COMPRESSED_TENSORS = replace(NVFP4_STATIC, name="NVFP4_STATIC_COMPRESSED_TENSORS", dequantize="divide")

# What becomes of an NVFP4 scale that underflows E4M3.
NVFP4_MODELOPT = replace(NVFP4, name="NVFP4_MODELOPT", min_scale=0.0, unit_scale_below=1e-5)
NVFP4_TRANSFORMER_ENGINE = replace(NVFP4, name="NVFP4_TRANSFORMER_ENGINE", min_scale=0.0)
NVFP4_TORCHAO = replace(NVFP4, name="NVFP4_TORCHAO", min_scale=2.0**-6)

# The MX exponent of the OCP specification, and torchao's EVEN mode.
MXFP8_OCP = replace(MXFP8, name="MXFP8_OCP", exponent_rounding="floor")
MXFP6_E3M2_OCP = replace(MXFP6_E3M2, name="MXFP6_E3M2_OCP", exponent_rounding="floor")
MXFP6_E2M3_OCP = replace(MXFP6_E2M3, name="MXFP6_E2M3_OCP", exponent_rounding="floor")
MXFP4_OCP = replace(MXFP4, name="MXFP4_OCP", exponent_rounding="floor")
MXINT8_OCP = replace(MXINT8, name="MXINT8_OCP", exponent_rounding="floor")
MXFP8_TORCHAO_EVEN = replace(MXFP8, name="MXFP8_TORCHAO_EVEN", exponent_rounding="even")
MXFP6_E3M2_TORCHAO_EVEN = replace(MXFP6_E3M2, name="MXFP6_E3M2_TORCHAO_EVEN", exponent_rounding="even")
MXFP6_E2M3_TORCHAO_EVEN = replace(MXFP6_E2M3, name="MXFP6_E2M3_TORCHAO_EVEN", exponent_rounding="even")
MXFP4_TORCHAO_EVEN = replace(MXFP4, name="MXFP4_TORCHAO_EVEN", exponent_rounding="even")


class _ByName(dict[str, Format]):
    """A dict that says which name was nearest to one that it has not."""

    def __missing__(self, name: object) -> Format:
        raise KeyError(f"found no format {shown(name)} in FORMATS (did you mean {nearest(str(name), self)[0]!r}?)")


# All of the above, by name.
FORMATS: dict[str, Format] = _ByName(
    {value.name: value for value in list(globals().values()) if isinstance(value, Format)}
)

# Layouts of files, and what their readers do with each type of scale; "plain" has weights, and no scales.
Layout: TypeAlias = Literal["compressed-tensors", "modelopt", "fp8", "plain"]
LAYOUTS: dict[str, dict[str, Literal["multiply", "divide"]]] = {
    "compressed-tensors": {"fp32": "multiply", "e4m3": "divide", "e8m0": "multiply"},
    "modelopt": {"fp32": "multiply", "e4m3": "multiply", "e8m0": "multiply"},
    "fp8": {"fp32": "multiply", "e4m3": "multiply", "e8m0": "multiply"},
    "plain": {},
}


def check_layout(layout: Any) -> str:
    """The layout, if it is one. Raises ValueError for another, with the nearest name."""
    if str(layout) not in LAYOUTS:
        meant = nearest(str(layout), LAYOUTS)[0]
        raise ValueError(f"layout: found {layout!r}, wanted one of {list(LAYOUTS)} (did you mean {meant!r}?)")
    return str(layout)


def dequantize_of(format: Format, layout: str) -> Literal["multiply", "divide"]:
    """What readers of a layout do with the scales of such a format."""
    return LAYOUTS[check_layout(layout)].get(format.scale, format.dequantize)


def is_own(format: Format, layout: str) -> bool:
    """True if a layout's library applies scales in the format's own order, so that it reads `fakequant`'s weights.

    Raises:
        ValueError: There is no such layout.

    Example:
        >>> is_own(NVFP4, "modelopt"), is_own(NVFP4, "compressed-tensors"), is_own(FP8, "compressed-tensors")
        (True, False, True)
    """
    return format.dequantize == dequantize_of(format, layout)


def _is_full(element: IntElement) -> bool:
    return element.low == -element.high - 1 and element.qmax == element.high


def static_format(format: Format) -> Format:
    """The format whose scales are state, in place of one with dynamic blocks under an amax: the files are the same.

    Example:
        >>> static_format(NVFP4).name, static_format(MXFP4).name, static_format(FP8).name
        ('NVFP4_STATIC', 'MXFP4', 'FP8')
    """
    if not format.dynamic or format.is_stateless:
        return format
    static = replace(format, dynamic=False, name=format.name.replace("NVFP4", "NVFP4_STATIC", 1))
    return next((known for known in FORMATS.values() if known == static), static)


@cache  # a spec asks for each of its groups
def own_format(format: Format, layout: str) -> Format:
    """The layout's own format in place of one that its readers would apply in another order; else the same.

    For integers of a full range compressed-tensors' has half a step more, which is how it quantizes. A format that is
    in the layout's order already keeps its range.

    Raises:
        ValueError: There is no such layout.

    Example:
        >>> own_format(NVFP4, "compressed-tensors").name, own_format(INT8_PER_CHANNEL, "modelopt").name
        ('NVFP4_COMPRESSED_TENSORS', 'INT8_PER_CHANNEL_MODELOPT_FILES')
        >>> own_format(INT4_BLOCK32, "compressed-tensors").element.qmax, own_format(MXFP4, "compressed-tensors").name
        (7.5, 'MXFP4')
    """
    if is_own(format, layout):
        return format
    element, name = format.element, f"{format.name}_{layout.upper().replace('-', '_')}"
    if layout == "compressed-tensors" and isinstance(element, IntElement) and _is_full(element):
        element = replace(element, qmax=element.high + 0.5)
    own = replace(format, name=name, element=element, dequantize=dequantize_of(format, layout))
    return next((known for known in FORMATS.values() if replace(known, name=name) == own), own)
