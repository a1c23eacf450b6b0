"""Means over the steps between two log rows: summed on the device, fetched without waiting."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from densecl_ext.nn.distributed import world_size


class Row:
    """The means of one window, on their way from the device.

    Attributes:
        step: the window's last step.
    """

    def __init__(
        self,
        step: int,
        names: Iterable[str],
        sums: Tensor,
        finite: Tensor,
        count: int,
        images: int,
        started: Any,
        waited: float,
    ) -> None:
        """Sends the values; on the CPU they are there already.

        Args:
            step: the window's last step.
            names: what the sums are of.
            sums: (len(names),) float32 on the device.
            finite: () bool, whether all weights are.
            count: steps in the window.
            images: images in the window.
            started: when it began, from `clock`.
            waited: seconds of it in which the host waited for images.
        """
        self.step = step
        self._names = list(names)
        self._count, self._images, self._started = count, images, started
        self._waited = waited
        values = torch.cat([sums, finite.float().reshape(1)])
        if sums.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
        else:
            self._values = values
        self.ended = clock(sums.device)

    def finite(self) -> bool:
        """Whether no loss of the window and no weight was NaN or infinite. Waits for the copy."""
        *sums, weights = self._fetched()
        losses = [value for name, value in zip(self._names, sums, strict=True) if _is_loss(name)]
        return bool(weights) and all(map(math.isfinite, losses))

    def means(self) -> dict[str, float]:
        """The means, `images_per_second` and `data_seconds` a step. Waits for the copy."""
        *sums, _ = self._fetched()
        means = {name: s / self._count for name, s in zip(self._names, sums, strict=True)}
        if isinstance(self._started, float):
            seconds = self.ended - self._started
        else:  # by the device's clock: the host is ahead of it
            seconds = self._started.elapsed_time(self.ended) / 1e3
        means["images_per_second"] = self._images / max(seconds, 1e-9)
        means["data_seconds"] = self._waited / self._count
        return means

    def _fetched(self) -> list[float]:
        if not isinstance(self.ended, float):
            self.ended.synchronize()
        return self._values.tolist()


class Window:
    """Sums of the metrics since the last log row.

    Sums stay on the device, so that adding never waits for the GPU. They are part of a run's
    state: a resumed run logs the same means as an uninterrupted one. Under torch.distributed rows
    hold the means over all processes, and `send`, `finite` and `state_dict` are called by all.
    """

    def __init__(self, device: torch.device) -> None:
        """Starts empty; sums of a loaded state go to `device`."""
        self._device = device
        self._reset(clock(device))

    def _reset(self, now: Any) -> None:
        self.count = 0
        self._names: list[str] = []
        self._sums: Tensor | None = None  # (len(names),) float32
        self._images = 0
        self._waited = 0.0
        self._started = now

    def add(self, values: Mapping[str, Tensor], images: int, waited: float = 0.0) -> None:
        """Adds one step.

        Args:
            values: name -> 0-d tensor on the device, the same names in every step.
            images: images in the step's batch.
            waited: seconds in which the host waited for it.

        Raises:
            ValueError: other names than before.
        """
        vector = torch.stack([value.detach().float() for value in values.values()])
        if self._sums is None:
            self._names, self._sums = list(values), vector
        elif self._names != list(values):
            raise ValueError(
                f"Window: a step must have the values of those before, {self._names}, got "
                f"{list(values)}"
            )
        else:
            self._sums = self._sums + vector
        self.count += 1
        self._images += images
        self._waited += waited

    def finite(self) -> bool:
        """Whether no loss since the last row was NaN or infinite. Waits for the device."""
        if self._sums is None:
            return True
        sums = zip(self._names, _mean_over_ranks(self._sums).tolist(), strict=True)
        return all(math.isfinite(value) for name, value in sums if _is_loss(name))

    def send(self, step: int, weights_finite: Tensor) -> Row:
        """Sends the sums to the host and starts anew.

        Args:
            step: the step just done.
            weights_finite: () bool, to be fetched with them.
        """
        assert self._sums is not None
        row = Row(
            step,
            self._names,
            _mean_over_ranks(self._sums),
            weights_finite,
            self.count,
            self._images,
            self._started,
            self._waited,
        )
        self._reset(row.ended)
        return row

    def state_dict(self) -> dict[str, Any]:
        """Sums and count, of several processes one behind the other; not the clock."""
        sums = self._sums
        if sums is not None and world_size() > 1:
            of_ranks = sums.new_empty(world_size() * sums.numel())
            dist.all_gather_into_tensor(of_ranks, sums)
            sums = of_ranks.view(world_size(), -1).T  # (len(names), ranks)
        columns = [] if sums is None else sums.cpu().unbind()
        named = zip(self._names, columns, strict=True)
        return {"count": self.count, "sums": {name: value.clone() for name, value in named}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved window; where the number of processes differs, from its mean."""
        self.count = state["count"]
        self._names = list(state["sums"])
        if not self._names:
            self._sums = None
            return
        values = torch.stack([value.reshape(-1) for value in state["sums"].values()])
        same = values.shape[1] == world_size()
        rank = dist.get_rank() if same and world_size() > 1 else 0
        self._sums = (values[:, rank] if same else values.mean(dim=1)).to(self._device)


def _mean_over_ranks(sums: Tensor) -> Tensor:
    if world_size() == 1:
        return sums
    mean = sums / world_size()
    dist.all_reduce(mean)
    return mean


def weights_finite(model: nn.Module) -> Tensor:
    """() bool on the device, whether every trainable weight is finite."""
    weights = [p.detach() for p in model.parameters() if p.requires_grad]
    return torch.isfinite(torch.stack(torch._foreach_norm(weights))).all()


def clock(device: torch.device) -> Any:
    """Now, in seconds; on a GPU an event that tells when the work so far is done."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _is_loss(name: str) -> bool:
    return name.startswith("loss")
