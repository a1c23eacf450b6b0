"""The training step: the same as by hand, free of waits, its schedules, its CUDA graph."""

from __future__ import annotations

import copy
import doctest
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import graph_emulator
import pytest
import torch
from tiny_models import TinyBackbone, crops, two_views
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from densecl_ext import _native
from densecl_ext.nn import phases
from densecl_ext.nn.matching import MATCHINGS
from densecl_ext.nn.model import DenseCL
from densecl_ext.train import step as step_module
from densecl_ext.train.step import TrainingStep
from densecl_ext.train.window import Window, weights_finite


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    """Tiny steps take one thread; the tests that follow get back what they had."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(device: str = "cpu", **settings: Any) -> DenseCL:
    torch.manual_seed(0)
    defaults = {"dim": 8, "hidden_dim": 16, "queue_length": 20, "key_bn_groups": 2}
    model = DenseCL(TinyBackbone(), **{**defaults, **settings})
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def sgd(model: DenseCL, **settings: Any) -> torch.optim.SGD:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=1e-4, **settings)


def inputs(seed: int, device: str = "cpu") -> tuple[Tensor, ...]:
    views = (view.contiguous(memory_format=torch.channels_last) for view in two_views(6, seed=seed))
    return tuple(x.to(device) for x in (*views, crops(6, seed), crops(6, seed + 50)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_equals_the_step_by_hand(precision: str) -> None:
    model, other = build(lambda_warmup_steps=1), build(lambda_warmup_steps=1)
    step, optimizer = TrainingStep(model, sgd(model), precision=precision), sgd(other)
    for seed in range(4):
        step.schedule(lr=0.1 / (seed + 1), key_momentum=0.9 + 0.02 * seed)
        torch.manual_seed(seed)
        out = step(*inputs(seed))
        torch.manual_seed(seed)
        view_q, view_k, crop_q, crop_k = inputs(seed)
        optimizer.param_groups[0]["lr"] = 0.1 / (seed + 1)
        other.momentum_encoder.momentum = 0.9 + 0.02 * seed
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            expected = other(view_q, view_k, crop_q=crop_q, crop_k=crop_k)
        optimizer.zero_grad()
        expected.loss.backward()
        optimizer.step()
        assert torch.equal(out.loss, expected.loss) and not out.loss.requires_grad
        assert list(out.scalars())[:3] == ["loss", "loss_global", "loss_dense"]
        assert all(torch.equal(out.metrics[k], v) for k, v in expected.metrics.items())
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())


class NoWaits(TorchDispatchMode):
    """Refuses whatever makes the host wait for a GPU: values read, and copies between devices."""

    reads = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(self.reads), f"{func} waits for the device"
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            given = args[0] if name == "_to_copy" else args[1]
            assert given.device == result.device, f"{func} from {given.device} to {result.device}"
        return result


@pytest.mark.parametrize("matching", MATCHINGS)
def test_nothing_waits(matching: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step on tensors that hold no values, taken as a GPU's: there is nothing to read."""
    monkeypatch.setattr(_native, "require_kernels", lambda op, device: None)
    model = build(matching=matching, lambda_warmup_steps=1, grid_size=3).to("meta")
    step = TrainingStep(model, sgd(model))
    given = [x.to("meta") for x in inputs(0)]
    window = Window(step.device)
    with NoWaits():
        for _ in range(2):
            step.schedule(lr=0.1, key_momentum=0.99)
            window.add(step(*given).scalars(), 6)
        window.send(2, weights_finite(model))


@pytest.mark.parametrize(
    "wait,error,words",
    [
        (lambda x: x.sum().item(), AssertionError, "waits for the device"),
        (lambda x: x[x > 0], NotImplementedError, "nonzero"),  # meta tensors refuse it
        (lambda x: x + torch.randperm(3).to("meta"), AssertionError, "from cpu to meta"),
        (lambda x: x.copy_(torch.ones(3)), AssertionError, "from cpu to meta"),
    ],
)
def test_waits_are_noticed(
    wait: Callable[[Tensor], Any], error: type[Exception], words: str
) -> None:
    with NoWaits(), pytest.raises(error, match=words):
        wait(torch.ones(3, device="meta"))


