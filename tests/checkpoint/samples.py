"""What several tests of checkpoints share: specs and trees, shards of them, faults in files, and comparisons."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fq_transforms as fqt
from fq_transforms import checkpoint
from fq_transforms.state import flatten
from tests.cases import experts

KINDS = ["directory", "file"]

FORMATS = {
    "a.experts.fp8": fqt.FP8,
    "a.experts.channel": fqt.INT8_PER_CHANNEL,
    "a.experts.block": fqt.INT4_BLOCK32,
    "b.experts.nvfp4": fqt.NVFP4,
    "b.experts.static": fqt.NVFP4_STATIC,
    "b.experts.square": fqt.FP8_BLOCK,
    "b.experts.none": fqt.MXFP4,
    "b.experts.mxfp6": fqt.MXFP6_E2M3,
}


def save_as(kind, path, fq, state):
    {"directory": checkpoint.save, "file": checkpoint.save_file}[kind](path, fq, state)


def load_as(kind, path, fq, like):
    return {"directory": checkpoint.load, "file": checkpoint.load_file}[kind](path, fq, like=like)


def small(format=fqt.FP8, count=4, dtype=torch.float32):
    """A transform of `count` experts in one format, their state, and the experts."""
    params = {f"experts.{i}.w": w for i, w in enumerate(experts(count, (128, 256), dtype))}
    fq = fqt.transform(fqt.select(params, {"*": format}))
    return fq, fq.calibrate(params), params


def of(formats, count=4, shape=(128, 256)):
    """The transform and the state of groups `{key}.experts.{i}.w`."""
    params = {f"{key}.experts.{i}.w": w for key in formats for i, w in enumerate(experts(count, shape))}
    fq = fqt.transform(fqt.select(params, {f"{key}.*": format for key, format in formats.items()}))
    return fq, fq.calibrate(params)


def whole_params(count=8, formats=FORMATS):
    """Stacked experts [E, 256, 128], each with a magnitude of its own, the same on every rank."""
    return {name: torch.stack(experts(count, (256, 128), seed=i)) for i, name in enumerate(formats)}


def sharded(params, placements, mesh):
    """The same parameters on a mesh, without a collective."""
    return {name: distribute_tensor(weight, mesh, placements, src_data_rank=None) for name, weight in params.items()}


def placed(params, ep, tp, size):
    """Sharded by expert and tensor parallelism; the ranks that are left over are replicas."""
    mesh = init_device_mesh("cpu", (size // (ep * tp), ep, tp), mesh_dim_names=("replica", "ep", "tp"))
    return sharded(params, [Replicate(), Shard(0), Shard(1)], mesh)


def packed_of(fq, params):
    return fq.pack(params, fq.calibrate(params))


def like_of(fq, params):
    """Packed weights to load into: `pack` of parameters on meta."""
    meta = {name: torch.empty_like(weight, device="meta") for name, weight in params.items()}
    return fq.pack(meta, fq.init(meta))


def bits(tensor):
    """A tensor's numbers as integers of the same size, which are equal where they are NaN too."""
    size = tensor.element_size()
    return tensor.contiguous().view({1: torch.uint8, 4: torch.int32, 8: torch.int64}[size])


def assert_same(found, wanted):
    """Equal trees: keys in order, leaves, types, dtypes, placements, and each byte of this rank's part."""
    assert list(found) == list(wanted)
    assert [list(group) for group in found.values()] == [list(group) for group in wanted.values()]
    a, b = flatten(found), flatten(wanted)
    for name in b:
        x, y = a[name], b[name]
        assert (type(x), x.shape, x.dtype) == (type(y), y.shape, y.dtype), name
        if isinstance(x, DTensor):
            assert (x.placements, x.device_mesh) == (y.placements, y.device_mesh), name
            x, y = x.to_local(), y.to_local()
        assert torch.equal(bits(x), bits(y)), name


def files_below(folder):
    """Every file below a folder with its bytes."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def damaged(file, step):
    """Change a file in turn: one bit flipped, then the end cut off; restored afterwards. Yields the place."""
    content = file.read_bytes()
    for at in range(0, len(content), step):
        file.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        yield at
    for end in range(0, len(content), 5 * step):
        file.write_bytes(content[:end])
        yield end
    file.write_bytes(content)
