"""The gate through which checkpoints come in: damaged, spliced, hostile and odd files.

Whatever is done to a file, reading it gives the very content that was written or a ValueError that
names the file; it runs no code and takes no more memory than the file.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import random
import resource
import struct
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from train_runs import assert_same

from densecl_ext.checkpoints import load_checkpoint, save_checkpoint

FUZZ = 300


def run_state(seed: int = 0) -> dict[str, Any]:
    """A small checkpoint with all the parts of a run's."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, 3, 3, generator=generator)
    return {
        "format": "densecl_ext",
        "version": 1,
        "densecl_ext": "1.0",
        "config": {"epochs": 3, "batch_size": 8, "lr": 0.1, "backbone": "custom"},
        "data": {"images": 26, "names": "ab"},
        "epoch": 1,
        "step": 4,
        "metrics": {"loss": 2.5},
        "model": {
            "backbone.conv1.weight": weight,
            "backbone.bn1.running_var": torch.rand(4, generator=generator),
            "backbone.bn1.num_batches_tracked": torch.tensor(4),
            "queue.keys": torch.randn(20, 4, generator=generator),
            "queue.pointer": torch.tensor([8]),
            "queue.filled": torch.tensor(8),
        },
        "optimizer": {
            "state": {0: {"momentum_buffer": weight * 2}},
            "param_groups": [{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "params": [0]}],
        },
        "loader": {"epoch": 1, "position": 1, "batch_size": 8},
        "window": {"count": 2, "sums": {"loss": torch.tensor(5.0)}},
        "rng": {"python": random.Random(seed).getstate(), "torch": torch.get_rng_state()},
    }


