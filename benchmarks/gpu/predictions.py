"""What each call's figures are expected to be, a card each: aims, bounds and likely values, all written down before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

MISS = 0.15  # of a prediction: past it, a sentence has to say why

Row = Mapping[str, Any]


class Expected(NamedTuple):
    """A figure: which rows hold it under which key, and what is expected on each card.

    bound is computed from bytes and operations, likely from what kernels took before, aim is what is wanted; None where
    there is none.
    """

    what: str
    case: str
    shape: str
    implementation: str
    key: str
    aim: Mapping[str, str]
    likely: Mapping[str, tuple[float, float]]
    bound: Mapping[str, float]


def _both(value: Any) -> dict[str, Any]:
    return {"H100": value, "H200": value}


NONE: dict[str, Any] = {}
BATCH_NORMS = (
    ("56 px", "x56x56"),
    ("28 px", "x28x28"),
)
STEP_SHAPE = "imagenet_rn50, batch 512"
EXPECTED = (
    Expected(
        "ResNet-50 step, 224 px, batch 512, graph, images/s",
        "step",
        STEP_SHAPE,
        "fastbyol, graph",
        "images_per_s",
        {"H100": ">= 2200", "H200": ">= 3000"},
        {"H100": (2900.0, 2925.0), "H200": (3550.0, 3610.0)},
        {"H100": 3182.0, "H200": 4267.0},
    ),
    Expected(
        "the same in plain torch, images/s",
        "step",
        STEP_SHAPE,
        "eager, a forward per view",
        "images_per_s",
        NONE,
        {"H100": (1420.0, 1440.0), "H200": (1660.0, 1690.0)},
        {"H100": 2153.0, "H200": 2948.0},
    ),
    Expected(
        "the same, in a training from JPEGs, images/s",
        "training",
        "imagenet",
        "fastbyol",
        "warm_images_per_s",
        {"H100": ">= 2200", "H200": ">= 3000"},
        {"H100": (2840.0, 2880.0), "H200": (3440.0, 3510.0)},
        {"H100": 3182.0, "H200": 4267.0},
    ),
    Expected(
        "share of its loop waiting for images",
        "training",
        "imagenet",
        "fastbyol",
        "loader_wait_share",
        _both("<= 0.01"),
        NONE,
        NONE,
    ),
    Expected(
        "its peak of memory, GiB", "training", "imagenet", "fastbyol", "peak_gib", NONE, _both((42.0, 44.0)), NONE
    ),
    *(
        Expected(
            f"batch norm, {name}, least share of a copy",
            "batch norm",
            shape,
            "fastbyol",
            "fraction_of_copy",
            _both(">= 0.80"),
            NONE,
            NONE,
        )
        for name, shape in BATCH_NORMS
    ),
    Expected(
        "LARS with EMA, share of a copy",
        "LARS + EMA",
        "imagenet_rn50",
        "fastbyol",
        "fraction_of_copy",
        _both(">= 0.85"),
        NONE,
        NONE,
    ),
    Expected(
        "both views of an image at 224 px, images/s",
        "views",
        "2x224",
        "fastbyol",
        "images_per_s",
        {"H100": ">= 250000", "H200": ">= 333333"},
        NONE,
        NONE,
    ),
    Expected(
        "a copy of 2 GiB, GB/s",
        "step",
        "",
        "fastbyol",
        "copy_gb_per_s",
        NONE,
        {"H100": (3000.0, 3000.0), "H200": (4300.0, 4300.0)},
        NONE,
    ),
)
OVER_PLAIN = "ResNet-50 step over plain torch, times"
OVER_PLAIN_AIM = 1.35


def card(gpu: str | None) -> str | None:
    """Name the card whose figures hold; None for one of which nothing was predicted."""
    return next((name for name in ("H100", "H200") if gpu and name in gpu), None)


def measured(rows: Iterable[Row], expected: Expected) -> float | None:
    """Find a figure in the rows: the least of those that match."""
    found = [row[expected.key] for row in rows if _matches(row, expected) and row.get(expected.key) is not None]
    return min(found, default=None)


def _matches(row: Row, expected: Expected) -> bool:
    is_one = expected.implementation in (row["implementation"], "fastbyol")
    return (
        str(row["case"]).startswith(expected.case)
        and expected.shape in str(row["shape"])
        and is_one
        and str(row["implementation"]).startswith(expected.implementation)
    )


def markdown(rows: Sequence[Row], gpu: str | None) -> str:
    """Set what was measured beside what was predicted; on other machines the predictions of both cards stand alone."""
    cards = [name] if (name := card(gpu)) else ["H100", "H200"]
    lines = [
        "| figure | measured | card of the predictions | likely (computed) | bound (computed) | aim | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for expected in EXPECTED:
        value = measured(rows, expected) if gpu else None
        lines += [_line(expected, value, name) for name in cards]
    times = _over_plain(rows) if gpu else None
    aim = f">= {OVER_PLAIN_AIM}"
    cells = (OVER_PLAIN, _text(times), cards[0] if len(cards) == 1 else "both", "", "", aim, _verdict(times, None, aim))
    return "\n".join([*lines, f"| {' | '.join(cells)} |"])


def _line(expected: Expected, value: float | None, name: str) -> str:
    likely, bound, aim = expected.likely.get(name), expected.bound.get(name), expected.aim.get(name, "")
    interval = "" if likely is None else " to ".join(dict.fromkeys(map(_text, likely)))
    cells = (expected.what, _text(value), name, interval, "" if bound is None else _text(bound), aim)
    return f"| {' | '.join((*cells, _verdict(value, likely, aim)))} |"


def _over_plain(rows: Sequence[Row]) -> float | None:
    ours, plain = (measured(rows, expected) for expected in EXPECTED[:2])
    return None if ours is None or plain is None else ours / plain


def _verdict(value: float | None, likely: tuple[float, float] | None, aim: str) -> str:
    if value is None:
        return "not measured"
    said = []
    if aim:
        sign, wanted = aim.split()
        said.append("aim met" if (value >= float(wanted) if sign == ">=" else value <= float(wanted)) else "aim missed")
    if likely and not likely[0] * (1 - MISS) <= value <= likely[1] * (1 + MISS):
        said.append("the prediction missed by over 15 %: say why")
    return "; ".join(said)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
