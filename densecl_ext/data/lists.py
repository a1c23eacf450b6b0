"""Lists of image files: text, CSV or Parquet with a column of paths."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from densecl_ext.data.folder import ImageFiles, Scan

LISTS = frozenset((".txt", ".lst", ".csv", ".tsv"))
# Names of the columns that hold paths, best first.
COLUMNS = (
    "path",
    "file_path",
    "filepath",
    "image_path",
    "img_path",
    "file_name",
    "filename",
    "file",
    "image",
    "img",
)


def listed_images(path: str | os.PathLike[str], names: Sequence[str] | None = None) -> ImageFiles:
    """The files that a list names, in its order, each once.

    A text file has one path a line; a label behind it (``a/b.jpg 3``) is left aside. Of a CSV the
    column named like a path counts (path, file_name, image, ...), else the first. Relative paths
    begin at the list's folder. Paths that are no files are counted as left out.

    Args:
        path: The list.
        names: Its paths, where they are known already.

    Returns:
        The files, whatever their endings.

    Raises:
        ValueError: The list names no file.
        UnicodeDecodeError: It is no text.
    """
    where = Path(path)

    def lines() -> Iterator[str]:
        return iter(names) if names is not None else _lines(where)

    folder = str(where.parent)
    above = _common_folder(lines())
    scan = Scan()
    first = ""
    for name in lines():
        first = first or name
        below = name[len(above) :] if above and name.startswith(above) else name
        scan.take(os.fsencode(os.path.join(above or folder, below)), os.fsencode(below))
    files = scan.packed([above or folder], [0], once=True)
    if not len(files):
        told = f"the first line is {first!r}" if first else "it is empty"
        raise ValueError(
            f"find_images: the list {path} names no file; {told}, and relative paths begin at "
            f"{folder or '.'}"
        )
    return files


def path_column(columns: Sequence[str]) -> str | None:
    """The column named like a path, whatever its case; None where there is none."""
    lower = {column.strip().lower(): column for column in reversed(columns)}
    return next((lower[name] for name in COLUMNS if name in lower), None)


def _lines(path: Path) -> Iterator[str]:
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        if path.suffix.lower() in (".csv", ".tsv"):
            yield from _column(file)
            return
        labelled: bool | None = None
        for line in file:
            name = line.strip("\r\n")
            if not name.strip():
                continue
            if labelled is None:
                labelled = not (path.parent / name).exists() and bool(_LABELLED.match(name))
            match = _LABELLED.match(name) if labelled else None
            yield match[1] if match else name


_LABELLED = re.compile(r"(.*\S)[ \t,;]+-?\d+$")


def _column(file: Iterator[str]) -> Iterator[str]:
    head = next(file, "")
    delimiter = max(",;\t", key=head.count)
    first = next(csv.reader([head], delimiter=delimiter), [])
    name = path_column(first)
    place = first.index(name) if name is not None else 0
    if name is None and first:
        yield first[0]
    for row in csv.reader(file, delimiter=delimiter):
        if len(row) > place and row[place]:
            yield row[place]


def _common_folder(names: Iterator[str]) -> str:
    """The folder that all names begin with, where all are absolute; "" otherwise."""
    above: str | None = None
    for name in names:
        if not os.path.isabs(name):
            return ""
        if above is None:
            above = name
        elif not name.startswith(above):
            above = os.path.commonprefix([above, name])
    return above[: above.rfind(os.sep) + 1] if above else ""
