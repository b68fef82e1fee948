"""Formats that can be packed, and their scales."""

from dataclasses import replace

import fq_transforms as fqt
from fq_transforms.formats import E5M2, FORMATS, IntElement
from fq_transforms.ops.amax.reference import expert_amax_reference

PACKABLE = [format for format in FORMATS.values() if not format.unit_scale_below] + [
    replace(fqt.FP8, name="FP8_E5M2", element=E5M2),
    replace(fqt.INT8, name="INT4", element=IntElement(7, -8, 7)),
]


def amax_of(weight, format, share=1.0):
    if format.is_stateless:
        return None, None
    amax, global_amax = expert_amax_reference(weight, format=format)
    return amax if format.dynamic else amax * share, global_amax
