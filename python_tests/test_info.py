"""`densecl info`: versions, the build, instruction sets, and reasons for what is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from densecl_ext import _version, info


def test_versions_build_and_cpu() -> None:
    told = info.collect()
    assert told["densecl_ext"]["version"] == _version.__version__
    assert told["libraries"]["torch"] == torch.__version__
    assert told["build"]["runs_under"].startswith("torch >= ")
    cpu = told["cpu"]
    assert cpu["selected"] in cpu["kernels_that_run_here"]
    assert set(cpu["kernels_that_run_here"]) <= set(cpu["kernels_known"])
    assert cpu["torch_threads"] == torch.get_num_threads()
    assert cpu["cores"] == os.cpu_count()
    assert json.loads(json.dumps(told)) == told


def test_text_has_every_value() -> None:
    told = info.collect()
    text = info.format_info(told)
    for section in ("densecl_ext", "libraries", "build", "cpu", "gpu"):
        for value in told[section].values():
            assert info._words(value) in text
    for sentence in told["missing"]:
        assert sentence in text
    assert info.format_info({**told, "missing": []}).endswith("missing\n  nothing")


def test_missing_library_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    original = info._version_of
    monkeypatch.setattr(info, "_version_of", lambda n: None if n == "lightning" else original(n))
    monkeypatch.setattr(info.importlib.metadata, "distributions", lambda: [])
    told = info.collect()
    assert told["libraries"]["lightning"] is None and told["libraries"]["dali"] is None
    assert any(
        sentence.startswith("lightning is not installed (needed for: training): pip install")
        for sentence in told["missing"]
    )
    assert any(sentence.startswith("DALI is not installed") for sentence in told["missing"])


def test_missing_cuda_kernels_are_told_with_the_builds_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "_build_info.json"
    record.write_text(json.dumps({"cuda": {"built": False, "reason": "no nvcc was found"}}))
    monkeypatch.setattr(info, "BUILD_INFO", record)
    monkeypatch.setattr(info._native, "missing_cuda", "No module named 'densecl_ext._C_cuda'")
    told = info.collect()
    assert told["build"]["cuda_kernels"] is False
    assert "CUDA kernels: no nvcc was found" in told["missing"]
    # Built, but it does not load: then the loader's reason counts.
    record.write_text(json.dumps({"cuda": {"built": True, "reason": "for sm_90a"}}))
    monkeypatch.setattr(info._native, "missing_cuda", "libcudart.so.13: cannot open")
    assert "CUDA kernels: libcudart.so.13: cannot open" in info.collect()["missing"]
    monkeypatch.setattr(info, "BUILD_INFO", tmp_path / "none.json")
    assert any("record of the build cannot be read" in s for s in info.collect()["missing"])


def test_wrong_instruction_set_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import densecl_ext._host as host

    def refuse() -> str:
        raise RuntimeError("DENSECL_CPU_ISA=sve is not known")

    monkeypatch.setattr(host, "selected_isa", refuse)
    told = info.collect()
    assert told["cpu"]["selected"] is None
    assert "CPU kernels as asked for: DENSECL_CPU_ISA=sve is not known" in told["missing"]


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    card = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=139 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert info.collect()["gpu"]["devices"] == ["NVIDIA H200 (sm_90, 139 GiB)"]


def test_a_checkout_that_hides_an_installation_says_so(tmp_path: Path) -> None:
    source = Path(_version.__file__).parent
    checkout = tmp_path / "checkout" / "densecl_ext"
    shutil.copytree(source, checkout, ignore=shutil.ignore_patterns("*.so", "__pycache__"))

    program = "import sys; sys.path[:0] = sys.argv[1:]; import densecl_ext"

    def told(*path: Path) -> str:
        result = subprocess.run(
            [sys.executable, "-S", "-c", program, *map(str, (*path, *site_packages))],
            capture_output=True, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
        return result.stderr.splitlines()[-1]

    site_packages = [Path(torch.__file__).parent.parent]
    if any((site_packages[0] / "densecl_ext").glob("_C.*")):
        pytest.skip("another installation lies beside torch")
    assert "are not built for this Python" in told(checkout.parent)
    hidden = told(checkout.parent, source.parent)
    assert "is a source checkout" in hidden and str(source) in hidden
