"""Laws of plans: progress that never falls and ends at one, and a reserve that follows the pace."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fastbyol.cli.train import main
from fastbyol.train.plan import EXIT_S, LEAVE_S, MARGIN, ClockPlan, Reserve, StepPlan
from tests.conftest import Betons


def test_step_plan_ends_at_exactly_one() -> None:
    plan = StepPlan(7)
    assert plan.advance(0.5, step=7, since_s=0, now_s=99) == 1.0
    assert plan.advance(0.5, step=1, since_s=0, now_s=99) == 1 / 7
    assert not plan.is_over(6, now_s=1e9)
    assert plan.is_over(7, now_s=0)


def test_a_run_of_steps_ends_by_no_clock() -> None:
    plan = StepPlan(7)
    plan.record_step(24, 1e9)
    plan.record_piece("evaluate", 1e9)
    assert plan.end_s == plan.score_until_s == math.inf
    assert not plan.is_over(6, now_s=1e12)


def plan_until(end_s: float) -> ClockPlan:
    return ClockPlan(end_s + EXIT_S, Reserve({}))


def test_undisturbed_progress_is_linear_in_time() -> None:
    plan, progress = plan_until(110), 0.0
    for now_s in range(11, 110):
        progress = plan.advance(progress, step=0, since_s=now_s - 1, now_s=now_s)
        assert progress == pytest.approx((now_s - 10) / 100)
    assert plan.advance(progress, step=0, since_s=109, now_s=110) == 1.0


def test_a_resumed_run_goes_on_where_it_stood_and_ends_in_time() -> None:
    plan = plan_until(100)
    assert plan.advance(0.4, step=0, since_s=50, now_s=75) == pytest.approx(0.7)
    assert plan.advance(0.7, step=0, since_s=75, now_s=100) == 1.0


def test_a_pause_is_made_good() -> None:
    plan = plan_until(100)
    after_pause = plan.advance(0.2, step=0, since_s=20, now_s=80)
    assert after_pause == pytest.approx(0.8)
    assert plan.advance(after_pause, step=0, since_s=80, now_s=200) == 1.0


def test_no_step_begins_that_would_end_late() -> None:
    for step_s, is_over in ((9, False), (11, True)):
        plan = ClockPlan(110 + EXIT_S, Reserve({}, fastest_s={24: step_s}))
        plan.reserve.record_step(24, step_s)
        assert plan.is_over(0, now_s=100) is is_over


def test_steps_in_flight_on_a_gpu_count() -> None:
    plan = ClockPlan(110 + EXIT_S, Reserve({}, fastest_s={24: 4}), in_flight=2)
    plan.reserve.record_step(24, 4)
    assert not plan.is_over(0, now_s=97)
    assert plan.is_over(0, now_s=99)


def test_one_pause_does_not_end_a_run() -> None:
    plan = ClockPlan(110 + EXIT_S, Reserve({}, fastest_s={24: 1}))
    for step_s in (1, 1, 1, 40, 1):
        plan.reserve.record_step(24, step_s)
    assert not plan.is_over(0, now_s=100)


def test_progress_never_falls_however_the_reserve_changes() -> None:
    reserve = Reserve({"evaluate": 10.0}, rehearsed_step=(24, 0.1), fastest_s={24: 0.1})
    plan, progress = ClockPlan(100, reserve), 0.0
    for second in range(100):
        for _ in range(16):
            reserve.record_step(24, 0.1 if second % 20 < 10 else 0.25)
        moved = plan.advance(progress, step=0, since_s=second, now_s=second + 1)
        assert moved >= progress
        progress = moved
    assert progress == 1.0


def reserve_after(step_s: float, *, rehearsed_s: float = 0.1) -> float:
    """Give the reserve for a second of closing work, rehearsed at one pace, after steps at another; 0.1 is the best."""
    reserve = Reserve({"evaluate": 1.0}, rehearsed_step=(24, rehearsed_s), fastest_s={24: 0.1})
    for _ in range(16):
        reserve.record_step(24, step_s)
    return reserve.seconds()


def test_the_reserve_follows_the_pace_both_ways() -> None:
    assert reserve_after(0.1) == pytest.approx(EXIT_S + MARGIN)
    assert reserve_after(0.2) == pytest.approx(2 * (EXIT_S + MARGIN))
    assert reserve_after(0.1, rehearsed_s=0.2) == pytest.approx(EXIT_S + MARGIN / 2)


def test_one_slow_step_changes_no_reserve() -> None:
    reserve = Reserve({"evaluate": 1.0}, rehearsed_step=(24, 0.1), fastest_s={24: 0.1})
    for step_s in (0.1, 0.1, 30.0):
        reserve.record_step(24, step_s)
    assert reserve.seconds() == pytest.approx(EXIT_S + MARGIN)


def test_smaller_views_are_no_better_pace() -> None:
    reserve = Reserve({"evaluate": 1.0}, rehearsed_step=(224, 0.4), fastest_s={224: 0.4})
    for _ in range(16):
        reserve.record_step(128, 0.1)
    assert reserve.seconds() == pytest.approx(EXIT_S + MARGIN)


def test_a_slower_checkpoint_is_reserved_once() -> None:
    reserve = Reserve({"checkpoint": 1.0}, rehearsed_step=(24, 0.1), fastest_s={24: 0.1})
    for step_s in (0.1, 0.2, 0.1):
        for _ in range(16):
            reserve.record_step(24, step_s)
        if step_s == 0.2:
            reserve.record_piece("checkpoint", 6.0)
    assert reserve.closing_s["checkpoint"] == pytest.approx(3.0)


def test_times_of_mere_launches_set_no_pace() -> None:
    """A GPU's host returns at once where its queue is empty: such a step is no measure of the best."""
    reserve = Reserve({"evaluate": 1.0}, rehearsed_step=(224, 0.4), fastest_s={224: 0.4})
    for number in range(160):
        reserve.record_step(224, 0.005 if number % 20 < 2 else 0.4)
    assert reserve.slowdown() == pytest.approx(1.0)


