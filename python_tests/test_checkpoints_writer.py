"""Checkpoints written behind the steps: what is copied, what waits, what failed writes do."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("filelock")

from densecl_ext.checkpoints import load_checkpoint, writer
from densecl_ext.checkpoints.run_folder import RunFolder
from densecl_ext.checkpoints.writer import CheckpointWriter, host_copy


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path)
    made.checkpoints.mkdir()
    return made


def state(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"weight": torch.full((3,), float(step))}}


def test_the_copy_is_of_this_moment_and_the_step_goes_on(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    save = RunFolder.save

    def slow(self: RunFolder, content: dict[str, Any]) -> Path:
        may_write.wait(30)
        return save(self, content)

    monkeypatch.setattr(RunFolder, "save", slow)
    behind, now = CheckpointWriter(folder), state(1)
    behind.save(now, keep="epoch_0001.pt")
    now["model"]["weight"].fill_(99)  # the next step
    assert not folder.last.exists()
    may_write.set()
    behind.wait()
    for name in ("last.pt", "epoch_0001.pt"):
        assert load_checkpoint(folder.checkpoints / name)["model"]["weight"].tolist() == [1, 1, 1]


def test_at_most_one_is_in_flight(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    flying, most = 0, 0

    def save(self: RunFolder, content: dict[str, Any]) -> None:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        time.sleep(0.02)
        flying -= 1

    monkeypatch.setattr(RunFolder, "save", save)
    behind = CheckpointWriter(folder)
    for step in range(4):
        behind.save(state(step))
    behind.close()
    assert most == 1


@pytest.mark.parametrize("failures", [1, 2])
def test_a_failed_write_is_tried_once_more(
    failures: int, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.01)
    behind = CheckpointWriter(folder)
    behind.save(state(1))
    behind.wait()
    right, left = torch.save, failures

    def full(*arguments: Any) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(28, "No space left on device")
        right(*arguments)

    monkeypatch.setattr(torch, "save", full)
    behind.save(state(2))
    if failures == 1:
        behind.wait()
    else:
        with pytest.raises(OSError, match="could not write .*No space left.*previous one is inta"):
            behind.wait()
        behind.check()  # told once
    assert load_checkpoint(folder.last)["step"] == (2 if failures == 1 else 1)


def test_tied_tensors_stay_tied() -> None:
    one = torch.ones(2)
    copied = host_copy({"a": one, "b": [one, (one, 3)]})
    assert copied["a"] is copied["b"][0] is copied["b"][1][0] is not one


@pytest.mark.parametrize("reason", [(28, "No space left on device"), (30, "Read-only file system")])
def test_a_disk_that_fills_up_ends_a_run_with_the_older_checkpoint(
    reason: tuple[int, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the command: one retry, one line that says why, exit code 2; and it goes on."""
    pytest.importorskip("lightning")
    import train_runs as runs

    from densecl_ext import cli

    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.01)
    data, output = runs.image_folder(tmp_path / "images"), tmp_path / "run"
    words = f"""pretrain --data {data} --output {output} --backbone resnet18 --output-stride 8
        --truncate --image-size 32 --batch-size 8 --dim 8 --hidden-dim 8 --queue-length 16
        --key-bn-groups 1 --device cpu --threads 1 --workers 0 --loader memory --no-tensorboard
        --epochs 3 --checkpoint-every 1 --resume auto""".split()
    right, written = torch.save, 0

    def save(*arguments: Any) -> None:
        nonlocal written
        written += 1
        if written > 2:
            raise OSError(*reason)
        right(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        assert cli.main(words) == 2
    told = capsys.readouterr().err
    assert written == 4 and told.count("error:") == 1
    assert reason[1] in told and "the previous one is intact" in told
    assert load_checkpoint(output / "checkpoints" / "last.pt")["step"] == 1
    assert [path.name for path in (output / "checkpoints").iterdir()].count("last.pt") == 1
    assert not list(output.glob("**/.unfinished*"))
    assert cli.main(words) == 0
    assert "resuming at step 1 of 9" in capsys.readouterr().err
