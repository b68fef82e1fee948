"""Mutated files of every kind that is read: what they stand for, or an error; no code, no path elsewhere, no bomb.

Each round damages a good folder or file in a drawn way, as an accident would or an attacker could, with the checksums
put right where the reader has any. A round ends in the tree that was saved, or in an error that names the path.
"""

import contextlib
import functools
import json
import os
import pickle
import pickletools
import random
import shutil
import struct
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import fq_transforms as fqt
from fq_transforms import checkpoint
from fq_transforms.checkpoint import megatron, pickles, storage
from fq_transforms.export.files.shards import Files
from fq_transforms.rules import from_json, from_yaml
from fq_transforms.spec import Spec
from tests.checkpoint.samples import assert_same, of
from tests.export.models import write
from tests.full import FULL
from tests.hostile import watched

ROUNDS = 4000 if FULL else 120

HOSTILE = [
    *(None, True, 0, -1, 1, 2**31, 2**63, 10**30, -(2**63), 0.0, -0.0, 1e308, float("nan"), float("inf"), ""),
    *("../x", "/etc/passwd", "..", ".", "a\0b", "evil.py:Compressor", "os.system", "x" * 10**5, "*" * 1000, "\ud800"),
    *("re:^(a|a)+$", "re:(", "re:" + "(a*)*" * 50, "s3://bucket/x", [], {}, [[]] * 100, {"a": {"b": {}}}, [2**40]),
]


def mutated_json(document, random):
    """A document with one value exchanged, dropped, doubled or renamed, wherever it lies."""
    places = []

    def walk(node, path):
        places.append(path)
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            walk(value, (*path, key))

    walk(document, ())
    path = random.choice(places[1:] or [()])
    if not path:
        return random.choice(HOSTILE)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    match random.randrange(4):
        case 0:
            del parent[path[-1]]
        case 1 if isinstance(parent, dict):
            parent[random.choice([h for h in HOSTILE if isinstance(h, str)])] = parent.pop(path[-1])
        case 2 if isinstance(parent, list):
            parent.append(parent[path[-1]])
        case _:
            parent[path[-1]] = random.choice(HOSTILE)
    return document


def mutated_bytes(content, random):
    """Bytes with bits flipped, an end cut off or added, or two ranges exchanged."""
    if not content:
        return b"x"
    content = bytearray(content)
    match random.randrange(5):
        case 0:
            for _ in range(random.randrange(1, 4)):
                content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        case 1:
            del content[random.randrange(len(content)) :]
        case 2:
            content += random.randbytes(random.choice([1, 16, 1000]))
        case 3:
            size = random.randrange(1, 1 + len(content) // 2)
            a, b = (random.randrange(len(content) - size + 1) for _ in range(2))
            content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]
        case _:
            a = random.randrange(len(content))
            content[a : a + 8] = struct.pack("<Q", random.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]))
    return bytes(content)


# Steps of the stack machine, whole: what an attacker would add.
STEPS = [
    *(b"N", b"(", b"t", b")", b"]", b"}", b"0", b"1", b"2", b".", b"\x85", b"\x86", b"R", b"b", b"s", b"u", b"a", b"e"),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"\x8c\x02os\x8c\x06system\x93", b"X\x02\x00\x00\x00id", b"\x81", b"o"),
    *(b"\x82\x01", b"q\x00", b"h\x00", b"r\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8, b"\x97", b"Q", b"\x94", b"\x92"),
    *(
        b"i__main__\nx\n",
        b"I01\n",
        b"L9L\n",
        b"F1.0\n",
        b"S'x'\n",
        b"\x8a\x09" + b"\xff" * 9,
        b"P0\n",
        b"\x98",
        b"\x8f",
    ),
]


def mutated_pickle(content, random):
    """A pickle with steps of another one put in, left out, doubled or exchanged."""
    steps = [at for _, _, at in pickletools.genops(content)] + [len(content)]
    parts = [content[a:b] for a, b in pairwise(steps)]
    for _ in range(random.randrange(1, 4)):
        at = random.randrange(len(parts))
        match random.randrange(5):
            case 0:
                parts.insert(at, random.choice(STEPS))
            case 1:
                del parts[at]
            case 2:
                parts.insert(at, parts[random.randrange(len(parts))])
            case 3:
                other = random.randrange(len(parts))
                parts[at], parts[other] = parts[other], parts[at]
            case _:
                parts[at] = random.choice(STEPS)
        parts = parts or [b"."]
    return b"".join(parts)


