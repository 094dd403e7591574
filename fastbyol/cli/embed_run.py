"""What fastbyol-embed does with its flags: vectors of a source's images in a file, and what follows from them."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fastbyol
from fastbyol.beton import UNLABELLED, BetonError, Reader
from fastbyol.cli.cache import Cache, folder_of
from fastbyol.cli.encoders import open_encoder, settle_px
from fastbyol.embed import clusters, formats, layout, neighbours, page, vectors
from fastbyol.embed.formats import Embedding
from fastbyol.embed.neighbours import Nearest
from fastbyol.embed.vectors import Partial, Vectors
from fastbyol.errors import ConfigError, require
from fastbyol.evaluate.features import OutOfTime, evenly_spaced
from fastbyol.evaluate.images import InputSettings
from fastbyol.export import IN_FOLDER
from fastbyol.jpeg import require_pillow
from fastbyol.loaders import default_workers
from fastbyol.model.parts import Encoder
from fastbyol.storage.checkpoint import CheckpointError
from fastbyol.storage.identity import identify
from fastbyol.storage.maps import add_map
from fastbyol.storage.run_folder import RunFolder
from fastbyol.system import threads
from fastbyol.system.command_line import BAD_INPUT, DONE, INTERRUPTED, fail, naming_memory
from fastbyol.system.device import choose_device
from fastbyol.system.limits import available_cores
from fastbyol.system.signals import StopSignal

Facts = dict[str, Any]
OF_MACHINE = ("cache", "device", "json", "threads", "workers")  # flags that change no file


def run(args: argparse.Namespace) -> int:
    """Write the vectors; return the exit status."""
    signal = StopSignal()
    try:
        with signal.catch(), naming_memory():
            require_pillow()
            facts = embed(args, stop=lambda: signal.has_arrived)
    except (KeyboardInterrupt, OutOfTime):
        _notify("interrupted; the same command goes on where it stopped")
        return INTERRUPTED
    except (ConfigError, BetonError, CheckpointError, OSError) as error:
        return fail("fastbyol-embed", error, status=BAD_INPUT)
    print(json.dumps(facts) if args.json else summary(facts))
    return DONE


def embed(args: argparse.Namespace, *, stop: Callable[[], bool]) -> Facts:
    """Compute the vectors and write their file; return what was done."""
    check_output(args)
    encoder, inputs, folder = _open_encoder(args)
    cache = Cache(folder_of(folder, args.cache), tuple(args.prep), command="fastbyol-embed")
    with Reader(cache.beton(args.source)) as reader:
        _check_number(args, len(reader))
        for path in (args.out, *([] if args.map is None else [args.map])):
            path.parent.mkdir(parents=True, exist_ok=True)
        key, name = _key(args, encoder, reader, inputs), _command(args)
        with Partial(partial_path(args.out), key, width=encoder.features, dtype=args.dtype, command=name) as partial:
            pace = _compute(args, encoder.to(inputs.device), reader, inputs, partial, stop)
            found = partial.vectors()
            require(len(found) > 0, f"no image of {reader.path} decodes; write it anew with fastbyol-prep")
            embedding = _describe(reader, found)
            if args.clusters:
                groups = clusters.cluster(
                    found, args.clusters, seed=args.seed, device=inputs.device, threads=inputs.threads
                )
                embedding = dataclasses.replace(embedding, clusters=groups)
            more = _compare(args, reader, embedding, inputs)
            formats.write(args.out, embedding)  # the last: where it exists, all is done
        partial.path.unlink()
    return {
        "run": args.encoder,
        "source": args.source,
        "file": str(args.out),
        "images": len(found),
        "left_out": found.left_out,
        "features": found.features,
        "dtype": args.dtype,
        "normalized": args.normalize,
        **pace,
        **({"clusters": args.clusters} if args.clusters else {}),
        **more,
    }


def partial_path(out: Path) -> Path:
    """Return the path of the vectors computed so far."""
    return out.with_name(f".{out.name}.vectors")


def check_output(args: argparse.Namespace) -> None:
    """Raise ConfigError for a file that cannot be written, before anything is computed."""
    require(not args.out.is_dir(), f"--out {args.out} is a folder; give the name of a file in it")
    tables = {"neighbours": args.neighbours, "duplicates": args.duplicates}
    others = [beside(args.out, what) for what, asked in tables.items() if asked is not None]
    others += formats.companions(args.out, has_clusters=bool(args.clusters))
    is_begun = vectors.read_command(partial_path(args.out)) == _command(args)  # and stopped: it wrote the others
    for path in (args.out, *([] if is_begun else others)):
        require(args.overwrite or not path.exists(), f"{path} already exists; give --overwrite or another --out")
    if args.map is not None:
        require(not args.map.is_dir(), f"--map {args.map} is a folder; give the name of a file in it")
        is_free = args.overwrite or is_begun or not args.map.exists()
        require(is_free, f"{args.map} already exists; give --overwrite or another --map")
        layout.require_package(args.layout or page.LAYOUT)
    if args.out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"{args.out} needs pyarrow; pip install 'fastbyol[parquet]', or give a name in .npz or .csv")


def _command(args: argparse.Namespace) -> str:
    """Return a digest of the flags that decide what is written: the same for a command that is given again."""
    asked = {name: value for name, value in vars(args).items() if name not in OF_MACHINE}
    places = {name: value.absolute() if isinstance(value, Path) else value for name, value in asked.items()}
    return hashlib.blake2b(repr(sorted(places.items())).encode(), digest_size=16).hexdigest()


def _check_number(args: argparse.Namespace, images: int) -> None:
    """Raise ConfigError where what is asked for needs more images, before they are embedded."""
    if args.clusters:
        clusters.check_number(args.clusters, images)
    if args.map is not None:
        layout.check_number(args.layout or page.LAYOUT, min(images, page.POINTS_MAX))


def _open_encoder(args: argparse.Namespace) -> tuple[Encoder, InputSettings, Path]:
    """Open the encoder and settle at what size it sees images; return also what a cache may lie beside."""
    named = open_encoder(args.encoder, notify=_notify)
    px = settle_px(args.encoder, named, args.px)
    device = choose_device(args.device)
    tuner = threads.make_tuner(args.threads, device, notify=_notify)
    workers = args.workers or default_workers(device, cores=available_cores())
    inputs = InputSettings(px, args.margin or named.margin, workers, device, args.on_error, threads=tuner)
    return named.encoder, inputs, named.folder.path


def _key(args: argparse.Namespace, encoder: Encoder, reader: Reader, inputs: InputSettings) -> str:
    """Return the key of everything that the vectors depend on."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().view(-1).numpy().tobytes())
    settings = (inputs.px, inputs.margin, inputs.device, inputs.on_error, args.dtype, args.normalize)
    digest.update(repr((fastbyol.__version__, settings, identify(reader))).encode())
    return digest.hexdigest()


