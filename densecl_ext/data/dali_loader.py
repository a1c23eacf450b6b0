"""The DALI loader: threads read files and draw parameters, DALI does the rest to the pixels."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from densecl_ext.data.augmentation import KEY_VIEW, QUERY_VIEW, ViewParameters, draw_parameters
from densecl_ext.data.base import EpochLoader, TwoViews, candidates
from densecl_ext.data.dali_pipeline import (
    ENCODED,
    VIEW_INPUTS,
    decode_pipeline,
    row_of,
    two_view_pipeline,
)
from densecl_ext.data.folder import decode_rgb, orientation_of, reason_of

if TYPE_CHECKING:
    from PIL import Image

# Batches whose files are read ahead of those in the pipeline.
_READ_AHEAD = 2

# Batches in the pipeline: one that is waited for and one behind it, so that a slow batch does not
# show at once. DALI's own prefetching would ask for both before the first may run, which an epoch
# of one batch could not give it.
_IN_FLIGHT = 2

# What DALI decodes exactly as Pillow does; the rest Pillow decodes and DALI takes from there.
_NATIVE = frozenset(
    [(kind, mode) for kind in ("JPEG", "PNG", "WEBP", "BMP") for mode in ("RGB", "L")]
)


def _looks_complete(data: bytes, kind: str | None) -> bool:
    """Whether a file's end is there; Pillow has the last word on one whose end is not.

    Finds nearly all truncated files before they fail a batch.
    """
    if kind == "JPEG":
        return b"\xff\xd9" in data[-64:]
    if kind == "PNG":
        return b"IEND" in data[-64:]
    if kind == "WEBP":
        return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    if kind == "BMP":
        return len(data) >= int.from_bytes(data[2:6], "little")
    return True


def _native_size(header: Image.Image, data: bytes) -> tuple[int, int] | None:
    """Upright width and height of an image that DALI decodes as Pillow does; None for any other."""
    if (header.format, header.mode) not in _NATIVE or getattr(header, "n_frames", 1) != 1:
        return None
    if not _looks_complete(data, header.format):
        return None
    width, height = header.size
    if header.format == "PNG":
        # Pillow would decode all of it to look for an orientation, which hardly any PNG has.
        oriented = b"eXIf" in data or b"Raw profile type" in data or b"tiff:Orientation" in data
        return None if oriented else (width, height)
    orientation = orientation_of(header)
    if orientation != 1 and b"tiff:Orientation" in data:
        return None  # Pillow also reads XMP's orientation, DALI only that of EXIF
    return (width, height) if orientation < 5 else (height, width)


class _Slot(NamedTuple):
    encoded: bytes
    shape: tuple[int, int, int]  # of the decoded image, as the header tells it
    parameters: list[ViewParameters]
    file: int
    sample: int
    unreadable: list[tuple[int, str]]


class DaliLoader(EpochLoader):
    """Views from DALI; see :func:`densecl_ext.data.build_loader`.

    DALI's operators cannot skip a sample: one file that does not decode fails its whole batch. Most
    such files show it in their header or at their end and never get there. A batch that fails all
    the same is looked through file by file, the culprit is skipped or, where Pillow can read it,
    handed over decoded from then on, and the batch is run again.
    """

    backend = "dali"

    def __init__(self, files: list[Path], *, workers: int, **settings: Any) -> None:
        super().__init__(files, **settings)
        self._threads = max(1, workers)
        self._unreadable: dict[int, str] = {}
        self._through_pillow: set[int] = set()
        self._pipeline: Any = self._build()
        self._pool: ThreadPoolExecutor | None = None

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

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
            batch_size=self.batch_size,
            prefetch_queue_depth=1,
            size=self.size,
            augmentation=self.augmentation,
            layout="HWC" if self.channels_last else "CHW",
            half=self.dtype == torch.float16,
            **self._pipeline_settings(),
        )
        pipeline.build()
        return pipeline

    def _read(self, index: int) -> tuple[bytes, int, int]:
        """Bytes that DALI can decode, and the upright width and height, from the header alone."""
        from PIL import Image

        data = self.files[index].read_bytes()
        if not data:
            raise ValueError("the file is empty")
        with Image.open(io.BytesIO(data)) as header:
            size = None if index in self._through_pillow else _native_size(header, data)
            if size is not None:
                return data, *size
        image = decode_rgb(data)
        portable = b"P6 %d %d 255\n" % image.size
        return portable + image.tobytes(), image.width, image.height

    def _prepare(self, epoch: int, sample: int) -> _Slot:
        unreadable: list[tuple[int, str]] = []
        for index in candidates(self.seed, epoch, sample, len(self.files)):
            if index not in self._unreadable:
                try:
                    encoded, width, height = self._read(index)
                    break
                except MemoryError:
                    raise
                except Exception as error:
                    self._unreadable[index] = reason_of(error)
            unreadable.append((index, self._unreadable[index]))
        else:
            raise ValueError(f"none of the {len(self.files)} image files can be read any more")
        drawn = [
            draw_parameters(
                self.augmentation,
                seed=self.seed,
                epoch=epoch,
                sample=sample,
                view=view,
                width=width,
                height=height,
            )
            for view in (QUERY_VIEW, KEY_VIEW)
        ]
        return _Slot(encoded, (height, width, 3), drawn, index, sample, unreadable)

    def _batches(self, epoch: int, requests: list[list[int]]) -> Iterator[TwoViews]:
        if self._pipeline is None:
            self._pipeline = self._build()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="densecl-read")
        pool = self._pool

        def submit(batch: list[int]) -> list[Future[_Slot]]:
            return [pool.submit(self._prepare, epoch, sample) for sample in batch]

        waiting = iter(requests)
        reading = deque(submit(batch) for batch in islice(waiting, _READ_AHEAD))
        running: deque[list[_Slot]] = deque()

        def start_next() -> None:
            if reading:
                running.append([future.result() for future in reading.popleft()])
                reading.extend(submit(batch) for batch in islice(waiting, 1))
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
                decode_rgb(self.files[slot.file].read_bytes())
                self._through_pillow.add(slot.file)
            except Exception as cause:
                self._unreadable[slot.file] = reason_of(cause)
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
