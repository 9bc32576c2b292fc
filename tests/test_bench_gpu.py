"""`benchmarks/gpu.py` runs to its end at toy size on the device of the tests, so that nothing but a real device is untried."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.labelled import labelled_device

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.timeout(1200)  # on a machine that does much else
def test_all_parts_run_and_are_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    for name, stand_in in {
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: 2**20,
        "get_device_name": lambda device: "no device",
        "get_device_properties": lambda device: SimpleNamespace(name="no device"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    runs, results = tmp_path / "runs", tmp_path / "gpu.md"
    options = ["--toy", "--without-triton", "--runs", str(runs), "--results", str(results)]
    with labelled_device(monkeypatch):
        gpu.main([*options, "--only", "codes"])
        assert not results.exists()
        gpu.main(options)
    told = json.loads((runs / "codes-toy.json").read_text())
    assert told["close"]
    assert told["equal"] == told["bytes"]
    text = results.read_text()
    assert "no device" in text
    assert "DeepSeek" not in text
    assert text.count("|") > 40
    sys.modules.pop("gpu")