def refused(path: Path, told: str = "") -> str:
    """What reading says; it must be a ValueError of one line that names the file."""
    with pytest.raises(ValueError, match=told or ".") as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def same_or_refused(path: Path, content: Any) -> bool:
    """Reads a damaged file; True where it was refused."""
    try:
        read = load_checkpoint(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return True
    assert_same(read, content)
    return False


def mutations(data: bytes, seed: int) -> Iterator[bytes]:
    """Flipped bits, changed and repeated pieces, truncations."""
    chance = random.Random(seed)
    for _ in range(FUZZ):
        changed = bytearray(data)
        kind = chance.randrange(5)
        place = chance.randrange(len(data))
        if kind == 0:
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[place : place + 4] = chance.randbytes(4)
        elif kind == 2:
            del changed[place:]
        elif kind == 3:
            del changed[place : place + chance.randrange(1, 9)]
        else:
            other = chance.randrange(len(data))
            changed[place:place] = data[other : other + chance.randrange(1, 40)]
        yield bytes(changed)


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_records(path: Path, content: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


# ---------------------------------------------------------------- damage


def test_every_flipped_bit_of_a_weight_is_found(tmp_path: Path) -> None:
    """torch writes CRCs and does not look at them; also without this project's own checksum."""
    file, state = tmp_path / "a.pth", run_state()["model"]
    torch.save(state, file)
    data, chance = file.read_bytes(), random.Random(1)
    with zipfile.ZipFile(file) as archive:
        items = archive.infolist()
    flips = 0
    for item in items:
        begin = item.header_offset + 30
        begin += sum(struct.unpack("<HH", data[begin - 4 : begin]))
        for _ in range(5):
            changed = bytearray(data)
            changed[begin + chance.randrange(item.file_size)] ^= 1 << chance.randrange(8)
            file.write_bytes(changed)
            refused(file, "CRC")
            flips += 1
    assert flips == 5 * len(items) >= 50


@pytest.mark.parametrize("kind", ["run", "foreign", "older", "pickle"])
def test_damaged_files(tmp_path: Path, kind: str) -> None:
    """Formats with CRCs or checksums never give other content; the others never anything odd."""
    file, state = tmp_path / "a.pt", run_state()
    if kind == "run":
        save_checkpoint(file, state)
    elif kind == "pickle":
        state = {"model": {"stem.conv1.weight": np.arange(12.0).reshape(3, 4)}, "n": np.int64(3)}
        file.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "foreign")
    load_checkpoint(file)
    seen = 0
    for changed in mutations(file.read_bytes(), seed=2):
        file.write_bytes(changed)
        if kind in ("run", "foreign"):
            seen += same_or_refused(file, state)
        else:  # no CRCs in these: a changed weight cannot be seen
            try:
                load_checkpoint(file)
            except ValueError as error:
                assert str(file) in str(error)
                seen += 1
    assert seen > FUZZ / 4


@pytest.mark.parametrize("seed", range(3))
def test_pickles_that_were_changed_under_right_crcs(tmp_path: Path, seed: int) -> None:
    file, state = tmp_path / "a.pt", run_state()
    save_checkpoint(file, state)
    whole = records(file)
    pickled = next(name for name in whole if name.endswith("/data.pkl"))
    seen = 0
    for changed in mutations(whole[pickled], seed=3 + seed):
        write_records(file, whole | {pickled: changed})
        try:
            read = load_checkpoint(file)
        except ValueError as error:
            assert str(file) in str(error)
            seen += 1
        else:  # the one change of a run that may pass is in the name of the checksum itself
            if isinstance(read, dict) and read.get("format") == "densecl_ext":
                assert_same({key: read.get(key) for key in state}, state)
    assert seen > FUZZ / 2


def test_spliced_records(tmp_path: Path) -> None:
    file, other, state = tmp_path / "a.pt", tmp_path / "b.pt", run_state()
    save_checkpoint(file, state)
    save_checkpoint(other, run_state(seed=7))
    whole, foreign = records(file), records(other)
    root = next(iter(whole)).partition("/")[0]
    theirs = {name.replace("b/", f"{root}/", 1): data for name, data in foreign.items()}
    first, second = f"{root}/data/0", f"{root}/data/4"

    def attempt(content: dict[str, bytes], told: str = "", **options: Any) -> None:
        write_records(file, content, **options)
        refused(file, told)

    attempt(whole | {first: theirs[first]}, "does not match the checksum")
    attempt(whole | {f"{root}/data.pkl": theirs[f"{root}/data.pkl"]}, "checksum")
    swapped = {name for name in whole if len(whole[name]) == len(whole[first])}
    for name in swapped - {first}:
        attempt(whole | {first: whole[name], name: whole[first]}, "checksum")
    attempt(whole | {first: whole[first] * 2}, "storage 0 has another size")
    attempt(whole | {first: whole[first][:-4]}, "storage 0 has another size")
    attempt(whole | {first: b""}, "storage 0 has another size")
    attempt({k: v for k, v in whole.items() if k != first}, "lacks the storage '0'")
    attempt({k: v for k, v in whole.items() if "data.pkl" not in k}, "not one that torch.save")
    attempt(whole | {"elsewhere/data.pkl": b"."}, "not one that torch.save")
    attempt(whole | {"evil": b"."}, "with more in it")
    attempt(whole | {f"{root}/constants.pkl": b"."}, "TorchScript")
    attempt(whole | {f"{root}/byteorder": b"big"}, "byte order")
    attempt(whole, "is compressed", method=zipfile.ZIP_DEFLATED)
    attempt(whole, "is compressed", method=zipfile.ZIP_LZMA)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "w") as archive:
        for name, data in (*whole.items(), (first, whole[second])):
            archive.writestr(name, data)
    refused(file, "one name")
    write_records(file, whole)
    assert_same(load_checkpoint(file), state)


def test_two_records_over_the_same_bytes(tmp_path: Path) -> None:
    """Many names for one stretch of a file: its length bounds what is read."""
    file = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(100_000)}, file)
    with zipfile.ZipFile(file) as archive:
        item = archive.getinfo("a/data/0")
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as copy:
            for record in archive.infolist():
                copy.writestr(record.filename, archive.read(record))
            for number in range(5):
                twin = zipfile.ZipInfo(f"a/data/{number + 1}")
                original = copy.getinfo("a/data/0")
                for field in ("header_offset", "file_size", "compress_size", "CRC"):
                    setattr(twin, field, getattr(original, field))
                copy.filelist.append(twin)
                copy.NameToInfo[twin.filename] = twin
            copy._didModify = True  # type: ignore[attr-defined]
    assert item.file_size == 400_000 and len(out.getvalue()) < 2 * item.file_size
    file.write_bytes(out.getvalue())
    refused(file, "more than the whole file")