def test_phases_are_named_and_measured() -> None:
    model = build(queue_init="random")
    step = TrainingStep(model, sgd(model))
    with phases.Stopwatch(step.device) as stopwatch:
        for seed in range(2):
            step(*inputs(seed))
        with pytest.raises(RuntimeError, match="another one is running"), stopwatch:
            pass
    measured = stopwatch.seconds()
    assert set(measured) == set(phases.PHASES) - {"data"}
    assert all(seconds > 0 for seconds in measured.values())
    with torch.profiler.profile(acc_events=True) as profile:
        step(*inputs(3))
    names = {event.name for event in profile.events()}
    assert {phases.PREFIX + name for name in measured} <= names
    assert stopwatch.seconds() == measured  # no longer the active one


def test_compiled_encoders_give_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # without Inductor, whose C++ compiler takes more than a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    results = []
    for compile in (False, True):
        model = build(queue_init="random", key_bn_groups=3)
        step = TrainingStep(model, sgd(model), compile=compile)
        torch.manual_seed(7)
        losses = [step(*inputs(seed)).loss for seed in range(2)]
        assert (model.backbone._compiled_call_impl is not None) == compile
        results.append((torch.stack(losses), model.state_dict()))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_settings_that_do_not_fit() -> None:
    model = build()
    with pytest.raises(ValueError, match="precision must be one of .*'fp16'"):
        TrainingStep(model, sgd(model), precision="fp16")
    with pytest.raises(RuntimeError, match="cuda_graph needs the model on a GPU, got one on cpu"):
        TrainingStep(model, sgd(model, fused=True), cuda_graph=True)
    with pytest.raises(ValueError, match="key_momentum must lie in"):
        TrainingStep(model, sgd(model)).schedule(key_momentum=1.5)


def test_window_means_and_what_is_not_finite() -> None:
    window, healthy = Window(torch.device("cpu")), torch.tensor(True)
    for value in (1.0, 2.0):
        window.add({"loss": torch.tensor(value), "matched": torch.tensor(value / 4)}, 8)
    assert list(window.state_dict()["sums"]) == ["loss", "matched"]
    with pytest.raises(ValueError, match="values of those before"):
        window.add({"loss": torch.tensor(1.0)}, 8)
    row = window.send(2, healthy)
    assert row.finite() and row.means()["loss"] == 1.5 and row.means()["matched"] == 0.375
    assert row.means()["images_per_second"] > 0 and window.count == 0 and window.finite()
    for name, value, weights, finite in (
        ("loss", 1.0, False, False),
        ("loss_dense", float("nan"), True, False),
        ("matched", float("nan"), True, True),
    ):
        window.add({name: torch.tensor(value)}, 8)
        assert window.finite() == (finite or not weights)
        assert window.send(3, torch.tensor(weights)).finite() == finite


def test_example_runs() -> None:
    for module in (step_module, phases):
        result = doctest.testmod(module)
        assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(("precision", "matching"), [("fp32", "random"), ("bf16", "backbone")])
