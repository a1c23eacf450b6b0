"""The batches of a loader in memory, on a GPU, kept for the next run of the same seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from densecl_ext.data import TwoViews
from densecl_ext.data.memory_loader import MemoryLoader

KEPT_BYTES = 1_500_000_000  # of one stream: 400 steps of 64 images at 64 pixels, in bfloat16


class Stream:
    """The batches of a seed, epoch after epoch; the first ones are kept for the next run."""

    def __init__(self, loader: MemoryLoader, seed: int) -> None:
        self.loader, self.seed = loader, seed
        self.kept: list[TwoViews] = []

    def __call__(self, steps: int) -> Iterator[TwoViews]:
        """The first `steps` batches."""
        yield from self.kept[:steps]
        first = len(self.kept)
        more = itertools.islice(self._made(first), max(0, steps - first))
        for index, batch in enumerate(more, first):
            if index == len(self.kept) and (index + 1) * size_of(batch) <= KEPT_BYTES:
                self.kept.append(batch)
            yield batch

    def _made(self, first: int) -> Iterator[TwoViews]:
        """The batches from number `first` on."""
        self.loader.seed = self.seed
        begun, position = divmod(first, len(self.loader))
        state = self.loader.state_dict() | {"epoch": begun, "position": position}
        self.loader.load_state_dict(state)
        for epoch in itertools.count(begun):
            self.loader.set_epoch(epoch)
            yield from self.loader


def size_of(batch: TwoViews) -> int:
    """Bytes of both views."""
    return 2 * batch.view_q.numel() * batch.view_q.element_size()
