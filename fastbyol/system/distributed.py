"""Ranks of a distributed run: the process groups, the rendezvous, and detection of lost ranks."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from fastbyol.errors import ConfigError
from fastbyol.system.launch import Launch, launch

HOST_TIMEOUT = timedelta(days=1)  # rank timeout: hosts wait for rank 0's evaluation; a dead rank is detected at once
DEVICE_TIMEOUT = timedelta(minutes=10)  # rank timeout: devices only wait for steps, of which compilation is longest
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
CLOSE_TIMEOUT_S = 1.0
POLL_S = 0.05


class RankLost(RuntimeError):
    """Another rank has ended, so that this one cannot continue."""


@dataclass(frozen=True)
class World:
    """The rank of this process and the process groups of the run; the default is a single process.

    local_ranks: the ranks on this machine. group: the ranks' devices, for gradients and batch-norm statistics. control:
    their hosts (gloo), for the clock and every decision that must be the same on all ranks. Both groups are None for a
    single process.
    """

    rank: int = 0
    ranks: int = 1
    local_ranks: int = 1
    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Tell whether this is rank 0, which writes, measures and decides."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Sum each value over all ranks; the hosts wait for one another."""
        if self.control is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        totals: list[float] = tensor.tolist()
        return totals

    def from_main(self, value: Any) -> Any:
        """Broadcast rank 0's value; the other ranks wait for it and ignore their own."""
        if self.control is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    @contextmanager
    def detect_lost_ranks(self) -> Iterator[None]:
        """Raise RankLost in place of a collective's error when another rank has ended."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo raises RuntimeError, named by its path
                raise self._rank_lost(error) from error
            raise

    def _rank_lost(self, error: RuntimeError) -> RankLost:
        reason = str(error).partition("\n")[0]
        return RankLost(
            f"rank {self.rank} of {self.ranks} stops because another rank has ended ({reason}); see that rank's error"
        )


def ranks(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks that torchrun or srun started, 1 without them."""
    return launch(environment).ranks


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the rank of this process, 0 without torchrun or srun."""
    return launch(environment).rank


def local_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks that share this machine's cores, 1 without torchrun or srun."""
    return launch(environment).local_ranks


def _rendezvous_prefix(store: Store, rank: int, ranks: int) -> str:
    """Agree on a key prefix with the ranks that are alive now.

    torchrun keeps one store over its restarts, and with it the addresses of ranks that have ended; its own count of
    restarts can differ from machine to machine. So each rank publishes a random word, rank 0 collects the words into a
    roster, and all continue once every rank has found its own word in the same roster.
    """
    word, deadline_s = uuid4().hex, time.monotonic() + RENDEZVOUS_TIMEOUT.total_seconds()
    store.set(f"word-{rank}", word)
    words, seen = [f"word-{n}" for n in range(ranks)], [f"seen-{n}" for n in range(1, ranks)]
    roster = ""
    while time.monotonic() < deadline_s:
        if rank == 0 and store.check(words):
            roster = ",".join(store.get(name).decode() for name in words)
            store.set("roster", roster)
            if store.check(seen) and all(store.get(name).decode() == roster for name in seen):
                store.set("go", roster)
                return roster
        elif rank and store.check(["roster"]):
            roster = store.get("roster").decode()
            if roster.split(",")[rank : rank + 1] == [word]:
                store.set(f"seen-{rank}", roster)
                if store.check(["go"]) and store.get("go").decode() == roster:
                    return roster
        time.sleep(POLL_S)
    raise RankLost(
        f"rank {rank} of {ranks} waited {RENDEZVOUS_TIMEOUT} for the other ranks, which did not start; start them all"
    )


def _close_connections() -> None:
    """Close the ranks' connections, waiting at most CLOSE_TIMEOUT_S: NCCL can hang there, and the deadline must hold.

    Source: pytorch issue 115388 (after captured collectives).
    """
    thread = threading.Thread(target=dist.destroy_process_group, name="close connections", daemon=True)
    thread.start()
    thread.join(CLOSE_TIMEOUT_S)
    if thread.is_alive():
        print(
            f"warning: the run is done, but the ranks' connections did not close within {CLOSE_TIMEOUT_S:g} s and are "
            "left open",
            file=sys.stderr,
        )


def _gpu_of(started: Launch, gpus: int) -> int:
    """Return the number of a rank's GPU among those that it sees; srun may show each task its own alone."""
    if gpus == 1 and started.meeting != "env://":
        return 0
    if started.local_rank >= gpus:
        raise ConfigError(
            f"local rank {started.local_rank} needs a GPU of its own, but this machine has {gpus}; give torchrun "
            "--nproc-per-node, or srun --ntasks-per-node, that number"
        )
    return started.local_rank


@contextmanager
def join_ranks(device: str, environment: Mapping[str, str] = os.environ) -> Iterator[World]:
    """Join the ranks that torchrun or srun started, as the environment tells; without them, yield a single process.

    With device "cuda" each rank uses the GPU of its local rank. Raises ConfigError where the machine has fewer GPUs.
    """
    started = launch(environment)
    if started.ranks == 1:
        yield World()
        return
    if device == "cuda":
        torch.cuda.set_device(_gpu_of(started, torch.cuda.device_count()))
    store, own_rank, world_size = next(rendezvous(started.meeting))
    store = PrefixStore(_rendezvous_prefix(store, own_rank, world_size), store)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=own_rank, world_size=world_size, timeout=DEVICE_TIMEOUT)
    world = World(
        own_rank,
        world_size,
        started.local_ranks,
        dist.group.WORLD,
        dist.new_group(backend="gloo", timeout=HOST_TIMEOUT),
    )
    with world.detect_lost_ranks():
        yield world
    _close_connections()  # not after an error: it could wait for ranks that have ended
