"""Specialisations of the kernels, those of a ResNet-50 step and edge cases, with the limits of their machine code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from triton import next_power_of_2

from fastbyol.kernels import (
    batchnorm,
    batchnorm_pool,
    batchnorm_statistics,
    blur,
    byol_loss,
    color,
    crop,
    ema_loss,
    lars_ema,
    max_pool,
    pointwise,
    segments,
    stem,
)


@dataclass(frozen=True)
class Build:
    """A specialisation of a kernel as its launcher asks for it, and the limits that it must keep.

    types: Triton's type of every run-time argument, such as "*bf16", "i32", "fp32"; constexprs: the others.
    divisible: integer arguments that are multiples of 16, as the launcher would find them; pointers always are.
    wide_loads, wide_stores: least number of 128-bit global accesses; registers: ceiling per thread;
    barriers: ceiling of barrier instructions; shared: ceiling of shared memory in bytes; products: least number of
    matrix products of sm_90's warp groups; archs: what it is compiled for.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    registers: int
    divisible: Sequence[str] = ()
    wide_loads: int = 0
    wide_stores: int = 0
    barriers: int = 0
    shared: int = 0
    products: int = 0
    archs: Sequence[int] = (80, 90)
    options: Mapping[str, Any] = field(default_factory=dict)


BATCHNORM_SUMS = {"barriers": 16, "shared": 1024}  # programs add up their lanes and warps, once, at the end


