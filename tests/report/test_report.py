"""Laws of the report: one page that needs nothing, whole for whatever a run left, true to its rows."""

from __future__ import annotations

import html
import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastbyol import report
from fastbyol.beton import Reader
from fastbyol.config import Config, CropRamp
from fastbyol.evaluate.neighbours import Neighbours
from fastbyol.recipe import TARGETS
from fastbyol.recipes import named
from fastbyol.report import chart, curves, pictures, settings, timeline
from fastbyol.storage.run_folder import RunFolder
from fastbyol.train import run
from tests.conftest import Betons

RESULT = {"images_per_s": 812.0, "epochs": 9.5, "train_s": 50.0, "knn_top1": 81.25, "knn_top1_random_init": 40.5}
PLAN = {
    "budget_s": 70.0,
    "startup_s": 5.0,
    "rehearsal_s": 3.0,
    "calibration_s": 0.0,
    "epochs_that_fit": 87.0,
    "step_s": 0.25,
    "reserve_s": 8.0,
    "closing_s": {"checkpoint": 0.5, "export": 0.25, "evaluate": 3.0, "report": 1.5, "result": 0.1, "recalibrate": 0.0},
    "base_lr": 0.45,
    "tau_base": 0.97,
}
VOID = {"meta", "img", "line", "circle", "path", "polygon"}  # have no end


class Parts(NamedTuple):
    """The files of a report."""

    config: Config
    train: Reader
    val: Reader
    path: Path


@pytest.fixture
def parts(betons: Betons, tmp_path: Path) -> Iterator[Parts]:
    config = Config(recipe=named("demo"), data=str(betons.train), val=str(betons.val), budget_s=70.0)
    with Reader(betons.train) as train, Reader(betons.val) as val:
        yield Parts(config, train, val, tmp_path / "report.html")


def row(number: int, **more: Any) -> dict[str, Any]:
    """Make a row that has everything."""
    numbers = dict.fromkeys(report.SERIES, 0.5)
    return {
        "step": number,
        "epoch": 0.1 * number,
        "progress": 0.01 * number,
        **numbers,
        "elapsed_s": 8.0 + number,
    } | more


def page(parts: Parts, rows: list[dict[str, Any]], result: dict[str, Any] | None = None, **more: Any) -> str:
    """Write a report, check that it is one well-formed page that loads nothing, and return it."""
    report.write(parts.path, parts.config, train=parts.train, rows=rows, result=result, **more)
    text = parts.path.read_text()
    assert not re.search(r"src=.?http|<script|<link|@import|url\(", text)
    assert '<meta name="viewport" content="width=device-width' in text
    assert ":root {" in text
    assert all(re.search(r'alt="[^"]+"', tag) for tag in re.findall(r"<img[^>]*>", text))
    assert all(re.search(r'aria-label="[^"]+"', tag) for tag in re.findall(r"<svg[^>]*>", text))
    assert "None" not in re.sub(r"base64,[^\"]*", "", text)
    assert not any(re.search(r"\b(nan|inf)\b", drawn) for drawn in re.findall(r"<svg.*?</svg>|style=\"[^\"]*", text))
    nesting = Nesting()
    nesting.feed(text)
    nesting.close()
    return text


