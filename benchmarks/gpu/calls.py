"""The five calls: which parts run, in which order, how long; on a GPU, or reduced as a rehearsal on a CPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import rows
from benchmarks.gpu.images import DIVIDED, Set, set_of
from benchmarks.gpu.parts import Part
from fastbyol.recipes.methods import NEGATIVES, UNBLURRED
from fastbyol.system.limits import available_cores

PATIENCE = 4.0  # of a rehearsal, which may have a quarter of a core, as multiples of a GPU's time limits
DEADLINES_S = {1: 390.0, 2: 345.0, 3: 570.0, 4: 445.0, 5: 365.0}
ROOT = Path(__file__).parents[2]
GRACE_S = 10.0  # between a benchmark's own limit and the end of its patience
TEST_WORKERS = 14  # compiling kernels is what takes the time
REPEATS = {"cuda": 50, "cpu": 1}
SLOW_RIVALS = ("compile", "torchvision", "kornia")  # seconds to minutes of compilation, or Python an image
REDUCED_TESTS = ("tests/kernels/test_byol_loss.py",)
REDUCED_BUDGET_S = 45.0  # on a third of a core 22 s pass before the first step, and 12 are kept for the end
REDUCED_EVERY = 20  # of an archive's images
SETS = ("imagenette", "cifar10")
CONVERSION_S, SCORES_S, CLOSING_S = 20.0, 25.0, 8.0  # of call 3, beside the trainings
STEP = "step, imagenet_rn50, batch 512"
# in call 4 today's step is measured once, by its graph; statistics apart from 1x1 convolutions were measured before
TODAY = ("(today)", "lagged", f"{STEP}, fastbyol, eager", "apart")
STEP_REPEATS = 15  # of 0.2 s each, whose 20 and 80 % quantiles lay 0.1 ms apart with 26
# the kernels of a card's aims, and whether the choice of the 1x1 convolutions' blocks is right on it
AIMS = ("LARS", "2x256x64x56", "2x256x256x56", "2x256x128x28", "2x256x512x28", "(chosen)", "cuDNN, then")
KNN = "knn --k 20 200 --temperature 0.07 0.1"  # ours, and lightly's
SGD = ("--optimizer", "sgd", "--weight-decay", "2e-3", "--base-lr")
MUON = "warmup_epochs=1+optimizer=muon+base_lr=0.05"  # in batches of 512 the rate that won for cifar10_tiny
CONTRASTIVE = "simclr"
CHANGES = {  # of cifar10_rn18, tried in call 5
    "today": (),
    "negatives-fade": (*SGD, "0.1", "+beta=1+fade=0.5"),
    "negatives-fade-late": (*SGD, "0.1", "+beta=1+fade=1"),
    CONTRASTIVE: (f"+{UNBLURRED}",),
    f"{CONTRASTIVE}-muon": (f"+{NEGATIVES}+decoupled=true+{MUON}",),
    "muon": (f"+{MUON}",),
    "negatives-fade-muon": (f"+beta=1+fade=0.5+{MUON}",),
}
REHEARSED = ("muon", f"{CONTRASTIVE}-muon")
FIFTH_TESTS = ("tests/gpu", *(f"tests/kernels/test_{name}.py" for name in ("augment", "lars_ema", "batchnorm")))
FINISHED_TRAININGS = {"imagenette": "imagenette_rn18", "cifar10": "cifar10_rn18"}

Stage = tuple[Part, ...]  # parts that run beside one another


@dataclass(frozen=True)
class Where:
    """The command lines of a call's parts: the device, folders and files, the commit for rows, the call's seconds."""

    device: str
    work: Path
    rows: Path
    failed: Path
    facts: Path
    carried: Path
    commit: str | None = None
    deadline_s: float = 400.0
    sets: Sequence[str] = SETS

    @property
    def is_gpu(self) -> bool:
        """Whether this is no rehearsal."""
        return self.device == "cuda"

    @property
    def patience(self) -> float:
        """How many times a part's limit it may take."""
        return 1.0 if self.is_gpu else PATIENCE

    @property
    def workers(self) -> int:
        """Count the threads that may decode, two cores being left to the loop and the driver."""
        return max(available_cores() - 2, 1)

    def images(self, name: str) -> Set:
        """Return the path of a converted set of images."""
        return set_of(name, self.work / "images")


