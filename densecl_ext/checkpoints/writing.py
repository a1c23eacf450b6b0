"""Files of weights going out: in the form that the ending says, read back before they count."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from densecl_ext.checkpoints.formats import find_tensors
from densecl_ext.checkpoints.provenance import model_card, stamped, to_text
from densecl_ext.checkpoints.storage import atomic_file, load_file, require_regular, torch_save

CARD = "# Model card"


def check_output(caller: str, output: str | os.PathLike[str], source: Path) -> Path:
    """The file to write, unless that would cost something that is there.

    Raises:
        ValueError: it is the source, part of a run's folder, a device, a folder or a pipe.
    """
    output = Path(output)
    try:
        final = require_regular(output)
    except ValueError as error:
        raise ValueError(f"{caller}: {error}") from None
    if final.exists() and source.exists() and final.samefile(source):
        raise ValueError(f"{caller}: the output {output} is the checkpoint itself")
    run = final.parent.parent if final.parent.name == "checkpoints" else final.parent
    own = final.name in ("config.yaml", "metrics.csv", ".lock")
    if (own or run != final.parent) and (run / "config.yaml").exists():
        raise ValueError(f"{caller}: the output {output} would lie among the files of a run, {run}")
    return output


def write_weights(
    output: Path,
    tensors: Mapping[str, Tensor],
    words: Mapping[str, Any],
    wrap: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> None:
    """Writes tensors with their provenance, as .safetensors or as `torch.save` does.

    The complete file is read back and compared before it replaces one that was there.

    Args:
        output: the file; its ending decides.
        tensors: name -> tensor.
        words: provenance, kept inside the file.
        wrap: what the file holds around the state_dict; None for the state_dict itself.

    Raises:
        ValueError: a container in a .safetensors file, which holds tensors alone.
        ImportError: a .safetensors file without safetensors.
        OSError: it could not be written.
        RuntimeError: it reads back otherwise.
    """
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    state = stamped(plain, words)
    if output.suffix == ".safetensors":
        if wrap is not None:
            raise ValueError(f"{output}: a .safetensors file holds tensors alone; end it in .pth")
        data = _safetensors(output, plain, to_text(state))
    content = state if wrap is None else wrap(state)

    def write(file: IO[bytes]) -> None:
        if output.suffix == ".safetensors":
            file.write(data)
        else:
            torch_save(content, file)

    def verify(temporary: Path) -> None:
        require_equal(temporary, output, plain)

    write_file(output, write, verify)


def require_equal(written: Path, output: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError unless a file, which messages call `output`, holds these tensors."""
    try:
        read = find_tensors(load_file(written, output))
    except ValueError as error:
        raise RuntimeError(f"{output}: reading the file back gave other weights: {error}") from None
    if read.keys() != tensors.keys() or not all(
        torch.equal(read[key], value) for key, value in tensors.items()
    ):
        raise RuntimeError(f"{output}: reading the file back gave other weights")


def write_file(
    output: Path, write: Callable[[IO[bytes]], Any], verify: Callable[[Path], None] | None
) -> None:
    """Writes a file that is verified before it takes its name; makes the folder around it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output, verify=verify) as file:
        write(file)


def write_card(path: Path, title: str, words: Mapping[str, Any], usage: str) -> Path | None:
    """Writes the model card, unless somebody's own text lies there.

    Returns:
        The card, or None where it was not written.
    """
    text = model_card(title, words, usage)
    if path.exists() and CARD not in path.read_text(errors="replace")[:2000]:
        return None
    write_file(path, lambda file: file.write(text.encode()), None)
    return path


def _safetensors(output: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError(
            f"{output}: a .safetensors file needs safetensors, which cannot be imported ({error}); "
            "pip install 'densecl_ext[timm]', or end the name in .pth"
        ) from error
    return save(tensors, metadata)