def mutated_folder(folder, random):
    """A file of a folder damaged, exchanged with another, or gone; or another thing of its name."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    file = random.choice(files)
    match random.randrange(8):
        case 0:
            file.unlink()
        case 1:
            other = random.choice(files)
            a, b = file.read_bytes(), other.read_bytes()
            file.write_bytes(b)
            other.write_bytes(a)
        case 2:
            file.unlink()
            random.choice([os.mkfifo, lambda f: f.mkdir(), lambda f: f.symlink_to("/dev/zero")])(file)
        case 3:
            file.write_bytes(b"")
        case _:
            content = file.read_bytes()
            if file.suffix == ".json" and random.random() < 0.8:
                file.write_text(json.dumps(mutated_json(json.loads(content), random)), errors="replace")
            else:
                file.write_bytes(mutated_bytes(content, random))


def mutated_header(content, random):
    """Safetensors with another header, its length put right."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(mutated_json(header, random)).encode(errors="replace")
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def in_rounds(name, rounds=ROUNDS):
    """Rounds with a generator each, whose number is in the report of one that fails."""
    for number in range(rounds):
        yield number, random.Random(f"{name} {number}")


def ends_well(number, folder, call, *, same, writes=None, where=None):
    """Run a reader; True if it gave what was saved, False if it raised an error that says where: a path, or a name."""
    said = ""
    with watched(folder, "/dev/zero", *([writes] if writes else []), writes=writes):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = call()
        except (ValueError, OSError, KeyError) as error:
            said = str(error)
    if said:
        assert any(name in said for name in (str(folder), folder.name, *(where or ()))), (number, said[:1000])
        assert len(said) < 4000, (number, len(said))
        return False
    same(found)
    return True


@pytest.fixture
def good(tmp_path):
    fq, state = of({"a": fqt.FP8, "b": fqt.FP8, "c": fqt.NVFP4_STATIC}, 2, (32, 32))
    return fq, state


def test_directories(good, tmp_path):
    """Of DCP's layout: files damaged; and metadata changed by steps or bytes, with its seal put right."""
    fq, state = good
    source, target = tmp_path / "source", tmp_path / "target"
    checkpoint.save(source, fq, state)
    content = (source / ".metadata").read_bytes()[: -storage.SEAL_BYTES]
    ends = []
    for number, draws in in_rounds("directories"):
        shutil.copytree(source, target)
        if draws.random() < 0.5:
            mutate = draws.choice([mutated_pickle, mutated_bytes])
            changed = mutate(content, draws)
            (target / ".metadata").write_bytes(changed + storage.seal_of(changed))
        else:
            mutated_folder(target, draws)
        ends.append(
            ends_well(
                number,
                target,
                lambda: checkpoint.load(target, fq, like=state),
                same=lambda found: assert_same(found, state),
            )
        )
        shutil.rmtree(target)
    assert ends.count(False) > len(ends) // 2, ends.count(False)


def test_files(good, tmp_path):
    """Of safetensors: bytes, headers and specs."""
    fq, state = good
    file = tmp_path / "target"
    checkpoint.save_file(file, fq, state)
    content = file.read_bytes()
    ends = []
    for number, draws in in_rounds("files"):
        file.write_bytes(draws.choice([mutated_bytes, mutated_header])(content, draws))
        ends.append(
            ends_well(
                number, file, lambda: checkpoint.load_file(file, fq), same=lambda found: assert_same(found, state)
            )
        )
    assert ends.count(False) > len(ends) // 2, ends.count(False)


