from __future__ import annotations

import copy
import doctest
import importlib
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import TinyBackbone, crops, two_views
from torch import Tensor, nn

from densecl_ext.nn.distributed import gather_keys, mean_over_ranks
from densecl_ext.nn.matching import MATCHINGS, geometric_match
from densecl_ext.nn.model import DenseCL, DenseCLOutput


def build(seed: int = 0, **settings: object) -> DenseCL:
    torch.manual_seed(seed)
    defaults = {"dim": 8, "hidden_dim": 16, "queue_length": 20, "key_bn_groups": 2}
    return DenseCL(TinyBackbone(), **{**defaults, **settings})  # type: ignore[arg-type]


def sgd(model: nn.Module) -> torch.optim.SGD:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=1e-4)


def train_step(model: DenseCL, optimizer: torch.optim.Optimizer, seed: int) -> DenseCLOutput:
    out = model(*two_views(6, seed=seed), crop_q=crops(6, seed), crop_k=crops(6, seed + 50))
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    return out


@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("grid_size", [None, 1, 3, 5, 7, 9, 14])
def test_every_matching_and_grid_trains(matching: str, grid_size: int | None) -> None:
    model = build(matching=matching, grid_size=grid_size, queue_init="random")
    before = copy.deepcopy(model.state_dict())
    out = train_step(model, sgd(model), seed=1)
    assert torch.isfinite(out.loss) and out.loss_dense > 0
    torch.testing.assert_close(out.loss, 0.5 * out.loss_global + 0.5 * out.loss_dense)
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, name


