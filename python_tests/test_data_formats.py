"""Views in the encoder's layout and precision, and DALI's graph for a GPU, with and without one."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("PIL")

from data_images import encode, photo_folder, scene
from test_data_augmentation import kolmogorov_smirnov

from densecl_ext.data import Augmentation, build_loader

SIZE = 40


@pytest.fixture(params=["torchvision", "dali", "memory"])
def backend(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos"), 12)


def batches(root, backend, **changes):
    settings = {"batch_size": 4, "size": SIZE, "workers": 0, "seed": 5, **changes}
    with build_loader(root, backend=backend, **settings) as loader:
        return list(loader)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layout_and_precision_are_the_encoders(photos, backend, channels_last, dtype):
    plain = batches(photos, backend)
    made = batches(photos, backend, channels_last=channels_last, dtype=dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for expected, batch in zip(plain, made, strict=True):
        for view in ("view_q", "view_k"):
            pixels = getattr(batch, view)
            assert pixels.shape == (4, 3, SIZE, SIZE) and pixels.dtype == dtype
            assert pixels.is_contiguous(memory_format=layout)
            assert pixels.contiguous(memory_format=layout) is pixels, "the trainer would copy it"
            # DALI rounds to float16 by itself, torch to the others: at most half a unit apart.
            exact = getattr(expected, view)
            tolerance = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
            torch.testing.assert_close(pixels.float(), exact, rtol=tolerance, atol=1e-6)
        assert batch.crop_q.dtype == torch.float32  # crop boxes are whole pixels
        assert torch.equal(batch.crop_q, expected.crop_q)
        assert torch.equal(batch.index, expected.index)


def test_a_state_fits_every_layout_and_precision(photos, backend):
    settings = {"batch_size": 4, "size": SIZE, "workers": 0}
    with build_loader(photos, backend=backend, **settings) as loader:
        complete = list(loader)
        next(iter(loader))
        state = json.loads(json.dumps(loader.state_dict()))
    settings |= {"channels_last": True, "dtype": torch.bfloat16}
    with build_loader(photos, backend=backend, **settings) as loader:
        loader.load_state_dict(state)
        rest = list(loader)
    for batch, expected in zip(rest, complete[1:], strict=True):
        assert torch.equal(batch.view_q, expected.view_q.bfloat16())


def test_other_precisions_are_refused(photos):
    with pytest.raises(TypeError, match=r"dtype must be torch.float32.*got torch.float64"):
        batches(photos, "torchvision", dtype=torch.float64)


def test_views_outlive_the_batches_that_follow(photos):
    """They are DALI's own memory, which it may not write again before they are gone."""
    pytest.importorskip("nvidia.dali")
    kept, copies = [], []
    with build_loader(photos, batch_size=2, size=SIZE, backend="dali", workers=1) as loader:
        for epoch in range(3):
            loader.set_epoch(epoch)
            for batch in loader:
                kept.append(batch.view_k)
                copies.append(batch.view_k.clone())
    assert len({view.data_ptr() for view in kept}) == len(kept) == 18
    assert all(torch.equal(view, copy) for view, copy in zip(kept, copies, strict=True))


