"""Compile every kernel for the GPUs it is meant for, with no GPU: prints what came out as JSON lines.

Run in a process of its own, in which Triton compiles: `python compile_all.py`.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from kvprefetch_kernels import checksum, copy, fp8
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
# What specialisation gives a launch with aligned tensors and sizes that are multiples of 16.
DIVISIBLE = [["tt.divisibility", 16]]


def cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, bool]]:
    """Name, kernel, signature, constants, warps, whether it moves 16 bytes at once."""
    table = {"sources": "*i64", "targets": "*i64", "taken": "*i64", "given": "*i64", "sums": "*i32"}
    counts = dict.fromkeys(("pairs", "planes", "chunks", "vectors", "seed_high", "seed_low"), "i32")
    for warps in (8, 16):
        for lines, width in ((1, 4096), (4, 1024), (8, 512)):
            for checked in (False, True):
                constants = {"LINES": lines, "WIDTH": width, "ALIGNMENT": 16, "WORD": 4, "CHECKED": checked}
                name = f"copy {lines}x{width}, {warps} warps{', checked' * checked}"
                yield name, copy._copy, {**table, **counts}, constants, warps, True
    for alignment, word in ((8, 8), (4, 4), (2, 2), (1, 1)):
        constants = {"LINES": 1, "WIDTH": 1024, "ALIGNMENT": alignment, "WORD": word, "CHECKED": False}
        yield f"copy aligned to {alignment}", copy._copy, {**table, **counts}, constants, 8, False
    sums = {"table": "*i64", "listed": "*i64", "sums": "*i32"}
    sums |= {"words": "i32", "chunks": "i32", "seed_high": "i32", "seed_low": "i32"}
    yield "checksum", checksum._checksum, sums, {"ALIGNMENT": 16, "WIDTH": 2048}, 4, True
    steps = dict.fromkeys(("page_step", "token_step", "head_step", "block", "dim"), "i32")
    packing = {"table": "*i64", "listed": "*i64", "values": "*u8", "scales": "*fp32", **steps}
    for dtype in (tl.bfloat16, tl.float16):
        tile = {"DTYPE": dtype, "ALIGNMENT": 16, "BLOCK": 32, "DIM": 128, "MOST": 65504.0}
        yield f"pack {dtype}", fp8._pack, packing, tile, 4, True
        yield f"unpack {dtype}", fp8._unpack, packing, tile, 4, True


def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, Any], warps: int, arch: int) -> Any:
    """The kernel for `sm_<arch>`, its pointers and sizes as aligned as launches give them."""
    names = kernel.arg_names
    exempt = {*(kernel.do_not_specialize or ()), *(kernel.do_not_specialize_on_alignment or ()), "chunks"}
    aligned = {(names.index(n),): DIVISIBLE for n in signature if n not in exempt}
    full = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, full, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


def spills(ptx: str) -> int:
    """Bytes of spill stores and loads, by the assemblers that Triton brings: the first that takes this PTX."""
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    said = ""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "kernel.ptx"
        file.write_text(ptx)
        for tool in sorted(folder.glob("ptxas*")):
            command = [tool, "-v", f"-arch={target[1]}", file, "-o", Path(scratch) / "kernel.cubin"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            said = done.stdout + done.stderr
            if done.returncode == 0:
                break
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    assert found, said
    return sum(map(int, found))


def main() -> None:
    for name, kernel, signature, constants, warps, wide in cases():
        for arch in ARCHITECTURES:
            ptx = compiled(kernel, signature, constants, warps, arch).asm["ptx"]
            found = {
                "kernel": name,
                "arch": arch,
                "wide": wide,
                "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
                "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
                "spills": spills(ptx),
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
