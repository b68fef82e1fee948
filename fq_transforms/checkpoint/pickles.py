"""DCP's metadata, which is a pickle, read as data: nothing that a file names is imported, made or called.

A pickle is a program for a stack machine. The standard library's runs it with Python's own classes and functions; this
one knows the few steps that metadata is made of, and keeps what it would make or call as a `Named`: the name and the
values. `metadata_in` then makes DCP's records of those whose names it knows, once each value is of its kind.
"""

import pickletools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo  # pyright: ignore[reportPrivateUsage] (no public name)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from fq_transforms.parse import shown

__all__ = ["METADATA", "MOST_METADATA", "Named", "metadata_in", "read_pickle"]

# Its file, and the most bytes that are read of one; a chunk takes about 0.3 KB.
METADATA, MOST_METADATA = ".metadata", 2**28


@dataclass(eq=False)
class Named:
    """What a pickle wants made or called: `name(*arguments)`, and then given a state. It stays undone.

    Attributes:
        name: Module and name, such as "torch.Size".
        arguments: None where the pickle only names it.
        state: None for none.
    """

    name: str
    arguments: tuple[Any, ...] | None = None
    state: Any = None
    is_built: bool = False

    def __repr__(self) -> str:
        """Without the values, which a pickle can nest into one another many times over."""
        return self.name if self.arguments is None else f"{self.name}(...)"


class _Mark:
    """Where a run of items begins on the stack."""


