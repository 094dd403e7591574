"""The settings table of a report: the usual settings, and departures from the paper if there are any."""

from __future__ import annotations

from typing import Any

from fastbyol.config import Config, HeadConfig, ObjectiveConfig, OptimConfig, Recipe, ViewConfig
from fastbyol.recipe import LOSS_SETTINGS, scale_lr
from fastbyol.schedule import peaks


def loss_ends_at_8(config: Config) -> bool:
    """Return whether the loss lies in [0, 8], as BYOL's does for l2-normalised rows without negatives."""
    goal = config.recipe.objective
    return goal.loss == "byol" and goal.normalization == "l2" and goal.beta == 0


def table(config: Config, plan: dict[str, Any] | None) -> dict[str, str]:
    """Return the settings by name; base_lr and tau_base come from the plan if it has them."""
    return {**_usual(config, plan or {}), **_departures(config)}


def _usual(config: Config, plan: dict[str, Any]) -> dict[str, str]:
    recipe, optim = config.recipe, config.recipe.optim
    base_lr, tau_base = peaks(recipe, epochs=config.epochs or recipe.epochs)
    base_lr, tau_base = plan.get("base_lr", base_lr), plan.get("tau_base", tau_base)
    peak_lr = scale_lr(base_lr, batch_size=recipe.batch_size)
    return {
        "validation": config.val or "none",
        "encoder": f"{recipe.encoder.arch}, width {recipe.encoder.width:g}, {recipe.encoder.stem} stem",
        "heads": _heads(recipe.head),
        "peak learning rate": f"{peak_lr:.4g} (base {base_lr:.4g} per 256 images)",
        "warm-up": f"{optim.warmup_epochs:g} epochs",
        "weight decay": f"{optim.weight_decay:g}",
        **_rate(optim, recipe.objective, tau_base),
        "optimiser": optim.optimizer,
        "engine": config.engine,
        "loader": f"{config.loader}, {config.workers} workers",
        **_views(recipe),
    }


def _heads(head: HeadConfig) -> str:
    usual = HeadConfig()
    depths = (head.projector_depth, head.predictor_depth)
    text = f"hidden {head.hidden}, out {head.out}"
    if head.local_predictor:
        text = f"{text}, local views with a predictor of their own"
    if depths == (usual.projector_depth, usual.predictor_depth):
        return text
    predictor = f"predictor of {depths[1]}" if depths[1] else "no predictor"
    return f"{text}, projector of {depths[0]} linear layers, {predictor}"


def _rate(optim: OptimConfig, objective: ObjectiveConfig, tau_base: float) -> dict[str, str]:
    """Describe the EMA rate; empty if the target is not a moving average."""
    if not objective.moves_target:
        return {}
    return {"τ at the start": f"{tau_base:.4g}"} if optim.tau_rises else {"τ": f"{tau_base:.4g} throughout"}


def _departures(config: Config) -> dict[str, str]:
    recipe, goal = config.recipe, config.recipe.objective
    departures = {
        "starts from": config.init or "",
        "method": "chosen by the length of the run" if config.method == "auto" else "",
        "channels": "1, gray" if recipe.encoder.channels == 1 else "",
        "padding": recipe.encoder.padding if recipe.encoder.padding != "symmetric" else "",
        "frozen": recipe.encoder.frozen,
        "loss": _loss(goal),
        "targets": goal.target if goal.target != "ema" else "",
        "predictor's learning rate": _predictor_lr(recipe.optim),
        "normalisation": goal.normalization if goal.normalization != "l2" else "",
        "negatives": _negatives(goal),
        "target statistics": recipe.target_statistics if recipe.target_statistics != "batch" else "",
        "target": "lags one step" if recipe.lagged_target else "",
        "images kept": f"with a short side of at most {config.memory_side} px" if config.memory_side else "",
        "crop ramp": _ramp(recipe),
        "crop": f"by {config.crop}" if config.crop != "kernels" else "",
        "micro-batches": str(config.micro_batches) if config.parts > 1 else "",
        "recalibration": f"{recipe.recalibrate} batches" if recipe.recalibrate else "",
    }
    return {name: value for name, value in departures.items() if value}


def _predictor_lr(optim: OptimConfig) -> str:
    return "" if optim.predictor_lr_scale == 1 else f"{optim.predictor_lr_scale:g} times the other layers'"


def _loss(goal: ObjectiveConfig) -> str:
    """Describe a loss other than BYOL's, with the settings that are its own."""
    if goal.loss == "byol":
        return ""
    return ", ".join((goal.loss, *(f"{name} {getattr(goal, name):g}" for name in LOSS_SETTINGS.get(goal.loss, ()))))


def _negatives(goal: ObjectiveConfig) -> str:
    if not goal.beta:
        return ""
    queue = f", queue of {goal.queue}" if goal.queue else ""
    fade = f", to {goal.beta_end:g} over {goal.fade:.0%} of the run" if goal.fade else ""
    decoupled = ", decoupled" if goal.decoupled else ""
    return f"β {goal.beta:g}{fade}, temperature {goal.temperature:g}{queue}{decoupled}"


def _ramp(recipe: Recipe) -> str:
    ramp = recipe.crop_ramp
    if ramp is None:
        return ""
    sizes = ", ".join(str(px) for px in ramp.sizes_px)
    return f"{sizes} px up to {ramp.until:.0%} of the run, then {recipe.crop_px} px"


def _views(recipe: Recipe) -> dict[str, str]:
    """Describe the views by their names; of more than two those that are drawn alike together."""
    views = recipe.drawn_views
    if len(views) == 2:
        return {name: _view(view) for name, view in zip(("first view", "second view"), views, strict=True)}
    numbers = {view: [str(number) for number, each in enumerate(views, start=1) if each == view] for view in views}
    titles = {view: f"view{'s' if len(alike) > 1 else ''} {', '.join(alike)}" for view, alike in numbers.items()}
    return {title: _view(view) for view, title in titles.items()}


def _view(view: ViewConfig) -> str:
    low, high = view.area
    local = "" if view.local_px is None else f"local, {view.local_px} px, "
    return (
        f"{local}area {low:g} to {high:g}, flip {view.flip:g}, jitter {view.jitter:g} (brightness {view.brightness:g}, "
        f"contrast {view.contrast:g}, saturation {view.saturation:g}, hue {view.hue:g}), grey {view.grayscale:g}, "
        f"blur {view.blur:g}, solarise {view.solarize:g}"
    )