def stages(number: int, where: Where) -> Iterator[Stage]:
    """Return the parts of a call, in the order of what one most needs to know; later ones may depend on rows."""
    made = {1: first, 2: second, 3: third, 4: fourth, 5: fifth}[number](where)
    for stage in made:
        yield tuple(replace(part, limit_s=part.limit_s * where.patience) for part in stage)


def first(where: Where) -> list[Stage]:
    """Do the kernels work, does a training reach its report, how fast is a step and what is it made of."""
    cifar, photographs = where.images("cifar10"), where.images("photographs")
    if where.is_gpu:
        short = ("cifar10_rn18", "--budget", "50s")
        long = ("imagenet_rn50", "--batch-size", "512", "--budget", "90s", "--log-every", "10")
    else:
        short = ("cifar10_tiny", "--budget", f"{REDUCED_BUDGET_S:.0f}s")
        photographs = cifar  # of whose images every twentieth would not make a profile's twenty steps
        long = ("demo", "--epochs", "0.4", "--warmup-epochs", "0.1", "--batch-size", "32", "--log-every", "5")
    return [
        (_tests(where, 90.0), _images(where, 90.0, "cifar10", "photographs")),
        (_training("imagenet-500px", where, 100.0, *long, "--profile", *_data(photographs)),),
        (_bench("step", where, 75.0, "imagenet_rn50"),),
        (_bench("kernels optimizer", where, 60.0),),
        (_training("cifar10", where, 60.0, *short, "--loader", "memory", *_data(cifar), val=cifar.val),),
    ]


def second(where: Where) -> list[Stage]:
    """What failed, a step with a candidate, kernels, optimiser and views alone, a kill, the vendor's tools."""
    killed = ("cifar10_rn18", "--epochs", "3", "--warmup-epochs", "1", "--engine", "graph")
    if not where.is_gpu:
        killed = ("cifar10_tiny", "--epochs", "0.3", "--warmup-epochs", "0.1", "--batch-size", "32")
    resume = _resume(where, 60.0, *killed, *_data(where.images("cifar10")))
    return [
        (_tests_again(where, 80.0), _images(where, 80.0, "cifar10")),
        (_bench("candidates", where, 55.0, "cudnn_benchmark_limit"),),
        (_bench("kernels optimizer views", where, 60.0, "stem", "x7x7", "ema_loss", "LARS", "views"),),
        (resume, _script("tools", "compute-sanitizer", where, 60.0, before=("sanitizer",))),  # neither measures times
        (_script("tools", "ncu", where, 25.0, before=("ncu",)),),
        (_bench("step", where, 45.0, "cifar10"),),
    ]


def third(where: Where) -> list[Stage]:
    """Trainings as long as the deadline lets them be, with kNN and linear scores."""
    made: list[Stage] = [(_images(where, CONVERSION_S, *where.sets, beside=False),)]
    spare = where.deadline_s - CONVERSION_S - CLOSING_S - SCORES_S * len(where.sets)
    budget_s, scores_s = max(spare / len(where.sets), 20.0), SCORES_S
    if not where.is_gpu:
        budget_s = REDUCED_BUDGET_S
    for name in where.sets:
        files = where.images(name)
        recipe = FINISHED_TRAININGS[name] if where.is_gpu else "cifar10_tiny+crop_px=16"
        length = ("--budget", f"{budget_s:.0f}s", *(("--knn-at", "0.25,0.5,0.75") if where.is_gpu else ()))
        linear = f"linear --cached --epochs {20 if where.is_gpu else 2} --skip-random-init"
        part = _training(
            f"{name}-long",
            where,
            budget_s + scores_s,
            recipe,
            *length,
            "--loader",
            "memory",
            *_data(files),
            val=files.val,
            scores=(linear, KNN),
        )
        made.append((part,))
    return made


