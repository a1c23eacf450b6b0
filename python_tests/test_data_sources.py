"""Images from lists, shards and tables: views, order, resuming and skipping as of files."""

from __future__ import annotations

import csv
import io
import os
import pickle
import sys
import tarfile
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("PIL")

from data_images import photo_folder  # noqa: E402

from densecl_ext.data import build_loader, find_images, open_images, shards  # noqa: E402

COUNT = 12
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve images, of which one is damaged."""
    folder = tmp_path_factory.mktemp("photos") / "images"
    files = find_images(photo_folder(folder, COUNT))
    files[4].write_bytes(files[4].read_bytes()[:300])
    return find_images(folder)


def text_list(photos, folder):
    path = folder / "train.txt"
    path.write_text("".join(f"{file}\n" for file in photos))
    return path


def labelled_list(photos, folder):
    path = folder.parent / "images/train.lst"
    path.write_text("".join(f"{file.name} {n}\n" for n, file in enumerate(photos)))
    return path


def csv_list(photos, folder):
    path = folder / "photos.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["label", "File_Name"])
        writer.writerows([["a;b", str(file)] for file in photos])
    return path


def parquet_list(photos, folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = folder / "photos.parquet"
    table = pa.table({"label": list(range(COUNT)), "image_path": [str(file) for file in photos]})
    parquet.write_table(table, path)
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def tar_folder(photos, folder):
    shards = folder / "shards"
    shards.mkdir()
    for shard in range(3):
        members = []
        for file in photos[4 * shard : 4 * shard + 4]:
            members += [(f"{file.stem}.json", b"{}"), (f"{file.stem}.jpg", file.read_bytes())]
        if shard == 1:  # a name that a plain header does not hold
            members[-1] = ("deep/" * 40 + members[-1][0], members[-1][1])
        write_tar(shards / f"{shard:06}.tar", members)
    return shards


def webdataset_folder(photos, folder):
    wds = pytest.importorskip("webdataset")
    (folder / "wds").mkdir()
    pattern = str(folder / "wds/train-%06d.tar")
    with wds.ShardWriter(pattern, maxcount=5, verbose=False) as sink:
        for number, file in enumerate(photos):
            sink.write({"__key__": f"{number:06}", "jpg": file.read_bytes(), "cls": number})
    return folder / "wds"


def saved_dataset(photos, folder):
    datasets = pytest.importorskip("datasets")
    rows = {
        "label": list(range(COUNT)),
        "image": [{"bytes": f.read_bytes(), "path": f.name} for f in photos],
    }
    features = datasets.Features({"label": datasets.Value("int64"), "image": datasets.Image()})
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def parquet_folder(photos, folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    (folder / "hub/data").mkdir(parents=True)
    for part in range(2):
        images = [
            {"bytes": f.read_bytes(), "path": f.name} for f in photos[6 * part : 6 * part + 6]
        ]
        table = pa.table({"text": ["a"] * 6, "image": images})
        parquet.write_table(table, folder / f"hub/data/train-{part:05}-of-00002.parquet")
    return folder / "hub"


def bytes_column(photos, folder):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"key": list(range(COUNT)), "jpg": [f.read_bytes() for f in photos]})
    with pa.ipc.new_file(str(folder / "table.arrow"), table.schema) as sink:
        sink.write_table(table, max_chunksize=5)
    return folder / "table.arrow"


def several(photos, folder):
    half = folder / "half.txt"
    half.write_text("".join(f"{file}\n" for file in photos[:7]))
    write_tar(folder / "rest.tar", [(f.name, f.read_bytes()) for f in photos[7:]])
    return [half, folder / "rest.tar"]


KINDS = [
    text_list,
    labelled_list,
    csv_list,
    parquet_list,
    tar_folder,
    webdataset_folder,
    saved_dataset,
    parquet_folder,
    bytes_column,
    several,
]


@pytest.fixture(params=KINDS, ids=lambda make: make.__name__)
def source(request, photos, tmp_path_factory, monkeypatch):
    """What names the images, in a folder of its own beside a copy of theirs."""
    folder = tmp_path_factory.mktemp("source")
    monkeypatch.setenv("DENSECL_CACHE", str(folder / "cache"))
    (folder / "images").mkdir()
    for file in photos:
        (folder / "images" / file.name).write_bytes(file.read_bytes())
    (folder / "list").mkdir()
    copies = find_images(folder / "images")
    return request.param(copies, folder / "list")


def batches(root, **changes):
    settings = {"batch_size": 4, "size": 32, "workers": 0, "backend": "torchvision", **changes}
    loader = build_loader(root, **settings)
    loader.set_epoch(1)
    return loader, list(loader)


def assert_equal(first, second):
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_same_images_give_the_same_views_in_the_same_order(source, photos):
    images = open_images(source)
    assert len(images) == COUNT
    assert images.sizes().tolist() == photos.sizes().tolist()
    assert len(set(images)) == COUNT
    for index in (0, 3, 11):
        assert images.encoded(index).data == photos.encoded(index).data
    loader, views = batches(source)
    assert_equal(views, batches(photos.roots[0])[1])
    assert list(loader.skipped) == [images[4]], "the damaged image is named, and it alone"


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(source, workers):
    assert_equal(batches(source)[1], batches(source, workers=workers)[1])


def test_resuming_goes_on_with_the_very_next_batch(source):
    loader, whole = batches(source)
    stopped = build_loader(source, batch_size=4, size=32, workers=0, backend="torchvision")
    stopped.set_epoch(1)
    iterator = iter(stopped)
    next(iterator)
    state = stopped.state_dict()
    again = build_loader(source, batch_size=4, size=32, workers=0, backend="torchvision")
    again.load_state_dict(state)
    again.set_epoch(1)
    assert_equal(list(again), whole[1:])


@pytest.mark.parametrize("make", [tar_folder, saved_dataset, parquet_folder, bytes_column])
def test_moved_data_is_the_same_data(make, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("DENSECL_CACHE", str(tmp_path / "cache"))
    source = make(photos, tmp_path)
    identity = open_images(source).identity
    (tmp_path / "elsewhere").mkdir()
    moved = source.rename(tmp_path / "elsewhere" / source.name)
    assert open_images(moved).identity == identity
    (tmp_path / "other").mkdir()
    other = make([*photos[1:], photos[0]], tmp_path / "other")
    assert open_images(other).identity != identity, "another order is other data"


def test_other_processes_open_what_they_read(source):
    images = open_images(source)
    copy = pickle.loads(pickle.dumps(images))
    assert len(pickle.dumps(images)) < 40_000, "the images travel to each worker"
    assert copy.encoded(7).data == images.encoded(7).data and copy[7] == images[7]


def test_every_nth_image(source):
    every = open_images(source, every_nth=5)
    assert list(every) == open_images(source)[::5]
    assert every.sizes().tolist() == open_images(source).sizes()[::5].tolist()
    assert every.identity != open_images(source).identity
    with pytest.raises(ValueError, match="every_nth must be at least 1, got 0"):
        open_images(source, every_nth=0)


def test_a_list_tells_what_it_lacks(photos, tmp_path):
    path = tmp_path / "some.txt"
    names = [str(photos[0]), str(photos[1]), "gone.jpg", str(photos[0]), str(tmp_path)]
    path.write_text("\n".join(names))
    images = open_images(path)
    assert list(images) == photos[:2]
    told = images.summary()
    assert "1 name of a missing file" in told and "second link" in told and "regular" in told
    path.write_text("a.jpg\nb.jpg\n")
    with pytest.raises(ValueError, match="names no file; the first line is 'a.jpg', and relative"):
        open_images(path)


def test_lists_of_moved_files_are_the_same_list(photos, tmp_path):
    identities = []
    for name in ("here", "there"):
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        for file in photos[:4]:
            (folder / "images" / file.name).write_bytes(file.read_bytes())
        (folder / "all.txt").write_text("".join(f"{f}\n" for f in find_images(folder)))
        identities.append(open_images(folder / "all.txt").identity)
    assert identities[0] == identities[1]


def test_shards_that_cannot_be_read_at_a_place(photos, tmp_path):
    with tarfile.open(tmp_path / "packed.tar.gz", "w:gz") as tar:
        tar.add(photos[0], "0.jpg")
    with pytest.raises(ValueError, match="a compressed tar cannot be read at a place: unpack it"):
        open_images(tmp_path / "packed.tar.gz")
    (tmp_path / "packed.tar.gz").rename(tmp_path / "packed.tar")
    with pytest.raises(ValueError, match="is no plain tar file"):
        open_images(tmp_path / "packed.tar")
    write_tar(tmp_path / "texts.tar", [("a.txt", b"x"), ("b.txt", b"y"), (".c.jpg", b"z")])
    with pytest.raises(ValueError, match=r"no image in .*left out .*2 files of other endings"):
        open_images(tmp_path / "texts.tar")


def test_splits_are_not_mixed_unasked(photos, tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    monkeypatch.setenv("DENSECL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        table = pa.table({"image": [{"bytes": photos[0].read_bytes(), "path": None}, None]})
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="files of the splits test, train; name those"):
        open_images(folder)
    images = open_images(folder / "train-00000-of-00001.parquet")
    assert len(images) == 1 and images.summary() == "1 row without an image"
    unpacked = list((tmp_path / "cache").iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_images(folder / "train-00000-of-00001.parquet")
    assert list((tmp_path / "cache").iterdir()) == unpacked, "unpacked a second time"


def test_a_table_without_images_names_its_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"label": [1], "text": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="no column of images .* its columns are label, text"):
        open_images(tmp_path / "t.parquet")


def test_without_pyarrow_the_way_out_is_told(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"need pyarrow.*pip install 'densecl_ext\[images\]'"):
        open_images(tmp_path / "t.parquet")


def test_a_run_on_shards_resumes_to_the_same_bits(photos, tmp_path):
    import train_runs as runs

    shards = tar_folder(photos, tmp_path)
    options = {"batch_size": 4, "epochs": 2, "every_nth": 1}
    whole = runs.tiny_run(runs.tiny_config(shards, tmp_path / "whole", **options))
    config = runs.tiny_config(shards, tmp_path / "cut", **options, max_steps=4)
    runs.tiny_run(config)
    moved = tmp_path / "moved"
    shards.rename(moved)
    config = runs.tiny_config(moved, tmp_path / "cut", **options, max_steps="none")
    cut = runs.tiny_run(config, resume=True)
    first, second = (torch.load(r.checkpoint, weights_only=False) for r in (whole, cut))
    runs.assert_same(first["model"], second["model"])
    assert np.isfinite(float(runs.rows(cut)[-1]["loss"]))


def test_the_index_of_a_large_shard_is_kept(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("DENSECL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "_KEPT_FROM", 12)
    members = [(f"{file.stem}.jpg", file.read_bytes()) for file in photos]
    shard = tmp_path / "0.tar"
    write_tar(shard, [*members, (".hidden.jpg", b"x"), ("a.json", b"{}")])
    first = open_images(shard)
    (index,) = (tmp_path / "cache").iterdir()

    def never(*_, **__):
        raise AssertionError("the shard was scanned again")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", never)
        again = open_images(shard)
    assert len(again) == COUNT and again == first and again.identity == first.identity
    assert again.summary() == first.summary() != ""
    assert again.encoded(3) == first.encoded(3)
    index.write_bytes(index.read_bytes()[:200])
    assert open_images(shard).identity == first.identity
    # Other content of the same size, a moment later.
    write_tar(shard, [*members[::-1], (".hidden.jpg", b"x"), ("a.json", b"{}")])
    os.utime(shard, ns=(1, 1))
    assert open_images(shard)[0].name == members[-1][0]
    monkeypatch.setenv("DENSECL_CACHE", "/dev/null/nowhere")
    assert open_images(shard)[0].name == members[-1][0]
