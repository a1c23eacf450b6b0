"""Benchmarks of the ops and of data loading against what people use today.

`make bench`, or `python -m benchmarks --out DIR`, measures and writes one folder: `results.json`
(pytest-benchmark's format, with the machine's description), `table.md` and the charts.

cases.py, loss_cases.py   what is measured: inputs of one size, and every way to compute the result
measure.py, memory.py     how: interleaved rounds; resident-set high-water mark in a process apart
machine.py, ceiling.cpp   where: the machine, its arithmetic and copy ceilings
test_*.py                 the rows; conftest.py runs one
thresholds.py             what is asked of them
report.py, charts.py      what people read

scale.py, scale_model.py  on paper: images/s, hours and cost of many GPUs (docs/scale.md)
vit_memory.py             peak memory of a vision transformer's step, beside the formula's logits
"""
