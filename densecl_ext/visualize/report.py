"""A run as one HTML file: recipe, curves, health, probes, pictures; opens without a network."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densecl_ext.visualize.losses import CURVES, plot_losses, read_metrics, save, smooth

if TYPE_CHECKING:
    from torch import nn

PROBE_MARK = "/"
"""A column with it belongs to a probe: `segmentation/miou`."""

POSITION_LIMIT = 0.5
_POSITION = ("position_share", "dense_position_share", "head_position_share")


@dataclasses.dataclass
class Table:
    """Rows of cells, with lines below."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: Sequence[str] = ()


@dataclasses.dataclass
class Picture:
    """A PNG as base64, with its caption."""

    data: str
    caption: str


@dataclasses.dataclass
class Section:
    """A heading with what stands below it."""

    title: str
    text: str = ""
    tables: list[Table] = dataclasses.field(default_factory=list)
    pictures: list[Picture] = dataclasses.field(default_factory=list)


def write_report(
    run: str | os.PathLike[str],
    html: str | os.PathLike[str],
    *,
    backbone: nn.Module | None = None,
    images: Sequence[str | os.PathLike[str]] = (),
    title: str = "",
) -> Path:
    """Write a run's report: one HTML file with everything inlined.

    What the folder holds is what the report shows: config.yaml, metrics.csv, other CSV files with a
    column ``step`` (a column with "/" is a probe's), evaluate/*.json as `densecl evaluate --output`
    writes them, and PNG files.

    Args:
        run: the run's folder.
        html: the file to write; its folder is made.
        backbone: (N, 3, H, W) to (N, C, h, w): also draws its features and matches on ``images``.
        images: files for these pictures.
        title: of the page; the folder's name where empty.

    Returns:
        The file's path.

    Raises:
        FileNotFoundError: the folder has no metrics.csv.
        ValueError: metrics.csv has no row, or an image does not decode.
        ImportError: matplotlib or jinja2 is not installed (torch brings jinja2).
    """
    import jinja2

    from densecl_ext.checkpoints.storage import atomic_file

    run, html = Path(run), Path(html)
    columns = read_metrics(run / "metrics.csv")
    sections = [_curves(run, columns), _health(columns), _probes(run, columns), _evaluated(run)]
    sections += [_pictures(run, backbone, images), _recipe(run)]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(
        Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(
        title=title or run.resolve().name,
        summary=_summary(columns),
        warnings=_warnings(run, columns),
        sections=[section for section in sections if section is not None],
    )
    html.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(html) as file:
        file.write(page.encode())
    return html


def _summary(columns: Mapping[str, list[float]]) -> str:
    told = [f"{columns['step'][-1]:g} steps"]
    if "epoch" in columns:
        told.append(f"{columns['epoch'][-1]:g} epochs")
    for name in ("loss", "loss_global", "loss_dense"):
        last = _last(columns.get(name, []))
        if not math.isnan(last):
            told.append(f"{name.replace('_', ' ')} {last:.3f}")
    return "Pre-training: " + ", ".join(told) + " at the last log row."


def _warnings(run: Path, columns: Mapping[str, list[float]]) -> list[str]:
    out = []
    if math.isnan(_last(columns.get("loss", [0.0]))):
        out.append("The loss has no finite value.")
    shares = {name: _last(values) for name, values in columns.items()}
    for file, reports in _evaluations(run).items():
        for report in reports.values():
            shares |= {f"{file}: {name}": report.get(name) or 0.0 for name in _POSITION}
    for name, share in shares.items():
        if name.replace(": ", PROBE_MARK).rpartition(PROBE_MARK)[2] not in _POSITION:
            continue
        if share > POSITION_LIMIT:
            out.append(
                f"{name} is {share:.2f}: the features tell where in the view, not what is there. "
                "Geometric matching with single-position negatives avoids it."
            )
    return out


def _curves(run: Path, columns: Mapping[str, list[float]]) -> Section | None:
    if not any(name in columns for name, *_ in CURVES):
        return None
    with tempfile.TemporaryDirectory() as folder:
        png = plot_losses(run / "metrics.csv", Path(folder) / "losses.png", title="Loss")
        return Section("Loss", pictures=[_inline(png, "thin: as logged; thick: moving average")])


def _health(columns: Mapping[str, list[float]]) -> Section | None:
    known = {"step", "epoch", *(name for name, *_ in CURVES)}
    names = [name for name in columns if name not in known and PROBE_MARK not in name]
    return _small_curves("Health and speed", columns, names)


def _probes(run: Path, columns: Mapping[str, list[float]]) -> Section | None:
    sources = [columns]
    for path in sorted(run.glob("*.csv")):
        if path.name != "metrics.csv":
            try:
                sources.append(read_metrics(path))
            except (ValueError, OSError):
                continue  # some other table that a person keeps here
    merged: Section | None = None
    for source in sources:
        names = [
            name
            for name in source
            if PROBE_MARK in name or (source is not columns and name not in ("step", "epoch"))
        ]
        section = _small_curves("Probes", source, names, marks=True)
        if section and merged:
            merged.tables += section.tables
            merged.pictures += section.pictures
        merged = merged or section
    return merged


def _small_curves(
    title: str, columns: Mapping[str, list[float]], names: Sequence[str], marks: bool = False
) -> Section | None:
    """A small plot a column, and a table of first, best and last values."""
    names = [name for name in names if any(math.isfinite(v) for v in columns[name])]
    if not names:
        return None
    from matplotlib.figure import Figure

    across = min(3, len(names))
    down = -(-len(names) // across)
    figure = Figure(figsize=(3.3 * across, 1.75 * down + 0.2), dpi=110, layout="constrained")
    rows = []
    for index, name in enumerate(names):
        points = [
            (s, v) for s, v in zip(columns["step"], columns[name], strict=True) if math.isfinite(v)
        ]
        steps, values = [s for s, _ in points], [v for _, v in points]
        axes = figure.add_subplot(down, across, index + 1)
        axes.plot(steps, values, color="#1a73e8", linewidth=1.0, alpha=1.0 if marks else 0.3)
        if marks:
            axes.scatter(steps, values, s=12, color="#1a73e8")
        else:
            axes.plot(steps, smooth(values), color="#1a73e8", linewidth=1.4)
        axes.set_title(name, fontsize=8.5, loc="left")
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        rows.append(
            [name, *(f"{v:.4g}" for v in (values[0], min(values), max(values), values[-1]))]
        )
    with tempfile.TemporaryDirectory() as folder:
        picture = _inline(save(figure, Path(folder) / "curves.png"), "over the steps")
    table = Table(["", "first", "least", "largest", "last"], rows)
    return Section(title, tables=[table], pictures=[picture])


def _evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """Name of each evaluate/*.json -> network -> its report."""
    out = {}
    for path in sorted((run / "evaluate").glob("*.json")):
        try:
            told = list(json.loads(path.read_text(encoding="utf-8")).items())
        except (ValueError, AttributeError):
            continue  # not what `densecl evaluate` wrote
        reports = {name: one for name, one in told if isinstance(one, dict) and "line" in one}
        if reports:
            out[path.stem] = reports
    return out


def _evaluated(run: Path) -> Section | None:
    tables = [_report_table(name, reports) for name, reports in _evaluations(run).items()]
    return Section("Evaluation", tables=tables) if tables else None


def _report_table(name: str, reports: Mapping[str, Mapping[str, Any]]) -> Table:
    numbers: dict[str, dict[str, Any]] = {}
    for title, report in reports.items():
        for key, value in report.items():
            if key != "seconds" and (value is None or isinstance(value, (int, float))):
                numbers.setdefault(key, {})[title] = value
    rows = [
        [key, *(_percent(values.get(title)) for title in reports)]
        for key, values in numbers.items()
    ]
    lines = list(dict.fromkeys(str(report["line"]) for report in reports.values()))
    return Table([f"{name}, %", *reports], rows, lines)


def _pictures(
    run: Path, backbone: nn.Module | None, images: Sequence[str | os.PathLike[str]]
) -> Section | None:
    pictures = []
    if backbone is not None and images:
        from densecl_ext.visualize.features import plot_features
        from densecl_ext.visualize.matches import plot_matches
        from densecl_ext.visualize.pairs import plot_pair_matches

        with tempfile.TemporaryDirectory() as folder:
            png = Path(folder) / "picture.png"
            plot_features(backbone, images[:6], png)
            pictures.append(_inline(png, "Features as colours: equal colours are similar features"))
            plot_matches(backbone, images[:4], png, threshold=0.0)
            pictures.append(_inline(png, "Two views of an image: green matches are right"))
            if len(images) > 1:
                plot_pair_matches(backbone, images[:3], png)
                pictures.append(_inline(png, "Matches between different images"))
    found = [*run.glob("*.png"), *run.glob("pictures/*.png"), *run.glob("evaluate/*.png")]
    pictures += [_inline(path, str(path.relative_to(run))) for path in sorted(found)]
    return Section("Pictures", pictures=pictures) if pictures else None


def _recipe(run: Path) -> Section | None:
    config = run / "config.yaml"
    if not config.is_file():
        return None
    import yaml

    content = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    rows = [[str(key), str(value)] for key, value in content.items()]
    return Section(
        "Recipe", "config.yaml: it repeats this run.", [Table(["option", "value"], rows)]
    )


def _inline(png: Path, caption: str) -> Picture:
    return Picture(base64.b64encode(png.read_bytes()).decode("ascii"), caption)


def _last(values: Sequence[float]) -> float:
    return next((value for value in reversed(values) if math.isfinite(value)), math.nan)


def _percent(value: Any) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
