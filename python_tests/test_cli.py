"""The command line: help, errors, and a run from photographs to an exported backbone."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train_runs as runs

from densecl_ext import cli, info
from densecl_ext.checkpoints import load_checkpoint
from densecl_ext.cli.pretraining import pretrain, pretrain_config
from densecl_ext.train import load_recipe

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "pretrain",
    "check",
    "export",
    "import",
    "evaluate",
    "compare",
    "visualize",
    "ablate",
    "info",
)
TINY = [
    *("--backbone", "resnet18", "--image-size", "32", "--batch-size", "8", "--epochs", "2"),
    *("--hidden-dim", "16", "--dim", "8", "--key-bn-groups", "2", "--precision", "fp32"),
    *("--workers", "0", "--threads", "1", "--log-every", "2", "--device", "cpu"),
    *("--loader", "torchvision", "--no-tensorboard"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.image_folder(tmp_path_factory.mktemp("photos") / "images")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  densecl {command}" in capsys.readouterr().out


def test_help_shows_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for name in runs.PretrainConfig().to_mapping():
        assert f"--{name.replace('_', '-')} " in out
    assert "weight of the dense loss; 0 is MoCo v2 (default: 0.5)" in out
    assert "densecl_coco_800ep" in out


@pytest.mark.parametrize(
    "words", [["--help"], ["pretrain", "--help"], ["evaluate", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    """Not even torch, which takes most of the time until a help or a completion stands there."""
    result = subprocess.run(
        [sys.executable, "-m", "densecl_ext", *words],
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "densecl_ext.cli" in imported
    heavy = {"torch", "numpy", "lightning", "torchvision", "nvidia", "PIL", "matplotlib"}
    assert not heavy & imported


def test_the_command_still_has_the_packages_names() -> None:
    """It imports them on first use; everyone else at once, which registers the ops."""
    code = (
        "import sys; sys.orig_argv = ['python', '/x/bin/densecl', 'info']\n"
        "import densecl_ext; assert 'torch' not in sys.modules\n"
        "for name in densecl_ext.__all__: getattr(densecl_ext, name)\n"
        "assert not hasattr(densecl_ext, 'nonsense')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(
    shell: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--print-completion", shell])
    assert stop.value.code == 0 and "_DENSECL_COMPLETE" in capsys.readouterr().out
    # What the shell then asks for.
    monkeypatch.setenv("_DENSECL_COMPLETE", f"{shell}_complete")
    for typed, wanted in (
        ("densecl pretrain --loa", "--loader"),
        ("densecl pretrain --loader to", "torchvision"),
        ("densecl pretrain --recipe sm", "small_data"),
    ):
        words = typed.split()
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", words[-1] if shell == "fish" else str(len(words) - 1))
        assert cli.main([]) == 0
        assert wanted in capsys.readouterr().out


def test_a_reader_that_has_gone_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "densecl_ext", "info"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.parametrize("missing", ["pydantic", "yaml", "lightning"])
def test_a_missing_package_is_told_with_how_to_get_it(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from densecl_ext import cli; sys.exit(cli.main(['pretrain', '--data', 'x']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert f"needs {missing}" in result.stderr and result.stderr.count("\n") == 1
    assert "which is not installed: pip install 'densecl_ext[train]'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["pretrain", "--bach-size", "3"],
            "No such option '--bach-size'. (Did you mean one of: '--batch",
        ),
        (["pretrain", "--epoch=3"], "No such option '--epoch'. Did you mean '--epochs'?"),
        (["pretrain", "--epochs"], "densecl pretrain: error: Option '--epochs' requires"),
        (["train"], "No such command 'train'; did you mean pretrain?"),
        (["visualize", "loses"], "did you mean losses?"),
        ([], "Missing command"),
        (["export", "run"], "Missing option '--output'"),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "--help" in error and error.count("\n") == 2
    assert "bach" not in error or "'--batch-size'" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain"], "data must name a folder"),
        (["pretrain", "--data", "/nowhere/at/all", "--output", "{tmp}"], "/nowhere/at/all"),
        (["pretrain", "--batch-size", "many"], "batch_size: expected an integer >= 1, got 'many'"),
        (["pretrain", "--recipe", "coco"], "is neither a file nor one of"),
        (["pretrain", "--resume", "--output", "{tmp}"], "nothing to resume in"),
        (["export", "{tmp}", "--output", "{tmp}/x.pth"], "no such file"),
        (["import", "{tmp}/none.pth", "--output", "{tmp}/x.pth"], "no such file"),
    ],
)
def test_library_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.replace("{tmp}", str(tmp_path)) for word in arguments]
    assert cli.main(filled) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith(f"densecl {arguments[0]}: error: ")
    assert captured.err.count("\n") == 1 and not captured.out
    assert cli.main([*filled, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_options_override_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("batch_size: 32\nepochs: 7\ntensorboard: true\n")
    words = ["pretrain", "--recipe", str(tmp_path / "mine.yaml"), "--epochs", "9"]
    with pretrain.make_context("pretrain", [*words[1:], "--no-tensorboard"]) as context:
        options = {name: context.params[name] for name in runs.PretrainConfig().to_mapping()}
    config = pretrain_config(context.params["recipe"], False, options)
    assert (config.batch_size, config.epochs, config.tensorboard) == (32, 9, False)


def test_dry_run_prints_the_recipe_and_writes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", "--data", str(data), "--output", str(tmp_path / "run"), *TINY]
    threads = torch.get_num_threads()
    try:
        assert cli.main([*words, "--dry-run"]) == 0
    finally:
        torch.set_num_threads(threads)
    captured = capsys.readouterr()
    assert "queue_length: 8\n" in captured.out and "lr: 0.009375\n" in captured.out
    assert captured.err.endswith("26 images, 6 steps on cpu; nothing written\n")
    assert not (tmp_path / "run").exists()
    (tmp_path / "again.yaml").write_text(captured.out)
    assert load_recipe(tmp_path / "again.yaml")["queue_length"] == "8"
    assert cli.main([*words, "--dry-run", "--weights", "none.pth"]) == 2


def test_a_command_from_a_plain_dataclass(capsys: pytest.CaptureFixture[str]) -> None:
    """What a protocol of `evaluate` is: inherited fields, help in docstrings, checks."""
    import click

    from densecl_ext.cli.command import Command, given, options_of
    from densecl_ext.options import build

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Base:
        """What is shared.

        Attributes:
            data: folder of
                images.
        """

        data: str = ""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Protocol(Base):
        """A protocol.

        Attributes:
            size: height and width.
            flip: whether to flip.
        """

        size: tuple[int, ...] = ()
        flip: bool = True

        def __post_init__(self) -> None:
            if len(self.size) not in (0, 2):
                raise ValueError(f"Protocol: size must be two numbers, got {self.size}")

    made: list[Protocol] = []
    command = Command(
        "protocol",
        help="A protocol.",
        example="densecl evaluate protocol",
        callback=lambda **values: made.append(build(Protocol, given(values), source="Protocol")),
        params=options_of(Protocol, required={"data": "DIR"}),
    )
    command.main(["--data", "x", "--size", "4", "6", "--no-flip"], standalone_mode=False)
    assert made == [Protocol(data="x", size=(4, 6), flip=False)]
    with pytest.raises(click.UsageError, match="Missing parameter: data"):
        command.main([], standalone_mode=False)
    for words, message in (
        (["4"], "Protocol: size must be two numbers, got"),
        (["4", "a"], "Protocol: size: expected a list, each an integer, got"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            command.main(["--data", "x", "--size", *words], standalone_mode=False)
    command.main(["--help"], standalone_mode=False)
    out = " ".join(capsys.readouterr().out.split())
    assert "--data DIR folder of images [required] --size N... height and width" in out
    assert "--flip / --no-flip whether to flip (default: true)" in out


def test_several_folders(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = runs.image_folder(tmp_path / "second")
    words = ["pretrain", "--dry-run", "--output", str(tmp_path / "run"), *TINY]
    threads = torch.get_num_threads()
    try:
        for given in (
            ["--data", str(data), str(second)],
            ["--data", str(data), "--data", str(second)],
        ):
            assert cli.main([*words, *given]) == 0
            captured = capsys.readouterr()
            assert "52 images, 12 steps on cpu" in captured.err
            (tmp_path / "both.yaml").write_text(captured.out)
            assert load_recipe(tmp_path / "both.yaml")["data"] == [str(data), str(second)]
        assert cli.main([*words, "--recipe", str(tmp_path / "both.yaml")]) == 0
    finally:
        torch.set_num_threads(threads)


def test_from_photographs_to_torchvision(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torchvision = pytest.importorskip("torchvision")
    pytest.importorskip("lightning")
    (data / "broken.png").write_bytes(b"not an image")
    run, threads = str(tmp_path / "my run"), torch.get_num_threads()
    try:
        begin = ["pretrain", "--data", str(data), "--output", run, *TINY]
        assert cli.main([*begin, "--max-steps", "2"]) == 0
        captured = capsys.readouterr()
        assert "skipped 1 files that do not decode" in captured.err
        assert "step 2 of 6" in captured.out
        assert f"--output '{run}' --resume --max-steps none" in captured.out
        assert cli.main(begin) == 2
        assert "--resume" in capsys.readouterr().err
        # Nothing but the folder is needed to go on.
        assert cli.main(["pretrain", "--output", run, "--resume", "--max-steps", "none"]) == 0
        out = capsys.readouterr().out
        assert "step 6 of 6, loss" in out and f"wrote {run}/backbone.pth; use it:" in out
        assert "minus mean (0.485, 0.456, 0.406)" in out
        assert cli.main(["pretrain", "--output", run, "--resume", "--epochs", "5"]) == 2
        assert "cannot resume with epochs = 5" in capsys.readouterr().err
    finally:
        torch.set_num_threads(threads)
        (data / "broken.png").unlink()

    assert cli.main(["export", run, "--output", str(tmp_path / "b.pth")]) == 0
    out = capsys.readouterr().out
    assert "resnet18" in out and "fc.weight and fc.bias are torchvision's random" in out
    model = torchvision.models.resnet18()
    model.load_state_dict(torch.load(tmp_path / "b.pth"), strict=True)
    trained = load_checkpoint(Path(run) / "checkpoints" / "last.pt")["model"]
    assert torch.equal(model.conv1.weight, trained["backbone.conv1.weight"])

    drawn = ["visualize", "losses", run, "--output", str(tmp_path / "losses.png")]
    assert cli.main(drawn) == 0
    image = str(data / "00.png")
    drawn = ["visualize", "matches", run, image, "--size", "64", "--threshold", "-1"]
    assert cli.main([*drawn, "--output", str(tmp_path / "matches.png")]) == 0
    assert re.search(r"00.png: \d+ of [1-4] matches right", capsys.readouterr().out)
    for picture in ("losses.png", "matches.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")

    imported = ["import", str(tmp_path / "b.pth"), "--output", str(tmp_path / "c.pth")]
    assert cli.main(imported) == 0
    assert "left out as heads: fc.bias, fc.weight" in capsys.readouterr().out


def test_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    from data_images import scene
    from PIL import Image

    from densecl_ext.backbones import build_backbone

    for folder in ("images", "masks", "splits"):
        (tmp_path / folder).mkdir()
    for index in range(6):
        scene(index, 64, 64).save(tmp_path / "images" / f"{index}.png")
        Image.new("L", (64, 64), index % 2).save(tmp_path / "masks" / f"{index}.png")
    (tmp_path / "splits" / "train.txt").write_text("0\n1\n2\n3\n")
    (tmp_path / "splits" / "val.txt").write_text("4\n5\n")
    (tmp_path / "classes.txt").write_text("even\nodd\n")
    torch.save(build_backbone("resnet18").state_dict(), tmp_path / "b.pth")
    words = ["evaluate", str(tmp_path / "b.pth"), "--data", str(tmp_path), "--epochs", "2"]
    numbers = tmp_path / "out" / "numbers.json"
    assert cli.main([*words, "--compare-random", "--output", str(numbers)]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("random", "pre-trained", "mIoU", "even", "odd"))
    told = json.loads(numbers.read_text())
    assert 0 <= told["pre-trained"]["miou"] <= 1 and set(told["random"]["iou"]) == {"even", "odd"}
    (tmp_path / "classes.txt").unlink()
    assert cli.main(words) == 2
    assert "give --num-classes" in capsys.readouterr().err


def test_ctrl_c_in_a_process_of_its_own(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a shell sees: exit code 130, a checkpoint, and how to go on, with loader processes."""
    pytest.importorskip("lightning")
    run = tmp_path / "run"
    words = [*TINY, "--epochs", "5000", "--workers", "1", "--checkpoint-every", "1000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "densecl_ext", "pretrain", "--data", data, "--output", run, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parent.parent,
    )
    log = run / "metrics.csv"
    deadline = time.monotonic() + 120
    while not log.is_file() or log.read_text().count("\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    assert cli.main(["pretrain", "--output", str(run), "--resume"]) == 2
    assert "another process is training" in capsys.readouterr().err
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    step = load_checkpoint(run / "checkpoints" / "last.pt")["step"]
    assert step >= 2 and f"stopped at step {step} of 15000" in out
    assert f"densecl pretrain --output {run} --resume" in out
    assert "stopping after this step" in error and "Traceback" not in error


def test_python_dash_m_and_version() -> None:
    words = [sys.executable, "-m", "densecl_ext", "--version"]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"densecl_ext \d+\.\d+\.\d+\S*\n", out)


def test_info_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["libraries"]["torch"] == torch.__version__
    assert cli.main(["info"]) == 0
    assert info.format_info(told) == capsys.readouterr().out.rstrip("\n")
