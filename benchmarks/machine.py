"""Facts about where a benchmark ran, and running a part of it as a process of its own."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
NOTABLE = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16")


def cpu_flags() -> frozenset[str]:
    """The instruction sets that the kernel lists; empty where there is no /proc/cpuinfo."""
    for line in _cpuinfo():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def has_bf16() -> bool:
    return not cpu_flags().isdisjoint(("amx_bf16", "avx512_bf16"))


def facts(threads: int, options: Sequence[str] = ()) -> str:
    """The foot of a results file, as a Markdown list: command, date, code, versions, machine, threads."""
    name = next((line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    flags = ", ".join(flag for flag in NOTABLE if flag in cpu_flags()) or "none of note"
    versions = ", ".join(f"{package} {version(package)}" for package in ("moebit", "torch", "transformers", "numba"))
    lines = [
        f"command: `{' '.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *options])}`",
        f"date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC; code: {_commit()}",
        f"{versions}, Python {platform.python_version()}",
        f"{name}, {os.cpu_count()} CPUs, {memory:.0f} GB of memory; instruction sets: {flags}",
        f"{threads} thread{'s' if threads != 1 else ''} in every process",
    ]
    return "\n".join(f"- {line}" for line in lines)


def environment(threads: int, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The caller's environment with the number of threads set for every library that asks for one, and the hub switched off."""
    return {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads)), "HF_HUB_OFFLINE": "1", **(more or {})}


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []
