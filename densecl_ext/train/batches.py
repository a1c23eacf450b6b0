"""The batches of a run, in order, from wherever it stands."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from densecl_ext.data import TwoViews
from densecl_ext.train.agreement import Agreement, blank
from densecl_ext.train.run import Run
from densecl_ext.train.signals import StopRequest


def batches(
    run: Run, last: int, stop: StopRequest, agreement: Agreement
) -> Iterator[tuple[TwoViews, float]]:
    """The batches that remain of all epochs, up to step `last` or a request to stop.

    Beside each the seconds that it was waited for. Counts `run.epoch`; the consumer counts
    `run.step`. Of several ranks one whose loader fails goes on with what it has, until the others
    know and `agreement` raises.
    """
    views = None
    while run.epoch < run.config.epochs:
        run.loader.set_epoch(run.epoch)  # the current epoch's number keeps a loaded position
        remaining = iter(run.loader)
        while run.step < last and not stop.agreed:
            began = time.monotonic()
            try:
                # torch's DataLoader draws from the global generator whenever an iteration begins,
                # which in a resumed run is not where it was in the interrupted one.
                with torch.random.fork_rng(devices=[]):
                    found = next(remaining, None)
            except Exception as error:
                if run.ranks.world > 1:
                    agreement.fail(error)
                    while True:
                        yield views or blank(run.config, run.ranks), 0.0
                if not (stop.requested and isinstance(error, RuntimeError)):
                    raise
                return  # the signal that asks us to stop has also ended the loader's workers
            if found is None:
                break
            views = found
            yield views, time.monotonic() - began
        else:
            return
        run.epoch += 1
