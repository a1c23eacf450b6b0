"""The loop on the real model and loader: logs, checkpoints, exact resume, stops, failures."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("torchvision")

import train_runs as runs
from tiny_models import TinyBackbone

from densecl_ext.checkpoints import load_checkpoint
from densecl_ext.train import TrainingDiverged, pretrain
from densecl_ext.train.progress import ConsoleProgress, Progress


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    """Tiny runs take one thread; the tests that follow get back what they had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.image_folder(tmp_path_factory.mktemp("photos") / "images")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> runs.PretrainResult:
    """An uninterrupted run of 9 steps."""
    return runs.tiny_run(runs.tiny_config(data, tmp_path_factory.mktemp("whole")))


def test_run_folder(whole: runs.PretrainResult) -> None:
    assert (whole.step, whole.total_steps, whole.interrupted) == (9, 9, False)
    assert whole.checkpoint == whole.output / "checkpoints" / "last.pt"
    logged = runs.rows(whole)
    first = ["step", "epoch", "loss", "loss_global", "loss_dense", "lr", "images_per_second"]
    assert list(logged[0])[:7] == first
    assert [row["step"] for row in logged] == ["2", "4", "6", "8", "9"]
    assert float(logged[1]["epoch"]) == pytest.approx(4 / 3, abs=1e-6)
    assert all(math.isfinite(float(value)) for row in logged for value in row.values())
    assert float(logged[-1]["loss"]) == pytest.approx(whole.metrics["loss"], abs=1e-6)
    # The config of a finished run is a recipe that repeats it: no automatic value is left open.
    config = (whole.output / "config.yaml").read_text()
    assert (
        "queue_length: 20" in config and "lr: 0.09375" in config and "key_momentum: 0.99" in config
    )


def test_training_changes_query_and_key_weights(whole: runs.PretrainResult) -> None:
    torch.manual_seed(5)
    before = TinyBackbone().state_dict()["layers.0.weight"]
    model = load_checkpoint(whole.checkpoint)["model"]
    after = model["backbone.layers.0.weight"]
    key = next(
        v for k, v in model.items() if k.startswith("momentum_encoder") and v.shape == after.shape
    )
    assert not torch.equal(before, after)
    assert 0 < (key - before).norm() < (after - before).norm()


@pytest.mark.parametrize("stop", [4, 6])  # inside an epoch, and at an epoch's end
def test_resumed_run_equals_an_uninterrupted_one(
    stop: int, whole: runs.PretrainResult, data: Path, tmp_path: Path
) -> None:
    part = runs.tiny_run(runs.tiny_config(data, tmp_path, max_steps=stop))
    assert part.step == stop and not part.interrupted
    torch.rand(7)  # whatever else the process does meanwhile
    resumed = runs.tiny_run(runs.tiny_config(data, tmp_path, max_steps="none"), resume=True)
    assert resumed.step == 9
    expected, got = load_checkpoint(whole.checkpoint), load_checkpoint(resumed.checkpoint)
    for name in ("metrics", "config"):
        del expected[name], got[name]  # speed and folder differ
    runs.assert_same(got, expected)
    keep = ("step", "loss", "loss_global", "loss_dense", "lr", "positive_similarity")
    logged = [{name: row[name] for name in keep} for row in runs.rows(resumed)]
    assert [row for row in logged if row["step"] != "4" or stop != 4][-3:] == [
        {name: row[name] for name in keep} for row in runs.rows(whole)
    ][-3:]


