"""What the compiler says about the kernel, for GPUs that are not there: registers, shared memory, occupancy.

``python -m benchmarks.gpu.compiled`` compiles every tiling and writes ``compiled.md``. It needs no GPU, but the
tools that Triton's wheel for Linux brings along.

Shape letters: C code size.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu.searches import Tiling, kernel_of, tiling_for
from benchmarks.gpu.tuned import TILINGS
from examples.te_vqgan.reports.document import Paragraph, Table, to_markdown
from examples.te_vqgan.runs.files import write_text_atomically

__all__ = ["CAPABILITIES", "Compiled", "compile_tiling", "instructions_per_score", "loops", "occupancy", "table"]

CAPABILITIES = (80, 90)
"""The A100's and the H100's."""

# KiB of shared memory that a multiprocessor of each has for its programs.
_SHARED = {80: 164, 90: 228}
_REGISTERS, _WARPS, _PROGRAMS = 65536, 64, 32
# Registers are handed out to warps in such portions; a program takes 1 KiB of shared memory for itself.
_PORTION, _RESERVED = 256, 1024
_SIZES = (8, 64, 256)
_MANY_ROWS = 1 << 14
_PRODUCTS = ("FFMA", "HMMA", "HGMMA")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")


class Loop(NamedTuple):
    """A loop of the machine code.

    Attributes:
        instructions: in one round.
        products: of them, those that multiply.
    """

    instructions: int
    products: int


class Compiled(NamedTuple):
    """What one tiling compiles to.

    Attributes:
        capability: 80 or 90.
        tiling: the tiling, without channels that short latents do not have.
        size: C that it was compiled for.
        registers: per thread.
        spilled: bytes per thread in memory.
        shared: bytes of shared memory per program.
        tensor_cores: whether they multiply.
        loops: from the innermost outwards.
    """

    capability: int
    tiling: Tiling
    size: int
    registers: int
    spilled: int
    shared: int
    tensor_cores: bool
    loops: tuple[Loop, ...]


def compile_tiling(tiling: Tiling, size: int, capability: int) -> Compiled:
    """Compile the kernel for latents of ``size`` channels and read what came out."""
    kernel, constants, options = kernel_of(tiling, size)
    codes = "*bf16" if tiling.precision == "bf16" else "*fp32"
    types = {"latents": "*fp32", "codes": codes, "half_norms": "*fp32", "center": "*fp32", "scores": "*fp32"}
    types |= {"indices": "*i64", "N": "i32", "K": "i32", "C": "i32", "part": "i32"}
    # Allocations are aligned, and C is a multiple of 16 more often than not.
    aligned: dict[tuple[int], list[list[object]]] = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, type_) in enumerate(types.items())
        if type_.startswith("*") or (name == "C" and size % 16 == 0)
    }
    source = ASTSource(
        fn=kernel, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=aligned
    )
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(result.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(binary))
        code = _tool("nvdisasm", "-c", str(binary))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump must name registers, got {usage!r}.")
    return Compiled(
        capability=capability,
        tiling=tiling,
        size=size,
        registers=int(found[1]),
        spilled=int(found[2]),
        shared=int(result.metadata.shared),
        tensor_cores=re.search(r"\bHG?MMA\b", code) is not None,
        loops=tuple(loops(code)),
    )


def loops(code: str) -> list[Loop]:
    """The loops of machine code that multiply, shortest first."""
    names: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in code.splitlines():
        label = re.match(r"\.(L_x_\d+):", line)
        if label is not None:
            labels[label[1]] = len(names)
            continue
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        target = re.search(r"L_x_\d+", found[2]) if found[1].startswith("BRA") else None
        names.append(found[1].partition(".")[0])
        if target is not None and target[0] in labels:
            spans.append((labels[target[0]], len(names)))
    every = [Loop(end - start, sum(name in _PRODUCTS for name in names[start:end])) for start, end in spans]
    return sorted(loop for loop in every if loop.products)


def instructions_per_score(compiled: Compiled, size: int) -> float | None:
    """How many instructions a thread issues for each of its scores, for codes of ``size`` channels.

    Each round of the loop over codes runs the loop over channels ``size / channels`` times; there is no such loop
    where latents stay in registers. ``None`` where the kernel was compiled for shorter or longer codes.
    """
    tiling, found = compiled.tiling, compiled.loops
    if not found or tiling.keeps_latents(size) != tiling.keeps_latents(compiled.size):
        return None
    outer, inner = found[-1], found[0] if len(found) > 1 else Loop(0, 0)
    if not tiling.keeps_latents(size):
        # Of loops with as many products, the shortest is the loop over channels.
        inner = max(found[:-1], key=lambda loop: (loop.products, -loop.instructions), default=inner)
    rounds = 1 if tiling.keeps_latents(size) else -(-size // tiling.channels)
    total = outer.instructions + inner.instructions * (rounds - 1)
    return total * 32 * tiling.warps / (tiling.rows * tiling.codes)


def occupancy(compiled: Compiled) -> int:
    """How many programs a multiprocessor holds at once."""
    per_warp = -(-compiled.registers * 32 // _PORTION) * _PORTION
    warps = compiled.tiling.warps
    by_registers = _REGISTERS // (per_warp * warps)
    by_shared = _SHARED[compiled.capability] * 1024 // (compiled.shared + _RESERVED)
    return int(min(by_registers, by_shared, _WARPS // warps, _PROGRAMS))


def table(found: Sequence[Compiled]) -> str:
    """The report as Markdown."""
    header = (
        "sm",
        "products",
        "rows x codes x channels",
        "warps",
        "stages",
        "compiled for C",
        "registers",
        "spilled bytes",
        "shared KiB",
        "programs per multiprocessor",
        *(f"instructions per score, C = {size}" for size in _SIZES),
    )
    rows = []
    for one in found:
        tiling = one.tiling
        counts = (instructions_per_score(one, size) for size in _SIZES)
        rows.append(
            [
                str(one.capability),
                tiling.precision,
                f"{tiling.rows} x {tiling.codes} x {tiling.channels}",
                str(tiling.warps),
                str(tiling.stages),
                str(one.size),
                str(one.registers),
                f"{one.spilled:,}",
                f"{one.shared / 1024:.1f}",
                str(occupancy(one)),
                *("–" if count is None else f"{count:.1f}" for count in counts),
            ]
        )
    note = (
        f"Triton {triton.__version__}, no GPU. Float32 products alone take C instructions per score; tensor cores "
        "take far fewer, and wait for them counts as none."
    )
    return to_markdown([Table(header, rows), Paragraph(note)])


def every_tiling() -> Iterator[tuple[Tiling, int]]:
    """Yield each tiling that is prepared, with the code size that it is compiled for; the first one for two."""
    yield TILINGS[0], _SIZES[0]
    for tiling in TILINGS:
        yield tiling, next((size for size in _SIZES[1:-1] if tiling.keeps_latents(size)), _SIZES[-1])


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def main(arguments: Sequence[str]) -> None:
    """Write ``compiled.md``; or print facts about the default tilings for ``--json PRECISION,C ...``."""
    if arguments[:1] == ["--json"]:
        for capability in CAPABILITIES:
            for request in arguments[1:]:
                precision, size = request.split(",")
                one = compile_tiling(tiling_for(precision, _MANY_ROWS, int(size)), int(size), capability)
                print(json.dumps({**one._asdict(), "tiling": one.tiling._asdict()}))
        return
    folder = Path(__file__).parents[1] / "results" / "gpu"
    found = [compile_tiling(*one, capability) for capability in CAPABILITIES for one in every_tiling()]
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / "compiled.md", table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