def _compute(
    args: argparse.Namespace,
    encoder: Encoder,
    reader: Reader,
    inputs: InputSettings,
    partial: Partial,
    stop: Callable[[], bool],
) -> Facts:
    """Compute the vectors that are missing; return how many were there and the pace of the others."""
    resumed, began_s = partial.done, time.perf_counter()
    if resumed:
        _notify(f"{resumed} of {len(reader)} images were done before")
    try:
        vectors.compute(encoder, reader, inputs, partial, has_unit_length=args.normalize, stop=stop)
    except (KeyboardInterrupt, OutOfTime):
        _notify(f"{partial.done} of {len(reader)} images are done")
        raise
    took_s = time.perf_counter() - began_s
    return {"resumed_at": resumed, "images_per_s": round((partial.done - resumed) / took_s, 1)}


def _describe(reader: Reader, found: Vectors) -> Embedding:
    """Join the vectors with the names and labels of their images; an image without a name has its sample number."""
    names, samples = reader.names(), found.samples
    return Embedding(
        found,
        list(map(str, samples)) if names is None else [names[sample] for sample in samples.tolist()],
        np.full(len(samples), UNLABELLED) if reader.labels is None else reader.labels[samples],
        reader.class_names,
    )


def beside(out: Path, what: str) -> Path:
    """Return the path of a table that belongs to a file of vectors: parquet beside parquet, else CSV."""
    return out.with_suffix(f".{what}{'.parquet' if out.suffix == '.parquet' else '.csv'}")


