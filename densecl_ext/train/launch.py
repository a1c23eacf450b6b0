"""The processes of a run: today one. Here is where several will begin."""

from __future__ import annotations

import os

import torch
from lightning.fabric import Fabric

# What launchers tell each process: torchrun and Kubernetes, mpirun, srun.
WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def launch(device: torch.device) -> Fabric:
    """Starts the run's processes, before anything else of it exists.

    Fabric knows launchers, ranks and devices. Precision, backward and saving are the project's own:
    crop boxes must stay float32 under bf16, `TrainingStep` runs without Lightning too and as a CUDA
    graph, and a checkpoint is one atomic file that does not depend on how the run was started.

    Raises:
        RuntimeError: a launcher started several processes.
    """
    for name in WORLD_SIZES:
        if int(os.environ.get(name) or 1) > 1:
            raise RuntimeError(
                f"pretrain: started as one of {os.environ[name]} processes ({name}), but a run "
                "uses one process and one device; start it without torchrun, mpirun or srun"
            )
    fabric = Fabric(
        accelerator=device.type, devices=1 if device.type == "cpu" else [device.index or 0]
    )
    fabric.launch()
    return fabric
