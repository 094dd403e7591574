"""Laws of the recipes: the paper's constants and sizes, and settings changed by text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastbyol.errors import ConfigError
from fastbyol.model.byol import MLP, Branch
from fastbyol.model.resnet import ARCHS, ResNet
from fastbyol.recipes import PAPER_VIEWS, RECIPES, named, overrides
from fastbyol.schedule import ema_rate, learning_rate, peaks

MILLIONS = {  # parameters of the encoder; paper, table 1 (50x1: 24, 50x2: 94, 50x4: 375, 200x2: 250)
    "imagenet_rn50": 23.5,
    "imagenet_rn50x2_e1000": 94,
    "imagenet_rn50x4_e1000": 375,
    "imagenet_rn200x2_e1000": 250,
}
PRESETS = {  # base lr, weight decay, tau, epochs, batch: DM presets; paper, sections 3.3, 4 and appendices F, G
    "imagenet_rn50_e40": (0.45, 1e-6, 0.97, 40, 4096),
    "imagenet_rn50": (0.45, 1e-6, 0.99, 100, 4096),
    "imagenet_rn50_e300": (0.3, 1e-6, 0.99, 300, 4096),
    "imagenet_rn50_e1000": (0.2, 1.5e-6, 0.996, 1000, 4096),
    "imagenet_rn50_b512_e1000": (0.4, 1.5e-6, 0.9995, 1000, 512),
    "imagenet_rn50x2_e1000": (0.2, 1.5e-6, 0.996, 1000, 4096),
    "imagenet_rn50x4_e1000": (0.2, 1.5e-6, 0.996, 1000, 4096),
    "imagenet_rn200x2_e1000": (0.2, 1.5e-6, 0.996, 1000, 4096),
    "simclr_imagenet_rn50_e300": (0.3, 1e-6, 0.99, 300, 4096),
}
PEAKS = {  # base lr * batch / 256, by hand
    "imagenet_rn50_e40": 7.2,
    "imagenet_rn50": 7.2,
    "imagenet_rn50_e300": 4.8,
    "imagenet_rn50_e1000": 3.2,
    "imagenet_rn50_b512_e1000": 0.8,
    "imagenette_rn18": 2.0,
    "imagenet100_rn18": 2.0,
    "stl10_rn18": 2.0,
    "cifar10_rn18": 4.0,
    "cifar100_rn18": 4.0,
}


@pytest.mark.parametrize("name", MILLIONS)
def test_encoders_have_the_papers_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        encoder = ResNet(named(name).encoder)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(MILLIONS[name], rel=0.006)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_papers(name: str) -> None:
    recipe = named(name)
    optim = recipe.optim
    assert (optim.base_lr, optim.weight_decay, optim.tau_base, recipe.epochs, recipe.batch_size) == PRESETS[name]
    assert (optim.warmup_epochs, optim.momentum, optim.trust) == (10, 0.9, 1e-3)
    assert (recipe.head.hidden, recipe.head.out) == (4096, 256)
    assert recipe.views == PAPER_VIEWS


@pytest.mark.parametrize("name", PEAKS)
def test_schedules_peak_after_the_warm_up_and_end_at_zero_and_one(name: str) -> None:
    recipe = named(name)
    peak, warmup = recipe.optim.base_lr * recipe.batch_size / 256, recipe.optim.warmup_epochs / recipe.epochs
    assert learning_rate(warmup, peak=peak, warmup=warmup) == pytest.approx(PEAKS[name])
    assert learning_rate(0.0, peak=peak, warmup=warmup) == learning_rate(1.0, peak=peak, warmup=warmup) == 0
    assert ema_rate(0.0, base=recipe.optim.tau_base) == pytest.approx(recipe.optim.tau_base)
    assert ema_rate(1.0, base=recipe.optim.tau_base) == 1


@pytest.mark.parametrize("name", [name for name in RECIPES if named(name).encoder.arch in ARCHS])  # others: tests/peers
def test_every_recipe_builds_its_networks(name: str) -> None:
    recipe = named(name)
    head = recipe.head
    with torch.device("meta"):  # the largest would take gigabytes
        encoder = ResNet(recipe.encoder)
        online = Branch(encoder, MLP(encoder.features, head, depth=head.projector_depth))
        predictor = MLP(head.out, head, depth=head.predictor_depth)
        assert predictor(online(torch.empty(4, 3, recipe.crop_px, recipe.crop_px))).shape == (4, head.out)


@pytest.mark.parametrize(
    ("name", "optim"),
    [
        ("imagenette_vit_small", (1.5e-4, 0.1, 40, "patch_embed")),  # MoCo v3, CONFIG.md
        ("imagenette_convnext_tiny", (4e-3 / 16, 0.05, 20, "")),  # ConvNeXt, at 4e-3 for 4096 images
    ],
)
def test_networks_of_timm_train_by_adamw_at_their_authors_rates(
    name: str, optim: tuple[float, float, int, str]
) -> None:
    recipe = named(name)
    assert (
        recipe.optim.base_lr,
        recipe.optim.weight_decay,
        recipe.optim.warmup_epochs,
        recipe.encoder.frozen,
    ) == optim
    assert (recipe.optim.optimizer, recipe.presets, recipe.views) == ("adamw", (), PAPER_VIEWS)


def test_simclr_has_neither_predictor_nor_target() -> None:
    recipe = named("simclr_cifar10_tiny")
    assert (recipe.head.predictor_depth, recipe.objective.target, recipe.objective.beta) == (0, "online", 1)
    assert replace(recipe, head=named("cifar10_tiny").head, objective=named("demo").objective) == replace(
        named("cifar10_tiny"), name=recipe.name
    )


def test_moco_keeps_tau_and_a_queue() -> None:
    recipe = named("moco_imagenet_rn50_e300")
    assert (recipe.optim.tau_base, recipe.optim.tau_rises) == (0.999, False)
    assert (recipe.objective.target, recipe.objective.beta, recipe.objective.queue) == ("ema", 1, 65_536)


def test_text_changes_settings_of_every_part_and_the_name() -> None:
    text = "cifar10_tiny+target=constant+base_lr=1.5+out=64+batch_size=32+width=1+tau_rises=false+epochs=3"
    recipe, base = named(text), named("cifar10_tiny")
    assert recipe.name == text
    assert recipe.objective == replace(base.objective, target="constant")
    assert recipe.optim == replace(base.optim, base_lr=1.5, tau_rises=False)
    assert recipe.head == replace(base.head, out=64)
    assert (recipe.batch_size, recipe.encoder.width, recipe.epochs, recipe.views) == (32, 1, 3, base.views)


def test_settings_have_one_place_each() -> None:
    recipe = named("demo")
    parts = (recipe, recipe.encoder, recipe.head, recipe.optim, recipe.objective)
    names = [name for part in parts for name in vars(part)]
    assert len(names) == len(set(names))
    assert {"arch", "hidden", "base_lr", "target", "crop_px"} <= overrides.settings(recipe).keys()


def test_a_setting_is_of_the_type_it_was_declared_with() -> None:
    known = overrides.settings(named("demo"))  # where some are written without a point
    assert {name: known[name].kind for name in ("width", "epochs", "warmup_epochs", "hidden", "arch", "tau_rises")} == {
        **dict.fromkeys(("width", "epochs", "warmup_epochs"), float),
        "hidden": int,
        "arch": str,
        "tau_rises": bool,
    }
    assert named("demo+width=0.5+weight_decay=0").encoder.width == 0.5


def test_settings_that_only_hold_together_are_changed_together() -> None:
    recipe = named("demo+queue=512+beta=1")
    assert (recipe.objective.queue, recipe.objective.beta) == (512, 1)


def test_views_lose_what_their_names_say() -> None:
    first, second = named("imagenet_rn50_e300+views=crop_color").views
    assert (first.flip, first.blur, first.solarize, first.jitter, first.grayscale) == (0, 0, 0, 0.8, 0.2)
    assert (second.flip, second.blur, second.solarize, second.jitter, second.grayscale) == (0, 0, 0, 0.8, 0.2)
    first, second = named("imagenet_rn50_e300+views=symmetric").views
    assert first == second
    assert (first.blur, first.solarize) == (0.5, 0.2)
    assert named("imagenet_rn50_e300+views=no_second_blur").views == (PAPER_VIEWS[0], replace(PAPER_VIEWS[1], blur=0.0))
    seen = {named(f"imagenet_rn50_e300+views={name}").views for name in overrides.VIEWS}
    assert len(seen) == len(overrides.VIEWS)


def test_global_views_are_the_recipes_in_turn() -> None:
    first, second = named("demo").views
    assert named("demo+global_views=5").views == (first, second, first, second, first)
    assert named("demo+global_views=2").views == (first, second)
    for text in ("global_views=4+views=no_second_blur", "views=no_second_blur+global_views=4"):
        assert named(f"demo+{text}").views == (first, replace(second, blur=0.0)) * 2


def test_local_views_are_small_parts_drawn_like_the_global_ones() -> None:
    for name, px in (("imagenet_rn50", 96), ("cifar10_rn18", 16), ("cifar10_tiny", 8), ("imagenette_rn18", 56)):
        first, second = named(name).views
        one, other = (replace(view, area=overrides.LOCAL_AREA, local_px=px) for view in (first, second))
        recipe = named(f"{name}+local_views=3")
        assert recipe.views == (first, second, one, other, one)
        assert (recipe.global_views, recipe.local_views) == ((first, second), (one, other, one))
        assert recipe.sizes_of_views(recipe.crop_px) == [(2, recipe.crop_px), (3, px)]
    more = named("imagenet_rn50+global_views=3+local_px=64+local_views=2+local_predictor=true")
    assert more.sizes_of_views(160) == [(3, 160), (2, 64)]
    assert more.head.local_predictor
    assert named("demo").sizes_of_views(20) == [(2, 20)]
    assert {view.jitter for view in named("demo+views=no_jitter+local_views=2").views} == {0.0}


def test_local_views_of_a_gray_network_need_no_colours() -> None:
    drawn = named("demo+channels=1+local_views=2").drawn_views
    assert len(drawn) == 4
    assert {(view.hue, view.saturation, view.grayscale) for view in drawn} == {(0, 0, 0)}


def test_targets_without_negatives_take_any_number_of_views() -> None:
    for target in ("ema", "constant", "stop-gradient", "online"):
        assert len(named(f"demo+global_views=3+target={target}+batch_size=33").views) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("demo+global_views=1", "global_views is 1; give a number from 2"),
        ("demo+global_views=-1", "global_views is -1; give a number from 2"),
        ("demo+global_views=0", "global_views is 0; give a number from 2"),
        ("demo+local_views=-4", "local_views is -4; give a number from 0"),
        ("demo+local_views=4+beta=1", "negatives .* with 6 views"),
        ("demo+local_views=4+lagged_target=true", "--lagged-target with 6 views"),
        ("demo+local_px=8", "no local views; give local_views=4, too"),
        ("demo+local_views=2+local_px=4", "local_px is 4; give a number from 8"),
        ("demo+local_px=abc+local_views=2", "local_px is 'abc'; give a whole number, such as 96"),
        ("demo+local_views=2+predictor_depth=0+local_predictor=true", "local_predictor with a predictor_depth of 0"),
        ("demo+local_predictor=true", "local_predictor is of local views, and there are none"),
        ("demo+global_views=many", "global_views is 'many'; give a whole number, such as 4"),
        ("simclr_cifar10_tiny+global_views=4", "negatives .* with 4 views.* beta 0, or two views"),
        ("moco_cifar10_tiny+global_views=4", "negatives .* with 4 views"),
        ("demo+global_views=4+lagged_target=true", "--lagged-target with 4 views"),
        ("demo+global_views=4+loss=mine:loss", "losses other than byol are of two"),
        ("demo+bananas=8", "bananas=8.*base_lr"),
        ("demo+", "is not a setting"),
        ("demo+target", "'target' is not a setting"),
        ("demo+target=sideways", "ema, constant"),
        ("demo+batch_size=many", "whole number"),
        ("demo+base_lr=fast", "base_lr is 'fast'; give a number"),
        ("demo+base_lr=nan", "base_lr is nan"),
        ("demo+width=nan", "width is nan"),
        ("demo+width=0", "width is 0"),
        ("demo+epochs=inf", "epochs is inf"),
        ("demo+trust=nan", "trust is nan"),
        ("demo+predictor_lr_scale=0", "predictor_lr_scale is 0"),
        ("demo+predictor_lr_scale=1e7", "predictor_lr_scale is 10000000.0; .* at most 1000000"),
        ("simclr_cifar10_tiny+predictor_lr_scale=10", "predictor_lr_scale is 10 with a predictor_depth of 0"),
        ("demo+tau_rises=no", "true or false"),
        ("demo+views=sepia", "views is 'sepia'; give one of no_flip"),
        ("demo+name=x", "is not a setting"),
        ("demo+beta=1+normalization=none", "by cosine"),
        ("demo+queue=512", "is not used"),
        ("demo+queue=100+beta=1", "at least 128"),
        ("demo+target=constant+lagged_target=true", "does not follow"),
        ("demo+beta=1+lagged_target=true", "BYOL's own loss"),
        ("demo+predictor_depth=4", "from 0 to 3"),
        ("demo+projector_depth=0", "from 1 to 3"),
        ("demo+temperature=0", "a number above 0"),
    ],
)
def test_a_change_that_cannot_be_is_refused_with_a_remedy(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        named(text)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_at_its_own_length_keeps_its_own_peaks(name: str) -> None:
    recipe = named(name)
    assert peaks(recipe, epochs=recipe.epochs) == pytest.approx((recipe.optim.base_lr, recipe.optim.tau_base))


def test_peaks_given_by_text_hold_for_any_length() -> None:
    base = named("imagenet_rn50")
    for epochs in (40, 100, 240, 1000):
        base_lr, tau_base = peaks(base, epochs=epochs)
        assert peaks(named("imagenet_rn50+base_lr=0.7"), epochs=epochs) == pytest.approx((0.7, tau_base))
        assert peaks(named("imagenet_rn50+tau_base=0.5"), epochs=epochs) == pytest.approx((base_lr, 0.5))
        assert peaks(named("imagenet_rn50+tau_base=1"), epochs=epochs) == pytest.approx((base_lr, 1))
        assert peaks(named("imagenet_rn50+base_lr=0.7+tau_base=0.5"), epochs=epochs) == pytest.approx((0.7, 0.5))
    assert named("imagenet_rn50+crop_px=128").presets == base.presets