# ---------------------------------------------------------------- bombs and hostile pickles


@pytest.mark.parametrize("place", ["data.pkl", "data/0", "extra"])
def test_a_bomb_is_not_inflated(tmp_path: Path, place: str) -> None:
    file = tmp_path / "bomb.pt"
    torch.save({"a": torch.zeros(4)}, file)
    whole = records(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in whole.items():
            if name != f"bomb/{place}":
                archive.writestr(name, data)
        with archive.open(f"bomb/{place}", "w", force_zip64=True) as out:
            for _ in range(16):
                out.write(bytes(1 << 24))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(file, "is compressed")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB, of 256 MB


def test_pickles_that_ask_for_the_impossible(tmp_path: Path) -> None:
    """Lengths, memo numbers and shapes are told by the file; none is taken on trust."""
    file = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(4)}, file)
    whole = records(file)
    good = whole["a/data.pkl"]
    assert good.count(b"K\x04tq") == 1 and good.count(b"K\x04\x85q") == 1
    big = b"J\xff\xff\xff\x7f"
    pickles = {
        "storage": good.replace(b"K\x04tq", big + b"tq"),
        "shape": good.replace(b"K\x04\x85q", big + b"\x85q"),
        "negative": good.replace(b"K\x04\x85q", b"J\xff\xff\xff\xff\x85q"),
        "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b".",
        "text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b".",
        "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
        "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 50) + b"N.",
        "memo": b"\x80\x02}r\xff\xff\xff\x7f0",
        "nested key": b"\x80\x02}" + b")q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s.",
        "nested set": b"\x80\x04\x8f(" + b")q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"\x90.",
        "digits": b"I" + b"9" * 60_000 + b"\n.",
        "stack": b"0000.",
        "empty": b"",
        "extension": b"\x80\x02\x82\x01.",
        "set item of a tensor": good[:-1] + b"X\x01\x00\x00\x00aK\x01K\x02s.",
        "no mark": b"\x80\x02}u.",
    }
    for name, pickled in pickles.items():
        write_records(file, whole | {"a/data.pkl": pickled})
        if name != "set item of a tensor":
            refused(file)
        plain = tmp_path / f"{name}.pkl"
        plain.write_bytes(pickled)
        refused(plain)


class Unsafe:
    ran = False

    def __reduce__(self) -> Any:
        return (exec, ("from test_checkpoints_gate import Unsafe; Unsafe.ran = True",))


@pytest.mark.parametrize("container", ["zip", "older", "plain"])
def test_code_is_named_and_not_run(tmp_path: Path, container: str) -> None:
    file, content = tmp_path / "a.pkl", {"model": {"w": Unsafe()}}
    if container == "plain":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=container == "zip")
    assert "exec" in refused(file, "trusted=True")
    assert not Unsafe.ran
    for module, name in (("os", "system"), ("builtins", "getattr"), ("torch.hub", "load")):
        file.write_bytes(f"c{module}\n{name}\n(Vx\ntR.".encode())
        refused(file, f"{module}.{name}")


# ---------------------------------------------------------------- odd contents


