"""The place of this process among the ranks of a run, as torchrun or Slurm's srun tells it by environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from fastbyol.system.limits import available_cores

PORTS = range(20_000, 30_000)  # below those that Linux hands out by itself


class Launch(NamedTuple):
    """The rank of this process and the number of ranks, both also on this machine, and where rank 0 is met.

    local_ranks: those that share this process's cores; srun may give each task its own. meeting: an address for torch's
    rendezvous.
    """

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1
    meeting: str = "env://"


def launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read the variables of torchrun or, without them, those of a step that srun started; else, a single process.

    A batch script is no step of srun, whatever the tasks of its job.
    """
    if "WORLD_SIZE" in environment:
        rank, local = (int(environment.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        return Launch(rank, int(environment["WORLD_SIZE"]), local, int(environment.get("LOCAL_WORLD_SIZE", "1")))
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _srun(environment)
    return Launch()


def _srun(environment: Mapping[str, str]) -> Launch:
    """Place a task of srun; MASTER_ADDR and MASTER_PORT, where they are set, tell where rank 0 is met."""
    rank, ranks = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
    tasks = tasks_of_nodes(environment["SLURM_STEP_TASKS_PER_NODE"])
    host = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
    step = int(environment["SLURM_JOB_ID"]) * 31 + int(environment.get("SLURM_STEP_ID", "0"))
    port = environment.get("MASTER_PORT") or PORTS[step % len(PORTS)]  # another for each step of a machine
    local, node = int(environment["SLURM_LOCALID"]), int(environment["SLURM_NODEID"])
    has_own_cores = available_cores() <= int(environment.get("SLURM_CPUS_PER_TASK", "0"))
    sharing = 1 if has_own_cores else tasks[node]
    return Launch(rank, ranks, local, sharing, f"tcp://{host}:{port}?rank={rank}&world_size={ranks}")


def tasks_of_nodes(text: str) -> list[int]:
    """Read Slurm's list of tasks a node: "2(x3),1" is 2, 2, 2, 1."""
    found: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [int(count)] * int(times or 1)
    return found


def first_host(text: str) -> str:
    """Return the first of Slurm's list of hosts: "a[08-09,12]b[1-2],c" begins with a08b1."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", text)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else text)
