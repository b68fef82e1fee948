"""A model in files while it is calibrated layer by layer: one layer is read at a time, and written when it is done.

    stage     the new shards at their full size, and for each part that is on the disk its state and a mark
    commit    the state of all parts, config.json and what else is beside the weights; the stage is renamed

A part is a layer, or what lies outside the layers. Its mark is written after all else of it has reached the disk, so a
run that goes on reads back what has a mark.
"""

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fq_transforms import checkpoint
from fq_transforms.checkpoint.storage import (
    Lock,
    crc32_of,
    fsync_directory,
    local_path,
    naming,
    stage_of,
    stages_beside,
    stages_within,
)
from fq_transforms.export.files.directory import (
    CONFIG,
    INDEX,
    bytes_of,
    check_free,
    commit,
    read_document,
    remove_staged,
    write_json,
)
from fq_transforms.export.files.shards import (
    DTYPES,
    Files,
    ShardWriter,
    TensorType,
    index_of,
    is_whole,
    lay_out,
    type_of,
)
from fq_transforms.export.layouts.plan import config_of
from fq_transforms.export.names.from_memory import file_tensors
from fq_transforms.export.streaming.sources import Folder
from fq_transforms.parse import shown
from fq_transforms.sequential import LayerStore
from fq_transforms.state import State
from fq_transforms.transform import Transform, transform

__all__ = ["STATE", "LayerFiles"]

# The state of all parts, in the folder that is written.
STATE = "fq_state.safetensors"
# In a stage: a sign that it is laid out; of a part its state, with the spec, and its mark.
_BEGUN, _PART_STATE, _MARK = ".begun.json", ".part-{:05d}.safetensors", ".part-{:05d}.json"