def odd(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


LONG = 10**18
WEIGHT = ("model", "backbone.conv1.weight")
ODD = [
    *(odd("step", value=v) for v in (-5, LONG, 13, 1.0, "4", True, None, torch.tensor(4))),
    *(odd("epoch", value=v) for v in (-1, 10**9, 4, 1.5, False, [1])),
    *(odd("loader", "position", value=v) for v in (-3, 5, LONG, 0.5, None)),
    *(odd("loader", "epoch", value=v) for v in (-3, 10**9, "1")),
    *(odd(*WEIGHT, value=torch.zeros(4, 3, 3, 3, dtype=d)) for d in (torch.int64, torch.bool)),
    odd(*WEIGHT, value=torch.zeros(4, 3, 3, 3, dtype=torch.complex64)),
    odd(*WEIGHT, value=torch.zeros(4, 3, 3, 3, dtype=torch.uint8)),
    odd(*WEIGHT, value=torch.zeros(1).expand(10**6)),
    odd(*WEIGHT, value=[1.0, 2.0]),
    odd("model", "backbone.bn1.running_var", value=-torch.ones(4)),
    odd("model", "backbone.bn1.num_batches_tracked", value=torch.tensor(-1)),
    odd("model", "backbone.bn1.num_batches_tracked", value=torch.tensor(1.0)),
    odd("model", "queue.pointer", value=torch.tensor([21])),
    odd("model", "queue.filled", value=torch.tensor(-1)),
    odd("model", value=[1]),
    odd("model", 3, value=torch.zeros(1)),
    odd("config", value=None),
    odd("config", "lr", value={"a": 1}),
    odd("data", "images", value=-1),
    odd("data", value="photos"),
    odd("metrics", "loss", value=float("nan")),
    odd("metrics", "loss", value="low"),
    odd("optimizer", "param_groups", value={}),
    odd("optimizer", "param_groups", 0, "lr", value=-0.1),
    odd("optimizer", "param_groups", 0, "lr", value=float("inf")),
    odd("optimizer", "state", value={"a": {}}),
    odd("optimizer", "state", 0, "momentum_buffer", value=torch.zeros(3, dtype=torch.int64)),
    odd("window", "count", value=-1),
    odd("rng", "torch", value=torch.zeros(3)),
    odd("rng", value=()),
    odd("version", value="1"),
]


@pytest.mark.parametrize("change", ODD)
def test_a_run_with_an_odd_part(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Also under a right checksum, or with none."""
    state = run_state()
    change(state)
    torch.save(state, tmp_path / "a.pt")
    refused(tmp_path / "a.pt")


def test_the_same_without_a_change(tmp_path: Path) -> None:
    torch.save(run_state(), tmp_path / "a.pt")
    assert_same(load_checkpoint(tmp_path / "a.pt"), run_state())
    save_checkpoint(tmp_path / "b.pt", run_state())
    assert_same(load_checkpoint(tmp_path / "b.pt"), run_state())


def test_lists_in_lists(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises((ValueError, RecursionError)):
        save_checkpoint(tmp_path / "a.pt", {"deep": deep})
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match=r"a.pt: state\['x'\] is a object"):
        save_checkpoint(tmp_path / "a.pt", {"x": object()})
    (tmp_path / "deep.pkl").write_bytes(b"(" * 100_000 + b"t" * 100_000 + b".")
    load_checkpoint(tmp_path / "deep.pkl")


def test_plain_objects_need_no_trust(tmp_path: Path) -> None:
    content = {
        "scalar": np.float64(2.5),
        "count": np.int64(3),
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "order": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "args": argparse.Namespace(arch="resnet50", lr=0.1),
        "path": Path("a/b"),
        "set": {1, 2},
        "default": defaultdict(list, a=1),
        "ordered": OrderedDict(a=1),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(2, dtype=torch.float16),
        "unsigned": torch.ones(2, dtype=torch.uint16),
        "view": torch.arange(12.0).reshape(3, 4)[1:, ::2],
        "none": torch.zeros(0, 3),
        "number": torch.tensor(3.0),
    }
    for zipped in (True, False):
        file = tmp_path / f"{zipped}.pt"
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        read = load_checkpoint(file)
        for key, value in content.items():
            if isinstance(value, (Tensor, np.ndarray)):
                assert read[key].dtype == value.dtype or key == "big", key
                assert read[key].shape == value.shape, key
                assert (np.asarray(read[key]) == np.asarray(value.data)).all(), key
            elif key == "path":
                assert read[key] == "a/b"
            else:
                assert read[key] == value, key
    file.write_bytes(pickle.dumps({k: content[k] for k in ("scalar", "array", "order")}, 5))
    read = load_checkpoint(file)
    assert read["scalar"] == 2.5 and (read["order"] == content["order"]).all()


def test_shared_storages_stay_shared(tmp_path: Path) -> None:
    weight = torch.zeros(4)
    torch.save({"a": weight, "b": weight[2:]}, tmp_path / "a.pt")
    read = load_checkpoint(tmp_path / "a.pt")
    read["a"][3] = 1
    assert read["b"].tolist() == [0, 1]


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt", "not a regular file")
    refused(tmp_path, "not a regular file")
    (tmp_path / "empty.pt").touch()
    refused(tmp_path / "empty.pt", "it is empty")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    refused(tmp_path / "script.pt", "TorchScript")