def read_pickle(content: bytes) -> Any:
    """The value of a pickle, of plain values and `Named`; memory and time are in proportion to the bytes.

    Raises:
        ValueError: It is no pickle, or has a step that metadata does not.

    Source: `pickletools` of the standard library, protocols 3 to 5.

    Example:
        >>> import pickle
        >>> read_pickle(pickle.dumps({"sizes": torch.Size([2, 3])}))
        {'sizes': torch.Size(...)}
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(content):
            name = opcode.name
            if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _ARGUMENTS:
                stack.append(argument)
            elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[cast("int", argument)])
            elif name in _STEPS:
                _STEPS[name](stack, argument)
            elif name == "STOP":
                (value,) = stack
                return value
            elif name not in ("PROTO", "FRAME"):
                raise ValueError(f"found the step {name}, which metadata does not have")
    except (LookupError, TypeError, OverflowError) as error:
        raise ValueError(f"found a pickle with steps that do not fit: {error!r}") from error
    raise ValueError("found a pickle without an end")


def metadata_in(content: bytes) -> Metadata:
    """DCP's metadata in a pickle: each value is of its kind, no number is negative, each tensor is there once.

    Raises:
        ValueError: It is no metadata; the message names the record and the value.

    Example:
        >>> import pickle
        >>> index = MetadataIndex("amax", [0])
        >>> content = pickle.dumps(Metadata({}, storage_data={index: _StorageInfo("0.distcp", 0, -8)}))
        >>> metadata_in(content)
        Traceback (most recent call last):
        ...
        ValueError: _StorageInfo.length: found -8, wanted a count
    """
    found = _record(read_pickle(content), "metadata", _DCP + "Metadata")
    storage = found.get("storage_data")
    return Metadata(
        {_text(key, "Metadata"): _stored(value, key) for key, value in _items(found, "state_dict_metadata")},
        planner_data=found.get("planner_data"),
        storage_data=None if storage is None else dict(map(_place, _items(found, "storage_data"))),
        storage_meta=_storage_meta(found.get("storage_meta")),
    )


# The steps of the machine, on its stack.


def _since_mark(stack: list[Any]) -> list[Any]:
    at = len(stack) - 1
    while not isinstance(stack[at], _Mark):
        at -= 1
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _tuple(count: int) -> Callable[[list[Any], Any], None]:
    def step(stack: list[Any], _: Any) -> None:
        items = tuple(_popped(stack) for _ in range(count))
        stack.append(items[::-1])

    return step


def _popped(stack: list[Any]) -> Any:
    if isinstance(stack[-1], _Mark):
        raise LookupError("a mark where a value is wanted")
    return stack.pop()


def _extend(items: list[Any], stack: list[Any]) -> None:
    if type(stack[-1]) is not list:
        raise TypeError("items for what is no list")
    stack[-1].extend(items)


def _set_items(items: list[Any], stack: list[Any]) -> None:
    if type(stack[-1]) is not dict or len(items) % 2:
        raise TypeError("entries for what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (
            str,
            Named,
        ):  # numbers can be made to collide, and tuples to hold themselves many times over
            raise TypeError(f"a key that is {type(key).__name__}")
        stack[-1][key] = value


def _name(stack: list[Any], argument: Any) -> None:
    if argument is None:
        name, module = _popped(stack), _popped(stack)
    else:
        module, name = argument.split(" ")
    if type(module) is not str or type(name) is not str:
        raise TypeError("a name that is no text")
    stack.append(Named(f"{module}.{name}"))


def _make(stack: list[Any], _: Any) -> None:
    arguments, named = _popped(stack), _popped(stack)
    if type(named) is not Named or named.arguments is not None or type(arguments) is not tuple:
        raise TypeError("a call of what is no name")
    stack.append(Named(named.name, arguments))


def _build(stack: list[Any], _: Any) -> None:
    state, made = _popped(stack), stack[-1]
    if type(made) is not Named or made.arguments is None or made.is_built:
        raise TypeError("a state for what was not made")
    made.state, made.is_built = state, True


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_ARGUMENTS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_STEPS: dict[str, Callable[[list[Any], Any], None]] = {
    "EMPTY_LIST": lambda stack, _: stack.append([]),
    "EMPTY_DICT": lambda stack, _: stack.append({}),
    "MARK": lambda stack, _: stack.append(_Mark()),
    "TUPLE": lambda stack, _: stack.append(tuple(_since_mark(stack))),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "APPEND": lambda stack, _: _extend([_popped(stack)], stack),
    "APPENDS": lambda stack, _: _extend(_since_mark(stack), stack),
    "SETITEM": lambda stack, _: _set_items([_popped(stack), _popped(stack)][::-1], stack),
    "SETITEMS": lambda stack, _: _set_items(_since_mark(stack), stack),
    "GLOBAL": _name,
    "STACK_GLOBAL": _name,
    "REDUCE": _make,
    "NEWOBJ": _make,
    "BUILD": _build,
}

# DCP's records, of what a pickle names.

_DCP = "torch.distributed.checkpoint.metadata."
_DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGE_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"


def _record(value: Any, where: str, *names: str) -> Mapping[str, Any]:
    """The fields of a record of one of some classes. Raises ValueError for anything else."""
    if type(value) is not Named or value.name not in names or value.arguments != ():
        found = f"the name {value.name!r}" if type(value) is Named else shown(value)
        raise ValueError(f"{where}: found {found}, wanted {' or '.join(name.rpartition('.')[2] for name in names)}")
    state = {} if value.state is None else value.state
    if type(state) is not dict or not all(type(key) is str for key in state):
        raise ValueError(f"{where}: found {shown(state)}, wanted fields")
    return state


def _items(record: Mapping[str, Any], name: str) -> Iterator[tuple[Any, Any]]:
    found = record.get(name)
    if type(found) is not dict:
        raise ValueError(f"Metadata.{name}: found {shown(found)}, wanted a dict")
    return iter(found.items())


def _text(value: Any, where: str) -> str:
    if type(value) is not str:
        raise ValueError(f"{where}: found {shown(value)}, wanted text")
    return value


def _count(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"{where}: found {shown(value)}, wanted a count")
    return value


def _sizes(value: Any, where: str) -> torch.Size:
    given = value.arguments if type(value) is Named and value.name == "torch.Size" else None
    if given is None or len(given) != 1 or type(given[0]) not in (tuple, list):
        raise ValueError(f"{where}: found {shown(value)}, wanted sizes")
    return torch.Size([_count(size, where) for size in given[0]])


def _stored(value: Any, key: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    where = f"tensor {shown(key)}"
    names = _DCP + "TensorStorageMetadata", _DCP + "BytesStorageMetadata"
    record = _record(value, where, *names)
    if value.name == names[1]:
        return BytesStorageMetadata()
    chunks = record.get("chunks")
    if type(chunks) is not list:
        raise ValueError(f"{where}: found chunks={shown(chunks)}, wanted a list")
    return TensorStorageMetadata(
        _properties(record.get("properties"), where),
        _sizes(record.get("size"), where),
        [_chunk(chunk, where) for chunk in chunks],
    )


def _chunk(value: Any, where: str) -> ChunkStorageMetadata:
    record = _record(value, where, _DCP + "ChunkStorageMetadata")
    return ChunkStorageMetadata(_sizes(record.get("offsets"), where), _sizes(record.get("sizes"), where))


def _properties(value: Any, where: str) -> TensorProperties:
    """The dtype; of what else DCP keeps, nothing is said by how a state or packed weights are stored."""
    is_named = type(value) is Named and value.name == _DCP + "TensorProperties" and value.arguments == ()
    state = value.state if is_named else None
    dtype = state[0] if type(state) is tuple and state else None
    found = _DTYPES.get(dtype.name) if type(dtype) is Named and dtype.arguments is None else None
    if found is None:
        raise ValueError(f"{where}: found {shown(value)}, wanted properties with a dtype")
    return TensorProperties(found)


def _place(item: tuple[Any, Any]) -> tuple[MetadataIndex, _StorageInfo]:
    index, where = item
    about = _record(index, "Metadata.storage_data", _DCP + "MetadataIndex")
    offset, number = about.get("offset"), about.get("index")
    record = _record(where, "Metadata.storage_data", _STORAGE_INFO)
    if record.get("transform_descriptors"):
        raise ValueError(f"_StorageInfo.transform_descriptors: found {shown(record['transform_descriptors'])}")
    return (
        MetadataIndex(
            _text(about.get("fqn"), "MetadataIndex.fqn"),
            None if offset is None else _sizes(offset, "MetadataIndex.offset"),
            None if number is None else _count(number, "MetadataIndex.index"),
        ),
        _StorageInfo(
            _text(record.get("relative_path"), "_StorageInfo.relative_path"),
            _count(record.get("offset"), "_StorageInfo.offset"),
            _count(record.get("length"), "_StorageInfo.length"),
        ),
    )


def _storage_meta(value: Any) -> StorageMeta | None:
    if value is None:
        return None
    save = _record(value, "Metadata.storage_meta", _DCP + "StorageMeta").get("save_id")
    return StorageMeta(save_id=None if save is None else _text(save, "StorageMeta.save_id"))