class LayerFiles(LayerStore):
    """The `store` of `Transform.calibrate_sequentially` for a model whose layers are in files, and for going on.

    With a folder the model is on meta (but for buffers that no folder has), and has the values of one layer at a time,
    and of what lies outside the layers. Parameters that are returned are read when they are asked for.

    Args:
        folder: Of safetensors and config.json, as transformers saves it; None if the model has its values.
        out: Written as plain weights, by names and in the shards of files, those that GPTQ has moved among them, with
            the state in "fq_state.safetensors": a new name or an empty directory. It appears whole, at the end.
            `fqt.export.folder(out, dst, state=f"{out}/fq_state.safetensors")` packs it. None: what is moved stays in
            memory.
        config: `model.config`, for an `out` of a model that has its values.
        device: Where layers are read to.
        resume: Go on where a run that was killed has stopped, and keep what an error leaves.
        max_shard_size: Of a file: bytes, or such as "5GB".

    Raises:
        ValueError: There is neither folder nor `out`; a size is none. When it is used: the folder lacks a tensor of the
            model or has another shape; `out` is taken; there is a part of another run, to go on with.
        OSError: When it is used: a file cannot be read or written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        out: str | os.PathLike[str] | None = None,
        *,
        config: Any = None,
        device: torch.device | str = "cpu",
        resume: bool = False,
        max_shard_size: int | str = "5GB",
    ) -> None:
        if folder is None and out is None:
            raise ValueError("folder, out: found None for both, wanted where to read or where to write")
        if out is None and resume:
            raise ValueError("resume: found True and out=None, wanted the directory that was being written")
        if folder is None and config is None:
            raise ValueError("config: found None, wanted model.config, by which the tensors of out get their names")
        self._folder = None if folder is None else local_path(folder)
        self._out = None if out is None else local_path(out)
        self._config: Any = config if folder is None else None
        self._device, self._resume, self._limit = torch.device(device), resume, bytes_of(max_shard_size)

    @contextmanager
    def using(
        self, fq: Transform, model: Module, names: Sequence[Sequence[str]], about: Sequence[str | Tensor]
    ) -> Generator[None]:
        """`LayerStore.using`."""
        with ExitStack() as stack:
            self._source = None if self._folder is None else stack.enter_context(Folder(self._folder))
            self._names, self._fq = names, fq
            own = dict(model.named_parameters()) | dict(model.named_buffers())
            self._own = {name: own[name].detach() for of_part in names for name in of_part}
            config = config_of(self._config) if self._source is None else self._source.config
            self._config = config
            self._tensors = file_tensors({name: tuple(one.shape) for name, one in self._own.items()}, config)
            types = self._types()
            self._parameters = [name for name, _ in model.named_parameters()]
            self.params = dict[str, Tensor]() if self._source else dict(model.named_parameters())
            self._stage: Path | None = None
            if self._out is not None:
                self._shards = lay_out(types, self._limit)
                stack.enter_context(self._staged(self._out, about))
            yield

    def load(self, part: int) -> dict[str, Tensor]:
        """`LayerStore.load`."""
        moved = self._moved(part)
        found: dict[str, Tensor] = {}
        if moved:
            assert self._stage is not None
            with Files(self._stage) as files:
                found = {name: self.read(name, files.read) for name in moved}
            if self._source is None:
                self.params.update(found)
        if self._source is not None:
            left = [name for name in self._names[part] if name not in found]
            found |= {name: self.read(name, self._source.read) for name in left}
        return found

    def state_of(self, part: int) -> State | None:
        """`LayerStore.state_of`."""
        if self._moved(part) is None:
            return None
        assert self._stage is not None
        path = self._stage / _PART_STATE.format(part)
        return checkpoint.load_file(path, transform(checkpoint.read_spec(path)), like=None)

    def keep(self, part: int, fq: Transform, moved: Mapping[str, Tensor], state: State) -> None:
        """`LayerStore.keep`."""
        if self._source is None or self._out is None:
            self.params.update(moved)
        if self._stage is None or self._out is None:
            return
        with naming(self._out):
            for name in self._names[part]:
                self._write(name, moved.get(name))
            if part == len(self._names) - 1:  # and what the model does not have
                for name in self._writer.places.keys() - self._known:
                    self._copy(name)
            self._writer.sync()
            checkpoint.save_file(self._stage / _PART_STATE.format(part), fq, state)
            mark = self._stage / _MARK.format(part)
            write_json(mark.with_suffix(".new"), {"moved": list(moved)})
            mark.with_suffix(".new").rename(mark)
            fsync_directory(self._stage)

    def finish(self, state: State) -> Mapping[str, Tensor]:
        """`LayerStore.finish`."""
        if self._out is None or self._stage is None:
            return self._read_from(self._folder)
        with naming(self._out):
            if self._source is not None:
                self._source.copy_others(self._stage)
            checkpoint.save_file(self._stage / STATE, self._fq, state)
            write_json(self._stage / CONFIG, self._config)
            commit(self._stage, self._out)
        return self._read_from(self._out)

    def _read_from(self, path: Path | None) -> Mapping[str, Tensor]:
        """The parameters: the model's own, or read from a folder."""
        if self._source is None or path is None:
            return self.params
        return _Read(self, path, self._parameters, self.params)

    # Tensors of the model in files.

    def _types(self) -> dict[str, tuple[TensorType, int]]:
        """All tensors of the files: those of the folder, selected ones in the model's dtype.

        Raises:
            ValueError: The folder lacks one of the model's, or has another shape.
        """
        selected = {name for group in self._fq.spec.groups for name in group.names}
        own: dict[str, tuple[TensorType, int]] = {}
        kept: dict[str, TensorType] = {}  # as the folder has it
        for parameter, tensor in self._own.items():
            for name, matrix, rows in self._parts(parameter, tensor.to("meta")):
                part = matrix[rows] if matrix.dim() else matrix
                own[name] = type_of(part), part.nbytes
                if parameter not in selected:
                    kept[name] = own[name][0]
        self._known = set(own)
        if self._source is None:
            return own
        stored = {name: (type_of(one), one.nbytes) for name, one in self._source.params().items()}
        stored |= {name: (at.type, at.size) for name, at in self._source.files.places.items() if name in stored}
        for name, (type, _) in own.items():
            if name not in stored or stored[name][0].shape != type.shape:
                found = f"{stored[name][0].shape}" if name in stored else "no such tensor"
                raise ValueError(
                    f"folder {str(self._folder)!r}: found {found} for {name!r}, wanted {type.shape}, as the model has "
                    "it; give the folder of this model, and tie what is tied there: model.tie_weights()"
                )
        return {name: one if name in kept or name not in own else own[name] for name, one in stored.items()}

    def _parts(self, parameter: str, tensor: Tensor) -> Iterator[tuple[str, Tensor, slice | Tensor]]:
        """The names in files, with the matrix or the stack that each is rows of."""
        for part in self._tensors[parameter]:
            if "*" not in part.name:
                yield part.name, tensor, part.rows
            else:
                for expert, matrix in enumerate(tensor):
                    yield part.name.replace("*", str(expert)), matrix, part.rows

    def read(self, parameter: str, read: Callable[[str], Tensor]) -> Tensor:
        """A tensor of the model, of what `read` gives by names in files, in the model's dtype."""
        own = self._own[parameter]
        (first, *others), device = self._tensors[parameter], self._device if own.is_meta else own.device
        if not others and "*" not in first.name and first.rows == slice(None):
            return read(first.name).to(device, own.dtype)
        found = torch.empty(own.shape, dtype=own.dtype, device=device)
        for name, matrix, rows in self._parts(parameter, found):
            matrix[rows] = read(name).to(device, own.dtype)
        return found

    def _write(self, parameter: str, moved: Tensor | None) -> None:
        if moved is None and self._source is not None:
            for name, _, _ in self._parts(parameter, self._own[parameter]):
                self._copy(name)
            return
        for name, matrix, rows in self._parts(parameter, self._own[parameter] if moved is None else moved):
            self._writer.write(name, matrix[rows] if matrix.dim() else matrix)

    def _copy(self, name: str) -> None:
        """Copy a tensor of the folder, or write what its codes stand for."""
        source = self._source
        assert source is not None
        place, type = source.files.places.get(name), self._writer.places[name].type
        if place is not None and place.type == type:
            self._writer.copy(name, source.files.path_of(name), place.start)
        else:
            self._writer.write(name, source.read(name).to(DTYPES[type.dtype]))

    # The directory that is being written.

    @contextmanager
    def _staged(self, path: Path, about: Sequence[str | Tensor]) -> Generator[None]:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with Lock(path):
                check_free(path)
                stage = stage_of(path, self._fingerprint(about))
                left = [*stages_beside(path), *stages_within(path)]
                if self._resume and left and stage not in left:
                    raise ValueError(
                        f"resume: found {str(left[0])!r}, a part of another run to {str(path)!r}: of other weights, "
                        "batches or options; wanted those, or no resume, to begin anew"
                    )
                if not (self._resume and (stage / _BEGUN).exists() and is_whole(stage, self._shards)):
                    remove_staged(path)
                    stage.mkdir()
                    ShardWriter(stage, self._shards).sync()
                    if index := index_of(self._shards):
                        write_json(stage / INDEX, index)
                    write_json(stage / _BEGUN, {})
                    fsync_directory(stage)
                self._stage, self._writer = stage, ShardWriter(stage, self._shards, is_new=False)
                try:
                    yield
                except Exception:
                    if not self._resume:
                        remove_staged(path)
                    raise

    def _fingerprint(self, about: Sequence[str | Tensor]) -> str:
        """32 hex digits of what the numbers depend on; of weights in a folder what the system says of its files."""
        words = [f"{crc32_of(one):08x}" if isinstance(one, Tensor) else one for one in about]
        if self._source is not None:
            files = {self._source.path / place.file for place in self._source.files.places.values()}
            stats = {str(file): file.stat() for file in sorted(files)}
            words += [f"{file} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats.items()]
        else:
            words += [f"{name} {crc32_of(one):08x}" for name, one in self._own.items() if not one.is_meta]
        digest = hashlib.sha256(json.dumps([*words, self._config]).encode())
        for shard in self._shards:
            digest.update(shard.head)
        return digest.hexdigest()[:32]

    def _moved(self, part: int) -> list[str] | None:
        """The names of a part's weights that were moved; None unless it is done."""
        if self._stage is None or not (mark := self._stage / _MARK.format(part)).exists():
            return None
        moved: Any = read_document(mark).get("moved")
        if not isinstance(moved, list) or not set(moved) <= set(self._names[part]):
            raise ValueError(f"file {str(mark)!r}: found {shown(moved)}, wanted names of weights of part {part}")
        return moved


class _Read(Mapping[str, Tensor]):
    """Parameters by name, read from a folder at each use, but for some that are kept."""

    def __init__(self, layers: LayerFiles, path: Path, names: Sequence[str], kept: Mapping[str, Tensor]) -> None:
        self._layers, self._folder, self._kept = layers, Folder(path), kept
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._kept[name] if name in self._kept else self._layers.read(name, self._folder.read)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
