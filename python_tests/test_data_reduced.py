"""JPEG files decoded at a fraction of their size: the same draws, nearly the same pixels."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("PIL")

from data_images import encode, scene  # noqa: E402
from PIL import Image  # noqa: E402

from densecl_ext.data import Augmentation, build_loader  # noqa: E402
from densecl_ext.data.images import decode, encoded  # noqa: E402
from densecl_ext.data.torchvision_loader import shrink_for  # noqa: E402

SIZE = 32
PLAIN = Augmentation(jitter_probability=0.0, gray_probability=0.0, blur_probability=0.0)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    for number in range(6):
        picture = scene(number, 100, 75).resize((801, 603), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = (1, 6, 3)[number % 3]
        (folder / f"{number}.jpg").write_bytes(encode(picture, "JPEG", quality=92, exif=exif))
    scene(9, 400, 300).save(folder / "small.png")
    return folder


def batch(folder, **changes):
    settings = {"batch_size": 7, "size": SIZE, "workers": 0, "augmentation": PLAIN, **changes}
    with build_loader(folder, backend="torchvision", **settings) as loader:
        return next(iter(loader)), loader.state_dict()


def test_draws_are_the_same_and_pixels_nearly(large):
    whole, _ = batch(large)
    reduced, state = batch(large, reduced_jpeg=True)
    assert torch.equal(whole.crop_q, reduced.crop_q) and torch.equal(whole.index, reduced.index)
    levels = 255 * 0.226 * (whole.view_q - reduced.view_q).abs()
    assert 0 < float(levels.mean()) < 2, "decoded in full, or elsewhere in the image"
    png = whole.index == 6
    assert torch.equal(whole.view_q[png], reduced.view_q[png])
    assert state["reduced_jpeg"] is True


def test_no_crop_is_enlarged():
    def drawn(*sides):
        from densecl_ext.data.augmentation import ViewParameters

        plain = ViewParameters((0, 0, 0, 0), False, (), 1.0, 1.0, 1.0, 0.0, False, 0.0)
        return [plain._replace(box=(5, 5, 5 + side, 905)) for side in sides]

    expected = {(100, 900): 1, (447, 900): 1, (448, 900): 2, (895, 896): 2, (896, 900): 4}
    for sides, by in expected.items():
        assert shrink_for(drawn(*sides), 224) == by
    data = encode(scene(0, 801, 603), "JPEG")
    for by in (2, 4, 8):
        image = decode(encoded(data), shrink=by).image
        assert image.size == (-(-801 // by), -(-603 // by))
    with Image.open(__import__("io").BytesIO(data)) as picture:
        exact = np.asarray(picture.convert("RGB").resize((100, 75), Image.Resampling.BOX))
    eighth = np.asarray(decode(encoded(data), shrink=8).image.resize((100, 75)))
    assert np.abs(eighth.astype(int) - exact).mean() < 4


def test_a_run_with_it_resumes_only_with_it(large):
    _, state = batch(large, reduced_jpeg=True)
    build = {"batch_size": 7, "size": SIZE, "workers": 0, "augmentation": PLAIN}
    with build_loader(large, backend="torchvision", reduced_jpeg=True, **build) as loader:
        loader.load_state_dict(state)
        del state["reduced_jpeg"]
        with pytest.raises(ValueError, match="reduced_jpeg=False, this loader has True"):
            loader.load_state_dict(state)
    with pytest.raises(ValueError, match="must be torchvision .* with reduced_jpeg, got 'memory'"):
        build_loader(large, backend="memory", reduced_jpeg=True, **build)