def test_an_undisturbed_score_as_long_as_rehearsed_is_never_given_up() -> None:
    for evaluate_s in (0.0, 0.1, 10.0):
        plan = ClockPlan(100, Reserve({"evaluate": evaluate_s, "report": 0.1, "export": 0.1}))
        assert plan.end_s + 0.1 + evaluate_s < plan.score_until_s
        assert plan.score_until_s + 0.1 + LEAVE_S <= 100


@pytest.mark.parametrize("budget_s", [43.0, 300.0])
def test_what_is_kept_for_hindrance_that_passes_leaves_93_percent_used(budget_s: float) -> None:
    """Hindered to the last step, then alone: the closing work takes what it takes unhindered."""
    for slowdown in (1.0, 2.5, 6.0, 70.0):
        reserve = Reserve(
            {"evaluate": 2.0, "export": 0.1, "report": 0.2}, rehearsed_step=(24, 0.1), fastest_s={24: 0.1}
        )
        for _ in range(16):
            reserve.record_step(24, 0.1 * slowdown)
        plan = ClockPlan(budget_s, reserve)
        last_step_s = plan.end_s - min(reserve.step_s(), 0.3)  # no step as slow as with threads that wait is taken
        assert last_step_s + 2.3 >= 0.93 * budget_s
        assert plan.end_s + EXIT_S + MARGIN * 2.3 <= budget_s + 1e-9


def test_a_rehearsal_that_was_hindered_does_not_raise_what_is_kept() -> None:
    assert reserve_after(0.1, rehearsed_s=0.3) == pytest.approx(EXIT_S + MARGIN / 3)


def test_a_long_budget_keeps_enough_for_a_score_beside_six_others() -> None:
    reserve = Reserve({"evaluate": 2.5}, rehearsed_step=(24, 0.05), fastest_s={24: 0.05})
    for _ in range(16):
        reserve.record_step(24, 0.25)
    plan = ClockPlan(300.0, reserve)
    assert plan.end_s + 5 * 2.5 < plan.score_until_s


@pytest.mark.parametrize(("recipe", "names_others"), [("imagenette_rn18", True), ("cifar10_tiny", False)])
def test_a_budget_that_is_used_up_names_no_step_and_on_a_cpu_its_recipes(
    betons: Betons, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, recipe: str, names_others: bool
) -> None:
    small = f"{recipe}+arch=resnet8+width=0.25+stem=cifar+crop_px=16+eval_px=16+hidden=32+batch_size=8"
    given = [f"--data={betons.train}", f"--out={tmp_path / 'run'}", "--budget=1s", "--device=cpu", "--no-tensorboard"]
    assert main([small, *given]) == 2
    said = capsys.readouterr().err
    assert "leaves no time to train" in said
    assert "a step takes" not in said
    assert ("a recipe for a CPU: " in said) == names_others
