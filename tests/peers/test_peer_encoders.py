"""Laws of the networks of timm and torchvision as encoders: populations, sizes, resume, scores, and the way back."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastbyol.cli import eval as evaluation
from fastbyol.cli.train import main
from fastbyol.config import EncoderConfig, HeadConfig
from fastbyol.errors import ConfigError
from fastbyol.export import formats, load_encoder
from fastbyol.model.batchnorm import set_views_
from fastbyol.model.byol import BYOL
from fastbyol.model.foreign import draw_weights
from fastbyol.model.parts import build_encoder
from fastbyol.monitor.metrics import read_metrics
from fastbyol.recipes import RECIPES, named
from fastbyol.storage.run_folder import RunFolder
from tests.conftest import Betons
from tests.support.commands import wait_until
from tests.support.runs import arguments, encoders_are_equal
from tests.support.tolerances import FLOAT64_ATOL, FLOAT64_RTOL

pytestmark = pytest.mark.peers
STARTED = """
import sys
from tests.support.peers import import_torchvision
import_torchvision()
from fastbyol.cli.train import main
sys.exit(main(sys.argv[1:]))
"""
ARCHS = (
    "timm:resnet18",
    "timm:efficientnet_b0",
    "timm:mobilenetv3_small_050",
    "timm:convnext_atto",
    "timm:vit_tiny_patch16_224",
    "torchvision:efficientnet_b0",
    "torchvision:mobilenet_v3_small",
)


@pytest.fixture
def timm(torchvision: ModuleType) -> ModuleType:  # noqa: ARG001 - which timm imports
    """Import timm."""
    return pytest.importorskip("timm")


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize(
    ("arch", "channels"),
    [*((arch, 3) for arch in ARCHS), ("timm:convnext_atto", 1), ("torchvision:efficientnet_b0", 1)],
)
def test_both_views_at_once_are_a_forward_of_each(arch: str, channels: int) -> None:
    config = EncoderConfig(arch, channels=channels)
    encoder = build_encoder(config, seed=0, views=2).double().train()
    apart = copy.deepcopy(encoder)
    set_views_(apart, 1)
    views = torch.randn(6, channels, 64, 64, dtype=torch.float64)
    views[3:] = 2 * views[3:] + 1
    close = {"rtol": 1e4 * FLOAT64_RTOL, "atol": 1e4 * FLOAT64_ATOL}  # a batch norm of 3 x 2 x 2 values magnifies
    together = encoder(views)
    torch.testing.assert_close(together, torch.cat([apart(view) for view in views.chunk(2)]), **close)
    torch.testing.assert_close(encoder.state_dict(), apart.state_dict(), **close)
    assert together.shape == (6, encoder.features)
    assert encoder.multiply_adds(px=32) > 0


@pytest.mark.parametrize("arch", ARCHS)
def test_weights_follow_the_seed_and_load_strictly_where_they_come_from(
    arch: str, timm: ModuleType, torchvision: ModuleType
) -> None:
    one, same, other = (build_encoder(EncoderConfig(arch), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    library, _, name = arch.partition(":")
    if library == "timm":
        timm.create_model(name, num_classes=0).load_state_dict(one)
        return
    network = torchvision.models.get_model(name, weights=None)
    missing, unexpected = network.load_state_dict(one, strict=False)
    assert not unexpected
    assert {each.rpartition(".")[2] for each in missing} == {"weight", "bias"}  # of the classifier
    assert len(missing) == 2


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("resnet18", {}),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
        ("deit_tiny_distilled_patch16_224", {"dynamic_img_size": True}),
        ("swin_tiny_patch4_window7_224", {"dynamic_img_size": True, "strict_img_size": False}),
        ("hrnet_w18_small", {}),
    ],
)
def test_a_network_is_built_once_for_any_size(name: str, more: dict[str, bool], timm: ModuleType) -> None:
    with draw_weights(1):
        wanted = timm.create_model(name, num_classes=0, **more).state_dict()
    encoder = build_encoder(EncoderConfig(f"timm:{name}"), seed=1).eval()
    found = encoder.state_dict()  # drawn for the first time: a second network would have other weights
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[each], wanted[each]) for each in wanted)
    with torch.no_grad():
        assert encoder(torch.zeros(1, 3, 96, 96)).shape == (1, encoder.features)


@pytest.mark.usefixtures("timm")
def test_a_network_of_one_size_and_one_of_no_name_are_told() -> None:
    with pytest.raises(ConfigError, match=r"vit_b_16 takes images of 224 px alone, and these are 64 x 64"):
        build_encoder(EncoderConfig("torchvision:vit_b_16"), seed=0)(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ConfigError, match=r"timm has no network 'convnext_tini' .* such as timm:convnext_tiny"):
        build_encoder(EncoderConfig("timm:convnext_tini"), seed=0)


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("name", [name for name in RECIPES if named(name).encoder.arch.startswith("timm:")])
def test_recipes_of_timm_take_a_step(name: str) -> None:
    recipe = named(name)
    model = BYOL(recipe.encoder, HeadConfig(hidden=8, out=4), seed=0)
    output = model(torch.randn(4, 3, recipe.crop_px, recipe.crop_px))
    output.loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.online.parameters())
    assert sum(not p.requires_grad for p in model.online.parameters()) == (2 if recipe.encoder.frozen else 0)


@pytest.mark.parametrize(
    ("arch", "more"),
    [
        ("timm:convnext_atto", "+optimizer=adamw+base_lr=0.001"),
        ("timm:vit_tiny_patch16_224", "+optimizer=adamw+base_lr=0.001+frozen=patch_embed"),
        ("torchvision:mobilenet_v3_small", ""),
    ],
)
def test_a_run_is_killed_resumed_bit_equal_scored_and_exported(
    arch: str, more: str, betons: Betons, tmp_path: Path, timm: ModuleType, torchvision: ModuleType
) -> None:
    recipe = f"demo+encoder={arch}+crop_px=32+eval_px=32{more}"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    asked = ["--epochs=2", "--warmup-epochs=0", f"--val={betons.val}", "--threads=1"]
    assert main([recipe, *arguments(betons, whole, *asked)[1:]]) == 0
    words = [recipe, *arguments(betons, cut, *asked)[1:], "--checkpoint-every=0.01s"]
    process = subprocess.Popen([sys.executable, "-c", STARTED, *words], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(read_metrics(RunFolder(cut).metrics)) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not RunFolder(cut).result.exists()
    assert main([recipe, *arguments(betons, cut, *asked)[1:], "--resume"]) == 0
    assert encoders_are_equal(whole, cut)

    files = [f"--train={betons.train}", f"--val={betons.val}", "--device=cpu"]
    assert evaluation.main(["knn", str(cut), *files, "--k=3"]) == 0
    kind = arch.partition(":")[0].replace("torchvision", "pth")
    path = tmp_path / "exported" / "encoder.pth"
    assert evaluation.main(["export", str(cut), str(path), f"--format={kind}"]) == 0
    encoder, images = load_encoder(cut), torch.randn(2, 3, 224, 224)
    if kind == "timm":
        network = timm.create_model(arch[5:], num_classes=0, checkpoint_path=str(path)).eval()
        with torch.inference_mode():
            torch.testing.assert_close(encoder(images), network(images), rtol=1e-4, atol=1e-5)
    else:
        network = torchvision.models.get_model(arch[12:], weights=None)
        assert not network.load_state_dict(torch.load(path, weights_only=True), strict=False).unexpected_keys
    with pytest.raises(ConfigError, match="detectron2 only has ResNets"):
        formats.write("detectron2", path, encoder, encoder.config, px=32)
