"""What the project claims about learning, measured: arms, sets and seeds beside each other.

Not part of the package. `python -m experiments.run --help` measures, `python -m experiments.report`
writes the tables of docs/evidence.md from experiments/results/.
"""
