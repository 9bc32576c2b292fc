"""What an output takes over from the checkpoint as it stands: tokenizer, generation and template files, and its licence.

Weights, code and papers are not carried, nor is what other quantizers left beside their weights, nor are files that moebit itself gives a
meaning to: those in an output are its own.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection, Iterable
from pathlib import Path

from moebit.errors import BadInputError
from moebit.formats.ownership import JOURNAL, REPORTS, SAMPLE
from moebit.formats.seal import SEALED
from moebit.recipe.reading import DOCUMENT_BYTES
from moebit.storage.durable import new_file
from moebit.storage.files import INDEX
from moebit.storage.places import check_inside, is_plain

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", *LICENCES)
# What says how somebody else quantized: AutoGPTQ and AutoAWQ, NVIDIA ModelOpt, llm-compressor, AutoRound, MLC.
QUANTIZERS = {"quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json", "recipe.yaml",
              "mlc-chat-config.json", "modelopt_state.json"}  # fmt: skip
OWN = {"config.json", SEALED, "overlay.json", "profile.json", "recipe.yaml", SAMPLE, JOURNAL, *REPORTS}
NOT_CARRIED = {*OWN, *QUANTIZERS, INDEX, "training.json", "requirements.txt"}
OWN_KINDS = ("report.", "stream-", "model.safetensors", "calibration.jsonl", "journal.jsonl")


def carried_files(source: Path, taken: Collection[str] = (), *, follow_links: bool = False) -> list[Path]:
    """The files of a checkpoint that its output takes over, by name. `taken`: names that the output has for something else.

    Args:
        follow_links: take what links out of the checkpoint's folder lead to.

    Raises:
        BadInputError: a link that leads out of the checkpoint's folder; one that is no regular file, or too large for what it is called.
    """
    found = {file for pattern in PATTERNS for file in source.glob(pattern) if not file.is_dir()}
    chosen = sorted(file for file in found if file.name not in {*NOT_CARRIED, *taken} and not file.name.startswith(OWN_KINDS))
    for file in chosen:
        if not follow_links:
            check_inside(file)
        _check(file)
    return chosen


def _check(file: Path) -> None:
    found = file.stat()
    if not is_plain(file.name) or not stat.S_ISREG(found.st_mode):
        raise BadInputError(f"{file}: no regular file; remove it, so that it is not carried into the output")
    if found.st_size > DOCUMENT_BYTES:
        raise BadInputError(f"{file}: {found.st_size:,} bytes, too large for what a tokenizer needs; remove it")


def copy_carried(files: Iterable[Path], target: Path) -> None:
    """Copy them, with their content on disk.

    Raises:
        OSError: the disk says no.
    """
    for file in files:
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as original, new_file(target / file.name) as copy:
            shutil.copyfileobj(original, copy)
            os.fsync(copy.fileno())
