"""Writing checkpoints: full disks, interruptions, leftovers, and the last two that are kept."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from densecl_ext.checkpoints import load_checkpoint, read_backbone, save_checkpoint
from densecl_ext.checkpoints.runs import previous_of, read_newest, resolve_checkpoint
from densecl_ext.checkpoints.storage import (
    TEMPORARY_PREFIX,
    atomic_file,
    remove_leftovers,
    torch_save,
)

ROOT = Path(__file__).resolve().parent.parent


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


def state(step: int) -> dict[str, Any]:
    return {"format": "densecl_ext", "version": 1, "step": step, "model": {"a": torch.ones(4000)}}


@pytest.mark.parametrize("previous", [True, False])
def test_a_full_disk_is_told_as_such(tmp_path: Path, previous: bool) -> None:
    """torch answers a failed write with `unexpected pos` while it closes; the first is told."""
    file = tmp_path / "last.pt"
    if previous:
        save_checkpoint(file, state(1))
    program = f"""
import resource, signal, torch
from densecl_ext.checkpoints import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    save_checkpoint({str(file)!r}, {{"a": torch.zeros(1_000_000)}})
except OSError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "File too large" in told.stdout and str(file) in told.stdout, told.stderr
    assert "unexpected pos" not in told.stdout and TEMPORARY_PREFIX not in told.stdout
    assert ("the previous one is intact" in told.stdout) == previous
    assert len(list(tmp_path.iterdir())) == previous
    if previous:
        assert load_checkpoint(file)["step"] == 1


def test_the_first_exception_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the writer makes of it: an interruption stays one, a full disk stays one."""
    file = tmp_path / "last.pt"
    save_checkpoint(file, state(1))
    for first in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(content: Any, out: Any, first: BaseException = first) -> None:
            out.write(b"half")
            try:
                raise first
            finally:
                raise RuntimeError("[enforce fail] unexpected pos 981760 vs 981648")

        monkeypatch.setattr(torch, "save", fail)
        if isinstance(first, OSError):
            with pytest.raises(OSError, match="No space left on device.*previous one is intact"):
                save_checkpoint(file, state(2))
        else:
            with pytest.raises(KeyboardInterrupt):
                save_checkpoint(file, state(2))
        monkeypatch.undo()
        assert load_checkpoint(file)["step"] == 1
        assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_messages_name_no_temporary_file(tmp_path: Path) -> None:
    missing = tmp_path / "none" / "a.pt"
    with pytest.raises(FileNotFoundError) as caught, atomic_file(missing):
        pass
    assert str(missing) in str(caught.value) and TEMPORARY_PREFIX not in str(caught.value)
    with pytest.raises(OSError, match="nothing was written") as failed:
        save_checkpoint(missing, {})
    assert TEMPORARY_PREFIX not in str(failed.value)
    with pytest.raises(ValueError, match="is a folder"), atomic_file(tmp_path):
        pass
    with atomic_file(tmp_path / ("n" * 250)) as file:  # a long name still has a temporary one
        file.write(b"x")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "real" / "a.pt")
    save_checkpoint(tmp_path / "link.pt", state(1))
    assert (tmp_path / "link.pt").is_symlink()
    assert load_checkpoint(tmp_path / "real" / "a.pt")["step"] == 1


def test_a_file_is_verified_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, save = tmp_path / "last.pt", torch.save
    save_checkpoint(file, state(1), previous=previous_of(file))

    def damaged(content: Any, out: Any) -> None:
        save(content, tmp_path / "whole")
        data = bytearray((tmp_path / "whole").read_bytes())
        data[len(data) // 2] ^= 8
        out.write(data)

    monkeypatch.setattr(torch, "save", damaged)
    with pytest.raises(OSError, match="Bad CRC.*the previous one is intact"):
        save_checkpoint(file, state(2), previous=previous_of(file))
    assert load_checkpoint(file)["step"] == 1 and not previous_of(file).exists()


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    last = run / "checkpoints" / "last.pt"
    last.parent.mkdir(parents=True)
    for step in (1, 2, 3):
        save_checkpoint(last, state(step), previous=previous_of(last))
    assert load_checkpoint(last)["step"] == 3 and load_checkpoint(previous_of(last))["step"] == 2
    assert len(list(last.parent.iterdir())) == 2
    assert read_newest(last)[0]["step"] == 3
    flip(last)
    with pytest.warns(UserWarning, match=r"last.pt is damaged.*before it, .*previous.pt"):
        content, used = read_newest(last)
    assert content["step"] == 2 and used == previous_of(last)
    with pytest.warns(UserWarning, match="using the one before it"):
        assert resolve_checkpoint(run) == previous_of(last)
    last.unlink()
    with pytest.warns(UserWarning, match="is missing; using the one before it"):
        assert read_newest(last)[0]["step"] == 2
    flip(previous_of(last))
    with pytest.raises(ValueError, match="previous.pt is damaged"):
        read_newest(last)
    with pytest.raises(ValueError):
        read_backbone(run)


def test_leftovers_of_these_files_alone(tmp_path: Path) -> None:
    names = ("config.yaml", "metrics.csv", "backbone.pth")
    for name in names:
        (tmp_path / f"{TEMPORARY_PREFIX}{name}-ab12").touch()
    remove_leftovers([tmp_path / "config.yaml", tmp_path / "metrics.csv"])
    assert [path.name for path in tmp_path.iterdir()] == [f"{TEMPORARY_PREFIX}backbone.pth-ab12"]


def test_a_second_interruption_during_a_save(tmp_path: Path) -> None:
    """Ctrl-C at any moment of a write leaves a KeyboardInterrupt, and the older file."""
    file = tmp_path / "last.pt"
    save_checkpoint(file, state(1))
    program = f"""
