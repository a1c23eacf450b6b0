"""Wheels where nothing else can write them: a setuptools before 70.1 without the package wheel.

Such is a virtual environment of Python 3.10 or 3.11 that got only torch, used with
--no-build-isolation.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from setuptools import Command


def is_needed() -> bool:
    """Whether this environment has no bdist_wheel of its own."""
    return find_spec("wheel") is None and find_spec("setuptools.command.bdist_wheel") is None


def requirement_lines(requires: str) -> Iterator[str]:
    """Turns an egg-info's requires.txt into the lines of a wheel's METADATA."""
    extra = marker = ""
    for line in filter(None, map(str.strip, requires.splitlines())):
        if line.startswith("["):
            extra, _, marker = line[1:-1].partition(":")
            continue
        conditions = [f"({marker})"] if marker else []
        conditions += [f'extra == "{extra}"'] if extra else []
        yield f"Requires-Dist: {line}" + (f" ; {' and '.join(conditions)}" if conditions else "")


def write_dist_info(egg_info: Path, dist_info: Path) -> None:
    """Writes the metadata folder of a wheel from setuptools' egg-info."""
    dist_info.mkdir(parents=True, exist_ok=True)
    headers, blank, description = (egg_info / "PKG-INFO").read_text("utf-8").partition("\n\n")
    requires = egg_info / "requires.txt"
    lines = requirement_lines(requires.read_text("utf-8")) if requires.is_file() else ()
    metadata = "\n".join([headers.rstrip(), *lines]) + blank + description
    (dist_info / "METADATA").write_text(metadata, "utf-8")
    for name in ("entry_points.txt", "top_level.txt"):
        if (egg_info / name).is_file():
            shutil.copy(egg_info / name, dist_info)
    if Path("LICENSE").is_file():
        shutil.copy("LICENSE", dist_info)


def write_wheel(tree: Path, wheel: Path, dist_info: str) -> None:
    """Zips a tree and the record of its files."""
    record = [f"{dist_info}/RECORD,,"]
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in tree.rglob("*") if path.is_file()):
            name, content = path.relative_to(tree).as_posix(), path.read_bytes()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            record.append(f"{name},sha256={digest.decode()},{len(content)}")
            archive.write(path, name)
        archive.writestr(f"{dist_info}/RECORD", "\n".join(record) + "\n")


class PlainWheel(Command):
    """The bdist_wheel command, as far as setuptools' build backend uses it."""

    description = "write a wheel"
    user_options = [("dist-dir=", "d", "folder of the wheel")]

    def initialize_options(self) -> None:
        """Sets no folder."""
        self.dist_dir: str | None = None

    def finalize_options(self) -> None:
        """Falls back to dist/."""
        self.dist_dir = self.dist_dir or "dist"

    def egg2dist(self, egg_info: str, dist_info: str) -> None:
        """What setuptools' dist_info command asks for."""
        write_dist_info(Path(egg_info), Path(dist_info))

    def run(self) -> None:
        """Builds everything and packs it."""
        assert self.dist_dir is not None
        self.run_command("build")
        self.run_command("egg_info")
        tree = Path(self.get_finalized_command("build").build_lib)
        name = f"{self.distribution.get_name()}-{self.distribution.get_version()}"
        dist_info = tree / f"{name}.dist-info"
        write_dist_info(Path(self.get_finalized_command("egg_info").egg_info), dist_info)

        python = f"cp{sys.version_info.major}{sys.version_info.minor}"
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        tag = f"{python}-{python}{sys.abiflags}-{platform}"
        (dist_info / "WHEEL").write_text(
            f"Wheel-Version: 1.0\nGenerator: densecl_ext\nRoot-Is-Purelib: false\nTag: {tag}\n"
        )
        Path(self.dist_dir).mkdir(parents=True, exist_ok=True)
        write_wheel(tree, Path(self.dist_dir) / f"{name}-{tag}.whl", dist_info.name)
        shutil.rmtree(dist_info)