def test_specs_and_rules(good):
    """A Spec, or rules, in JSON or YAML: whatever is read can be written and read again, and is the same."""
    fq, _ = good
    rules = fqt.rules.to_json(
        [fqt.Rule("*.experts.*", fqt.NVFP4, fqt.FP8), fqt.Rule("*.0.*"), fqt.Rule("x", fqt.INT8, required=False)]
    )
    texts = {Spec.from_json: fq.spec.to_json(), from_json: rules, from_yaml: rules}
    read = 0
    for number, draws in in_rounds("specs"):
        for reader, text in texts.items():
            changed, said = json.dumps(mutated_json(json.loads(text), draws)), ""
            with watched():
                try:
                    found = reader(changed)
                    assert str(found)
                    assert not isinstance(found, Spec) or isinstance(found.diff(fq.spec), str)
                except ValueError as error:
                    said = str(error)
            if said:
                assert len(said) < 2000, (number, len(said))
                continue
            again = found.to_json() if isinstance(found, Spec) else fqt.rules.to_json(found)
            assert (Spec.from_json if isinstance(found, Spec) else from_json)(again) == found, number
            read += 1
    assert read


def test_folders_of_models(tmp_path):
    """A folder that `folder` reads, plain or in codes: another one, whole, or none and an error that says where."""
    samples = list(samples_of_models(tmp_path / "samples"))
    target, out = tmp_path / "target", tmp_path / "out"
    names: set[str] = set()

    def whole(_):
        found = {path.name for path in out.iterdir()}
        assert {"config.json"} < found, found
        assert not [name for name in found if name.startswith(".")], found
        with Files(out) as opened:
            names.update(name for name in opened.places if opened.read(name) is not None)
        shutil.rmtree(out)

    for sample in samples:  # undamaged ones are read, and all libraries imported
        fqt.export.folder(sample, out, layout="plain")
        whole(None)
    ends = []
    for number, draws in in_rounds("models", 2000 if FULL else 60):
        shutil.copytree(draws.choice(samples), target)
        mutated_model(target, draws)
        options = draws.choice([{"layout": "plain"}, {"rules": {"*.experts.*": fqt.MXFP4}, "layout": "plain"}])
        options |= {"jobs": draws.choice([1, 2])}
        call = functools.partial(fqt.export.folder, target, out, **options)
        ends.append(ends_well(number, target, call, same=whole, writes=tmp_path, where=WHERE))
        assert {path.name for path in tmp_path.iterdir()} == {"samples", "target"}, number
        shutil.rmtree(target)
    assert 0.3 * len(ends) < ends.count(False) < len(ends), ends.count(False)
    assert names


# What an error names that comes once the files are read.
WHERE = ("parameter", "params", "group", "config", "rule", "tensor", "out")


def samples_of_models(parent):
    """A tiny folder for each way in which weights are stored."""
    experts = [f"model.layers.0.mlp.experts.{e}.up_proj" for e in range(2)]
    config = {"model_type": "any", "architectures": ["Any"], "num_hidden_layers": 1, "num_experts": 2}
    plain = {f"{module}.weight": torch.full((32, 32), n + 1.0) for n, module in enumerate(experts)}
    plain |= {"model.norm.weight": torch.ones(32)}
    fq = fqt.transform(fqt.select(plain, {"*.experts.*": fqt.FP8}))
    save = functools.partial(fqt.export.save, fq=fq, params=plain, state=fq.calibrate(plain), config=config)
    save(parent / "ct", max_shard_size=1100)
    fq = fqt.transform(fqt.select(plain, {"*.experts.*": fqt.NVFP4}))
    save(parent / "modelopt", fq=fq, state=fq.calibrate(plain), layout="modelopt", max_shard_size=700)
    save(parent / "plain", fq=fq, state=fq.calibrate(plain), layout="plain", max_shard_size=5000)
    codes = {f"{module}.weight": torch.ones(32, 32).to(torch.float8_e4m3fn) for module in experts}
    codes |= {f"{module}.weight_scale_inv": torch.ones(1, 1) for module in experts}
    about = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write(parent / "fp8", codes, {"config.json": config | {"quantization_config": about}}, 1100)
    stack = "model.layers.0.mlp.experts.down_proj"
    blocks = {f"{stack}_blocks": torch.ones(2, 32, 2, 16, dtype=torch.uint8)}
    blocks |= {f"{stack}_scales": torch.full((2, 32, 2), 127, dtype=torch.uint8), f"{stack}_bias": torch.ones(2, 32)}
    about = {"quant_method": "mxfp4"}
    write(parent / "mxfp4", blocks, {"config.json": config | {"quantization_config": about}}, 1100)
    return sorted(parent.iterdir())


