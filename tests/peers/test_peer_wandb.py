"""Laws of W&B as a place for rows, by the package itself, offline."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbyol.telemetry import Telemetry, read_metrics
from fastbyol.wandb_run import WandbRun
from tests.test_telemetry import row

pytestmark = pytest.mark.peers


def test_rows_reach_wandbs_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2  # noqa: PLC0415
    from wandb.sdk.internal.datastore import DataStore  # noqa: PLC0415

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = WandbRun("fastbyol-tests", folder=tmp_path, name="a-run", settings={"batch_size": 64})
    with Telemetry(tmp_path / "metrics.jsonl", from_step=0, also=run) as telemetry:
        for step in (1, 2, 3):
            telemetry.row(row(step), left_s=1.0)
    (path,) = tmp_path.rglob("run-a-run.wandb")
    store = DataStore()
    store.open_for_scan(str(path))
    losses = []
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        if "loss" in items:
            losses.append(float(items["loss"]))
    assert losses == pytest.approx([r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")])