class Nesting(HTMLParser):
    """A parser that fails on a tag that another's end closes, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def close(self) -> None:
        super().close()
        assert not self.open


def names(text: str) -> list[str]:
    """Return the names of the charts of a page."""
    return [html.unescape(name) for name in re.findall(r'<figure class="chart">\s*<figcaption><span>([^<]*)<', text)]


def test_a_whole_run_shows_everything(parts: Parts) -> None:
    near = [Neighbours(3, (1, 2, 5), (0.9, 0.8, 0.7)), Neighbours(0, (7, 8, 9), (0.9, 0.8, 0.7))]
    rows = [row(n, crop_px=16 + n // 10, mfu=0.4, peak_gib=1.5) for n in range(1, 51)]
    result = {**RESULT, "elapsed_s": 66.0}
    text = page(parts, rows, result, scored=(parts.train, parts.val), neighbours=near, plan=PLAN)
    assert names(text) == [
        "Loss",
        "Learning rate",
        "Target rate τ",
        "View size",
        "Embedding std",
        "Images per second",
        "Waiting for images",
        "GPU utilisation",
        "Where the loop's time goes",
    ]
    for said in (
        "81.2 %",
        "40.5 %",
        "4.0 s",
        "before the deadline",
        "epochs that fit</td><td>87",
        "1.50 GiB",
        "First view",
        "the evaluation</td><td>3 s",
    ):
        assert said.lower() in text.lower()
    assert text.count('<div class="neighbours">') == 2
    assert len(re.findall('<figure class="(same|other)"', text)) == 6
    assert text.count("<img") == 3 * 10 + 2 * 4


def test_a_neighbours_mark_is_whether_its_class_is_the_querys(parts: Parts) -> None:
    assert parts.train.labels is not None
    assert parts.val.labels is not None
    wanted = parts.val.labels[0]
    same = next(n for n, label in enumerate(parts.train.labels) if label == wanted)
    other = next(n for n, label in enumerate(parts.train.labels) if label != wanted)
    text = page(parts, [], scored=(parts.train, parts.val), neighbours=[Neighbours(0, (other, same), (0.9, 0.8))])
    assert re.findall(r'<figure class="(\w+)" title', text) == ["query", "other", "same"]


def test_a_run_without_labels_shows_measures_and_neighbours(parts: Parts) -> None:
    first = {"rankme": 12.0, "effective_rank": 30.0, "alignment": 0.25, "uniformity": -0.5}
    near = [Neighbours(3, (1, 2), (0.91, 0.85))]
    rows = [row(1), row(2, rankme=20.0), row(3, rankme=40.0, progress=1.0)]
    result = {**RESULT, "knn_top1": None, "quality_random_init": first, "quality": {**first, "rankme": 40.0}}
    measures = {"random init": first, "trained": {"rankme": 40.0}}
    files = (parts.train, parts.train)
    text = page(parts, rows, result, scored=files, neighbours=near, measures=measures)
    assert "<td>RankMe</td><td>12</td><td>40</td>" in text
    assert "<td>effective rank</td><td>30</td><td>-</td>" in text
    assert "RankMe 40, 12 at the start" in text
    assert "RankMe, from 12 to 40" in text
    assert "Alignment" not in names(text)
    assert re.findall(r'<figure class="(\w+)" title', text) == ["query", "plain", "plain"]
    assert "<figcaption>0.91</figcaption>" in text


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row(1)],
        [row(1), row(2)],
        [{"step": 20, "elapsed_s": 3.0}],
        [{"step": 20}],
        [row(1, loss=math.nan), row(2), row(3, loss=math.inf, interval_s=0.0)],
        [row(n, elapsed_s=5.0) for n in range(4)],
    ],
    ids=["no row", "one", "two", "bare", "timeless", "not finite", "no time passed"],
)
@pytest.mark.parametrize(
    ("result", "plan"),
    [
        (None, None),
        (None, PLAN),
        ({}, {}),
        (RESULT, {"budget_s": 70.0}),
        ({**RESULT, "knn_top1": None, "knn_top1_random_init": None}, PLAN),
    ],
    ids=["unfinished", "unfinished, planned", "empty", "no reserve", "no score"],
)
def test_whatever_is_missing_is_left_out(
    parts: Parts, rows: list[dict[str, Any]], result: dict[str, Any] | None, plan: dict[str, Any] | None
) -> None:
    text = page(parts, rows, result, plan=plan)
    assert ("This run has not finished" in text) == (result is None)


@pytest.mark.parametrize("target", TARGETS)
def test_the_rate_of_the_target_is_shown_where_one_moves(target: str, parts: Parts) -> None:
    config = replace(parts.config, recipe=named(f"demo+target={target}"))
    text = page(parts._replace(config=config), [row(1), row(2)], RESULT, plan=PLAN)
    assert "epochs that fit" in text
    assert ("τ" in text) == ("Target rate τ" in names(text)) == (target == "ema")


def test_rows_of_older_runs_show_their_waiting(parts: Parts) -> None:
    old = [{key: value for key, value in row(n).items() if key not in ("loader_wait_share", "crop_px")} for n in (1, 2)]
    text = page(parts, [{**r, "interval_s": 2.0} for r in old])
    assert "Waiting for images, from 25 to 25 %" in text
    assert "View size" not in names(text)


def test_events_are_told_with_their_time(parts: Parts) -> None:
    rows = [row(1), row(2, skipped_steps=1), row(3, skipped_steps=4, warnings=["half <b>lost</b>"])]
    text = page(parts, rows)
    assert "4 steps skipped for inf or NaN, the first by step 2" in text
    assert "<span>11.0 s</span>half &lt;b&gt;lost&lt;/b&gt;" in text
    assert "no warnings" not in text
    assert "no warnings" in page(parts, [row(1)])


def test_the_plan_and_what_happened_add_up_to_the_budget() -> None:
    rows = [{"step": 1, "elapsed_s": 58.5}]
    plan, actual = timeline.plan_timeline(PLAN), timeline.actual_timeline(rows, {**RESULT, "elapsed_s": 66.0}, PLAN)
    assert plan is not None
    assert plan.seconds == {"start-up": 5.0, "rehearsal": 3.0, "calibration": 0.0, "training": 54.0, "closing": 8.0}
    assert actual is not None
    assert actual.seconds == {"start-up": 5.5, "rehearsal": 3.0, "calibration": 0.0, "training": 50.0, "closing": 7.5}
    assert actual.unused_s == 4.0
    assert plan.total_s == actual.total_s == 70.0


@pytest.mark.slow
def test_the_plan_of_a_real_run_is_shown_whole(betons: Betons, tmp_path: Path) -> None:
    recipe = replace(named("demo+hidden=16+out=8"), batch_size=32)
    folder = RunFolder(tmp_path / "run")
    config = Config(recipe, str(betons.train), str(betons.val), budget_s=10, workers=1, tensorboard=False)
    result = run(config, folder.path)
    assert result is not None
    plan = result["plan"]
    assert plan.keys() == PLAN.keys()
    assert plan["closing_s"].keys() == report.CLOSING.keys() == PLAN["closing_s"].keys()
    shown = folder.report.read_text()
    for name, seconds in plan["closing_s"].items():
        assert (f"{report.CLOSING[name]}</td><td>" in shown) == (seconds > 0)
    assert f"(base {plan['base_lr']:.4g} per 256 images)" in shown


def settings_of(parts: Parts, text: str, plan: dict[str, Any] | None = None, **more: Any) -> str:
    """Return the settings of a recipe changed by text, in one line."""
    config = replace(parts.config, recipe=named(text), **more)
    return " ".join(f"{name} {value}" for name, value in settings.table(config, plan).items())


def test_settings_tell_the_peaks_that_were_used(parts: Parts) -> None:
    assert "base 0.45 per 256" in settings_of(parts, "demo", PLAN)
    assert "0.97" in settings_of(parts, "demo", PLAN)
    for epochs, base_lr in ((40.0, 0.45), (300.0, 0.3), (1000.0, 0.2)):  # the paper's presets
        lines = settings_of(parts, "imagenet_rn50", budget_s=None, epochs=epochs)
        assert f"peak learning rate {base_lr * 16:.4g} (base {base_lr} per 256" in lines


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("demo+target=constant", {}, "targets constant"),
        ("demo+normalization=layernorm", {}, "normalisation layernorm"),
        ("demo+predictor_lr_scale=10", {}, "predictor's learning rate 10 times the other layers'"),
        ("demo+beta=0.5+temperature=0.3", {}, "negatives β 0.5, temperature 0.3"),
        ("demo+beta=1+queue=512", {}, "negatives β 1, temperature 0.1, queue of 512"),
        (
            "demo+loss=vicreg+target=online+predictor_depth=0",
            {},
            "loss vicreg, invariance 25, variance 25, covariance 1",
        ),
        ("demo+projector_depth=3", {}, "projector of 3 linear layers, predictor of 2"),
        ("demo+predictor_depth=0", {}, "projector of 2 linear layers, no predictor"),
        ("demo+target_statistics=running", {}, "target statistics running"),
        ("demo+lagged_target=true", {}, "target lags one step"),
        ("demo+tau_rises=false", {}, "throughout"),
        ("demo", {"micro_batches": 4}, "micro-batches 4"),
        ("demo", {"crop": "dali"}, "crop by dali"),
        ("demo", {"loader": "memory", "memory_side": 24}, "images kept with a short side of at most 24 px"),
    ],
)
def test_settings_tell_departures_and_nothing_usual(parts: Parts, text: str, more: dict[str, Any], said: str) -> None:
    assert said in settings_of(parts, text, **more)
    assert said not in settings_of(parts, "demo")


def test_settings_tell_a_crop_ramp(parts: Parts) -> None:
    recipe = replace(named("demo"), crop_px=24, crop_ramp=CropRamp((12, 16)))
    assert "12, 16 px up to 60% of the run, then 24 px" in page(
        parts._replace(config=replace(parts.config, recipe=recipe)), [row(1)]
    )


@pytest.mark.parametrize(("text", "ends"), [("demo", True), ("demo+beta=1", False), ("demo+normalization=none", False)])
def test_eight_is_the_end_of_byols_own_loss_alone(parts: Parts, text: str, ends: bool) -> None:
    shown = page(parts._replace(config=replace(parts.config, recipe=named(text))), [row(1)])
    assert ("last loss, of 8" in shown) == ("both directions, 0 to 8" in shown) == ends


def test_text_from_outside_is_escaped(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\"'><script>&"
    monkeypatch.setattr(pictures, "_label", lambda reader, index: text)
    config = replace(parts.config, data=text, val=text)
    shown = page(
        parts._replace(config=config),
        [row(1, warnings=[text])],
        scored=(parts.train, parts.val),
        neighbours=[Neighbours(0, (1,), (0.9,))],
        warnings=[text],
    )
    escaped = "&#34;&#39;&gt;&lt;script&gt;&amp;"
    assert shown.count("script&gt;") == shown.count(escaped)
    for place in (
        f"<code>{escaped}<",
        f"<td>{escaped}<",
        f"</span>{escaped}<",
        f'alt="{escaped}: ',
        f'title="{escaped}: ',
    ):
        assert place in shown


def test_warnings_after_the_last_row_are_told(parts: Parts) -> None:
    assert "<span>9.0 s</span>the end is &lt;near&gt;" in page(parts, [row(1)], warnings=["the end is <near>"])
    assert "the end is near" in page(parts, [], warnings=["the end is near"])


def test_an_overrun_is_told(parts: Parts) -> None:
    text = page(parts, [row(50)], {**RESULT, "elapsed_s": 73.0}, plan=PLAN)
    assert "<b>3.0 s</b><span>after the deadline" in text


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 7.9), (0.97, 1), (0, 0.0884), (0, 12_345), (0, 3e-6), (-2, 3), (0.5, 0.5)]
)
def test_ticks_are_few_and_round_and_inside(low: float, high: float) -> None:
    marks = chart.ticks(low, high)
    assert 1 <= len(marks) <= 7
    assert len(marks) >= 2 or low == high
    assert all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)
    assert len({chart.number(mark) for mark in marks}) == len(marks)


def test_a_mean_leaves_a_straight_line_and_its_gaps() -> None:
    assert chart.smooth([1.0, 2.0, None, 4.0, 5.0], reach=1) == [1.5, 1.5, None, 4.5, 4.5]
    assert chart.smooth([3.0] * 9, reach=2) == [3.0] * 9


def test_a_curve_breaks_where_values_are_missing() -> None:
    drawn = chart.curves("x", [0, 1, 2, 3, 4, 5], [chart.Line([1.0, 2.0, None, 3.0, None, 1.0])])
    assert drawn.count("<path") == 1
    assert drawn.count("<circle") == 2


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1999, 2000, 54_321])
def test_long_runs_are_thinned_and_keep_their_ends(count: int) -> None:
    rows = [{"step": number} for number in range(count)]
    thinned = curves.thin_rows(rows)
    assert len(thinned) <= 2 * curves.PLOTTED_ROWS
    assert [*thinned[:1], *thinned[-1:]] == [*rows[:1], *rows[-1:]]


def test_a_long_runs_report_takes_under_a_second_of_cpu_time(parts: Parts) -> None:
    rows = [row(n, loss=math.sin(n), crop_px=n) for n in range(1, 100_001)]
    began = time.process_time()
    page(parts, rows, RESULT, plan=PLAN)
    assert time.process_time() - began < 1.0


def test_the_changes_of_a_recipe_stand_below_its_name(parts: Parts) -> None:
    config = parts.config
    changed = replace(config, recipe=replace(config.recipe, name="demo+beta=1+optimizer=sgd"))
    text = page(parts._replace(config=changed), [row(1)])
    assert "<h1>demo</h1>" in text
    assert "<code>+beta=1+optimizer=sgd</code>" in text
