"""Benchmarks of the ops and of data loading against what people use today.

`make bench`, or `python -m benchmarks --out DIR`, measures and writes one folder: `results.json`
(pytest-benchmark's format, with the machine's description), `table.md` and the charts.

On a GPU: `make gpu`, or `python -m benchmarks.gpu`, which needs neither pytest-benchmark nor a
package index. results/README.md says how to fill the tables.

cases.py, loss_cases.py   what is measured: inputs of one size, and every way to compute the result
measure.py, memory.py     how: interleaved rounds; resident-set high-water mark in a process apart
machine.py, ceiling.cpp   where: the machine, its arithmetic and copy ceilings
test_*.py                 the rows; conftest.py runs one
thresholds.py             what is asked of them
report.py, charts.py      what people read
gpu.py                    `make gpu`: its parts
gpu_suites.py, gpu_thresholds.py, gpu_timing.py, gpu_machine.py, gpu_report.py
                          the same for a GPU; gpu_rows.py runs the rows in the process gpu_worker.py
step.py                   the whole training step: `make gpu PART=step`
scale.py, scale_model.py  on paper: images/s, hours and cost of many GPUs (docs/scale.md)
vit_memory.py             peak memory of a vision transformer's step, beside the formula's logits
"""
