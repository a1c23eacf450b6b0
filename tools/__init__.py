"""What `make gpu` runs: gpu.py its parts, gpu_checks.py every kernel once."""
