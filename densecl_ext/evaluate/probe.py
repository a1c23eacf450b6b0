"""Cheap protocols inside a training run: `Probe(options).run(backbone)` every n epochs."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from densecl_ext.evaluate.correspondence import CorrespondenceOptions, Views, correspondence
from densecl_ext.evaluate.dense import DenseData, DenseProtocol, evaluate_dense
from densecl_ext.evaluate.incontext import InContext, InContextOptions
from densecl_ext.evaluate.options import PixelOptions, require_at_least
from densecl_ext.evaluate.report import Report
from densecl_ext.evaluate.segmentation import Linear, SegmentationOptions

PROBES = ("segmentation", "incontext", "correspondence")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeOptions(PixelOptions):
    """Linear and in-context segmentation and correspondence, sized for a training run.

    Attributes:
        probes: which of segmentation, incontext, correspondence.
        photos: folder of images for correspondence; empty takes the images of data.
        limit: use at most this many images of each split, evenly spread; 0 uses all.
        rows: grid positions to learn from, drawn at random from the training images.
        bank: size of the in-context memory bank.
        recalibrate: number of training images that give every batch norm new statistics first; 0
            keeps the network's own. The network itself stays as it was.
        view_size: side of the correspondence's views in pixels.
    """

    probes: tuple[str, ...] = PROBES
    photos: str = ""
    limit: int = 128
    rows: int = 20_000
    bank: int = 8_192
    recalibrate: int = 64
    view_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "rows", "bank", "view_size")
        wrong = [name for name in self.probes if name not in PROBES]
        if wrong or not self.probes:
            raise ValueError(
                f"ProbeOptions: probes must be some of {', '.join(PROBES)}, got {self.probes}"
            )


class Probe:
    """Measures a network in the middle of its training, and leaves no trace.

    Images are read, resized and cut into views once. Training modes, batch-norm statistics, weights
    and the state of torch's random number generators (CPU and every GPU) are given back exactly as
    they were, so that a run with probes trains as one without.

    Args:
        options: what to measure, on what.

    Attributes:
        reports: the last run's reports by protocol.

    Raises:
        ValueError: data or options that do not fit.
    """

    def __init__(self, options: ProbeOptions) -> None:
        self.options = options
        self.reports: dict[str, Report] = {}
        shared = {
            field.name: getattr(options, field.name) for field in dataclasses.fields(PixelOptions)
        }
        self._protocols: list[DenseProtocol] = []
        if "segmentation" in options.probes:
            linear = SegmentationOptions(**shared, rows=options.rows, solver="lbfgs")
            self._protocols.append(Linear(linear))
        if "incontext" in options.probes:
            near = InContextOptions(**shared, rows=options.rows, bank=options.bank)
            self._protocols.append(InContext(near))
        self._data = DenseData.load(self._protocols[0].options) if self._protocols else None
        self._crops: CorrespondenceOptions | None = None
        self._views: Views | None = None
        if "correspondence" in options.probes:
            self._crops = CorrespondenceOptions(
                data=options.photos or f"{options.data}/images", images=options.limit or 128,
                view_size=options.view_size, layers=options.layers, seed=options.seed,
                recalibrate=options.recalibrate, precision=options.precision,
                batch_size=options.batch_size,
            )  # fmt: skip
            self._views = Views.load(self._crops)

    def run(self, backbone: nn.Module, dense_head: nn.Module | None = None) -> dict[str, float]:
        """Measure a network.

        Args:
            backbone: (N, 3, H, W) to (N, C, h, w), on the device where everything is computed.
            dense_head: (N, C, h, w) to (N, D, h', w'), for correspondence; None leaves it out.

        Returns:
            ``PROTOCOL/NUMBER`` -> value, such as ``segmentation/miou``, the same names each time.
        """
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=devices):
            self.reports = {}
            if self._data is not None:
                self.reports |= evaluate_dense(backbone, self._data, self._protocols)
            if self._crops is not None:
                self.reports["correspondence"] = correspondence(
                    backbone, self._crops, dense_head=dense_head, views=self._views
                )
        return {
            f"{protocol}/{name}": value
            for protocol, report in self.reports.items()
            for name, value in report.numbers.items()
        }

    def lines(self) -> list[str]:
        """The protocol lines of the last run."""
        return [report.line for report in self.reports.values()]