def mutated_model(folder, random):
    """A file damaged in any way; or the header of a shard, its length put right."""
    if random.random() < 0.4:
        shard = random.choice(sorted(folder.glob("*.safetensors")))
        shard.write_bytes(mutated_header(shard.read_bytes(), random))
    else:
        mutated_folder(folder, random)


def test_names_of_modelopt():
    """Entries under drawn names: what is found fits, or is refused; time is that of the names."""
    fq, _ = of({"a": fqt.FP8}, 2, (32, 32))
    words = ["a.experts", "0", "1", "99999999999999", "weight_quantizer", "_amax", "w", "*", "٣", "_global_amax", "-1"]
    for number, draws in in_rounds("modelopt"):
        names = [".".join(draws.choices(words, k=draws.randrange(1, 9))) for _ in range(draws.randrange(5))]
        entries = {name: torch.ones(draws.choice([(), (1,), (2,), (2, 1)])) for name in names}
        good = {f"a.experts.{i}.w_weight_quantizer._amax": torch.tensor(float(i)) for i in range(2)}
        with watched():
            try:
                found = checkpoint.modelopt.read(entries | good, fq, strict=draws.random() < 0.5)
            except (ValueError, KeyError):
                continue
        assert found["a.experts.*.w"]["amax"].tolist() == [0.0, 1.0], number


def _of_megatron(rank, size, folder, rounds):
    from tests.checkpoint.test_megatron import Layout, build, save, share, state_of, transform_of

    share(Layout())
    model = build(Layout(), gated=False)
    params = dict(model.named_parameters())
    fq = transform_of(params, fqt.FP8, ("*.linear_fc1.weight",))
    sharded = model.sharded_state_dict()
    source, target = Path(folder, "source"), Path(folder, "target")
    save(megatron.sharded_state_dict(fq, state_of(params, fq.spec), sharded), source)
    megatron.verify(source, fq, sharded)
    content = (source / ".metadata").read_bytes()
    ends = []
    for number, draws in in_rounds("megatron", rounds):
        shutil.copytree(source, target)
        if draws.random() < 0.5:
            (target / ".metadata").write_bytes(draws.choice([mutated_pickle, mutated_bytes])(content, draws))
        else:
            mutated_folder(target, draws)
        ends.append(ends_well(number, target, lambda: megatron.verify(target, fq, sharded), same=lambda _: None))
        shutil.rmtree(target)
    return ends.count(False), len(ends)


@pytest.mark.dist
def test_of_megatron(ranks, tmp_path):
    """`.metadata` of Megatron's has no seal: its steps and bytes are changed as they are."""
    ((refused, rounds),) = ranks(_of_megatron, str(tmp_path), ROUNDS, size=1)
    assert refused > rounds // 4


def test_pickles_are_never_run():
    """Law: what is read of a drawn pickle is what the standard library reads, where that makes plain values only."""
    plain = 0
    for number, draws in in_rounds("pickles", 10 * ROUNDS):
        value = {"a": [1, (2, "x"), {"b": None}], "c": b"bytes", "d": (True, -5, 2**40, 1.5, ()), "e": [[], {}]}
        content = mutated_pickle(pickle.dumps(value, draws.choice([3, 4, 5])), draws)
        try:
            found = pickles.read_pickle(content)
        except ValueError:
            continue
        if any(word in content for word in (b"os\n", b"system", b"eval", b"r\xff\xff\xff\x7f")):
            continue  # which the standard library carries out
        # It wants frames to be right, too; and a list may hold itself.
        with contextlib.suppress(pickle.UnpicklingError, EOFError, RecursionError):
            assert found == pickle.loads(content), number
            plain += 1
    assert plain > ROUNDS // 10, plain