def loss_builds() -> tuple[Build, ...]:
    """Build the loss alone and with the targets' sweep, for projections [1024, 256] under autocast and in float32.

    Barriers and shared memory add up the rows of the warps of a program and hand its ticket round: both are meant.
    """
    pointers = {f"{name}_ptr": "*fp32" for name in ("partials", "loss")} | {"ticket_ptr": "*i32"}
    scalars = dict.fromkeys(("pairs", "width", "q_stride", "z_stride", "programs"), "i32")
    tables = {"segments_ptr": "*i64", "segment_of_block_ptr": "*i32", "tau_ptr": "*fp64"}
    shape = {"ROWS": byol_loss.TILE // 256, "BLOCK_D": 256, "CHUNK": byol_loss.CHUNK}
    meant: dict[str, Any] = {"num_warps": segments.NUM_WARPS, "registers": 64, "barriers": 20, "shared": 64}
    builds = []
    for dtype, accesses in (("bf16", 1), ("fp32", 2)):  # of 128 bits, for 8 elements a thread
        types = {f"{name}_ptr": f"*{dtype}" for name in ("q", "z", "dq")} | pointers | scalars
        name, wide = f"{dtype} [1024, 256]", {"wide_loads": 2 * accesses, "wide_stores": accesses}
        kernel = byol_loss.byol_loss_kernel
        builds.append(Build(f"byol_loss {name}", kernel, types, shape, divisible=tuple(scalars), **wide, **meant))
        for is_aligned in (True, False):
            builds.append(
                Build(
                    f"ema_loss {name}{'' if is_aligned else ' unaligned'}",
                    ema_loss.ema_loss_kernel,
                    types | tables,
                    {**shape, "ALIGNED": is_aligned, "BLOCK": segments.BLOCK},
                    divisible=tuple(scalars),
                    wide_loads=2 * accesses + 4 * is_aligned,
                    wide_stores=accesses + 2 * is_aligned,
                    **meant,
                )
            )
    # One image of one number: Triton makes a constant of every argument that is 1, and the only column changes its
    # layout on the way through shared memory.
    types = {f"{name}_ptr": "*fp32" for name in ("q", "z", "dq")} | pointers
    ones = dict.fromkeys(scalars, 1) | {"ROWS": byol_loss.TILE, "BLOCK_D": 1, "CHUNK": byol_loss.CHUNK}
    builds.append(Build("byol_loss fp32 [2, 1]", byol_loss.byol_loss_kernel, types, ones, **{**meant, "shared": 8192}))
    return tuple(builds)


def lars_builds() -> tuple[Build, ...]:
    """Build the three kernels of a LARS step; the sweeps once more for tensors that are not aligned."""
    tables = {"segments_ptr": "*i64", "grads_ptr": "*i64", "segment_of_block_ptr": "*i32", "rates_ptr": "*fp64"}
    norms = {**tables, "partials_ptr": "*fp32", "is_skipped_ptr": "*i32", "blocks": "i32"}
    ratios = {name: norms[name] for name in ("segments_ptr", "rates_ptr", "partials_ptr", "is_skipped_ptr", "blocks")}
    sweep = {**tables, "ratios_ptr": "*fp32", "is_skipped_ptr": "*i32", "skipped_ptr": "*i32"}
    sums: dict[str, Any] = {"barriers": 6, "shared": 64}  # squares are added over the warps of a program
    builds = [
        Build(
            "lars_ratios",
            lars_ema.lars_ratios_kernel,
            {**ratios, "ratios_ptr": "*fp32"},
            {"BLOCK": segments.BLOCK, "CHUNK": lars_ema.CHUNK},
            num_warps=lars_ema.RATIO_WARPS,
            registers=48,
            **sums,
        )
    ]
    for is_aligned in (True, False):
        shape = {"ALIGNED": is_aligned, "BLOCK": segments.BLOCK}
        name = "" if is_aligned else " unaligned"
        warps = segments.NUM_WARPS
        builds += [
            Build(
                f"lars_norms{name}",
                lars_ema.lars_norms_kernel,
                norms,
                shape,
                num_warps=warps,
                registers=40,
                wide_loads=4 * is_aligned,
                **sums,
            ),
            Build(
                f"lars_sweep{name}",
                lars_ema.lars_sweep_kernel,
                sweep,
                shape,
                num_warps=warps,
                registers=64,
                wide_loads=8 * is_aligned,
                wide_stores=6 * is_aligned,
            ),
        ]
    return tuple(builds)


def batchnorm_builds() -> tuple[Build, ...]:
    """Build batch norm's kernels for two views of feature maps of 256 channels.

    Rows that one split holds, and sums over ranks, make a constant of the number of splits, 1.
    """
    launch: dict[str, Any] = {"GROUPS": 2, **batchnorm_statistics.FINALIZE}
    limits: dict[str, Any] = {
        "num_warps": launch.pop("num_warps"),
        "registers": 112,
        "divisible": ("channels",),
        "barriers": 1,
        "shared": 4096,
    }
    limits |= {"wide_loads": 8, **BATCHNORM_SUMS}
    statistics = {f"{name}_ptr": "*fp32" for name in ("partial", "mean", "rstd", "running_mean", "running_var")}
    statistics |= {"batches_ptr": "*i64", "momentum": "fp32", "eps": "fp32"}
    totals = {f"{name}_ptr": "*fp32" for name in ("partial", "sums", "first", "second")}
    numbers = {"channels": "i32", "splits": "i32", "count": "fp32"}
    nothing = {"first_ptr": None, "second_ptr": None}  # forward, the ranks' sums are joined and no gradients
    one, few = {"splits": 1}, limits | {"wide_loads": 2}
    join, finalize = batchnorm_statistics.join_kernel, batchnorm_statistics.finalize_kernel
    alone, synced = {"COUNTED": False, **launch}, {"COUNTED": True, **launch}

    def without(types: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
        return {name: kind for name, kind in types.items() if name not in constants}

    sums, moved = totals | numbers, statistics | numbers
    reduced = (
        Build("batchnorm join", join, sums, launch, **limits),
        Build("batchnorm join one split", join, without(sums, one), launch | one, **few),
        Build("batchnorm join synced", join, without(sums, nothing), launch | nothing, **limits),
        Build("batchnorm finalize", finalize, moved, alone, **limits),
        Build("batchnorm finalize one split", finalize, without(moved, one), alone | one, **few),
        Build("batchnorm finalize synced", finalize, without(moved, one), synced | one, **few),
    )
    return (
        *_batchnorm_tiles("bf16", 2, packing={}),
        *_batchnorm_tiles("fp32", 4, packing={"barriers": 1, "shared": 128}),
        *reduced,
    )


def _batchnorm_tiles(dtype: str, width: int, *, packing: dict[str, int]) -> list[Build]:
    """Build the kernels that read feature maps of numbers of `width` bytes, two wide accesses a thread and tensor.

    packing: what eight channels to a mask byte may cost; in bfloat16 one thread holds them.
    """
    bc = batchnorm_statistics.WIDEST
    x, sizes = f"*{dtype}", {"rows": "i32", "channels": "i32"}
    parts = {"partial_ptr": "*fp32", "rows_per_split": "i32", **sizes}
    channel = {f"{name}_ptr": "*fp32" for name in ("mean", "rstd", "weight", "bias")}

    def build(name: str, kernel: Any, types: dict[str, str], *, registers: int, loads: int, **other: Any) -> Build:
        tile_bytes = batchnorm_statistics.STATS_TILE_BYTES if name == "stats" else batchnorm.TILE_BYTES
        constexprs = {"RELU": other.pop("relu", True), "BM": tile_bytes // width // bc, "BC": bc}
        optional = ("residual_ptr", "mask_ptr", "other_dz_ptr", "g_ptr", "eps")
        constexprs |= {key: None for key in optional if key not in types}
        return Build(
            f"batchnorm {name} {dtype}",
            kernel,
            types,
            {key: value for key, value in constexprs.items() if key in kernel.arg_names},
            num_warps=batchnorm_statistics.WARPS,
            registers=registers,
            divisible=("rows", "channels", "rows_per_split"),
            wide_loads=loads,
            **other,
        )

    stats = {"x_ptr": x, "running_mean_ptr": "*fp32", **parts}
    apply = {"x_ptr": x, "z_ptr": x, **channel, **sizes}
    add = {**apply, "residual_ptr": x, "mask_ptr": "*u8"}
    target_add = {**apply, "residual_ptr": x}
    evaluate, evaluate_add = ({**types, "eps": "fp32"} for types in (apply, target_add))
    sums = {"dz_ptr": x, "x_ptr": x, **channel, **parts}
    add_sums = {**sums, "mask_ptr": "*u8", "g_ptr": x}
    two_sums = {**add_sums, "other_dz_ptr": x}
    dx = {"g_ptr": x, "x_ptr": x, "dx_ptr": x, "sums_ptr": "*fp32", **channel, **sizes}
    plain_limits: dict[str, Any] = {"relu": False, **BATCHNORM_SUMS}
    add_limits: dict[str, Any] = {"wide_stores": 2, **plain_limits}
    return [
        build("stats", batchnorm_statistics.stats_kernel, stats, registers=64, loads=4, **BATCHNORM_SUMS),
        build("sums relu", batchnorm.backward_sums_kernel, sums, registers=96, loads=4, **BATCHNORM_SUMS),
        build("sums plain", batchnorm.backward_sums_kernel, sums, registers=96, loads=4, **plain_limits),
        build("sums add", batchnorm.backward_sums_kernel, add_sums, registers=80, loads=4, **add_limits),
        build("sums add two", batchnorm.backward_sums_kernel, two_sums, registers=80, loads=6, **add_limits),
        build("apply relu", batchnorm.apply_kernel, apply, registers=64, loads=2, wide_stores=2),
        build("apply add", batchnorm.apply_kernel, add, registers=72, loads=4, wide_stores=2, **packing),
        build("apply add target", batchnorm.apply_kernel, target_add, registers=72, loads=4, wide_stores=2),
        build("apply plain", batchnorm.apply_kernel, apply, registers=64, loads=2, wide_stores=2, relu=False),
        build("eval relu", batchnorm.apply_kernel, evaluate, registers=64, loads=2, wide_stores=2),
        build("eval plain", batchnorm.apply_kernel, evaluate, registers=64, loads=2, wide_stores=2, relu=False),
        build("eval add", batchnorm.apply_kernel, evaluate_add, registers=64, loads=4, wide_stores=2),
        build("dx relu", batchnorm.backward_apply_kernel, dx, registers=72, loads=4, wide_stores=2),
        build("dx add or plain", batchnorm.backward_apply_kernel, dx, registers=64, loads=4, wide_stores=2, relu=False),
    ]


def pool_builds() -> tuple[Build, ...]:
    """Build the stem's pooling, forward with and without its places, and backward for one and two gradients."""
    sides = dict.fromkeys(("height", "width", "out_height", "out_width", "channels", "pixels"), "i32")
    forward = {"x_ptr": "*bf16", "z_ptr": "*bf16"}
    backward = {"dz_ptr": "*bf16", "place_ptr": "*u8", "dx_ptr": "*bf16"}
    shape: dict[str, Any] = {"BM": max_pool.TILE // 64, "BC": 64}
    common: dict[str, Any] = {"num_warps": max_pool.WARPS, "divisible": ("channels",)}
    kernels = max_pool.max_pool_kernel, max_pool.max_pool_backward_kernel
    return (
        Build("max_pool bf16", kernels[0], forward | {"place_ptr": "*u8"} | sides, shape, registers=96, **common),
        Build(
            "max_pool target bf16", kernels[0], forward | sides, {**shape, "place_ptr": None}, registers=96, **common
        ),
        Build(
            "max_pool backward bf16",
            kernels[1],
            backward | sides,
            {**shape, "other_dz_ptr": None},
            registers=96,
            **common,
        ),
        Build(
            "max_pool backward two bf16",
            kernels[1],
            backward | {"other_dz_ptr": "*bf16"} | sides,
            shape,
            registers=96,
            **common,
        ),
        *_norm_pool_builds(sides, shape),
    )


def _norm_pool_builds(sides: Mapping[str, str], shape: Mapping[str, Any]) -> tuple[Build, ...]:
    """Build batch norm with pooling. The sums add up a program's lanes and warps, as batch norm's do."""
    norm = {f"{name}_ptr": "*fp32" for name in ("mean", "rstd", "weight", "bias")}
    sizes = {name: kind for name, kind in sides.items() if name != "pixels"} | {"images": "i32"}
    common: dict[str, Any] = {"num_warps": batchnorm_pool.WARPS, "divisible": ("channels",)}
    forward = {"x_ptr": "*bf16", "z_ptr": "*bf16"} | norm | sizes
    backward = {f"{name}_ptr": "*bf16" for name in ("dz", "other_dz", "x")} | {"place_ptr": "*u8"} | norm | sizes
    sums = backward | {"partial_ptr": "*fp32", "pixels_per_split": "i32"}
    apply = backward | {"dx_ptr": "*bf16", "sums_ptr": "*fp32"}
    return (
        Build(
            "norm_pool bf16",
            batchnorm_pool.norm_pool_kernel,
            forward | {"place_ptr": "*u8"},
            shape,
            registers=96,
            **common,
        ),
        Build(
            "norm_pool target bf16",
            batchnorm_pool.norm_pool_kernel,
            forward,
            {**shape, "place_ptr": None},
            registers=96,
            **common,
        ),
        Build(
            "norm_pool sums bf16",
            batchnorm_pool.norm_pool_sums_kernel,
            sums,
            shape,
            registers=144,  # 3 blocks a multiprocessor, whose 22 wide loads in flight are enough
            **common,
            **BATCHNORM_SUMS,
        ),
        Build(
            "norm_pool backward bf16", batchnorm_pool.norm_pool_backward_kernel, apply, shape, registers=128, **common
        ),
    )


def stem_builds() -> tuple[Build, ...]:
    """Build the folding of 224-pixel images. Pixels are loaded one number at a time: no window starts at a word."""
    sides = dict.fromkeys(("height", "width", "rows", "columns"), "i32")
    return tuple(
        Build(
            f"fold {dtype}",
            stem.fold_kernel,
            {"images_ptr": f"*{dtype}", "folded_ptr": "*bf16"} | sides,
            {"CHANNELS": 3, "FOLDED": 64, "BM": stem.TILE // 64},
            num_warps=stem.WARPS,
            registers=64,
            wide_stores=2,
        )
        for dtype in ("bf16", "fp32")
    )


def pointwise_builds() -> tuple[Build, ...]:
    """Build the 1x1 convolution with each choice of tiles, for as many inputs as a block holds and for more.

    For sm_90 alone, whose copies and products it is made for. Registers and shared memory are those that so many
    programs a multiprocessor leave each other.
    """
    numbers = dict.fromkeys(("rows", "channels", "rows_per_split"), "i32")
    builds = []
    for tiles in pointwise.CHOICES:
        bm, bn, bk = tiles.BM, tiles.BN, tiles.BK
        blocks = {"x": (bm, bk), "weight": (bn, bk), "y": (bm, bn)}
        types = {name: f"tensordesc<bf16[{rows}, {columns}]>" for name, (rows, columns) in blocks.items()}
        for inputs in (bk, 8 * bk):
            sizes = pointwise.constants(tiles, inputs=inputs, channels=bn)
            builds.append(
                Build(
                    f"pointwise bf16 {inputs} inputs {bm}x{bn}x{bk} {tiles.stages} stages",
                    pointwise.pointwise_kernel,
                    {**types, "running_mean_ptr": "*fp32", "partial_ptr": "*fp32", **numbers},
                    sizes,
                    num_warps=tiles.warps,
                    registers=min(65536 // (32 * tiles.warps * tiles.blocks) // 8 * 8, 255),
                    divisible=tuple(numbers),
                    barriers=88,  # nearly all when a program adds up its sums, once, at the end
                    shared=228 * 1024 // tiles.blocks - 1024,  # the driver takes 1 KiB of each program
                    products=bm // (16 * sizes["WARP_ROWS"]) * bk // 16,
                    archs=(90,),
                    options={"num_stages": tiles.stages},
                )
            )
    return tuple(builds)


def view_builds() -> tuple[Build, ...]:
    """Build the four launches of 224-pixel views for both dtypes, and of a side that no tile and no access divides.

    Crop and color add up sums over a program's warps: their barriers and shared memory are meant. Crop reads scattered
    words, finish one pixel a thread (see there), so both access narrowly.
    """
    builds = []
    for dtype, between, side in (("bf16", "fp16", 224), ("fp32", "fp32", 224), ("bf16", "fp16", 33)):
        steps, tiles = crop.tiling(side)
        planes = {"planes_ptr": f"*{between}", "params_ptr": "*fp32"}
        crop_types = planes | {"pixels_ptr": "*u8", "offsets_ptr": "*i64", "sizes_ptr": "*i64", "sums_ptr": "*fp32"}
        blur_shape = {"SIDE": side, "RADIUS": side // 20}
        accesses = 0 if side % 16 else 1 if between == "fp16" else 2  # of 128 bits for 8 numbers
        builds += [
            Build(
                f"crop {dtype} {side}",
                crop.crop_kernel,
                crop_types | {"views": "i32", "images": "i32"},
                {"SIDE": side, "STEPS": steps, "ROWS": crop.ROWS, "COLS": crop.COLS},
                num_warps=crop.WARPS,
                registers=64,
                barriers=8,
                shared=64,
            ),
            Build(
                f"color {dtype} {side}",
                color.color_kernel,
                planes | {"sums_ptr": "*fp32"},
                {"AREA": side**2, "TILES": tiles, "TILES_POW2": next_power_of_2(tiles), "BLOCK": color.BLOCK},
                num_warps=color.WARPS,
                registers=80,
                wide_loads=3 * accesses,
                wide_stores=3 * accesses,
                barriers=8,
                shared=64,
            ),
            Build(
                f"blur_down {dtype} {side}",
                blur.blur_down_kernel,
                planes | {"out_ptr": f"*{between}"},
                blur_shape | {"BLOCK": blur.DOWN_BLOCK},
                num_warps=blur.DOWN_WARPS,
                registers=40,
                wide_loads=3 * accesses,
                wide_stores=accesses,
            ),
            Build(
                f"finish {dtype} {side}",
                blur.finish_kernel,
                planes | {"down_ptr": f"*{between}", "out_ptr": f"*{dtype}"},
                blur_shape | {"BLOCK": blur.FINISH_BLOCK},
                num_warps=blur.FINISH_WARPS,
                registers=40,
            ),
        ]
    return tuple(builds)


BUILDS: tuple[Build, ...] = (
    *batchnorm_builds(),
    *loss_builds(),
    *lars_builds(),
    *pool_builds(),
    *stem_builds(),
    *pointwise_builds(),
    *view_builds(),
)
