"""Laws of who starts ranks: torchrun's variables rule, then those of a step of srun; a batch script is one process."""

from __future__ import annotations

import pytest

from fastbyol.errors import ConfigError
from fastbyol.system.distributed import _gpu_of
from fastbyol.system.launch import Launch, first_host, launch, tasks_of_nodes

STEP = {  # of eight tasks on three machines, as its sixth task sees it
    "SLURM_JOB_ID": "412",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),2",
    "SLURM_STEP_NODELIST": "gpu[08-09,12]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
}


def test_a_process_alone_is_rank_zero_of_one() -> None:
    assert launch({}) == Launch(0, 1, 0, 1)


def test_a_batch_script_is_one_process() -> None:
    assert launch({"SLURM_JOB_ID": "412", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}).ranks == 1


def test_torchruns_variables_rule() -> None:
    started = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert launch({**STEP, **started}) == Launch(3, 4, 1, 2, "env://")


def test_a_step_of_srun_places_its_tasks() -> None:
    place = launch(STEP)
    assert place[:4] == (5, 8, 2, 3)
    assert place.meeting.startswith("tcp://gpu08:2")
    assert place.meeting.endswith("?rank=5&world_size=8")
    assert launch({**STEP, "SLURM_PROCID": "0"}).meeting.partition("?")[0] == place.meeting.partition("?")[0]
    assert launch({**STEP, "SLURM_STEP_ID": "2"}).meeting != place.meeting
    met = launch({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}).meeting
    assert met.startswith("tcp://10.0.0.1:29500?")
    assert launch({**STEP, "SLURM_CPUS_PER_TASK": "99999"}).local_ranks == 1  # this task's own cores


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("gpu[08-09,12]", "gpu08"),
        ("rack[1,3]-n[004-010],login", "rack1-n004"),
        ("a.b.example,c", "a.b.example"),
    ],
)
def test_the_first_host_of_slurms_lists(text: str, host: str) -> None:
    assert first_host(text) == host


def test_tasks_of_nodes_of_slurms_lists() -> None:
    assert tasks_of_nodes("2(x3),1") == [2, 2, 2, 1]
    assert tasks_of_nodes("8") == [8]


def test_a_task_that_sees_one_gpu_takes_it() -> None:
    place = launch(STEP)
    assert _gpu_of(place, 1) == 0
    assert _gpu_of(place, 4) == 2
    with pytest.raises(ConfigError, match="local rank 2 needs a GPU of its own, but this machine has 2"):
        _gpu_of(place, 2)
    with pytest.raises(ConfigError, match="--nproc-per-node"):
        _gpu_of(Launch(1, 2, 1, 2), 1)