def test_log_rows_after_the_checkpoint_are_dropped(data: Path, tmp_path: Path) -> None:
    runs.tiny_run(runs.tiny_config(data, tmp_path, max_steps=4))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("6,2,1.0,1.0,1.0,0.1,5,1\n8,2.6,1.0,1")  # a crash after the checkpoint
    resumed = runs.tiny_run(runs.tiny_config(data, tmp_path, max_steps="none"), resume=True)
    assert [row["step"] for row in runs.rows(resumed)] == ["2", "4", "6", "8", "9"]
    assert runs.rows(resumed)[2]["loss"] != "1.0"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_run_with_a_checkpoint(
    number: signal.Signals, whole: runs.PretrainResult, data: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    progress = runs.CallAt(5, lambda: os.kill(os.getpid(), number))
    result = runs.tiny_run(runs.tiny_config(data, tmp_path), progress=progress)
    assert result.interrupted and result.step == 5
    assert "stopping after this step" in progress.messages
    assert signal.getsignal(number) is before
    resumed = runs.tiny_run(runs.tiny_config(data, tmp_path), resume=True)
    expected, got = load_checkpoint(whole.checkpoint), load_checkpoint(resumed.checkpoint)
    runs.assert_same(got["model"], expected["model"])


def test_second_signal_interrupts_at_once(data: Path, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        runs.tiny_run(runs.tiny_config(data, tmp_path), progress=runs.CallAt(5, twice))
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt")["step"] == 3


def test_workers_survive_the_terminals_interrupt(data: Path, tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches the loader's processes too."""

    def interrupt_children() -> None:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        assert children
        for child in [*children, os.getpid()]:
            os.kill(int(child), signal.SIGINT)

    config = runs.tiny_config(data, tmp_path, workers=2)
    result = runs.tiny_run(config, progress=runs.CallAt(4, interrupt_children))
    assert result.interrupted and result.step == 4
    assert load_checkpoint(result.checkpoint)["step"] == 4


def test_existing_run_is_not_overwritten(
    whole: runs.PretrainResult, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileExistsError, match="--resume.*--overwrite"):
        runs.tiny_run(runs.tiny_config(data, whole.output))
    assert load_checkpoint(whole.checkpoint)["step"] == 9
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        runs.tiny_run(runs.tiny_config(data, tmp_path / "new"), resume=True)
    with pytest.raises(ValueError, match="exclude each other"):
        runs.tiny_run(runs.tiny_config(data, whole.output), resume=True, overwrite=True)


def test_overwrite_removes_the_run_and_nothing_else(data: Path, tmp_path: Path) -> None:
    runs.tiny_run(runs.tiny_config(data, tmp_path, keep_every=1))
    (tmp_path / "notes.txt").write_text("mine")
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["epoch_0001.pt", "epoch_0002.pt", "epoch_0003.pt", "last.pt", "previous.pt"]
    assert load_checkpoint(tmp_path / "checkpoints" / "epoch_0002.pt")["step"] == 6
    with pytest.raises(ValueError):  # a mistake does not cost the older run
        runs.tiny_run(runs.tiny_config("/nowhere", tmp_path), overwrite=True)
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt")["step"] == 9
    again = runs.tiny_run(runs.tiny_config(data, tmp_path, max_steps=2), overwrite=True)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["last.pt", "previous.pt"]
    assert again.step == 2 and (tmp_path / "notes.txt").read_text() == "mine"


def test_other_images_cannot_be_resumed(data: Path, tmp_path: Path) -> None:
    other = runs.image_folder(tmp_path / "images")
    output = tmp_path / "run"
    runs.tiny_run(runs.tiny_config(other, output, max_steps=2))
    (other / "00.png").rename(other / "renamed.png")
    with pytest.raises(ValueError, match="cannot resume: .* or with others"):
        runs.tiny_run(runs.tiny_config(other, output, max_steps="none"), resume=True)


def test_nan_keeps_the_last_good_checkpoint(data: Path, tmp_path: Path) -> None:
    class Breaks(TinyBackbone):
        calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(images) * (math.nan if self.calls > 5 else 1.0)

    config = runs.tiny_config(data, tmp_path, checkpoint_every=1, log_every=100)
    with pytest.raises(TrainingDiverged, match="at or before step 6.*lower rate"):
        pretrain(config, backbone=Breaks())
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "last.pt")
    assert checkpoint["step"] == 5
    assert all(torch.isfinite(v).all() for v in checkpoint["model"].values())


def test_unwritable_output_fails_before_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    steps: list[int] = []
    progress = runs.CallAt(1, lambda: steps.append(1))
    with pytest.raises(OSError):
        runs.tiny_run(runs.tiny_config(data, tmp_path / "file" / "run"), progress=progress)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="save_checkpoint: could not write .*No space left"):
        runs.tiny_run(runs.tiny_config(data, tmp_path / "run"), progress=progress)
    assert not steps


def test_disk_with_room_for_one_checkpoint_only(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="0 MB free, and the next checkpoints need"):
        runs.tiny_run(runs.tiny_config(data, tmp_path))


def test_bf16_keeps_crop_boxes_exact(data: Path, tmp_path: Path) -> None:
    """Fabric's mixed precision would round the boxes, and with them the geometric matches."""
    seen: dict[str, torch.Tensor] = {}

    class Look(Progress):
        def start(self, **_: object) -> None:
            import densecl_ext.nn.matcher as module

            original = module.geometric_match

            def spy(crop_q: torch.Tensor, *rest: object) -> torch.Tensor:
                seen["crop_q"] = crop_q
                return original(crop_q, *rest)  # type: ignore[arg-type]

            patch.setattr(module, "geometric_match", spy)

    with pytest.MonkeyPatch.context() as patch:
        config = runs.tiny_config(
            data, tmp_path, precision="bf16", matching="geometric", max_steps=2
        )
        result = runs.tiny_run(config, progress=Look())
    assert seen["crop_q"].dtype == torch.float32
    assert (
        load_checkpoint(result.checkpoint)["model"]["backbone.layers.0.weight"].dtype
        == torch.float32
    )


def test_starts_from_weights(data: Path, tmp_path: Path) -> None:
    from densecl_ext.backbones import build_backbone

    torch.manual_seed(3)
    weights = build_backbone("resnet18").state_dict()
    torch.save(weights, tmp_path / "start.pth")
    config = runs.tiny_config(
        data,
        tmp_path / "run",
        backbone="resnet18",
        weights=str(tmp_path / "start.pth"),
        base_lr=1e-9,
        weight_decay=0,
        max_steps=1,
    )
    model = load_checkpoint(pretrain(config).checkpoint)["model"]
    torch.testing.assert_close(model["backbone.conv1.weight"], weights["conv1.weight"])
    wrong = runs.tiny_config(
        data, tmp_path / "two", backbone="resnet34", weights=str(tmp_path / "start.pth")
    )
    with pytest.raises(ValueError, match="holds a resnet18, but backbone is resnet34"):
        pretrain(wrong)


def test_tensorboard(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs.tiny_run(runs.tiny_config(data, tmp_path, tensorboard=True, max_steps=4))
    runs.tiny_run(runs.tiny_config(data, tmp_path, tensorboard=True), resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8, 9]


def test_lines_where_there_is_no_terminal(data: Path, tmp_path: Path) -> None:
    import io

    out = io.StringIO()
    progress = ConsoleProgress(out, line_seconds=0)
    runs.tiny_run(runs.tiny_config(data, tmp_path, max_steps=4), progress=progress)
    text = out.getvalue()
    assert "training for 9 steps (3 epochs of 3) on cpu, fp32" in text
    assert "queue 20" in text and "26 images through torchvision" in text
    assert "step 4/4, loss" in text and "images/s, 0:00 left" in text


def test_bar_in_a_terminal(data: Path, tmp_path: Path) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    runs.tiny_run(runs.tiny_config(data, tmp_path, max_steps=4), progress=ConsoleProgress(out))
    assert "4/4" in out.getvalue() and "images/s" in out.getvalue()


def test_a_run_may_move_between_devices(data: Path, tmp_path: Path) -> None:
    """How the optimizer is implemented is the machine's choice, not the checkpoint's."""
    part = runs.tiny_run(runs.tiny_config(data, tmp_path, max_steps=2))
    checkpoint = load_checkpoint(part.checkpoint)
    checkpoint["optimizer"]["param_groups"][0]["fused"] = True  # as from a GPU
    torch.save(checkpoint, part.checkpoint)
    resumed = runs.tiny_run(runs.tiny_config(data, tmp_path, max_steps=4), resume=True)
    (group,) = load_checkpoint(resumed.checkpoint)["optimizer"]["param_groups"]
    assert group["fused"] is None and isinstance(group["lr"], float)


def test_key_momentum_follows_its_schedule(data: Path, tmp_path: Path) -> None:
    from densecl_ext.nn.momentum import MomentumEncoder

    used: list[float] = []

    class Look(Progress):
        def start(self, **_: object) -> None:
            original = MomentumEncoder.update_

            def spy(self: MomentumEncoder, module: torch.nn.Module) -> None:
                used.append(float(self.momentum))
                original(self, module)

            patch.setattr(MomentumEncoder, "update_", spy)

    options = {"key_momentum": 0.9, "key_momentum_schedule": "cosine", "max_steps": 4}
    with pytest.MonkeyPatch.context() as patch:
        runs.tiny_run(runs.tiny_config(data, tmp_path, **options), progress=Look())
    cosine = [(1 + math.cos(math.pi * step / 9)) / 2 for step in range(4)]
    assert used == pytest.approx([1 - 0.1 * c for c in cosine])


def test_cuda_graph_needs_a_gpu(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cuda_graph needs a GPU, the run's device is cpu"):
        pretrain(runs.tiny_config(data, tmp_path, cuda_graph=True))


@pytest.mark.gpu
def test_graph_and_late_rows_write_the_rows_of_an_eager_run(data: Path, tmp_path: Path) -> None:
    columns = ("step", "loss", "loss_dense", "lr", "positive_similarity")
    logged = []
    for cuda_graph in (False, True):
        config = runs.tiny_config(
            data, tmp_path / str(cuda_graph), device="cuda", cuda_graph=cuda_graph
        )
        rows = runs.rows(runs.tiny_run(config))
        logged.append([[float(row[name]) for name in columns] for row in rows])
    assert [row[0] for row in logged[0]] == [2, 4, 6, 8, 9]
    for eager, graphed in zip(*logged, strict=True):
        assert graphed == pytest.approx(eager, rel=1e-3)


def test_one_image_of_one_position_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path
) -> None:
    config = runs.tiny_config(data, tmp_path, backbone="resnet18", batch_size=1, key_bn_groups=1)
    with pytest.raises(ValueError, match="batch_size 1 at image_size 32 leaves batch norm one va"):
        pretrain(config)
    assert not list(tmp_path.rglob("*.pt"))
    # Where the grid is larger, one image will do.
    assert runs.tiny_run(runs.tiny_config(data, tmp_path, batch_size=1, max_steps=2)).step == 2


def test_a_launcher_is_told_so_and_not_that_the_folder_is_taken(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="one of 2 processes .WORLD_SIZE.*with torchrun"):
        runs.tiny_run(runs.tiny_config(data, tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_loader_of_the_callers(data: Path, whole: runs.PretrainResult, tmp_path: Path) -> None:
    from densecl_ext.data import build_loader

    with build_loader(
        data, batch_size=runs.BATCH, size=32, backend="torchvision", workers=0, channels_last=True
    ) as loader:
        config = runs.tiny_config("", tmp_path, loader="auto")
        result = runs.tiny_run(config, loader=loader)
        got, expected = load_checkpoint(result.checkpoint), load_checkpoint(whole.checkpoint)
        runs.assert_same(got["model"], expected["model"])
        again = runs.tiny_config("", tmp_path, loader="auto", epochs=3)
        assert runs.tiny_run(again, loader=loader, resume=True).step == 9
        with pytest.raises(ValueError, match="batch_size is 4, the loader's is 8"):
            runs.tiny_run(runs.tiny_config("", tmp_path / "b", batch_size=4), loader=loader)
        loader.set_epoch(7)
        assert next(iter(loader)).view_q.shape[0] == runs.BATCH  # it stays open


def test_moved_images_are_found_again(data: Path, tmp_path: Path) -> None:
    first = runs.image_folder(tmp_path / "first")
    output = tmp_path / "run"
    runs.tiny_run(runs.tiny_config(first, output, max_steps=2))
    assert f"data: {first}\n" in (output / "config.yaml").read_text()
    first.rename(tmp_path / "second")
    config = runs.tiny_config(tmp_path / "second", output, max_steps=4)
    assert runs.tiny_run(config, resume=True).step == 4


def test_a_run_of_version_0_1_0_goes_on(tmp_path: Path, data: Path) -> None:
    """As that version did itself: it printed the loss below at the last of these steps."""
    import shutil

    shutil.copytree(Path(__file__).parent / "data" / "old_run", tmp_path / "run")
    options = {"lambda_warmup": "0.5ep", "key_momentum_schedule": "cosine"}
    options |= {"matching": "backbone", "dense_negatives": "pooled"}  # then the defaults
    config = runs.tiny_config(data, tmp_path / "run", **options)
    result = runs.tiny_run(config, resume=True)
    assert [row["step"] for row in runs.rows(result)] == ["2", "4", "6", "8", "9"]
    assert result.metrics["loss"] == pytest.approx(2.882522, rel=1e-3)


def test_the_finished_runs_backbone_lies_beside_it(data: Path, tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    config = runs.tiny_config(data, tmp_path, backbone="resnet18", max_steps=2, epochs=1)
    assert pretrain(config).backbone is None  # not finished
    config = runs.tiny_config(data, tmp_path, backbone="resnet18", max_steps=3, epochs=1)
    result = pretrain(config, resume=True)
    assert result.backbone == tmp_path / "backbone.pth"
    torchvision.models.resnet18().load_state_dict(torch.load(result.backbone), strict=True)


@pytest.mark.parametrize("logger", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed(
    logger: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, logger, None)
    config = runs.tiny_config(data, tmp_path, logger=logger)
    with pytest.raises(ImportError, match=f"logger {logger} needs {logger}.*pip install {logger}"):
        runs.tiny_run(config)


def test_compiling_is_told(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)  # it takes minutes
    progress = runs.CallAt(-1, None)
    runs.tiny_run(runs.tiny_config(data, tmp_path, compile=True, max_steps=2), progress=progress)
    assert "compiling both encoders" in progress.messages
    assert progress.messages.count("compiled after") == 1


def test_weights_that_cannot_be_downloaded(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens
    config = runs.tiny_config(data, tmp_path, backbone="resnet18", weights="IMAGENET1K_V1")
    with pytest.raises(OSError, match="weights: IMAGENET1K_V1 of resnet18 cannot be downloaded"):
        pretrain(config)


def test_wrong_device_and_missing_data(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda"):
        pretrain(runs.tiny_config(data, tmp_path, device="tpu"))
    with pytest.raises(ValueError, match="data must name a folder"):
        pretrain(runs.tiny_config("", tmp_path))
    with pytest.raises(RuntimeError, match="not available: torch .* sees"):
        pretrain(runs.tiny_config(data, tmp_path, device="cuda:99"))
    assert not (tmp_path / "checkpoints").exists()