def fourth(where: Where) -> list[Stage]:
    """Today's step beside plain torch and every candidate, the kernels of a card's aims; a training from photographs.

    What cuDNN fuses comes last, where time is left.
    """
    photographs = where.images("photographs")
    if where.is_gpu:
        length = ("imagenet_rn50", "--batch-size", "512", "--budget", "45s", "--log-every", "10", "--profile")
    else:
        photographs = where.images("cifar10")
        length = ("demo", "--epochs", "0.2", "--warmup-epochs", "0.1", "--batch-size", "32")
    limit_s = 90.0
    asked = ("--out", str(where.work / "commands"), "--limit", f"{limit_s * where.patience:.0f}")
    commands = _script("commands", "commands", where, limit_s + 5.0, *asked, "--device", where.device)
    return [
        (_tests(where, 85.0, "tests/gpu"), _images(where, 75.0, "photographs"), commands),
        (
            _bench(
                "views step candidates", where, 110.0, "views", STEP, "candidate", without=TODAY, repeats=STEP_REPEATS
            ),
        ),
        (_bench("optimizer kernels", where, 60.0, *AIMS),),
        (_training("imagenet-500px", where, 55.0, *length, *_data(photographs)),),
        (_script("graphs", "cuDNN's graphs", where, 100.0, "--limit", f"{85 * where.patience:.0f}"),),
    ]


def fifth(where: Where) -> Iterator[Stage]:
    """Trainings of CIFAR-10, each with one change, scored on images held out; then the best, longer and on all.

    The second part is made when the first has left its rows: the best of BYOL's changes, and the best contrastive one.
    """
    held_out, whole = where.images(DIVIDED), where.images("cifar10")
    yield _images(where, 55.0, "cifar10", DIVIDED), _tests(where, 55.0, *FIFTH_TESTS)
    yield (_bench("views", where, 25.0, without=("reference",)),)
    recipe, length = ("cifar10_rn18", ("--epochs", "10", "--warmup-epochs", "1"))
    longer = ("--epochs", "30", "--warmup-epochs", "3", "--knn-at", "0.5")
    changes = list(CHANGES)
    if not where.is_gpu:
        recipe, length = "cifar10_tiny+crop_px=16", ("--epochs", "0.1", "--warmup-epochs", "0")
        longer, changes = length, list(REHEARSED)

    def training(change: str, files: Set, limit_s: float, length: Sequence[str], *, suffix: str = "") -> Part:
        settings = "".join(word for word in CHANGES[change] if word.startswith("+"))
        flags = (word for word in CHANGES[change] if not word.startswith("+"))
        asked = (recipe + settings, *flags, *length, "--loader", "memory", *_data(files))
        return _training(change + suffix, where, limit_s, *asked, val=files.val)

    yield tuple(training(name, held_out, 115.0, length) for name in changes)  # while one starts, others compute
    contrastive = [name for name in changes if name.startswith(CONTRASTIVE)]
    best = [best_of(where.rows, names) for names in ([n for n in changes if n not in contrastive], contrastive)]
    yield tuple(training(name, whole, 160.0, longer, suffix="-long") for name in best)


def best_of(file: Path, names: Sequence[str]) -> str:
    """Return the training with the best kNN score among those of these names; the first of them without a score."""
    scores = dict.fromkeys(names, 0.0)
    for row in rows.read(file) if file.exists() else ():
        name = str(row["shape"]).partition(",")[0]
        if row["case"] == "training" and name in scores:
            scores[name] = row.get("knn_top1") or 0.0
    return max(names, key=lambda name: scores[name])


def _data(files: Set) -> tuple[str, ...]:
    return "--data", str(files.train)


