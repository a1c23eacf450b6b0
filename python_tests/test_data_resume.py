"""Which images a resumed run accepts, and how a configuration's options reach the loader."""

from __future__ import annotations

import hashlib
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("lightning")
pytest.importorskip("PIL")

import train_runs as runs  # noqa: E402
from data_images import scene  # noqa: E402

from densecl_ext.train import PretrainConfig  # noqa: E402
from densecl_ext.train.build import open_loader  # noqa: E402
from densecl_ext.train.launch import Ranks
from densecl_ext.train.run import data_identity, same_images  # noqa: E402


@pytest.fixture
def started(tmp_path):
    """A run of one step over two folders that hold files of the same names."""
    data = tmp_path / "data"
    for number in range(16):
        folder = data / ("a" if number % 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        scene(number, 48, 40).save(folder / f"{number // 2}.png")
    runs.tiny_run(runs.tiny_config(data, tmp_path / "run", max_steps=1))
    return data


def resume(data, tmp_path):
    return runs.tiny_run(runs.tiny_config(data, tmp_path / "run", max_steps=2), resume=True)


def test_the_same_images_elsewhere_are_resumed(started, tmp_path, monkeypatch):
    moved = tmp_path / "elsewhere" / "photos"
    shutil.move(started, moved)
    monkeypatch.chdir(moved.parent)
    assert resume("photos", tmp_path).step == 2
    assert f"data: {moved}\n" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_renamed_folder_is_another_data_set(started, tmp_path):
    (started / "a").rename(started / "c")
    with pytest.raises(ValueError, match="cannot resume"):
        resume(started, tmp_path)


def test_replaced_contents_are_another_data_set(started, tmp_path):
    scene(40, 96, 80).save(started / "a" / "0.png")
    with pytest.raises(ValueError, match="cannot resume"):
        resume(started, tmp_path)


def test_identities_of_older_checkpoints_are_compared_by_their_own_rule(started):
    config = runs.tiny_config(started, started.parent / "other")
    with open_loader(config, Ranks(torch.device("cpu"))) as loader:
        names = "\n".join(path.name for path in loader.files)
        older = {"images": 16, "names": hashlib.sha256(names.encode()).hexdigest()}
        assert same_images(older, loader) and same_images(data_identity(loader), loader)
        assert not same_images({**older, "names": "0"}, loader)
        assert not same_images({**older, "images": 15}, loader)


def test_options_reach_the_loader(started):
    config = runs.tiny_config(
        started,
        started.parent / "other",
        loader="memory",
        cache_size=33,
        max_pixels=5_000,
        value_range="-1,4095.5",
        smallest_crop=0.4,
    )
    with open_loader(config, Ranks(torch.device("cpu"))) as loader:
        assert loader.backend == "memory" and loader.cache_size == 33
        assert loader.reading.max_pixels == 5_000
        assert loader.reading.value_range == (-1.0, 4095.5)
        assert loader.augmentation.scale == (0.4, 1.0)


def test_a_range_may_be_a_list_and_must_be_two_numbers():
    assert PretrainConfig(value_range=[0, 4095]).value_range == "0,4095"
    for bad in ("5", "a,b", 7, [1, 2, 3]):
        with pytest.raises(ValueError, match=r"value_range: expected auto or none or two numbers"):
            PretrainConfig(value_range=bad)