def _compare(args: argparse.Namespace, reader: Reader, embedding: Embedding, inputs: InputSettings) -> Facts:
    """Write the neighbours, the near copies and the map that were asked for; return their files."""
    facts: Facts = {}
    is_whole = args.map is not None and len(embedding) <= page.POINTS_MAX
    k = max(args.neighbours or 0, page.NEAREST if is_whole else 0)
    nearest = None
    if k or args.duplicates is not None:
        nearest, pairs = neighbours.compare(
            embedding.vectors, k=k, above=args.duplicates, device=inputs.device, threads=inputs.threads
        )
        if args.neighbours:
            facts["neighbours"] = str(beside(args.out, "neighbours"))
            neighbours.write_nearest(beside(args.out, "neighbours"), embedding.names, nearest.first(args.neighbours))
        if args.duplicates is not None:
            facts |= {"duplicates": str(beside(args.out, "duplicates")), "pairs": len(pairs.rows)}
            neighbours.write_pairs(beside(args.out, "duplicates"), embedding.names, pairs)
    if args.map is not None:
        facts["map"] = _draw_map(args, reader, embedding, nearest if is_whole else None, inputs)
    return facts


def _draw_map(
    args: argparse.Namespace, reader: Reader, embedding: Embedding, nearest: Nearest | None, inputs: InputSettings
) -> Facts:
    """Write the map of all images or, where they are too many, of a part of them; return what it shows.

    nearest: the neighbours, if they are known of what is shown.
    """
    whole, method = len(embedding), args.layout or page.LAYOUT
    if nearest is None:
        embedding = embedding.part(evenly_spaced(whole, page.POINTS_MAX))
        nearest, _ = neighbours.compare(embedding.vectors, k=page.NEAREST, device=inputs.device, threads=inputs.threads)
    places = layout.lay_out(embedding.vectors, method, seed=args.seed, device=inputs.device)
    shown = page.write(
        args.map,
        reader,
        embedding,
        nearest.first(page.NEAREST),
        places,
        title=Path(args.source).name or args.source,
        facts=[*([f"of {whole:,}"] if len(embedding) < whole else []), layout.TITLES[method]],
        workers=available_cores(),
    )
    _link_map(args, whole)
    return {"file": str(args.map), **shown._asdict()}


def _link_map(args: argparse.Namespace, images: int) -> None:
    """Link the map in the report of the run, if the encoder is that of a run; where that fails, say so."""
    run = RunFolder(Path(args.encoder))
    if not run.config.is_file() or (run.path / IN_FOLDER).is_file():
        return
    try:
        add_map(run, args.map, title=Path(args.source).name or args.source, images=images)
    except OSError as error:
        _notify(f"warning: the map is not linked in the report of {run.path}: {error}")


def _notify(text: str) -> None:
    print(f"fastbyol-embed: {text}", file=sys.stderr)


def summary(facts: Facts) -> str:
    """Summarise what was written, a line for each file."""
    left_out = f", {facts['left_out']} left out" if facts["left_out"] else ""
    groups = f", in {facts['clusters']} groups" if "clusters" in facts else ""
    lines = [
        f"{facts['file']}: {facts['images']} vectors of {facts['features']} numbers{left_out}{groups}, "
        f"{facts['images_per_s']:.0f} images/s"
    ]
    if "neighbours" in facts:
        lines.append(f"{facts['neighbours']}: the most similar images of each")
    if "duplicates" in facts:
        lines.append(f"{facts['duplicates']}: {facts['pairs']} pairs of near copies")
    if "map" in facts:
        shown = facts["map"]
        lines.append(
            f"{shown['file']}: {shown['points']} images, {shown['thumbnails']} of them as thumbnails, "
            f"{shown['bytes'] / 1e6:.1f} MB"
        )
    return "\n".join(lines)