def _resume(where: Where, limit_s: float, *arguments: str) -> Part:
    given = ("--", *arguments, "--workers", str(where.workers), "--device", where.device)
    return _script("resume", "kill and resume", where, limit_s, "--out", str(where.work / "runs"), *given)


def _pytest(where: Where, limit_s: float, *asked: str) -> Part:
    workers = ("-n", str(TEST_WORKERS)) if where.is_gpu and importlib.util.find_spec("xdist") else ()
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.failures")
    command += ("--failures", str(where.failed), "-o", f"faulthandler_timeout={limit_s / 2:.0f}", *workers, *asked)
    return Part("tests", command, limit_s, {} if where.is_gpu else {"TRITON_INTERPRET": "1"})


def _tests(where: Where, limit_s: float, *asked: str) -> Part:
    return _pytest(where, limit_s, *((asked or ("tests/kernels", "tests/gpu")) if where.is_gpu else REDUCED_TESTS))


def _tests_again(where: Where, limit_s: float) -> Part:
    """Run what failed in the call before, or everything where its failed.txt was not carried."""
    carried = where.carried / "failed.txt"
    if not carried.exists():
        return _tests(where, limit_s)
    names = list(dict.fromkeys(line for line in carried.read_text().splitlines() if line))
    return _pytest(where, limit_s, *names) if names else _said("tests", "nothing failed in the call before")


def _said(name: str, text: str) -> Part:
    return Part(name, (sys.executable, "-c", f"print({text!r})"), 10.0)


def _images(where: Where, limit_s: float, *sets: str, beside: bool = True) -> Part:
    """Convert the carried images of these sets; beside: the tests run at the same time."""
    workers = str(max(os.cpu_count() or 1, 2) // (1 + beside))
    arguments = ["--carried", str(where.carried), "--out", str(where.work / "images"), "--rows", str(where.rows)]
    arguments += [
        "--facts",
        str(where.facts),
        "--workers",
        workers,
        "--every",
        "1" if where.is_gpu else str(REDUCED_EVERY),
        "--sets",
        *(sets if where.is_gpu else ("cifar10", *sets)),
    ]
    return Part("images", (sys.executable, "benchmarks/gpu/images.py", *arguments), limit_s)


def _training(  # what one training differs in
    name: str,
    where: Where,
    limit_s: float,
    *arguments: str,
    val: Path | None = None,
    scores: Sequence[str] = (),
) -> Part:
    asked = [word for protocol in scores for word in ("--score", protocol)]
    asked += ["--val", str(val)] if val is not None else []
    given = (*arguments, "--workers", str(where.workers), "--device", where.device)
    out = str(where.work / "runs" / name)
    return _script("training", f"training {name}", where, limit_s, "--out", out, *asked, "--", *given, before=(name,))


def _script(script: str, name: str, where: Where, limit_s: float, *arguments: str, before: Sequence[str] = ()) -> Part:
    files = ("--rows", str(where.rows), "--facts", str(where.facts))
    return Part(name, (sys.executable, f"benchmarks/gpu/{script}.py", *before, *files, *arguments), limit_s)


def _bench(
    groups: str, where: Where, limit_s: float, *only: str, without: Sequence[str] = (), repeats: int = REPEATS["cuda"]
) -> Part:
    """Run benchmark groups, named with blanks between, in one process; a rehearsal repeats nothing."""
    rounds = repeats if where.is_gpu else REPEATS["cpu"]
    options = ["--device", where.device, "--json", str(where.rows), "--repeats", str(rounds)]
    options += ["--limit", f"{(limit_s - GRACE_S) * where.patience:.0f}"]
    chosen = only if where.is_gpu or groups == "candidates" else ()
    options += [word for text in chosen for word in ("--only", text)]
    options += [word for rival in (*SLOW_RIVALS, *without) for word in ("--without", rival)]
    options += ["--commit", where.commit] if where.commit else []
    name = f"{groups} {', '.join(only)}".strip()
    return Part(name, (sys.executable, "benchmarks/bench.py", *groups.split(), *options), limit_s)
