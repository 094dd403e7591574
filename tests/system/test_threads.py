"""Laws of the number of threads: the fastest is found, changes are followed, trials cost little, a pin is a pin."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastbyol.system.threads import NO_TUNING, ThreadTuner, candidates, make_tuner

ALONE, BESIDE_ONE = {1: 0.1, 2: 0.055}, {1: 0.1, 2: 2.7}  # seconds of a step of the demo recipe on two cores


class Machine:
    """Cores with a clock that work moves; `pace` gives the seconds of a unit by the number of threads.

    others: the cores that other programs keep busy.
    """

    def __init__(self, pace: dict[int, float], *, others: float = 0.0, cores: int = 2) -> None:
        self.pace, self.others, self.now_s, self.others_s, self.number = pace, others, 1.0, 0.0, cores
        self.used: set[int] = set()
        self.said: list[str] = []
        self.threads = ThreadTuner(
            tuple(range(1, cores + 1)),
            notify=self.said.append,
            clock=lambda: self.now_s,
            set_threads=self.use,
            other_cpu_s=lambda: self.others_s,
            cores=cores,
        )

    def use(self, number: int) -> None:
        self.number = number

    def work(self, seconds: float) -> int:
        """Work for so long; return the units done."""
        until_s, units = self.now_s + seconds, 0
        while self.now_s < until_s:
            with self.threads.unit("step"):
                self.used.add(self.number)
                took_s = self.pace[self.number]
                self.now_s += took_s
                self.others_s += self.others * took_s
            units += 1
        return units


@pytest.mark.parametrize(
    ("cores", "others", "used"),
    [
        (2, 0.0, {1, 2}),
        (2, 0.3, {1, 2}),
        (2, 0.5, {1}),
        (2, 1.9, {1}),
        (4, 0.3, {1, 2, 3, 4}),
        (4, 1.0, {1, 2, 3}),
        (4, 2.5, {1}),
    ],
)
def test_more_threads_than_other_programs_leave_cores_are_not_tried(cores: int, others: float, used: set[int]) -> None:
    """Not once: beside one busy process a unit with all threads may take 70 times as long."""
    machine = Machine(dict.fromkeys(range(1, cores + 1), 0.2), others=others, cores=cores)
    machine.work(100.0)  # the first trials, and those for the time that passed
    assert machine.used == used
    said = f"other programs leave {cores - others:.1f} cores idle: at most {max(used)} of {cores} threads compute"
    assert [line.startswith(said) for line in machine.said] == [True] * (len(used) < cores)


@pytest.mark.parametrize("pace", [ALONE, BESIDE_ONE])
def test_the_default_is_near_the_better_of_one_and_all(pace: dict[int, float]) -> None:
    machine = Machine(pace)
    assert machine.work(40.0) >= 0.8 * 40.0 / min(pace.values())


def test_a_program_that_comes_costs_a_few_steps_and_is_named_once() -> None:
    machine = Machine(ALONE)
    machine.work(20.0)
    assert not machine.said
    machine.pace, machine.others = BESIDE_ONE, 1.0
    assert machine.work(60.0) >= 0.8 * 60.0 / 0.1
    assert len(machine.said) == 1
    assert "1 of 2 threads" in machine.said[0]


def test_a_program_that_comes_slows_one_unit_alone() -> None:
    machine = Machine(ALONE)
    machine.work(20.0)
    machine.pace, machine.others = BESIDE_ONE, 1.0
    assert machine.work(4.0) >= (4.0 - BESIDE_ONE[2]) / BESIDE_ONE[1]


@pytest.mark.parametrize("loops", [1, 2])
def test_threads_for_which_no_core_is_idle_are_not_tried_first(loops: int) -> None:
    machine = Machine(BESIDE_ONE, others=loops)
    with machine.threads.unit("step"):  # cold: with all threads
        machine.now_s, machine.others_s = machine.now_s + BESIDE_ONE[2], machine.others_s + loops * BESIDE_ONE[2]
    assert machine.work(4.0) == pytest.approx(4.0 / BESIDE_ONE[1], abs=1.0)
    assert machine.said == [
        f"other programs leave {2 - loops}.0 cores idle: at most 1 of 2 threads compute for now; the number follows "
        "the measured pace, and --threads fixes it"
    ]


def test_cores_that_become_idle_are_used_again() -> None:
    machine = Machine(BESIDE_ONE, others=1.0)
    machine.work(20.0)
    assert machine.number == 1
    machine.pace, machine.others = ALONE, 0.0
    machine.work(100.0)
    assert machine.number == 2
    assert machine.work(20.0) >= 0.9 * 20.0 / 0.055


def test_trials_cost_a_few_percent_while_nothing_changes() -> None:
    machine = Machine(BESIDE_ONE, others=1.0)
    machine.work(10.0)
    assert machine.work(1000.0) >= 0.95 * 1000.0 / 0.1


def test_loops_are_paced_as_blocks_are() -> None:
    machine = Machine(BESIDE_ONE)

    def items() -> list[int]:
        return list(range(50))

    for _ in machine.threads.units(items(), "loop"):
        machine.now_s += machine.pace[machine.number]
    assert machine.number == 1


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_nothing_is_tried_where_the_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(asked: int | None, device: str) -> tuple[int, ...]:
        return make_tuner(asked, device).numbers

    assert settings(1, "cpu") == (1,)
    assert settings(2, "cpu") == (2,)
    torch.set_num_threads(2)
    assert settings(None, "cpu") == (2,)  # OMP_NUM_THREADS is set for these tests
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert len(settings(None, "cuda")) == 1
    assert len(make_tuner(None, "cpu", processes=2).numbers) == 1
    settings(2, "cpu")
    for threads in (NO_TUNING, ThreadTuner((2,))):
        with threads.unit("step"):
            pass
        assert threads.is_settled("step")


@pytest.mark.parametrize(("limit", "numbers"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (16, (1, 2, 4, 8, 15, 16))])
def test_candidates_hold_one_all_and_one_left_to_others(limit: int, numbers: tuple[int, ...]) -> None:
    assert candidates(limit) == numbers
