"""What quantization does to each expert: numbers, a table and a plot. `Transform.report` makes it."""

from fq_transforms.report.report import GroupReport, Report

__all__ = ["GroupReport", "Report"]
