"""What the compiler makes of a kernel for a GPU that is not here: registers, spills, width of accesses, barriers.

`python benchmarks/aot.py` compiles every build of builds.py for its architectures, sm_80 and sm_90, and prints the
table; --write puts it into docs/performance.md. Never under TRITON_INTERPRET, which replaces the compiler.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from a checkout

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.builds import BUILDS, Build
from benchmarks.document import DOCUMENT, put

REGISTER_FILE = 65536  # 32-bit registers of a multiprocessor, sm_80 and sm_90
MAX_THREADS = 2048  # resident on a multiprocessor
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
BEGIN, END = "<!-- aot table: python benchmarks/aot.py --write -->", "<!-- end of aot table -->"


@dataclass(frozen=True)
class Usage:
    """What the machine code of one build uses; loads and stores are of global memory, by width in bits."""

    registers: int
    stack: int
    spills: int
    shared: int
    barriers: int
    wide_loads: int
    loads: int
    wide_stores: int
    stores: int
    products: int

    def occupancy(self, num_warps: int) -> float:
        """Estimate the share of a multiprocessor's threads that its registers allow, in blocks of num_warps."""
        threads = 32 * num_warps
        rounded = -(-self.registers // 8) * 8  # registers are given out by eights
        return min(REGISTER_FILE // (rounded * threads) * threads / MAX_THREADS, 1.0)


def compile_build(build: Build, arch: int) -> Usage:
    """Compile a build for cuda:arch without a GPU and read its machine code."""
    names = build.kernel.arg_names
    missing = set(names) - build.types.keys() - build.constexprs.keys()
    if missing:
        raise ValueError(f"{build.name}: no type and no value for {', '.join(sorted(missing))}")
    signature = {name: build.types.get(name, "constexpr") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in build.divisible]
    source = ASTSource(
        build.kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in build.constexprs.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": build.num_warps, **build.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _read(compiled.asm["cubin"], shared=compiled.metadata.shared)


def _read(cubin: bytes, *, shared: int) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dumped = {
            flag: subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        }
    used = re.search(r"REG:(\d+) STACK:(\d+)", dumped["-res-usage"])
    assert used, dumped["-res-usage"]
    ops = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", dumped["-sass"], re.MULTILINE)
    loads, stores = ([op for op in ops if op.split(".")[0] == name] for name in ("LDG", "STG"))
    return Usage(
        registers=int(used[1]),
        stack=int(used[2]),
        spills=sum(op.split(".")[0] in ("LDL", "STL") for op in ops),
        shared=shared,
        barriers=sum(op.startswith("BAR") for op in ops),
        wide_loads=sum("128" in op for op in loads),
        loads=len(loads),
        wide_stores=sum("128" in op for op in stores),
        stores=len(stores),
        products=sum(op.startswith("HGMMA") for op in ops),
    )


def broken_limits(build: Build, usage: Usage) -> list[str]:
    """List the limits of the build that its machine code breaks."""
    checks = (
        (usage.spills == 0, f"{usage.spills} spills"),
        (usage.stack == 0, f"{usage.stack} bytes of stack"),
        (usage.registers <= build.registers, f"{usage.registers} registers, at most {build.registers}"),
        (usage.wide_loads >= build.wide_loads, f"{usage.wide_loads} 128-bit loads, at least {build.wide_loads}"),
        (usage.wide_stores >= build.wide_stores, f"{usage.wide_stores} 128-bit stores, at least {build.wide_stores}"),
        (usage.barriers <= build.barriers, f"{usage.barriers} barriers, at most {build.barriers}"),
        (usage.shared <= build.shared, f"{usage.shared} bytes of shared memory, at most {build.shared}"),
        (usage.products >= build.products, f"{usage.products} products of warp groups, at least {build.products}"),
    )
    return [fault for holds, fault in checks if not holds]


def table(usages: Sequence[tuple[Build, int, Usage]]) -> str:
    """Format the figures as a Markdown table, under the version of the compiler that made them."""
    names = ("kernel", "arch", "warps", "registers", "occupancy", "spills", "shared", "barriers", "loads", "stores")
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    for build, arch, usage in usages:
        cells = (
            build.name,
            f"sm_{arch}",
            build.num_warps,
            usage.registers,
            f"{usage.occupancy(build.num_warps):.0%}",
            usage.spills,
            usage.shared,
            usage.barriers,
            f"{usage.wide_loads} of {usage.loads} wide",
            f"{usage.wide_stores} of {usage.stores} wide",
        )
        lines.append(" | ".join(map(str, cells)))
    return "\n".join((f"Compiled by Triton {triton.__version__}.", "", *(f"| {line} |" for line in lines)))


def main() -> int:
    """Compile every build, print the table, return 1 where a limit is broken."""
    parser = argparse.ArgumentParser(prog="aot.py", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", default="", help="builds whose name holds this")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args()
    chosen = [build for build in BUILDS if args.only in build.name]
    usages = [(build, arch, compile_build(build, arch)) for build in chosen for arch in build.archs]
    broken = [f"{b.name} sm_{a}: {fault}" for b, a, usage in usages for fault in broken_limits(b, usage)]
    print(table(usages))
    print("\n".join(broken), file=sys.stderr)
    if args.write:
        put(table(usages), DOCUMENT, BEGIN, END)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
