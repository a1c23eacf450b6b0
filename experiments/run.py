"""Pre-trains arms beside each other and measures them; one line of JSON a run, resumable.

    python -m experiments.run --data-root DIR --study NAME --sets photos camvid --arms mocov2 ours
        --seeds 0 1 2 --steps 400 --split val

A run whose line is in RESULTS/NAME.jsonl is left out, so the same command goes on after an
interruption. `--plan FILE` takes many such sets of arguments from a JSON list of objects, in its
order, as one pool of work; what an object does not say, the command line does.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.data import prepared
from experiments.methods import ARMS
from experiments.pool import Pool, Setting
from experiments.training import ALSO, Materials, Run

RESULTS = Path(__file__).resolve().parent / "results"
# An arm that was not tuned itself takes the settings of the arm that it varies.
VARIED = {
    "mocov2_reflect": "mocov2",
    "densecl_paper_reflect": "densecl_paper",
    "densecl_geometric": "densecl_paper",
    "densecl_position": "densecl_paper",
}


def lines(path: Path) -> list[dict[str, Any]]:
    """The results of a study."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def best(tuned: list[dict[str, Any]], set_name: str, arm: str, *, plain: bool) -> tuple[float, str]:
    """Rate and options with the best mean of linear and in-context mIoU on the validation split.

    Candidates are compared on the seeds that all of them have. The arm's own settings where none
    was measured.

    Args:
        tuned: lines of the tuning.
        set_name: of the pre-training.
        arm: or the arm that it varies.
        plain: consider runs with the arm's own options alone.
    """
    arm = VARIED.get(arm, arm)
    scores: dict[tuple[float, str], dict[int, float]] = defaultdict(dict)
    for line in tuned:
        run, numbers = Run(**line["run"]), line["numbers"]
        if (run.set, run.arm, run.split) == (set_name, arm, "val"):
            if plain and run.options != "{}":
                continue
            score = (numbers["segmentation"] + numbers["incontext"]) / 2
            scores[run.lr, run.options][run.seed] = score if math.isfinite(score) else -math.inf
    if not scores:
        return ARMS[arm][2], "{}"
    common = set.intersection(*(set(by_seed) for by_seed in scores.values()))
    means = {
        candidate: fmean(by_seed[seed] for seed in common or by_seed)
        for candidate, by_seed in scores.items()
    }
    return max(means, key=lambda candidate: means[candidate])


def merged(*options: str) -> str:
    """Options of JSON objects together, the later ones first in rank; always the same text."""
    together: dict[str, Any] = {}
    for one in options:
        together |= json.loads(one)
    return json.dumps(together, sort_keys=True) if together else "{}"


def jobs(entries: list[argparse.Namespace], pool: Pool | None = None) -> Iterator[Run]:
    """The runs of the entries in their order, each once, without those that have a line.

    A seed is finished before the next begins, so that an interruption leaves pairs. Selection reads
    its file when the entry's turn comes; without a pool, nothing is selected.
    """
    given: set[str] = set()
    for entry in entries:
        given |= {Run(**line["run"]).key for line in lines(entry.results / f"{entry.study}.jsonl")}
        tuned, plain = None, entry.rate_of is not None
        source = entry.rate_of or entry.select
        for study in filter(None, (source.stem if source else "", entry.start.partition("-")[0])):
            if pool is not None:
                pool.drain(study)
        if source and pool is not None:
            tuned = lines(source)
        every = itertools.product(entry.seeds, entry.steps, entry.sets, entry.arms)
        for seed, steps, set_name, arm in every:
            if arm == "random":
                rates, chosen, steps = [0.0], "{}", 0
            elif tuned is not None:
                rate, chosen = best(tuned, set_name, arm, plain=plain)
                rates = [rate]
            else:
                rates, chosen = entry.lr or [ARMS[arm][2]], "{}"
            for lr, own in itertools.product(rates, entry.options):
                run = Run(
                    entry.study, set_name, arm, seed, steps, lr, entry.split,
                    "{}" if arm == "random" else merged(chosen, own),
                    entry.backbone, entry.output_stride, entry.size, entry.batch,
                    not entry.dilate, entry.views, entry.start, " ".join(sorted(entry.also)),
                )  # fmt: skip
                if run.key not in given:
                    given.add(run.key)
                    yield run


