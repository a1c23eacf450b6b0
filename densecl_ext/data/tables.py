"""Images in tables: Arrow and Parquet files with an image column, as Hugging Face datasets have."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from densecl_ext.data.cache import cache_folder, cached_path, written_whole
from densecl_ext.data.images import (
    DEFAULT,
    Encoded,
    Reading,
    encoded,
    read_encoded,
    require_size,
)
from densecl_ext.data.lists import listed_images, path_column
from densecl_ext.data.source import ImageSource

TABLES = frozenset((".arrow", ".parquet"))
_SPLIT_FILE = re.compile(r"(.+)-\d{5}-of-\d{5}\.(?:parquet|arrow)$")
_NO_IMAGE = ("row without an image", "rows without an image")
_BATCH = 64


def is_dataset(folder: str | os.PathLike[str]) -> bool:
    """Whether `datasets` has saved a dataset, or several splits of one, in the folder."""
    path = Path(folder)
    saved = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return saved or (path / "dataset_dict.json").is_file()


def dataset_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of a saved dataset, in order.

    Raises:
        ValueError: It holds several splits.
    """
    where = Path(folder)
    if (where / "dataset_dict.json").is_file():
        splits = json.loads((where / "dataset_dict.json").read_text())["splits"]
        if len(splits) != 1:
            raise ValueError(
                f"find_images: {where} holds the splits {', '.join(splits)}; name one, such as "
                f"{where / splits[0]}, or several"
            )
        where = where / splits[0]
    state = json.loads((where / "state.json").read_text())
    return [where / entry["filename"] for entry in state["_data_files"]]


def require_one_split(files: Sequence[Path]) -> None:
    """Refuse files of several splits: nobody may have meant to train on the test images.

    Raises:
        ValueError: Their names are those of several splits.
    """
    splits = sorted({match[1] for file in files if (match := _SPLIT_FILE.match(file.name))})
    if len(splits) > 1:
        raise ValueError(
            f"find_images: {files[0].parent} holds files of the splits {', '.join(splits)}; name "
            f"those to train on, such as {files[0].parent}/{splits[-1]}-*{files[0].suffix}"
        )


class TableImages(ImageSource):
    """The image column of Arrow files, mapped into memory and read row by row.

    Parquet files are unpacked into such files first, once, in a cache folder: a row of theirs
    cannot be read without its whole group.

    Args:
        files: Arrow or Parquet files with the same columns, in order.
        cache: Where Parquet files are unpacked; None takes the user's cache folder.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: A file has no image column, or no image.
    """

    def __init__(self, files: Sequence[Path], *, cache: Path | None = None) -> None:
        self._require_pyarrow()
        self.roots = tuple(map(str, files))
        self.left_out: Counter[tuple[str, str]] = Counter()
        self.endings: Counter[str] = Counter()
        packed = [file for file in files if file.suffix == ".parquet"]
        if packed:
            cache = cache or cache_folder()
            _say_unpacking(packed, cache)
        self._files = [
            str(_unpacked(file, cache)) if cache and file.suffix == ".parquet" else str(file)
            for file in files
        ]
        self._chunks: list[Any] | None = None
        lengths = [length for chunk in self._open() for length in [_lengths(chunk)]]
        sizes = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
        # Rows without an image are passed over, so that numbers run on.
        self._rows = np.flatnonzero(sizes != 0)
        self._sizes = sizes[self._rows]
        missing = len(sizes) - len(self._rows)
        if missing:
            self.left_out[_NO_IMAGE] += missing
        if not len(self._rows):
            raise ValueError(f"find_images: no image in {', '.join(self.roots[:5])}")
        self._identity: str | None = None

    @staticmethod
    def _require_pyarrow() -> None:
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise ImportError(
                "find_images: Arrow and Parquet files need pyarrow, which is not installed: "
                "pip install 'densecl_ext[images]'"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        # A mapping is opened again in another process; pickled, it would be copied.
        return self.__dict__ | {"_chunks": None}

    def _open(self) -> list[Any]:
        """The image column's chunks, in order."""
        if self._chunks is None:
            chunks: list[Any] = []
            starts: list[int] = []
            owners: list[int] = []
            count = 0
            for number, file in enumerate(self._files):
                for chunk in _column(file).chunks:
                    starts.append(count)
                    owners.append(number)
                    chunks.append(chunk)
                    count += len(chunk)
            self._chunks, self._starts, self._owners = chunks, starts, owners
        return self._chunks

    def _place(self, index: int) -> tuple[int, int]:
        """The chunk and the row in it."""
        chunks = self._open()
        row = int(self._rows[index])
        chunk = bisect_right(self._starts, row) - 1
        assert 0 <= row - self._starts[chunk] < len(chunks[chunk])
        return chunk, row - self._starts[chunk]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def identity(self) -> str:
        """SHA-256 of the ordered images' sizes and names, however they lie in files."""
        if self._identity is None:
            digest = hashlib.sha256(b"table")
            digest.update(np.ascontiguousarray(self._sizes).data)
            for chunk in self._open():
                paths = _part(chunk, "path")
                if paths is not None:
                    for name in paths.to_pylist():
                        digest.update((name or "").encode() + b"\n")
            self._identity = digest.hexdigest()
        return self._identity

    def name(self, index: int) -> Path:
        """The file's path, with the row and the image's own name below it."""
        number, row = self._place(index)
        chunk = self._open()[number]
        paths = _part(chunk, "path")
        own = paths[row].as_py() if paths is not None else None
        place = f"{int(self._rows[index])}" + (f" {os.path.basename(own)}" if own else "")
        return Path(self.roots[self._owners[number]], place)

    def encoded(self, index: int, reading: Reading = DEFAULT) -> Encoded:
        """Read the row's image through the gate."""
        number, row = self._place(index)
        chunk = self._open()[number]
        content = _part(chunk, "bytes")
        value = content[row] if content is not None else None
        if value is not None and value.is_valid:
            require_size(len(value.as_buffer()), reading)
            return encoded(value.as_buffer().to_pybytes())
        path = _part(chunk, "path")[row].as_py()
        folder = os.path.dirname(self.roots[self._owners[number]])
        return read_encoded(os.path.join(folder, path), reading)

    def sizes(self) -> np.ndarray:
        """Bytes of every image, int64 (len,); -1 for one that is named by its path."""
        return self._sizes


def table_images(files: Sequence[Path]) -> ImageSource:
    """The images of tables, or the files that a Parquet table's column of paths names.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: There is neither an image column nor one of paths.
    """
    TableImages._require_pyarrow()
    if len(files) == 1 and files[0].suffix == ".parquet":
        from pyarrow import parquet

        schema = parquet.read_schema(files[0])
        if _image_column(schema) is None:
            named = path_column(schema.names)
            if named is not None and _is_text(schema.field(named).type):
                column = parquet.read_table(files[0], columns=[named])[named]
                return listed_images(files[0], [name for name in column.to_pylist() if name])
    return TableImages(files)


def _image_column(schema: Any) -> str | None:
    """The column of images: what the metadata of `datasets` names so, else by its type."""
    import pyarrow.types as types

    words = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(words).get("info", {}).get("features", {}) if words else {}
    for name, feature in (features or {}).items():
        if isinstance(feature, dict) and feature.get("_type") == "Image" and name in schema.names:
            return name
    for field in schema:
        if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return str(field.name)
    for field in schema:
        if types.is_binary(field.type) or types.is_large_binary(field.type):
            return str(field.name)
    return None


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_string(kind) or types.is_large_string(kind))


