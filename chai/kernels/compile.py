"""``python -m chai.kernels.compile``: compile every kernel without a GPU, and report registers and spills.

Spilled registers go to memory, and make a kernel slow. So that counts as an error here, as does more shared memory than
the GPU has.

Exit codes: 0 all fine, 1 some kernel spills, needs too much or does not compile, 2 Triton is missing or interprets.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import chai.kernels
from chai.kernels.compiler import INSTALLED, Case, is_interpreted, triton

#: Architectures, and the bytes of shared memory that a program may have: A100, H100.
ARCHITECTURES = {80: 163 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs of a multiprocessor."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread in local memory
    shared: int  # bytes of shared memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser("python -m chai.kernels.compile", description="Compile the kernels without a GPU.")
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        default=list(ARCHITECTURES),
        choices=list(ARCHITECTURES),
        help="architectures (all)",
    )
    parser.add_argument("--match", default="", metavar="TEXT", help="only kernels whose name has this text")
    options = parser.parse_args(arguments)
    if not INSTALLED or is_interpreted():
        problem = "Triton is not installed" if not INSTALLED else "TRITON_INTERPRET is set"
        print(f"{problem}; valid: an installed Triton that compiles", file=sys.stderr)
        return 2
    failed = 0
    print(f"{'kernel':54}{'GPU':>6}{'registers':>11}{'spilled':>9}{'shared memory':>15}")
    for architecture in options.arch:
        for case in all_cases():
            if options.match not in case.name or architecture not in case.architectures:
                continue
            try:
                usage = compile_case(case, architecture)
            except Exception as error:
                print(
                    f"{case.name:54}{f'sm_{architecture}':>6}  {type(error).__name__}: {str(error)[:200]}", flush=True
                )
                failed += 1
                continue
            failed += usage.spilled > 0 or usage.shared > ARCHITECTURES[architecture]
            print(
                f"{case.name:54}{f'sm_{architecture}':>6}{usage.registers:11}{usage.spilled:9}{usage.shared:15,}",
                flush=True,
            )
    print(f"{failed} of the kernels spill, need too much shared memory or fail" if failed else "no kernel spills")
    return 1 if failed else 0


def all_cases() -> Iterator[Case]:
    """Yield the cases of all modules of the package."""
    for module in pkgutil.iter_modules(chai.kernels.__path__):
        if module.name != "compile":
            yield from getattr(importlib.import_module(f"chai.kernels.{module.name}"), "COMPILED", ())


def compile_case(case: Case, architecture: int) -> Usage:
    """Compile a kernel for a GPU that need not be there."""
    signature = case.signature | dict.fromkeys(case.constants, "constexpr")
    # As at a launch, pointers and strides that are divisible by 16 are compiled as such.
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(case.kernel.arg_names)
        if name in signature
        and (signature[name].startswith("*") or (name.startswith("stride") and not name.startswith("stride_m")))
    }
    source = triton.compiler.ASTSource(case.kernel, signature, case.constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=case.options)
    return read_usage(compiled.asm["cubin"], compiled.metadata.shared)


def read_usage(cubin: bytes, shared: int) -> Usage:
    """Read the registers and the spills of a compiled kernel."""
    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Usage(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], shared)


if __name__ == "__main__":
    sys.exit(main())