def test_emulated_graph_gives_the_bits_of_the_eager_step(
    precision: str, matching: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that must change from step to step is left in Python, on the CPU's operators."""
    graph_emulator.install(monkeypatch)
    captured = step_module.CapturedStep
    monkeypatch.setattr(
        step_module, "CapturedStep", lambda run, _: captured(run, graph_emulator.GPU)
    )
    eager, graphed = (
        train("cpu", precision, matching, cuda_graph, steps=30) for cuda_graph in (False, True)
    )
    assert graphed.graph_replays == 27 and eager.graph_replays == 0
    assert_same_runs(eager, graphed)


def test_a_failed_capture_leaves_the_step_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said by the call that captures and by every later one; no collection runs meanwhile."""
    graph_emulator.install(monkeypatch)
    collects = []

    def run(*_: Tensor | None) -> step_module.StepOutput:
        collects.append(gc.isenabled())
        if len(collects) > step_module.WARMUP_STEPS:
            raise RuntimeError("operation not permitted when stream is capturing")
        return step_module.StepOutput(*[torch.ones(())] * 3, {})

    step = step_module.CapturedStep(run, graph_emulator.GPU)
    for _ in range(step_module.WARMUP_STEPS):
        step(torch.ones(1), None, None, None)
    with pytest.raises(RuntimeError, match="unusable.* The capture failed: operation not"):
        step(torch.ones(1), None, None, None)
    with pytest.raises(RuntimeError, match="TrainingStep: this step could not be captured"):
        step(torch.ones(1), None, None, None)
    assert collects == [True, True, True, False] and gc.isenabled()


class Run(NamedTuple):
    values: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    rng: Tensor
    graph_replays: int


def train(device: str, precision: str, matching: str, cuda_graph: bool, *, steps: int) -> Run:
    """Queues of 20 wrap round every 3 or 4 steps, both rates change, lambda leaves its warm-up."""
    model = build(device, matching=matching, lambda_warmup_steps=10)
    optimizer = sgd(model, fused=True)
    step_module._rates_on_device(optimizer, torch.device(device))
    step = TrainingStep(model, optimizer, precision=precision, cuda_graph=cuda_graph)
    torch.manual_seed(3)
    values = []
    for seed in range(steps):
        step.schedule(lr=0.05 * (1 - seed / steps), key_momentum=0.9 + seed / 1000)
        values.append(step(*inputs(seed, device)).scalars())
    rng = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    graph = step._graph._graph if step._graph else None
    return Run(values, model.state_dict(), rng, getattr(graph, "replays", 0))


def assert_same_runs(eager: Run, graphed: Run) -> None:
    for seed, (one, other) in enumerate(zip(eager.values, graphed.values, strict=True)):
        assert list(one) == list(other)
        assert all(torch.equal(one[name], other[name]) for name in one), seed
    for name, value in eager.weights.items():
        assert torch.equal(value, graphed.weights[name]), name
    assert torch.equal(eager.rng, graphed.rng)


@pytest.fixture
def same_kernels() -> Iterator[None]:
    """One choice of cuDNN's kernels for all steps of a test."""
    backend = torch.backends.cudnn
    before = backend.deterministic, backend.benchmark
    backend.deterministic, backend.benchmark = True, False
    yield
    backend.deterministic, backend.benchmark = before


@pytest.mark.gpu
@pytest.mark.parametrize("matching", MATCHINGS)
def test_nothing_waits_on_a_gpu(matching: str) -> None:
    model = build("cuda", matching=matching, lambda_warmup_steps=1, grid_size=3)
    step = TrainingStep(model, sgd(model, fused=True), precision="bf16")
    window, batches = Window(step.device), [inputs(seed, "cuda") for seed in range(6)]
    step(*batches[0])  # libraries are loaded at first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            step.schedule(lr=0.1, key_momentum=0.99)
            window.add(step(*batch).scalars(), 6)
        row = window.send(5, torch.ones((), dtype=torch.bool, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert row.finite() and row.means()["loss"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("matching", ["backbone", "random"])
def test_graph_gives_the_bits_of_the_eager_step(
    precision: str, matching: str, same_kernels: None
) -> None:
    eager, graphed = (
        train("cuda", precision, matching, cuda_graph, steps=100) for cuda_graph in (False, True)
    )
    assert_same_runs(eager, graphed)


@pytest.mark.gpu
def test_resumed_graph_continues_with_the_same_bits(same_kernels: None) -> None:
    whole, part = build("cuda"), build("cuda")
    step = TrainingStep(whole, sgd(whole, fused=True), cuda_graph=True)
    torch.manual_seed(3)
    expected = [step(*inputs(seed, "cuda")).loss for seed in range(20)]
    optimizer = sgd(part, fused=True)
    step = TrainingStep(part, optimizer, cuda_graph=True)
    torch.manual_seed(3)
    for seed in range(10):
        step(*inputs(seed, "cuda"))
    saved = copy.deepcopy((part.state_dict(), optimizer.state_dict(), torch.cuda.get_rng_state()))
    resumed = build("cuda", queue_init="random")
    optimizer = sgd(resumed, fused=True)
    step = TrainingStep(resumed, optimizer, cuda_graph=True)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    torch.cuda.set_rng_state(saved[2])
    got = [step(*inputs(seed, "cuda")).loss for seed in range(10, 20)]
    assert torch.equal(torch.stack(got), torch.stack(expected[10:]))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.gpu
def test_graph_refuses_other_shapes_and_optimizers() -> None:
    model = build("cuda")
    with pytest.raises(ValueError, match="reads its learning rate on the device, got SGD"):
        TrainingStep(model, sgd(model), cuda_graph=True)
    step = TrainingStep(model, sgd(model, fused=True), cuda_graph=True)
    step(*inputs(0, "cuda"))
    with pytest.raises(ValueError, match=r"view_q must stay \(6, 3, 32, 32\) float32.*\(4, 3,"):
        step(*(x[:4] for x in inputs(0, "cuda")))
    with pytest.raises(ValueError, match="crop_q must stay .* got None"):
        step(*inputs(0, "cuda")[:2])
