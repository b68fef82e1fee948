"""What every checkpoint holds beside its leaves: a Spec, and whether it is the one that is wanted.

What was skipped and how parameters are named is not compared: only what decides the meaning of the leaves.
"""

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fq_transforms.spec import Group, Inputs, Skipped, Spec

__all__ = ["check_groups", "check_no_others", "joined", "named", "naming"]


def check_groups(stored: Spec, wanted: Spec) -> None:
    """Raise ValueError unless each wanted group is stored with the same format, number of experts and shape."""
    found = {group.key: group for group in stored.all_groups}
    missing = [group.key for group in wanted.all_groups if group.key not in found]
    if missing:
        raise ValueError(
            f"missing {len(missing)} of {len(wanted.all_groups)} groups: {sorted(missing)[:4]}; it holds {_some(found)}"
        )
    for group in wanted.all_groups:
        if differ := difference(found[group.key], group):
            raise ValueError(f"group {group.key!r}: found {differ[0]}, wanted {differ[1]} as the spec says")


def check_no_others(stored: Spec, wanted: Collection[str]) -> None:
    """Raise ValueError if a group is stored that nobody wants."""
    extra = {group.key for group in stored.all_groups} - set(wanted)
    if extra:
        raise ValueError(
            f"found {len(extra)} groups that the spec has not: {sorted(extra)[:4]}; wanted {_some(wanted)} only"
        )


def joined(specs: Mapping[int, Spec]) -> Spec:
    """The groups of all ranks, each once, in the order of the ranks; and their rules, where they are the same.

    Raises:
        ValueError: Ranks disagree about a group; the message names them.
    """
    first: dict[str, tuple[int, Group]] = {}
    skipped: dict[str, Skipped] = {}
    for rank, spec in specs.items():
        for group in spec.all_groups:
            owner, known = first.setdefault(group.key, (rank, group))
            if differ := difference(known, group):
                raise ValueError(
                    f"group {group.key!r}: found {differ[0]} on rank {owner} and {differ[1]} on rank {rank}, wanted "
                    "one spec"
                )
        for parameter in spec.skipped:
            skipped.setdefault(parameter.name, parameter)
    groups = [group for _, group in first.values()]
    inputs = tuple(group for group in groups if isinstance(group, Inputs))
    rules = {spec.rules for spec in specs.values()}
    return Spec(
        tuple(g for g in groups if not isinstance(g, Inputs)),
        tuple(skipped.values()),
        inputs,
        rules.pop() if len(rules) == 1 else (),
    )


def difference(found: Group, wanted: Group) -> tuple[str, str] | None:
    """How two groups of one key differ in what decides their leaves, in words; None if they do not."""
    if found.format != wanted.format:
        a, b = found.format.to_dict(), wanted.format.to_dict()
        names = [name for name in a if a[name] != b[name]]
        if "name" in names:
            return f"format {a['name']}", f"{b['name']}"
        return (
            f"format {a['name']} with {', '.join(f'{n}={a[n]}' for n in names)}",
            ", ".join(f"{n}={b[n]}" for n in names),
        )
    if found.experts != wanted.experts:
        return f"{found.experts} experts", f"{wanted.experts}"
    if found.shape != wanted.shape:
        return f"(out, in) = {found.shape}", f"{wanted.shape}"
    if found.leaf_shapes != wanted.leaf_shapes:
        return f"leaves {found.leaf_shapes}", f"{wanted.leaf_shapes}"
    return None


def named(error: OSError, path: Path, message: str = "") -> OSError:
    """The same error, with the path that it is about."""
    return OSError(error.errno, message or error.strerror or str(error), error.filename or str(path))


@contextmanager
def naming(path: Path) -> Generator[None, None, None]:
    """Let each OSError inside say which path it is about: one of `write` does not."""
    try:
        yield
    except OSError as error:
        raise named(error, path) from error


def _some(names: Collection[str]) -> str:
    shown: Sequence[str] = sorted(names)[:4]
    return f"{len(names)} groups, such as {shown}" if len(names) > 4 else f"{shown}"