@pytest.mark.parametrize("matching", MATCHINGS)
def test_the_match_that_is_used(matching: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The match reaches the loss: it is recorded there and compared with what its name says."""
    model = build(matching=matching, grid_size=3, key_bn_groups=1)
    views, boxes = two_views(6), (crops(6), crops(6, 1))
    query = model.neck(model.backbone(views[0]))
    key = model.momentum_encoder(views[1])
    torch.manual_seed(9)
    expected = {
        "backbone": cosine_argmax(query.features, key.features),
        "dense": cosine_argmax(query.grid, key.grid),
        "geometric": geometric_match(*boxes, (3, 3)),
        "random": torch.randint(9, (6, 9)),
    }[matching]
    seen: list[Tensor] = []
    model.criterion.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["match"]), with_kwargs=True
    )
    torch.manual_seed(9)
    model(*views, crop_q=boxes[0], crop_k=boxes[1])
    assert torch.equal(seen[0], expected)


def cosine_argmax(query: Tensor, key: Tensor) -> Tensor:
    query, key = (nn.functional.normalize(x.flatten(2), dim=1) for x in (query, key))
    return torch.einsum("ncs,nct->nst", query, key).argmax(dim=2)


def test_keys_belong_to_their_images() -> None:
    """With statistics frozen the permutation of the keys must not be seen anywhere."""
    shuffled, plain = build(key_bn_groups=3), build(key_bn_groups=1)
    for model in (shuffled, plain):
        for layer in model.momentum_encoder.modules():
            if hasattr(layer, "running_mean"):
                layer.forward = lambda x: x  # type: ignore[method-assign]
    for seed in range(2):
        views = two_views(6, seed=seed)
        for one, other in zip(shuffled(*views)[:3], plain(*views)[:3], strict=True):
            torch.testing.assert_close(one, other)
    for queue in ("global_queue", "dense_queue"):
        torch.testing.assert_close(getattr(shuffled, queue).keys, getattr(plain, queue).keys)


def test_keys_do_not_depend_on_images_of_other_groups() -> None:
    """A changed image may change its own group's keys (of 3 groups), never those of the others."""
    view_q, view_k = two_views(12)
    changed = view_k.clone()
    changed[4] = -changed[4]
    for groups, expected in ((3, 12 - 4), (1, 0)):
        model = build(key_bn_groups=groups, queue_length=12)
        keys = []
        for images in (view_k, changed):
            twin = copy.deepcopy(model)
            torch.manual_seed(5)
            twin(view_q, images)
            keys.append((twin.global_queue.keys, twin.dense_queue.keys))
        for before, after in zip(*keys, strict=True):
            assert int((before == after).all(dim=1).sum()) == expected


def test_warmup_starts_the_dense_term_late() -> None:
    model = build(lambda_warmup_steps=2, queue_init="random")
    optimizer = sgd(model)
    for step in range(4):
        out = train_step(model, optimizer, step)
        weight = 0.0 if step < 2 else 0.5
        assert out.metrics["loss_lambda"] == weight
        assert out.loss_dense > 0
        expected = (1 - weight) * out.loss_global + weight * out.loss_dense
        torch.testing.assert_close(out.loss, expected)
        moved = any(bool(p.grad.any()) for p in model.neck.dense_head.parameters())
        assert moved == (step >= 2)
        assert int(model.dense_queue.pointer) == 6 * (step + 1) % 20  # filled all the while
    assert int(model.step) == 4


def test_lambda_one_leaves_out_the_global_branch() -> None:
    model = build(loss_lambda=1.0, queue_init="random")
    model.neck.global_head.register_forward_hook(lambda *_: pytest.fail("not needed"))
    out = train_step(model, sgd(model), 0)
    assert out.loss_global == 0 and torch.equal(out.loss, out.loss_dense) and out.loss > 0
    assert int(model.global_queue.pointer) == 0
    warmed = build(loss_lambda=1.0, lambda_warmup_steps=1, queue_init="random")
    optimizer = sgd(warmed)
    first, second = (train_step(warmed, optimizer, step) for step in range(2))
    torch.testing.assert_close(first.loss, first.loss_global)
    torch.testing.assert_close(second.loss, second.loss_dense)


@pytest.mark.parametrize("loss_lambda", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("warmup", [0, 5])
def test_what_is_trainable_gets_a_gradient(loss_lambda: float, warmup: int) -> None:
    """DistributedDataParallel waits for the gradient of every parameter that asks for one."""
    model = build(loss_lambda=loss_lambda, lambda_warmup_steps=warmup)
    model(*two_views(6)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_first_step_of_empty_queues_has_no_loss_but_keeps_its_keys() -> None:
    model = build()
    out = model(*two_views(6))
    out.loss.backward()
    assert out.loss == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    assert int(model.global_queue.filled) == int(model.dense_queue.filled) == 6
    assert model(*two_views(6, seed=1)).loss > 0


@pytest.mark.parametrize("matching", ["backbone", "random"])
def test_reloaded_state_continues_bit_for_bit(matching: str, tmp_path: Path) -> None:
    settings = {"lambda_warmup_steps": 3, "matching": matching, "grid_size": 3}
    model = build(**settings)
    optimizer = sgd(model)
    for step in range(2):
        train_step(model, optimizer, step)
    saved = model.state_dict(), optimizer.state_dict(), torch.get_rng_state()
    torch.save(saved, tmp_path / "state.pt")
    expected = [train_step(model, optimizer, step) for step in range(2, 5)]

    other = build(seed=1, **settings)
    other_optimizer = sgd(other)
    state, optimizer_state, rng = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state)
    other_optimizer.load_state_dict(optimizer_state)
    torch.set_rng_state(rng)
    for step, wanted in zip(range(2, 5), expected, strict=True):
        out = train_step(other, other_optimizer, step)
        assert all(torch.equal(a, b) for a, b in zip(out[:3], wanted[:3], strict=True))
        assert all(torch.equal(out.metrics[k], wanted.metrics[k]) for k in wanted.metrics)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_evaluation_updates_nothing() -> None:
    model = build(queue_init="random")
    train_step(model, sgd(model), 0)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    with torch.no_grad():
        first, second = (model(*two_views(6)) for _ in range(2))
    assert first.loss > 0 and torch.equal(first.loss, second.loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())


def test_pretrained_weights_reach_both_encoders() -> None:
    torch.manual_seed(7)
    pretrained = TinyBackbone()
    pretrained(torch.randn(4, 3, 16, 16))
    by_argument = DenseCL(copy.deepcopy(pretrained), dim=8, hidden_dim=16, queue_length=20)
    later = build()
    later.load_backbone_weights(pretrained.state_dict())
    for model in (by_argument, later):
        for encoder in (model, model.momentum_encoder.module):
            for name, value in encoder.backbone.state_dict().items():
                assert torch.equal(value, pretrained.state_dict()[name])
        for name, value in model.momentum_encoder.module.neck.state_dict().items():
            assert torch.equal(value, model.neck.state_dict()[name])
    with pytest.raises(RuntimeError, match="Missing key"):
        later.load_backbone_weights({})


def test_metrics_by_hand() -> None:
    model = build(key_bn_groups=1, momentum=1.0)
    model(*two_views(6, seed=3))
    views = two_views(6)
    query = nn.functional.normalize(model.neck(model.backbone(views[0])).vector, dim=1)
    key = nn.functional.normalize(model.momentum_encoder(views[1]).vector, dim=1)
    metrics = model(*views, crop_q=crops(6), crop_k=crops(6, 1)).metrics
    assert all(v.shape == () and not v.requires_grad for v in metrics.values())
    assert all(v.dtype == torch.float32 for v in metrics.values())
    cosine = query @ key.T
    own = torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(metrics["positive_similarity"], cosine[own].mean().detach())
    torch.testing.assert_close(metrics["negative_similarity"], cosine[~own].mean().detach())
    spread = query.std(dim=0, unbiased=False).mean().detach() * 8**0.5
    torch.testing.assert_close(metrics["feature_std"], spread)
    assert metrics["queue_filled"].item() == pytest.approx(6 / 20)
    assert metrics["matched"] == 1 and 0 <= metrics["match_agreement"] <= 1

    geometric = build(matching="geometric")
    crop = crops(6)
    far = crop + torch.tensor([500.0, 0.0, 500.0, 0.0, 0.0])
    assert geometric(*views, crop_q=crop, crop_k=crop).metrics["matched"] == 1
    out = geometric(*views, crop_q=crop, crop_k=far)
    assert out.metrics["matched"] == 0 and out.loss_dense == 0
    agreeing = build(key_bn_groups=1)
    same = agreeing(views[0], views[0], crop_q=crop, crop_k=crop)
    assert same.metrics["match_agreement"] == 1
    half = build(key_bn_groups=1)(views[0], views[0], crop_q=crop, crop_k=far)
    assert half.metrics["match_agreement"] == 0


def test_mutual_matching_leaves_positions_out() -> None:
    out = build(mutual_matching=True)(*two_views(6))
    assert 0 < out.metrics["matched"] < 1


@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_close_to_float32(queue_dtype: torch.dtype) -> None:
    losses = []
    for enabled in (False, True):
        model = build(queue_dtype=queue_dtype, queue_init="random", grid_size=3)
        optimizer = sgd(model)
        for step in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = model(*two_views(6, seed=step))
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        assert out.loss.dtype == torch.float32
        assert model.dense_queue.keys.dtype == queue_dtype
        assert all(p.dtype == torch.float32 for p in model.parameters())
        losses.append(out.loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0.0)


def test_compiled_model_gives_the_same_step() -> None:
    eager, compiled = build(lambda_warmup_steps=1), build(lambda_warmup_steps=1)
    run = torch.compile(compiled, backend="aot_eager")
    optimizers = sgd(eager), sgd(compiled)
    for step in range(3):
        results = []
        for call, optimizer in zip((eager, run), optimizers, strict=True):
            torch.manual_seed(step)
            # nothing that changes with the steps is baked into the graphs
            with torch.compiler.set_stance("fail_on_recompile" if step == 2 else "default"):
                results.append(call(*two_views(6, seed=step)))
            optimizer.zero_grad()
            results[-1].loss.backward()
            optimizer.step()
        torch.testing.assert_close(results[0].loss, results[1].loss)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(value, compiled.state_dict()[name], msg=name)


def test_channels_last_and_foreign_backbones() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 5, 3, stride=8), nn.BatchNorm2d(5), nn.ReLU())
    model = DenseCL(backbone, dim=8, hidden_dim=16, queue_length=20, queue_init="random")
    assert model.neck.in_channels == 5
    views = (view.contiguous(memory_format=torch.channels_last) for view in two_views(6))
    assert torch.isfinite(model(*views).loss)
    infrared = nn.Sequential(nn.Conv2d(4, 5, 3, stride=8), nn.BatchNorm2d(5))
    stated = DenseCL(infrared, backbone_channels=5, dim=8, queue_length=20, queue_init="random")
    assert torch.isfinite(stated(*torch.randn(2, 6, 4, 32, 32)).loss)
    wrong = DenseCL(infrared, backbone_channels=7, dim=8, queue_length=20)
    with pytest.raises(ValueError, match=r"\(N, 7, H, W\).*backbone_channels="):
        wrong(*torch.randn(2, 6, 4, 32, 32))