def parsed(arguments: list[str] | None) -> tuple[argparse.Namespace, list[argparse.Namespace]]:
    """The command line, and the entries: those of the plan or the command line itself."""
    parser = argparse.ArgumentParser(prog="python -m experiments.run", description=__doc__)
    add = parser.add_argument
    add("--data-root", type=Path, required=True, help="DATA or PACKED, see experiments.data")
    add("--cache", type=Path, default=Path("build/experiments"))
    add("--results", type=Path, default=RESULTS)
    add("--study", default="try")
    add("--sets", nargs="+", default=["photos"], choices=["photos", "camvid"])
    add("--arms", nargs="+", default=["ours"], choices=["random", *ARMS])
    add("--seeds", nargs="+", type=int, default=[0])
    add("--steps", nargs="+", type=int, default=[400])
    add("--lr", nargs="+", type=float, help="instead of the arm's own")
    add("--options", nargs="+", default=["{}"], help="JSON each, on top of the arm's own")
    add("--split", default="val", choices=["val", "test"])
    add("--backbone", default="resnet18")
    add("--output-stride", type=int, default=8)
    add("--size", type=int, default=64)
    add("--batch", type=int, default=64)
    add("--views", default="{}", help="JSON, on top of MoCo v2's augmentation")
    add("--dilate", action="store_true", help="keep all stages at the output stride")
    add(
        "--start",
        default="",
        help="STUDY-SET-ARM-STEPS whose weights of the same seed to go on from",
    )
    add("--also", nargs="+", default=[], choices=ALSO, help="protocols to measure besides")
    add("--select", type=Path, help="lines of a tuning: its best rate and options for each arm")
    add("--rate-of", type=Path, help="lines of a tuning: its best rate for the arm's own options")
    add("--plan", type=Path)
    add("--device", default="cpu", help="cpu or cuda")
    add("--no-graph", action="store_true", help="on a GPU, launch every kernel of every step")
    add("--processes", type=int, default=1)
    add("--threads", type=int, default=1, help="of each process")
    add("--seconds", type=float, help="start no run later than this")
    given = parser.parse_args(arguments)
    entries = json.loads(given.plan.read_text()) if given.plan else [{}]
    known = vars(given)
    for entry in entries:
        if unknown := entry.keys() - known.keys():
            parser.error(f"{given.plan}: unknown {', '.join(sorted(unknown))}")
        for name in ("select", "rate_of"):  # of a plan: by name, among the results
            if name in entry:
                entry[name] = given.results / entry[name]
        if "views" in entry:
            entry["views"] = json.dumps(entry["views"])
        if "options" in entry:
            entry["options"] = [json.dumps(one) for one in entry["options"]]
    return given, [argparse.Namespace(**{**known, **entry}) for entry in entries]


def main(arguments: list[str] | None = None) -> int:
    begun = time.monotonic()
    given, entries = parsed(arguments)
    cache = given.cache.resolve()
    given.results.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    expected = list(jobs(entries))
    sets = {(run.set, run.size) for run in expected}
    root = prepared(given.data_root.resolve(), cache, sets)
    setting = Setting(given.device, given.threads, not given.no_graph)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        share = functools.partial(Materials, root, cache, Path(folder))
        pool = Pool(
            min(given.processes, max(1, len(expected))), share(), setting, given.results,
            given.seconds, begun,
        )  # fmt: skip
        try:
            share(workers=8).prepare(expected)
            print(f"{len(expected)} runs, ready after {time.monotonic() - begun:.1f} s", flush=True)
            pool.run(jobs(entries, pool))
        finally:
            pool.close()
    seconds = time.monotonic() - begun
    print(f"{pool.finished} runs finished, {pool.failed} failed, {seconds:.0f} s", flush=True)
    return 1 if pool.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