def _column(file: str) -> Any:
    """The image column of an Arrow file, mapped: nothing is read yet."""
    import pyarrow

    try:
        mapped = pyarrow.memory_map(file)
        try:
            reader: Any = pyarrow.ipc.open_stream(mapped)
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(mapped)
        name = _image_column(reader.schema)
        if name is not None:
            return reader.read_all()[name]
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"find_images: {file!r} is no Arrow file: {error}") from None
    raise ValueError(
        f"find_images: {file!r} has no column of images (bytes, or a struct with bytes); its "
        f"columns are {', '.join(reader.schema.names)}"
    )


def _part(chunk: Any, name: str) -> Any:
    """The field of an image column's struct; a plain column is its bytes alone."""
    import pyarrow.types as types

    if not types.is_struct(chunk.type):
        return chunk if name == "bytes" else None
    return chunk.field(name) if chunk.type.get_field_index(name) >= 0 else None


def _lengths(chunk: Any) -> np.ndarray:
    """Bytes of each row, int64; -1 where it has a path alone, 0 where it has nothing."""
    import pyarrow.compute as compute

    content, path = _part(chunk, "bytes"), _part(chunk, "path")
    sizes = compute.fill_null(compute.binary_length(content), 0).to_numpy(zero_copy_only=False)
    sizes = sizes.astype(np.int64)
    if path is not None:
        named = compute.is_valid(path).to_numpy(zero_copy_only=False)
        null = compute.is_null(content).to_numpy(zero_copy_only=False)
        sizes[named & null] = -1
    return sizes


def _say_unpacking(files: Sequence[Path], cache: Path) -> None:
    fresh = [file for file in files if not _target(file, cache).is_file()]
    if fresh:
        size = sum(file.stat().st_size for file in fresh) / 1e9
        warnings.warn(
            f"unpacking {len(fresh)} Parquet files of {size:.2f} GB into {cache}, once: their rows "
            "cannot be read one by one (DENSECL_CACHE names another folder)",
            UserWarning,
            stacklevel=3,
        )


def _target(file: Path, cache: Path) -> Path:
    return cached_path(file, cache, ".arrow")


def _unpacked(file: Path, cache: Path) -> Path:
    """The file's image column as an Arrow file in the cache; whole or not there."""
    import pyarrow
    import pyarrow.parquet

    target = _target(file, cache)
    if target.is_file():
        return target
    try:
        table = pyarrow.parquet.ParquetFile(file)
        name = _image_column(table.schema_arrow)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"find_images: {str(file)!r} is no Parquet file: {error}") from None
    if name is None:
        raise ValueError(
            f"find_images: {str(file)!r} has no column of images (bytes, or a struct with bytes) "
            f"and none of paths; its columns are {', '.join(table.schema_arrow.names)}"
        )
    schema = pyarrow.schema([table.schema_arrow.field(name)])
    with (
        written_whole(target) as temporary,
        pyarrow.OSFile(temporary, "wb") as sink,
        pyarrow.ipc.new_stream(sink, schema) as made,
    ):
        for batch in table.iter_batches(batch_size=_BATCH, columns=[name]):
            made.write_batch(pyarrow.record_batch(batch.columns, schema=schema))
    return target
