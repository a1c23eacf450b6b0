"""`make gpu` without a GPU: its parts, its checks, and that faults cost no more than themselves."""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import commands, gpu, gpu_checks


def run_of(tmp_path: Path, **changed: Any) -> gpu.Run:
    chosen = {"out": tmp_path / "gpu", "archive": None, "device": "cpu", "quick": True,
              "seconds": 200.0}  # fmt: skip
    return gpu.Run(argparse.Namespace(**chosen | changed))


def packed(run: gpu.Run) -> dict[str, Any]:
    """gpu.json as it lies in the archive."""
    with tarfile.open(run.archive) as archive:
        found = archive.extractfile("gpu/gpu.json")
        assert found is not None
        return json.load(found)


# Whole commands in the place of checks; "switched" ones fail until dependent launches are off.
FAULTS = {
    "hang": "import time; time.sleep(60)",
    "fault": "import os; os.abort()",
    "wrong": "print('wrong: failed: AssertionError: off by 1'); raise SystemExit(1)",
    "switched": "import os; os.environ.get('DENSECL_CUDA_PDL') == '0' or os.abort()",
    "fine": "print('fine: ok')",
    "orphan": "import subprocess, sys; "
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])",
}


@pytest.mark.parametrize(
    ("portable", "hopper", "off", "failed"),
    [
        (["fine", "orphan"], ["fine"], {}, {}),
        (["fine", "wrong"], ["fine"], {}, {"wrong": "status 1, wrong: failed: Assert"}),
        (["fine"], ["hang", "fine"], {"DENSECL_CUDA_KERNEL": "portable, since hang failed"},
         {"hang": "status 124"}),
        (["fine"], ["fine", "switched"], {"DENSECL_CUDA_PDL": "0, since switched failed"},
         {"switched": "status -6"}),
    ],
)  # fmt: skip
def test_smoke_replaces_what_fails(
    portable: list[str], hopper: list[str], off: dict[str, str],
    failed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu_checks, "PORTABLE", dict.fromkeys(portable))
    monkeypatch.setattr(gpu_checks, "HOPPER", dict.fromkeys(hopper))
    monkeypatch.setattr(gpu, "CHECK_LIMIT", 2.0)
    monkeypatch.setattr(
        gpu, "check_command", lambda name, device: [sys.executable, "-c", FAULTS[name.split()[-1]]]
    )
    run = run_of(tmp_path)
    assert run.part("smoke", 100.0) == ("failed, exit status 1" if failed else "ok")
    run.pack()
    found = packed(run)
    assert {name: text[: len(off[name])] for name, text in found["off"].items()} == off
    assert set(found["checks"]) == set(failed)
    for name, words in failed.items():
        assert found["checks"][name].startswith(words)
    assert not commands.alive
    # Another call, with bench alone, knows it.
    called: list[Any] = []
    again = run_of(tmp_path)
    monkeypatch.setattr(again, "call", lambda *given, **off: called.append((given, off)) or 0)
    assert again.part("bench", 100.0) == "ok"
    (given, switched) = called[0]
    assert given[0][2] == "benchmarks"
    assert switched == {name: text.partition(",")[0] for name, text in off.items()}


def test_a_part_that_fails_or_cannot_run_is_said_and_the_archive_holds_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(run: gpu.Run) -> int:
        (run.out / "step.md").write_text("half")
        raise OSError("disk full")

    def bench(run: gpu.Run) -> int:
        return run.call([sys.executable, "-c", "import time; time.sleep(60)"], 1.0, "bench.txt")

    parts = gpu.PARTS | {"bench": (bench, 30.0), "step": (step, 30.0)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    arguments = ["--device", "cpu", "--quick", "--out", str(tmp_path / "gpu"), "--part", "test"]
    assert gpu.main([*arguments, "bench", "step", "--archive", str(tmp_path / "all.tgz")]) == 1
    told = capsys.readouterr().out
    assert "== test: left out: needs a GPU" in told
    assert "== bench: failed, exit status 124" in told
    assert "== step: failed: OSError: disk full" in told
    with tarfile.open(tmp_path / "all.tgz") as archive:
        assert {"gpu/gpu.json", "gpu/step.md", "gpu/bench.txt"} <= set(archive.getnames())
    assert run_of(tmp_path).part("bench", 3.0) == "left out: the time was over"


def test_tests_run_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that faults and one that hangs cost themselves."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "FILE_LIMIT", 60.0)
    folder = tmp_path / "python_tests"
    folder.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    for name, body in {
        "passes": "pass", "faults": "import os; os.abort()", "fails": "assert False",
        "plain": "",
    }.items():  # fmt: skip
        mark = "import pytest\npytestmark = pytest.mark.gpu\n" if body else "\n"
        (folder / f"test_{name}.py").write_text(f"{mark}def test(): {body or 'pass'}\n")
    run = run_of(tmp_path, device="cuda")
    assert run.part("test", 100.0) == "failed, exit status 1"
    assert run.found["tests"]["files"] == 3
    failed = run.found["tests"]["failed"]
    assert set(failed) == {"test_faults", "test_fails"}
    assert failed["test_faults"].startswith("status -6")
    assert "1 failed" in failed["test_fails"]
    assert "1 passed" in (run.out / "tests" / "test_passes.txt").read_text()


def test_sanitizers_see_every_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, device="cuda")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.part("sanitize", 90.0) == "left out: no compute-sanitizer on the PATH"
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    commands = []
    monkeypatch.setattr(
        run, "call", lambda command, limit, log, **_: commands.append((command, limit)) or 0
    )
    assert run.part("sanitize", 90.0) == "ok"
    assert [command[2] for command, _ in commands] == list(gpu.SANITIZERS)
    assert commands[0][1] == pytest.approx(45.0)
    seen = set(commands[0][0])
    assert {"sm90 dense_match", "dense_info_nce", "joint_info_nce", "key_gradient"} <= seen
    assert {"enqueue_, many keys", "ema_update_, large tables", "sm90 joint_info_nce"} <= seen
    assert list(gpu.PARTS).index("sanitize") < list(gpu.PARTS).index("bench")


@pytest.mark.parametrize("name", gpu_checks.SANITIZED)
def test_checks_agree_with_themselves(name: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        gpu_checks.CHECKS[name](torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)


def test_a_check_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is not the CPU's twin: every op's result is a little off the second time."""
    calls: list[int] = []

    def off_once(function: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            result = function(*given, **options)
            calls.append(1)
            return result * 1.01 if len(calls) == 1 else result

        return call

    monkeypatch.setattr("densecl_ext.ops.info_nce", off_once(gpu_checks.ops.info_nce))
    with pytest.raises(AssertionError, match="info_nce torch.float32 3 70 16, output 0: off by"):
        gpu_checks.CHECKS["info_nce"](torch.device("cpu"))
    nan = torch.full((3,), torch.nan)
    with pytest.raises(AssertionError, match="off by nan"):
        gpu_checks.close("x", nan, torch.ones(3), 1.0)
    with pytest.raises(AssertionError, match="x: off by"):
        gpu_checks.close("x", torch.zeros(3), torch.ones(3), 0.5)