def test_a_damaged_file_behind_the_batch_that_is_waited_for(tmp_path):
    """Two batches are in the pipeline; the second's failure must not cost the first."""
    pytest.importorskip("nvidia.dali")
    data = encode(scene(20), "PNG")
    half = len(data) // 2
    for number in range(12):
        (tmp_path / f"{number:02}.jpg").write_bytes(encode(scene(number), "JPEG"))
    whole = batches(tmp_path, "dali", batch_size=3)
    for last in (2, 5, 8, 11):  # in turn in the first, second, third and fourth batch
        index = int(whole[last // 3].index[2])
        name = tmp_path / f"{index:02}.jpg"
        good = name.read_bytes()
        name.write_bytes(data[:half] + bytes(20) + data[half + 20 :])  # only decoding tells
        with pytest.warns(UserWarning, match=f"skipped .*{name.name}"):
            made = batches(tmp_path, "dali", batch_size=3)
        name.write_bytes(good)
        assert len(made) == 4
        for place, (batch, expected) in enumerate(zip(made, whole, strict=True)):
            rows = slice(0, 2) if place == last // 3 else slice(0, 3)
            assert torch.equal(batch.view_q[rows], expected.view_q[rows])
        assert int(made[last // 3].index[2]) != index


# ---------------------------------------------------------------- the graph for a GPU


@pytest.mark.parametrize("layout", ["CHW", "HWC"])
def test_the_gpus_graph_brings_nothing_back(layout):
    """Laid out without a GPU: decoding is mixed, what follows stays there, numbers alone go in."""
    pytest.importorskip("nvidia.dali")
    from densecl_ext.data.dali_pipeline import two_view_pipeline

    def graph(device):
        pipeline = two_view_pipeline(
            batch_size=4, num_threads=1, device_id=None, prefetch_queue_depth=1, size=SIZE,
            augmentation=Augmentation(), device=device, layout=layout,
        )  # fmt: skip
        assert pipeline.serialize()  # DALI's own checks of every operator's arguments
        return [(type(node._op).__name__, node.spec) for node in pipeline._ops]

    def on_device(graph, device):
        return sorted(
            name for name, spec in graph if name in pixels and spec.OutputDevice(0) == device
        )

    pixels = {"Image", "Slice", "Resize", "ColorSpaceConversion", "BrightnessContrast"}
    pixels |= {"Mean", "GaussianBlur", "CropMirrorNormalize"}
    cpu, gpu = graph("cpu"), graph("gpu")
    assert set(on_device(cpu, "cpu")) == pixels
    assert on_device(gpu, "gpu") == on_device(cpu, "cpu")
    made = {
        spec.OutputName(number): spec.OutputDevice(number)
        for _, spec in gpu
        for number in range(spec.NumOutput())
    }
    for name, spec in gpu:
        for number in range(spec.NumInput()):
            # An input may also lie on the GPU and be made on the CPU, but not the other way.
            wanted = spec.InputDevice(number)
            assert wanted == "gpu" or made[spec.InputName(number)] == "cpu", name


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_makes_the_cpus_views(photos, channels_last, dtype):
    """The draws are the same; nvJPEG and the resampling may round otherwise."""
    pytest.importorskip("nvidia.dali")
    on_cpu = batches(photos, "dali")
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    on_gpu = batches(photos, "dali", device=device, channels_last=channels_last, dtype=dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for batch, expected in zip(on_gpu, on_cpu, strict=True):
        assert torch.equal(batch.crop_q.cpu(), expected.crop_q)
        assert torch.equal(batch.index, expected.index)
        for view in ("view_q", "view_k"):
            pixels = getattr(batch, view)
            assert pixels.device == device and pixels.dtype == dtype
            assert pixels.is_contiguous(memory_format=layout)
            # In units of the normalised view: one level of 255 is about 0.017.
            error = (pixels.float().cpu() - getattr(expected, view)).abs().mean(dim=(1, 2, 3))
            assert error.mean() < 0.02 and error.max() < 0.06


@pytest.mark.gpu
def test_a_gpus_views_are_distributed_as_the_cpus(photos):
    """Levels, contrast and sharpness of other draws (another seed), so that only laws compare."""
    pytest.importorskip("nvidia.dali")

    def statistics(device, seed):
        views = []
        with build_loader(
            photos, batch_size=12, size=SIZE, backend="dali", device=device, seed=seed
        ) as loader:
            for epoch in range(40):
                loader.set_epoch(epoch)
                views += [view for batch in loader for view in (batch.view_q, batch.view_k)]
        pixels = torch.cat(views).cpu()
        gray = pixels.mean(1)
        edges = (gray[:, :, 1:] - gray[:, :, :-1]).abs().mean((1, 2))
        return gray.mean((1, 2)), gray.flatten(1).std(1), edges, (pixels.amax(1) - pixels.amin(1))

    for ours, theirs in zip(statistics("cuda", 1), statistics("cpu", 2), strict=True):
        ours, theirs = (values.flatten(1).mean(1) if values.dim() > 1 else values
                        for values in (ours, theirs))  # fmt: skip
        assert kolmogorov_smirnov(ours.numpy(), theirs.numpy()) < 1.95


@pytest.mark.gpu
def test_the_host_does_not_wait_for_a_gpus_views(photos):
    pytest.importorskip("nvidia.dali")
    with build_loader(
        photos, batch_size=4, size=SIZE, backend="dali", device="cuda", channels_last=True
    ) as loader:
        list(loader)  # allocations and lazy initialisation
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in loader:
                batch.view_q.sum()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_gpus_epoch_resumes(photos):
    pytest.importorskip("nvidia.dali")
    settings = {"batch_size": 4, "size": SIZE, "backend": "dali", "device": "cuda"}
    with build_loader(photos, **settings) as loader:
        complete = list(loader)
        next(iter(loader))
        state = loader.state_dict()
    with build_loader(photos, **settings) as loader:
        loader.load_state_dict(state)
        for batch, expected in zip(loader, complete[1:], strict=True):
            assert torch.equal(batch.crop_q, expected.crop_q)
            torch.testing.assert_close(batch.view_q, expected.view_q, rtol=0.0, atol=1e-3)