import signal, sys, torch
from densecl_ext.checkpoints import save_checkpoint
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
state = {{"a": torch.zeros(500_000), **{{str(i): torch.zeros(2000) for i in range(3000)}}}}
print("ready", flush=True)
try:
    while True:
        save_checkpoint({str(file)!r}, state)
except KeyboardInterrupt:
    sys.exit(130)
"""
    for delay in (0.0, 0.05, 0.11, 0.23, 0.37):
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            process.wait(timeout=delay + 0.01)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
        process.stdout.close()
        assert load_checkpoint(file)
        assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("times", [1, 2])
def test_an_interruption_that_a_library_drops_is_not_lost(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As copyreg drops every exception while it caches; the second one is not held back."""
    file = tmp_path / "last.pt"
    save_checkpoint(file, state(1))
    right, told = torch.save, []

    def save(*arguments: Any) -> None:
        for _ in range(times):
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException as error:
                told.append(type(error))
        right(*arguments)

    monkeypatch.setattr(torch, "save", save)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(file, state(2))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)  # a job in the background ignores it
    assert told == [KeyboardInterrupt] * (times - 1)
    assert load_checkpoint(file)["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_the_error_of_a_write_is_told_and_nothing_is_written_after_it(error: BaseException) -> None:
    """torch's writer would write on, in the end from a destructor, where no error may be raised."""
    content = {str(i): torch.zeros(100) for i in range(20)}
    torch_save(content, whole := FlakyFile(0, error))
    assert whole.writes > 20
    for failing in range(1, whole.writes + 1):
        with pytest.raises(type(error)) as caught:
            torch_save(content, flaky := FlakyFile(failing, error))
        assert caught.value is error and flaky.writes == failing


class FlakyFile(io.BytesIO):
    """A file of which one write, the n-th from 1 on, raises, and all after it."""

    def __init__(self, failing: int, error: BaseException) -> None:
        super().__init__()
        self.failing, self.error, self.writes = failing, error, 0

    def write(self, data: Any) -> int:
        self.writes += 1
        if 0 < self.failing <= self.writes:
            raise self.error
        return super().write(data)


def test_a_run_goes_on_from_the_one_before(tmp_path: Path) -> None:
    """A damaged newest checkpoint is named and moved aside; the run ends with the same bits."""
    pytest.importorskip("lightning")
    import train_runs as runs

    data = runs.image_folder(tmp_path / "images")
    whole = runs.tiny_run(runs.tiny_config(data, tmp_path / "whole"))
    config = runs.tiny_config(data, tmp_path / "run", max_steps=6, checkpoint_every=2)
    last = runs.tiny_run(config).checkpoint
    assert load_checkpoint(previous_of(last))["step"] < 6
    flip(last)
    for name in ("config.yaml", "metrics.csv"):
        (tmp_path / "run" / f"{TEMPORARY_PREFIX}{name}-x1").touch()
    (tmp_path / "run" / f"{TEMPORARY_PREFIX}mine-x1").touch()
    with pytest.warns(UserWarning, match="last.pt is damaged.*before it, .*previous.pt"):
        result = runs.tiny_run(runs.tiny_config(data, tmp_path / "run"), resume=True)
    assert result.step == 9
    ours, theirs = (load_checkpoint(run.checkpoint)["model"] for run in (result, whole))
    runs.assert_same(ours, theirs)
    names = {path.name for path in last.parent.iterdir()}
    assert names == {"damaged.pt", "last.pt", "previous.pt"}
    left = [path.name for path in (tmp_path / "run").glob(f"{TEMPORARY_PREFIX}*")]
    assert left == [f"{TEMPORARY_PREFIX}mine-x1"]
