"""The DALI loader: threads read files and draw parameters, DALI does the rest to the pixels."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from densecl_ext.data.augmentation import KEY_VIEW, QUERY_VIEW, ViewParameters, draw_parameters
from densecl_ext.data.base import EpochLoader, FileReader, TwoViews
from densecl_ext.data.dali_pipeline import (
    ENCODED,
    VIEW_INPUTS,
    decode_pipeline,
    row_of,
    two_view_pipeline,
)
from densecl_ext.data.images import (
    Encoded,
    decode,
    header_size,
    reason_of,
)
from densecl_ext.data.metadata import with_orientation
from densecl_ext.data.source import ImageSource

# Batches whose files are read ahead of those in the pipeline.
_READ_AHEAD = 2

# Batches in the pipeline: one that is waited for and one behind it, so that a slow batch does not
# show at once. DALI's own prefetching would ask for both before the first may run, which an epoch
# of one batch could not give it.
_IN_FLIGHT = 2


def _native(file: Encoded, max_pixels: int) -> tuple[bytes, int, int] | None:
    """Bytes that a GPU decodes, upright width and height; None for what Pillow has to decode.

    JPEG files alone, the others have no decoder there, and only those that show no damage: a file
    that fails costs DALI its batch.
    """
    if file.kind != "JPEG" or not file.whole:
        return None
    width, height, mode = header_size(file)
    if mode not in ("RGB", "L") or width * height > max_pixels:
        return None
    oriented = file.orientation != 1
    return with_orientation(file.data, file.orientation) if oriented else file.data, width, height


class _Read(NamedTuple):
    encoded: bytes
    width: int  # of the decoded image, as the header tells it
    height: int
    narrow: str


class _Slot(NamedTuple):
    encoded: bytes
    shape: tuple[int, int, int]  # of the decoded image, as the header tells it
    parameters: list[ViewParameters]
    file: int
    sample: int
    unreadable: list[tuple[int, str]]
    narrow: str


class DaliLoader(EpochLoader):
    """Views from DALI; see :func:`densecl_ext.data.build_loader`.

    On a CPU Pillow decodes, in the reading threads: it is as fast there, says nothing about damage
    on standard error, and so both loaders agree on every file. On a GPU DALI decodes JPEG files.
    Its operators cannot skip a sample, one file that does not decode fails its whole batch. Most
    such files show their damage and never get there. A batch that fails all the same is looked
    through file by file, the culprit is skipped or, where Pillow can read it, handed over decoded
    from then on, and the batch is run again.
    """

    backend = "dali"

    def __init__(self, files: ImageSource, *, workers: int, **settings: Any) -> None:
        super().__init__(files, **settings)
        self._threads = max(1, workers)
        self._reader = FileReader(files, self.seed, self.reading)
        self._through_pillow: set[int] = set()
        self._pipeline: Any = self._build()
        self._pool: ThreadPoolExecutor | None = None

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def _decodes(self) -> bool:
        """Whether JPEG files go to DALI as they are."""
        return self._on_gpu

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self.device) if self._on_gpu else None

    def _pipeline_settings(self) -> dict[str, Any]:
        settings = {"num_threads": self._threads, "device_id": None, "device": "cpu"}
        if self._on_gpu:
            index = self.device.index
            index = torch.cuda.current_device() if index is None else index
            settings.update(device_id=index, device="gpu")
        return settings

    def _build(self) -> Any:
        pipeline = two_view_pipeline(
            batch_size=self.own_size,
            prefetch_queue_depth=1,
            size=self.size,
            augmentation=self.augmentation,
            layout="HWC" if self.channels_last else "CHW",
            half=self.dtype == torch.float16,
            **self._pipeline_settings(),
        )
        pipeline.build()
        return pipeline

    def _use(self, index: int, file: Encoded) -> _Read:
        """Bytes that DALI can decode, the upright width and height, and of the range."""
        if self._decodes and index not in self._through_pillow:
            native = _native(file, self.reading.max_pixels)
            if native is not None:
                return _Read(*native, "")
        image, narrow = decode(file, self.reading)
        portable = b"P6 %d %d 255\n" % image.size
        return _Read(portable + image.tobytes(), image.width, image.height, narrow)

    def _prepare(self, epoch: int, sample: int) -> _Slot:
        read, index, unreadable = self._reader.read(epoch, sample, self._use)
        drawn = [
            draw_parameters(
                self.augmentation,
                seed=self.seed,
                epoch=epoch,
                sample=sample,
                view=view,
                width=read.width,
                height=read.height,
            )
            for view in (QUERY_VIEW, KEY_VIEW)
        ]
        shape = (read.height, read.width, 3)
        return _Slot(read.encoded, shape, drawn, index, sample, unreadable, read.narrow)

    def _batches(self, epoch: int, requests: Iterator[list[int]]) -> Iterator[TwoViews]:
        if self._pipeline is None:
            self._pipeline = self._build()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="densecl-read")
        pool = self._pool

        def submit(batch: list[int]) -> list[Future[_Slot]]:
            return [pool.submit(self._prepare, epoch, sample) for sample in batch]

        reading = deque(submit(batch) for batch in islice(requests, _READ_AHEAD))
        running: deque[list[_Slot]] = deque()

        def start_next() -> None:
            if reading:
                running.append([future.result() for future in reading.popleft()])
                reading.extend(submit(batch) for batch in islice(requests, 1))
                self._schedule(running[-1])

        try:
            for _ in range(_IN_FLIGHT):
                start_next()
            while running:
                batch = self._finish(epoch, running)
                # DALI works on the next batches while the consumer has this one.
                start_next()
                yield batch
        finally:
            if running:
                # The consumer stopped early; what the pipeline holds belongs to no later epoch.
                self._pipeline = None
                for future in (future for batch in reading for future in batch):
                    future.cancel()

    def _schedule(self, slots: list[_Slot]) -> None:
        encoded = [np.frombuffer(slot.encoded, dtype=np.uint8) for slot in slots]
        self._pipeline.feed_input(ENCODED, encoded)
        for view, name in enumerate(VIEW_INPUTS):
            self._pipeline.feed_input(name, [row_of(slot.parameters[view]) for slot in slots])
        self._pipeline.schedule_run()

    def _finish(self, epoch: int, running: deque[list[_Slot]]) -> TwoViews:
        """The views of the first of the batches in flight, which it takes out."""
        try:
            # Bound to the consumer's stream: its next operators wait for these outputs on the GPU,
            # the host does not, and memory that the consumer gives back is reused in that order.
            outputs = self._pipeline.share_outputs(cuda_stream=self._stream())
        except RuntimeError as error:
            self._repair(epoch, running, error)
            self._pipeline = self._build()
            for slots in running:
                self._schedule(slots)
            return self._finish(epoch, running)
        slots = running.popleft()
        for slot in slots:
            for index, reason in slot.unreadable:
                self._skip(index, reason)
            self._tell_narrow(slot.file, slot.narrow)
        views = [self._to_torch(output) for output in outputs]
        self._pipeline.release_outputs()
        crops = torch.tensor(
            [
                [(*slot.parameters[view].box, slot.parameters[view].flip) for slot in slots]
                for view in (QUERY_VIEW, KEY_VIEW)
            ],
            dtype=torch.float32,
            pin_memory=self._on_gpu,  # from other memory the copy would make the host wait
        ).to(self.device, non_blocking=True)
        return TwoViews(
            views[QUERY_VIEW],
            views[KEY_VIEW],
            crops[QUERY_VIEW],
            crops[KEY_VIEW],
            torch.tensor([slot.file for slot in slots], dtype=torch.int64),
        )

    def _to_torch(self, output: Any) -> torch.Tensor:
        """DALI's own memory as a tensor: it is not written again while the tensor lives."""
        views = torch.from_dlpack(output.as_tensor())
        if self.channels_last:
            views = views.permute(0, 3, 1, 2)
        # Copies for bfloat16 alone, which DALI does not write.
        return views.to(self.dtype)

    def _repair(self, epoch: int, running: deque[list[_Slot]], error: RuntimeError) -> None:
        """Replace, in place, the slots that DALI cannot decode; raise `error` if there is none.

        Which of the batches in flight has failed is not told.
        """
        failed = [(slots, place) for slots in running for place in self._undecodable(slots)]
        if not failed:
            raise error
        for slots, position in failed:
            slot = slots[position]
            if slot.file in self._through_pillow:
                raise error
            try:
                decode(self.files.encoded(slot.file, self.reading), self.reading)
                self._through_pillow.add(slot.file)
            except Exception as cause:
                self._reader.unreadable[slot.file] = reason_of(cause)
            slots[position] = self._prepare(epoch, slot.sample)

    def _undecodable(self, slots: list[_Slot]) -> list[int]:
        """Positions of the slots that DALI decodes not at all or not as their headers say."""
        failed = []
        probe: Any = None
        for position, slot in enumerate(slots):
            if probe is None:
                probe = decode_pipeline(
                    batch_size=1, prefetch_queue_depth=1, **self._pipeline_settings()
                )
                probe.build()
            try:
                probe.feed_input(ENCODED, [np.frombuffer(slot.encoded, dtype=np.uint8)])
                (shapes,) = probe.run()
                if tuple(shapes.at(0)) != slot.shape:
                    failed.append(position)
            except RuntimeError:
                failed.append(position)
                # DALI declares a pipeline invalid once an operator has failed.
                probe = None
        return failed

    def close(self) -> None:
        """End the reading threads and the pipeline."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._pipeline = None
