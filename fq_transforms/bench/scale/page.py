"""The page of results of `scale`, in Markdown."""

from typing import Any

from fq_transforms.bench.step import AGAIN, LIMIT, cell, lines

__all__ = ["page"]

Row = dict[str, Any]


def page(environment: dict[str, str], rows: list[Row]) -> str:
    """What was found, part by part, and how."""
    known = ", ".join(f"{key} {value}" for key, value in environment.items())
    text = [f"# Several ranks, {environment['date']}", "", f"`python -m fq_transforms.bench scale`: {known}.", ""]
    if trained := [row for row in rows if row["part"] != "folder"]:
        text += _training(trained)
    if converted := [row for row in rows if row["part"] == "folder"]:
        text += _folder(converted)
    return "\n".join(text)


def _training(rows: list[Row]) -> list[str]:
    header = ["part", "layout", "bf16 ms", "lens ms", "write ms", AGAIN, "lens", f"lens above {AGAIN}"]
    table = [[*header, "bf16 GiB", "lens GiB", "fake weights are of", "state loaded at"]]
    for row in rows:
        times = ["{:.2f} ± {:.2f}".format(*row[name]) for name in ("bf16_ms", "lens_ms", "write_ms")]
        ratios = [cell(row[name]) for name in ("again", "lens", "above")]
        memory = ["" if gib is None else f"{gib:.2f}" for gib in row["gib"].values()]
        table.append([row["part"], row["layout"], *times, *ratios, *memory, row["law"], ", ".join(row["loaded"])])
    return [
        f"A step is forward, backward, gradients to the masters, the optimizer, and the write of the next weights, on "
        f"all ranks at once: the time of the slowest. Ratios are over the mean of the steps of bf16 just before and "
        f"after, of bf16 itself and of the lens, {len(rows[0]['lens']['ratios'])} of each; medians and their standard "
        "errors. Plain bf16 casts masters to bf16, and gradients to fp32; under Megatron's DistributedOptimizer, which "
        "casts and gathers by itself, the lens is one more pass over the bf16 weights. Write: of the fake weights "
        "alone. GiB: the most of a rank within a step. Experts are NVFP4, tokens are spread evenly over them. Fake "
        "weights after the last step, and amax calibrated on the masters then, equal one GPU's of the gathered masters "
        "bit for bit, and so does the saved state, loaded by other processes.",
        "",
        *lines(table),
        "",
        f"The limit of the lens above {AGAIN} is {LIMIT} for FSDP2.",
        "",
    ]


def _folder(rows: list[Row]) -> list[str]:
    table = [["ranks", "s", "GB/s of the source", "over one rank", "of a cold read", "of both"]]
    for row in rows:
        speed = row["bytes"] / row["seconds"]
        shares = [f"{speed / row['rates'][name]:.2f}" for name in ("read", "both")]
        scaling = f"{rows[0]['seconds'] / row['seconds']:.2f}"
        table.append([str(row["ranks"]), f"{row['seconds']:.1f}", f"{speed / 1e9:.2f}", scaling, *shares])
    first = rows[0]
    speeds = ", ".join(f"{name} {rate / 1e9:.2f}" for name, rate in first["rates"].items())
    return [
        f"One folder of {first['bytes'] / 1e9:.2f} GB to NVFP4, {first['written'] / 1e9:.2f} GB, by ranks that share "
        f"the cores, read from the disk each time; one run of each. The {first['files']} files are the same by every "
        f"number of ranks, by SHA-256. GB/s by themselves: {speeds}; of both: a cold read while a third as many bytes "
        "are written.",
        "",
        *lines(table),
        "",
    ]