def test_named_backbone() -> None:
    pytest.importorskip("torchvision")
    model = DenseCL("resnet18", queue_length=32, queue_init="random", grid_size=3)
    out = model(*two_views(4, size=64))
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert len(model.global_queue) == 32 and model.global_queue.keys.shape[1] == 128


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matching": "nearest"}, "matching.*'nearest'"),
        ({"loss_lambda": 1.5}, "loss_lambda"),
        ({"loss_lambda": -0.5}, "loss_lambda"),
        ({"temperature": 0.0}, "temperature"),
        ({"momentum": 2.0}, "momentum"),
        ({"grid_size": 0}, "grid_size"),
        ({"queue_length": 0}, "length"),
        ({"queue_init": "ones"}, "'ones'"),
        ({"key_bn_groups": 0}, "key_bn_groups"),
        ({"lambda_warmup_steps": -1}, "lambda_warmup_steps"),
        ({"matching": "random", "mutual_matching": True}, "mutual_matching"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_inputs_that_do_not_fit() -> None:
    model = build(matching="geometric")
    before = copy.deepcopy(model.state_dict())
    view_q, view_k = two_views(4)
    crop = crops(4)
    with pytest.raises(ValueError, match=r"\(4, 3, 32, 32\) and \(3, 3, 32, 32\)"):
        model(view_q, view_k[:3], crop_q=crop, crop_k=crop)
    with pytest.raises(ValueError, match="one shape"):
        model(view_q[0], view_k[0], crop_q=crop, crop_k=crop)
    with pytest.raises(ValueError, match="'geometric' needs crop_q"):
        model(view_q, view_k)
    with pytest.raises(ValueError, match="together"):
        model(view_q, view_k, crop_q=crop)
    with pytest.raises(ValueError, match=r"crop_q.*\(4, 5\).*\(3, 5\)"):
        model(view_q, view_k, crop_q=crop[:3], crop_k=crop[:3])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["queue", "losses", "momentum", "necks", "model"])
