"""Laws of choosing a loader by its name: what cannot be used is refused before anything is decoded."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fastbyol import loaders
from fastbyol.beton import RAW, Reader, StoredImage
from fastbyol.cli import train, train_run
from fastbyol.config import Config
from fastbyol.data_prep import cli
from fastbyol.data_prep.writer import Writer
from fastbyol.errors import ConfigError
from fastbyol.monitor.logger import RunLogger
from fastbyol.recipes import named
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system import limits
from fastbyol.system.distributed import World
from tests.conftest import Betons


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nativ", {}, "no loader 'nativ'; choose one of native, memory, ffcv, dali"),
        ("native", {"workers": 0}, "workers is 0; give a number from 1"),
        ("native", {"prefetch": 0}, "prefetch is 0; give a number from 1"),
        ("memory", {"processes": 0}, "processes is 0; give a number from 1"),
        ("native", {"on_error": "ignore"}, "on_error is 'ignore'; choose one of fail, skip"),
    ],
)
def test_what_is_no_setting_is_refused(betons: Betons, name: str, settings: dict[str, Any], message: str) -> None:
    with Reader(betons.train) as reader, pytest.raises(ConfigError, match=message):
        loaders.load(name, reader, [], **({"workers": 1} | settings))


@pytest.mark.parametrize(("name", "package"), [("ffcv", "ffcv"), ("dali", "nvidia")])
def test_a_missing_package_is_named_with_how_to_install_it(betons: Betons, name: str, package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with Reader(betons.train) as reader, pytest.raises(ConfigError, match=rf"pip install 'fastbyol\[{name}\]'"):
        loaders.load(name, reader, [], workers=1)


@pytest.mark.parametrize(("name", "package"), [("ffcv", "numba"), ("dali", "nvidia")])
def test_a_package_that_is_there_and_fails_is_not_to_be_installed(
    betons: Betons, name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    (tmp_path / f"{package}.py").write_text("raise ImportError('libtbb.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, f"fastbyol.loaders.{name}", raising=False)
    with Reader(betons.train) as reader, pytest.raises(ConfigError) as raised:
        loaders.load(name, reader, [], workers=1)
    assert "libtbb.so: cannot open" in str(raised.value)
    assert str(raised.value).endswith("it is installed: mend what its import lacks, or choose another --loader")


def test_one_thread_decodes_small_images_and_none_once_all_are_there(betons: Betons, tmp_path: Path) -> None:
    large = StoredImage(RAW, 64, 64, bytes(3 * 64 * 64))
    with Writer(tmp_path / "large.beton", capacity=1, class_names=None) as writer:
        writer.append(large)
    with Reader(betons.train) as small, Reader(tmp_path / "large.beton") as reader:
        counts = [
            loaders.decoding_threads(name, each, workers=7) for name in ("native", "memory") for each in (small, reader)
        ]
    assert counts == [None, 7, None, None]


def test_who_would_be_no_faster_is_not_told_to_take_more_workers(betons: Betons) -> None:
    config = Config(recipe=named("demo"), data=str(betons.train), epochs=1.0, workers=1)
    with Reader(betons.train) as reader:
        assert RunLogger(config, RunFolder(betons.train), World(), reader=reader).decoding_threads is None


@pytest.mark.parametrize(
    ("cores", "local_ranks", "cuda", "cpu"),
    [
        (1, 1, 1, 1),
        (2, 1, 2, 2),
        (3, 1, 2, 2),
        (16, 1, 14, 2),
        (16, 8, 2, 2),
        (16, 16, 1, 1),
        (2, 8, 1, 1),
        (128, 8, 14, 2),
    ],
)
def test_decoders_leave_a_gpu_two_cores_of_a_ranks_share(cores: int, local_ranks: int, cuda: int, cpu: int) -> None:
    given = [loaders.default_workers(device, cores=cores, local_ranks=local_ranks) for device in ("cuda", "cpu")]
    assert given == [cuda, cpu]


@pytest.mark.parametrize(("local_ranks", "workers"), [("1", 2), ("8", 1)])
def test_train_decodes_with_what_a_control_group_leaves_each_rank(
    local_ranks: str, workers: int, betons: Betons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text("300000 100000\n")
    monkeypatch.setattr(limits, "groups", lambda controller: iter([(tmp_path, 2)]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, local_ranks)
    asked = ["demo", f"--data={betons.train}", "--device=cpu", "--epochs=1"]
    for more, wanted in (((), workers), (("--workers=5",), 5)):
        args = train.build_parser().parse_args([*asked, *more])
        train.check_texts(args)
        assert train_run.config_of(args, RunFolder(tmp_path)).workers == wanted
    assert cli.build_parser().parse_args(["verify", "f.beton"]).workers == 3
