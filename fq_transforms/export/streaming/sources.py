"""A folder to read: its plain weights by name, whatever it stores them in, and the other files beside them."""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fq_transforms.checkpoint.storage import local_path
from fq_transforms.export.files.directory import CONFIG, INDEX, read_document
from fq_transforms.export.files.shards import DTYPES, Files, Place
from fq_transforms.export.layouts import compressed_tensors, fp8, modelopt, mxfp4
from fq_transforms.export.layouts.encoded import Found, check_finite
from fq_transforms.export.names.accounted import text_configs
from fq_transforms.export.streaming.ahead import Span
from fq_transforms.parse import shown

__all__ = ["MODELOPT", "READS", "Folder"]

# What `quant_method` in config.json can be, and who finds what is stored so.
READS: dict[str, Callable[[Files, Mapping[str, Any]], Found]] = {
    "compressed-tensors": compressed_tensors.find,
    "modelopt": modelopt.find,
    "fp8": fp8.find,
    "mxfp4": mxfp4.find,
}
MODELOPT = "hf_quant_config.json"
# Dtypes that are no codes: those of weights, and of buffers such as positions.
_NO_CODES = ("F64", "F32", "F16", "BF16", "C64", "BOOL", "I64", "I32", "I16", "U64", "U32", "U16")
_OF_CODES = re.compile(
    r"[._](?:weight_(?:packed|scale|scale_inv|scale_2|global_scale|shape|zero_point|g_idx)|scale_inv|qweight|qzeros)$"
    r"|\.experts\.\w+_(?:blocks|scales)$|\.weight\.(?:absmax|quant_map|quant_state\..*)$"
)
# What configs call modules that are not quantized.
_EXCLUDED = ("ignore", "exclude_modules", "modules_to_not_convert")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# Other forms of the weights, which are not copied.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


