"""Benchmarks of the ops, of data loading and of the training step against what people use today.

`make bench`, or `python -m benchmarks --out DIR`, measures and writes one folder: `results.json`,
`table.md` and the charts. `--suite gpu` and `--suite step` are a GPU's; `make gpu` runs them, and
results/README.md says how to fill the tables.

rows.py                       the one table: what is measured against whom, what is asked of it
cases.py, losses.py, step.py  inputs of one size, and every way to compute the result
run.py, processes.py          the command: rows one by one, in a process that may hang or fault
worker.py, timing.py          what that process does: interleaved rounds, by the device's own clock
loaders.py                    two views of photographs: ours, timm's, lightly's
machine.py, ceiling.cpp       the machine, its arithmetic and copy ceilings
verdicts.py, report.py, charts.py  what people read
"""
