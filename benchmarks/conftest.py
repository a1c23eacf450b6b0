"""Options, devices, and what goes into results.json beside pytest-benchmark's own numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import machine
from benchmarks.memory import MemoryProcess
from densecl_ext import _native

skipped: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny sizes: does everything run?")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        if _native.missing_cuda is not None:
            pytest.skip(f"no CUDA kernels: {_native.missing_cuda}")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def memories() -> Iterator[MemoryProcess]:
    process = MemoryProcess(torch.get_num_threads())
    yield process
    process.close()


@pytest.fixture(scope="session", autouse=True)
def ceilings(quick: bool) -> None:
    """What the machine can do at most, measured in the same run as everything else."""
    machine.measured_ceilings.update(machine.ceilings(quick=quick))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.split("::")[-1]
    if report.skipped and isinstance(report.longrepr, tuple):
        skipped[name] = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash is not None else report.longreprtext
        skipped[name] = f"failed: {message.splitlines()[0]}"


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine.describe() | {"ceilings": machine.measured_ceilings}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["skipped"] = skipped
    output_json["quick"] = bool(config.getoption("--quick"))
