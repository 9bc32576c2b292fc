"""`make tables`: what is out of date is made, what is not is left, and a failure does not stop the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.tables import Table


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Table]:
    """Two benchmarks of a project of its own: one writes its table, one fails."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "good.py").write_text("print('working')\nwith open('good.md', 'a') as file:\n    file.write('x')\n")
    (tmp_path / "benchmarks" / "bad.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "src" / "moebit" / "recipe" / "presets").mkdir(parents=True)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return [Table("bad", "bad", models=False, result="bad.md"), Table("good", "good", models=False, result="good.md")]


def test_what_is_out_of_date_is_made(made: list[Table], tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert tables.make_all(made, state, 1) == ["bad"]
    assert (tmp_path / "good.md").read_text() == "x"
    assert (state / "good.log").read_text() == "working\n"
    assert [tables.is_current(table, state) for table in made] == [False, True]
    assert tables.make_all(made, state, 1) == ["bad"]
    assert (tmp_path / "good.md").read_text() == "x"
    with open(tmp_path / "benchmarks" / "good.py", "a") as file:
        file.write("# changed\n")
    assert tables.make_all(made[1:], state, 1) == []
    assert (tmp_path / "good.md").read_text() == "xx"


def test_a_table_that_was_cut_off_is_made_again(made: list[Table], tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert tables.make_all(made[1:], state, 1) == []
    (state / "good.json").write_text('{"key"')
    assert not tables.is_current(made[1], state)
    assert "not made here before" in tables.line(made[1], state)
    assert not tables.is_current(replace(made[1], arguments=("--more",)), state)


def test_every_table_that_is_listed_has_a_benchmark() -> None:
    for table in tables.TABLES:
        for file in (f"{table.module}.py", *table.files):
            assert (tables.ROOT / "benchmarks" / file).is_file(), file


def test_an_unknown_table_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tables.main(["nonsense"])
    assert "no table nonsense; there are solver" in capsys.readouterr().err