class Folder:
    """A folder of safetensors, read tensor by tensor.

    Attributes:
        path: The directory.
        config: What config.json holds, without what it says of quantization.
        method: How it is quantized, as config.json calls it; None if it is not.
        files: Its tensors.
        encoded: Weights that are stored in codes, by the name of the plain weight.
        left: Names of tensors that plain weights do not need, and why.
        dtype: Of the plain weights that codes stand for: the one that config.json names, or bf16.

    Raises:
        ValueError: The directory has no safetensors or no config.json; a file is damaged; it is quantized in a way that
            is not read; codes and scales do not fit.
        OSError: A file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = local_path(path)
        self.files = Files(self.path)
        try:
            if not (self.path / CONFIG).exists():
                raise ValueError(f"folder {str(self.path)!r}: found no {CONFIG!r}, wanted what transformers writes")
            self.config = read_document(self.path / CONFIG)
            about = self._about()
            self.method = None if about is None else str(about["quant_method"])
            self.dtype = _dtype_of(self.config)
            try:
                found = Found({}, {}) if self.method is None else READS[self.method](self.files, about or {})
                _check_accounted(self.files, found, about)
                others = self._other_weights()
            except ValueError as error:
                raise ValueError(f"folder {str(self.path)!r}: {error}") from error
        except BaseException:
            self.close()
            raise
        self.encoded, self.left = found.weights, found.left | others
        self._name_of = {part: name for name, weight in self.encoded.items() for part in weight.parts.values()}

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self.files.__exit__()

    def params(self) -> dict[str, Tensor]:
        """All plain weights on the meta device, in the order of the files: what `select` takes.

        Of a dtype that PyTorch does not have a tensor has bytes, [bytes].
        """
        found: dict[str, Tensor] = {}
        for part, place in self.files.places.items():
            name = self._name_of.get(part, part)
            if part in self.left or name in found:
                continue
            if weight := self.encoded.get(name):
                found[name] = torch.empty(weight.shape, dtype=self.dtype, device="meta")
            elif dtype := DTYPES.get(place.type.dtype):
                found[name] = torch.empty(place.type.shape, dtype=dtype, device="meta")
            else:
                found[name] = torch.empty(place.size, dtype=torch.uint8, device="meta")
        return found

    def read_all(self, names: Sequence[str], part: slice | None, device: torch.device) -> list[Tensor]:
        """Plain weights, or some experts of each, on a device."""
        if device.type == "cuda" and not any(name in self.encoded for name in names):
            return self.files.on_device(names, part, device)
        return [self.read(name, part, device) for name in names]

    def read(self, name: str, part: slice | None = None, device: torch.device | str = "cpu") -> Tensor:
        """A plain weight, or some experts of a stack, decoded on the device; on a CPU mapped where it is plain."""
        weight = self.encoded.get(name)
        if weight is None:
            return self.files.read(name, part).to(device)
        experts = weight.shape[0] if len(weight.shape) > 2 else None  # a stack may share a number
        shapes = {key: self.files.places[tensor].type.shape for key, tensor in weight.parts.items()}
        own = {key: part if shape and shape[0] == experts else None for key, shape in shapes.items()}
        parts = {key: self.files.read(tensor, own[key]).to(device) for key, tensor in weight.parts.items()}
        plain = weight.decode(parts, self.dtype)
        check_finite(name, plain, part, f"the {weight.format} in {[*weight.parts.values()]}, as {self.dtype}")
        return plain

    def exponents(self, name: str, part: slice | None = None) -> Tensor | None:
        """Exponents + 127 of the blocks of 32 of a weight that is stored in MXFP4, [..., out, in/32]; else None."""
        weight = self.encoded.get(name)
        if weight is None or weight.exponents is None:
            return None
        return self.files.read(weight.parts[weight.exponents], part if len(weight.shape) > 2 else None).view(
            torch.uint8
        )

    def places(self, name: str) -> list[Place]:
        """Where the tensors of a plain weight are."""
        weight = self.encoded.get(name)
        return [self.files.places[part] for part in (weight.parts.values() if weight else (name,))]

    def spans(self, name: str, part: slice | None = None) -> Iterator[Span]:
        """The bytes that `read` reads."""
        weight = self.encoded.get(name)
        for file, (_, shape), start, size in self.places(name):
            skipped, rows, row = 0, 1, size
            if part is not None and (weight is None or shape[:1] == weight.shape[:1]):  # else experts share it
                skipped, rows, row = part.start, len(range(shape[0])[part]), size // shape[0]
            yield Span(self.files.folder / file, start + skipped * row, rows * row)

    def size(self, name: str) -> int:
        """Bytes that a plain weight takes in the files."""
        return sum(place.size for place in self.places(name))

    def others(self) -> Iterator[str]:
        """Files that are copied: all but weights, their index, config.json, and what is hidden. Links are followed.

        Raises:
            ValueError: One is no file, such as a link to nothing, as where a download is not whole.
            OSError: A directory cannot be read.
        """
        for name in self._names():
            if name in (CONFIG, INDEX, MODELOPT) or name.endswith(_WEIGHTS):
                continue
            if not (self.path / name).is_file():
                raise ValueError(
                    f"folder {str(self.path)!r}: found {name!r}, no file or a link to nothing, wanted one to copy; "
                    "mend it, or take it away"
                )
            yield name

    def _names(self) -> Iterator[str]:
        """All files that are not hidden, by their paths within the folder."""
        for directory, names, files in os.walk(self.path, onerror=_raise, followlinks=True):
            at = Path(directory)
            above = {os.path.realpath(one) for one in (at, *at.parents)}  # to which a link would lead in a circle
            names[:] = sorted(n for n in names if not n.startswith(".") and os.path.realpath(at / n) not in above)
            yield from (str((at / file).relative_to(self.path)) for file in sorted(files) if not file.startswith("."))

    def copy_others(self, to: Path) -> None:
        """Copy these files into a directory, until they reach the disk."""
        for name in self.others():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path / name, to / name)
            with (to / name).open("rb") as stream:
                os.fsync(stream.fileno())

    def _other_weights(self) -> dict[str, str]:
        """Files of weights that are not read, and why. Raises ValueError for a shard that the index does not name."""
        read = {place.file for place in self.files.places.values()}
        names = [name for name in self._names() if name.endswith(_WEIGHTS)]
        for name in names:
            if _SHARD.fullmatch(name) and name not in read:
                raise ValueError(
                    f"file {str(self.path / name)!r}: found a shard that {INDEX!r} does not name, wanted all shards in "
                    "it, or no others beside them"
                )
        why = "a file of other weights, which the index does not name"
        return {name: why for name in names if name not in read and name != INDEX}

    def _about(self) -> dict[str, Any] | None:
        """What says how the folder is quantized, which config has no more then."""
        about: Any = None
        for entries in text_configs(self.config):
            for key in ("quantization_config", "compression_config"):
                value = entries.pop(key, None)
                about = value if about is None and value != {} else about
        if about is None and (self.path / MODELOPT).exists():  # older exporters wrote that alone
            own: Any = read_document(self.path / MODELOPT)
            own = own.get("quantization", own)
            if not isinstance(own, dict):
                raise ValueError(
                    f"file {str(self.path / MODELOPT)!r}: found quantization {shown(own)}, wanted an object"
                )
            about = {"quant_method": "modelopt"} | own
        if about is None:
            return None
        method = about.get("quant_method") if isinstance(about, dict) else None
        if method is None and isinstance(about, dict) and "quant_algo" in about:
            method = "modelopt"
        if not isinstance(method, str) or method not in READS:
            found = (
                f"quant_method {shown(method)}" if isinstance(about, dict) else f"quantization_config {shown(about)}"
            )
            near = get_close_matches(method, READS, 1) if isinstance(method, str) else []
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"folder {str(self.path)!r}: found {found}, wanted one of {sorted(READS)}, or a model that is not "
                f"quantized{meant}"
            )
        return about | {"quant_method": method}


def _check_accounted(files: Files, found: Found, about: Mapping[str, Any] | None) -> None:
    """Raise ValueError for codes or scales that belong to no weight: they would be copied as if they were weights."""
    method = None if about is None else about["quant_method"]
    plain = {name for key in _EXCLUDED for name in (about or {}).get(key) or ()}
    taken = {part for weight in found.weights.values() for part in weight.parts.values()} | found.left.keys()
    for name, place in files.places.items():
        module, _, part = name.rpartition(".")
        is_weight = (part == "weight" or ".experts." in name) and module not in plain
        is_code = is_weight and place.type.dtype not in _NO_CODES and len(place.type.shape) > 1
        if name not in taken and (_OF_CODES.search(name) or (is_code and method is not None)):
            alone = "config.json says nothing of quantization" if method is None else f"quant_method {method!r}"
            raise ValueError(
                f"tensor {name!r}: found {place.type.dtype} {place.type.shape}, which is not a weight and of which no "
                f"weight is made, and {alone}, wanted codes and scales beside each other, and the config that they "
                "were written with"
            )
    for name in found.weights:
        if name in files.places and name not in taken:
            raise ValueError(f"tensor {name!r}: found it plain and in codes, wanted it once")


def _raise(error: OSError) -> None:
    raise error


def _dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that config names, or that of its text; bf16 if it names none that weights can have."""
    for entries in text_configs(config):
        named = str(entries.get("dtype") or entries.get("torch_dtype")).removeprefix("torch.")
        if named in ("bfloat16", "float16", "float32"):
            return getattr(torch, named)
    return torch.bfloat16
