"""What the ranks of a run tell each other in every step, so that all do the same."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from densecl_ext.checkpoints.writer import CheckpointWriter
from densecl_ext.data import TwoViews
from densecl_ext.nn.distributed import CHECKED, CHECKSUM, FAILED, STOP, KeyExchange, queue_checksum
from densecl_ext.train.launch import RankFailed, Ranks, own
from densecl_ext.train.run import Run
from densecl_ext.train.signals import StopRequest


class Agreement:
    """Carries a request to stop, or a failure, of one rank to all, with the keys of a step.

    A note is read when its step is done: on a CPU at once, on a GPU one step later, so that nothing
    waits; all ranks read it after the same step. Alone there is nothing to agree upon.

    Args:
        run: before its first step; its model then gathers keys and notes together.
        ranks: of the run.
        stop: this rank's request; `agreed` becomes true on all ranks after the same step.
    """

    def __init__(self, run: Run, ranks: Ranks, stop: StopRequest) -> None:
        self._ranks, self._stop, self._run = ranks, stop, run
        self._error: Exception | None = None
        self._arriving: deque[tuple[Tensor, Any]] = deque()
        if ranks.world > 1:
            self._exchange = KeyExchange(ranks.device)
            run.model.gather = self._exchange

    def fail(self, error: Exception) -> None:
        """This rank cannot go on; it takes part until the others know."""
        self._error = error

    def before_step(self, writer: CheckpointWriter | None = None) -> None:
        """Tells this rank's note with the step to come, now and then with the queues' checksum.

        Args:
            writer: a checkpoint that it could not write is this rank's failure.
        """
        try:
            if writer is not None:
                writer.check()
        except Exception as error:
            if self._ranks.world == 1:
                raise
            self.fail(error)
        if self._ranks.world == 1:
            return
        checksum = None
        if self._run.step % self._run.config.log_every == 0:
            model = self._run.model
            checksum = queue_checksum(model.global_queue.keys, model.dense_queue.keys)
        self._exchange.tell(
            stop=self._stop.requested, failed=self._error is not None, checksum=checksum
        )

    def after_step(self, *, all_arrived: bool = False) -> None:
        """Reads the notes that are due.

        Args:
            all_arrived: also those that have to be waited for.

        Raises:
            Exception: of this rank's own failure.
            RankFailed: another rank failed, or the queues of two differ.
        """
        if self._ranks.world == 1:
            return
        assert self._exchange.notes is not None
        self._arriving.append(_to_host(self._exchange.notes))
        delay = 1 if self._ranks.device.type == "cuda" and not all_arrived else 0
        while len(self._arriving) > delay:
            notes, event = self._arriving.popleft()
            if event is not None:
                event.synchronize()
            self._read(notes)

    def _read(self, notes: Tensor) -> None:
        failed = notes[:, FAILED].nonzero().flatten().tolist()
        if failed:
            if self._error is not None and failed[0] == self._ranks.rank:
                raise own(self._error)
            raise RankFailed(f"rank {failed[0]} failed")
        if bool(notes[:, CHECKED].all()):
            other = (notes[:, CHECKSUM] != notes[0, CHECKSUM]).nonzero().flatten().tolist()
            if other:
                raise RankFailed(
                    f"pretrain: the queues of rank {other[0]} differ from rank 0's at step "
                    f"{self._run.step}: a device computes wrongly, or a program has changed them; "
                    "go on from the last checkpoint with --resume",
                    told=not self._ranks.first,
                )
        if bool(notes[:, STOP].any()):
            self._stop.agree()


def blank(config: Any, ranks: Ranks) -> TwoViews:
    """Views of a rank that has none, for the last step that it takes part in."""
    images, size = config.batch_size // ranks.world, config.image_size
    view = torch.zeros(images, 3, size, size, device=ranks.device)
    crop = torch.tensor([[0.0, 0.0, size, size, 0.0]], device=ranks.device).repeat(images, 1)
    return TwoViews(view, view, crop, crop, torch.zeros(images, dtype=torch.int64))


def _to_host(notes: Tensor) -> tuple[Tensor, Any]:
    if not notes.is_cuda:
        return notes, None
    copy = torch.empty(notes.shape, dtype=notes.dtype, pin_memory=True)
    copy.copy_(notes, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event
