"""The one door to images: folders, lists, shards and tables, by their names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from densecl_ext.data.folder import ARRAYS, EXTENSIONS, find_images
from densecl_ext.data.lists import LISTS, listed_images
from densecl_ext.data.shards import SHARDS, TarImages
from densecl_ext.data.source import Chosen, ImageSource, Several
from densecl_ext.data.tables import (
    TABLES,
    dataset_files,
    is_dataset,
    require_one_split,
    table_images,
)

_FOLDER = "folder"


def open_images(
    root: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    arrays: bool = False,
    every_nth: int = 1,
) -> ImageSource:
    """Open images by what names them: a folder, a list, shards, tables, or several of these.

    - A folder is a tree of image files (:func:`find_images`); where it holds none, its tar, Arrow
      or Parquet files are taken, in the order of their names.
    - .txt, .lst, .csv, .tsv: a list of paths (:func:`listed_images`).
    - .tar: a shard of WebDataset's (:class:`TarImages`); uncompressed.
    - .arrow, .parquet: tables with an image column; a folder that ``datasets`` saved
      (:class:`TableImages`). A Parquet file may also be a list, by a column of paths.

    Args:
        root: The name, or a sequence of names.
        arrays: Take .npy and .npz files too.
        every_nth: Take every n-th image alone, from the first on.

    Returns:
        The images, always in the same order.

    Raises:
        ValueError: A name is none of these, or there is no image.
        ImportError: Reading a table needs pyarrow.
    """
    if every_nth < 1:
        raise ValueError(f"find_images: every_nth must be at least 1, got {every_nth}")
    several = not isinstance(root, (str, os.PathLike))
    roots = [os.fspath(one) for one in root] if several else [os.fspath(root)]  # type: ignore[union-attr, arg-type]
    parts: list[ImageSource] = []
    for kind, group in groupby(roots, _kind_of):
        named = list(group)
        if kind == _FOLDER:
            parts.append(find_images(named, arrays=arrays))
        elif kind in LISTS:
            parts += [listed_images(name) for name in named]
        elif kind in SHARDS:
            shards = [file for name in named for file in _files(name, SHARDS)]
            parts.append(TarImages(shards, EXTENSIONS | ARRAYS if arrays else EXTENSIONS))
        else:
            parts.append(table_images([file for name in named for file in _tables(name)]))
    source = parts[0] if len(parts) == 1 else Several(parts)
    return Chosen(source, range(0, len(source), every_nth)) if every_nth > 1 else source


def _kind_of(root: str) -> str:
    """The ending that tells what a name is of; "folder" for a tree of files."""
    if os.path.isdir(root):
        return ".arrow" if is_dataset(root) else _kind_of_folder(root)
    ending = os.path.splitext(root)[1].lower()
    if not os.path.isfile(root) or ending not in LISTS | SHARDS | TABLES:
        packed = ".tar." in os.path.basename(root).lower() or ending in (".tgz", ".tbz2", ".txz")
        hint = "; a compressed tar cannot be read at a place: unpack it" if packed else ""
        raise ValueError(
            f"find_images: root must be a folder, a list ({', '.join(sorted(LISTS))}), a tar file "
            f"or a table ({', '.join(sorted(TABLES))}), got {root!r}, which is none{hint}"
        )
    return ".parquet" if ending in TABLES else ending


def _kind_of_folder(root: str) -> str:
    """What is below a folder; the first image decides, so that few names are looked at."""
    found, stack = "", [root]
    while stack:
        try:
            with os.scandir(stack.pop()) as entries:
                for entry in entries:
                    ending = os.path.splitext(entry.name)[1].lower()
                    if entry.name.startswith(".") or entry.name == "__MACOSX":
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        stack.append(entry.path)
                    elif ending in EXTENSIONS or ending in ARRAYS:
                        return _FOLDER
                    elif ending in SHARDS | TABLES:
                        found = found or (".parquet" if ending in TABLES else ending)
        except OSError:
            continue  # the scan counts it
    return found or _FOLDER


def _files(root: str, endings: Iterable[str]) -> list[Path]:
    """The file itself, or those of the endings below a folder, in order."""
    path = Path(root)
    if not path.is_dir():
        return [path]
    return sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in endings and not file.name.startswith(".") and file.is_file()
    )


def _tables(root: str) -> list[Path]:
    if os.path.isdir(root) and is_dataset(root):
        return dataset_files(root)
    files = _files(root, TABLES)
    if os.path.isdir(root):
        require_one_split(files)
    return files