def test_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"densecl_ext.nn.{name}"))
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_whole_model_of_16_bit_numbers_trains(dtype: torch.dtype) -> None:
    """With the default number of batch-norm groups; the loss stays float32."""
    model = build(key_bn_groups=8, queue_init="random", matching="dense").to(dtype)
    assert model.global_queue.keys.dtype == dtype
    optimizer = sgd(model)
    exact = build(key_bn_groups=8, queue_init="random", matching="dense")
    exact.load_state_dict(model.state_dict())
    for step in range(3):
        views = two_views(16, seed=step)
        torch.manual_seed(step)
        out = model(*(view.to(dtype) for view in views))
        if step == 0:
            torch.manual_seed(step)
            assert out.loss.dtype == torch.float32
            assert out.loss.item() == pytest.approx(exact(*views).loss.item(), rel=0.05)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


SETTINGS: list[dict[str, object]] = [
    {},
    {"lambda_warmup_steps": 2},
    {"matching": "geometric"},
    {"matching": "dense", "mutual_matching": True},
    {"matching": "random", "loss_lambda": 1.0},
    {"loss_lambda": 0.0},
]


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_training_step_compiles_in_one_graph(settings: dict[str, object], groups: int) -> None:
    torch._dynamo.reset()
    model = build(key_bn_groups=groups, queue_init="random", **settings)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    views, boxes = two_views(16), {"crop_q": crops(16), "crop_k": crops(16, 50)}
    torch.manual_seed(1)
    compiled(*views, **boxes).loss.backward()
    torch.manual_seed(1)
    eager(*views, **boxes).loss.backward()
    for (name, got), expected in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=name)
        torch.testing.assert_close(got, expected, msg=name)
    assert int(model.step) == 1
    torch._dynamo.reset()


def test_gathering_alone_changes_nothing() -> None:
    keys = torch.randn(3, 4)
    assert gather_keys(keys) is keys
    mean = torch.tensor(2.0)
    assert mean_over_ranks(mean, torch.tensor([[0, -1]])) is mean


def _one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = build(queue_length=30)
    parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = sgd(model)
    for step in range(3):
        out = parallel(*two_views(6, seed=10 * rank + step))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


class FlatBackbone(nn.Sequential):
    """No batch norm: what a process computes of an image depends on no other image."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 12, 8, stride=8), nn.Tanh())
        self.out_channels = 12


MASKED: list[dict[str, object]] = [
    {"matching": "geometric"},
    {"matching": "geometric", "loss_lambda": 1.0},
    {"mutual_matching": True},
    {"matching": "backbone"},
]


def _gradients(settings: dict[str, object], ranks: int, rank: int) -> list[Tensor]:
    """Of 12 images, of which this process has its part."""
    torch.manual_seed(0)
    defaults = {"dim": 8, "hidden_dim": 16, "queue_length": 20, "key_bn_groups": 1}
    model = DenseCL(FlatBackbone(), queue_init="random", **{**defaults, **settings})
    parallel = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    part = slice(12 // ranks * rank, 12 // ranks * (rank + 1))
    # Crops that hardly meet in one half of the images: the processes have different counts.
    boxes = crops(12), crops(12, 50)
    boxes[1][6:, :4] += 45.0
    views = two_views(12)
    out = parallel(views[0][part], views[1][part], crop_q=boxes[0][part], crop_k=boxes[1][part])
    out.loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _half_a_batch(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    gradients = [_gradients(settings, 2, rank) for settings in MASKED]
    match = torch.tensor([[0, -1], [2, -1]] if rank == 0 else [[1, 1], [1, 0]])
    weight = torch.tensor([[2.0, 9.0], [1.0, 9.0]] if rank == 0 else [[1.0, 0.0], [1.0, 3.0]])
    shares = [
        mean_over_ranks(torch.tensor(10.0 + rank), match),
        mean_over_ranks(torch.tensor(10.0 + rank), match, weight),
        mean_over_ranks(torch.tensor(0.0), torch.full((2, 2), -1)),
    ]
    torch.save((gradients, shares), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_processes_have_the_gradients_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice 6 images and once 12, where positions without a match are spread unevenly."""
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    mp.spawn(_half_a_batch, args=(str(tmp_path),), nprocs=2)
    (first, shares), (second, others) = (torch.load(tmp_path / f"rank{r}.pt") for r in range(2))
    for settings, got, same in zip(MASKED, first, second, strict=True):
        for ours, theirs, expected in zip(got, same, _gradients(settings, 1, 0), strict=True):
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4, msg=str(settings))
    means = [float(a + b) / 2 for a, b in zip(shares, others, strict=True)]
    assert means == pytest.approx([(2 * 10 + 4 * 11) / 6, (3 * 10 + 5 * 11) / 8, 0.0])


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_processes_keep_equal_queues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    mp.spawn(_one_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for name in ("global_queue", "dense_queue"):
        for part in ("keys", "pointer", "filled"):
            assert torch.equal(first[f"{name}.{part}"], second[f"{name}.{part}"])
        assert int(first[f"{name}.filled"]) == 30  # 3 steps of 2 x 6 keys
        assert int(first[f"{name}.pointer"]) == 6
    for name, value in first.items():
        if name.endswith(("weight", "bias")):
            assert torch.equal(value, second[name]), name
