"""The numbers of README and documentation are those of the committed tables, cell by cell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import numbers

TABLE = """# Made up

| name | seconds | |
|---|---:|---|
| a | 7.5 | x |

## One

| bits | method | known, mean | novel |
| --- | --- | ---: | ---: |
| 3 | GPTQ | 1.25 ± 0.04 | 2.50 |
| 4 | GPTQ | 0.25 | 0.50 |

| bits | perplexity |
| --- | ---: |
| 3 | 41.0 |

## Two

| bits | method | known, mean | novel |
| --- | --- | ---: | ---: |
| 3 | GPTQ | 9.00 | 8.00 |
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "made.md").write_text(TABLE, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("made; One; 3 + GPTQ; known, mean", "1.25"),
        ("made; One; 4; novel", "0.50"),
        ("made; Two; 3; novel", "8.00"),
        ("made; One; 3; perplexity", "41.0"),
        ("made; ; a; seconds", "7.5"),
    ],
)
def test_a_place_gets_its_cell(place: str, value: str, results: Path) -> None:
    assert numbers.filled(f"a <!--={place}-->old<!--/--> b", results) == f"a <!--={place}-->{value}<!--/--> b"


@pytest.mark.parametrize("place", ["made; One; GPTQ; novel", "made; One; 5; novel", "made; One; 3; other", "made; Three; 3; novel"])
def test_a_place_that_is_not_one_cell_is_an_error(place: str, results: Path) -> None:
    with pytest.raises(ValueError, match="rows have these cells"):
        numbers.filled(f"<!--={place}-->1<!--/-->", results)


@pytest.mark.parametrize(
    "page", [page for page in numbers.pages() if "<!--=" in page.read_text(encoding="utf-8")], ids=lambda page: page.name
)
def test_pages_have_the_tables_numbers(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == numbers.filled(text), "python docs/numbers.py fills them"


@pytest.mark.parametrize(
    ("page", "places", "settings"), [("README.md", 11, {"15.8", "3.125"}), ("docs/recipes.md", 20, {"2.125", "3.125", "4.125", "8.125"})]
)
def test_no_result_stands_outside_of_a_marked_place(page: str, places: int, settings: set[str]) -> None:
    """Between the two comments that enclose results, every other decimal number is a setting: a size or a width."""
    section = (numbers.ROOT / page).read_text(encoding="utf-8").split("<!-- results -->")[1].split("<!-- /results -->")[0]
    assert len(numbers.PLACE.findall(section)) == places
    assert set(re.findall(r"(?<![\w.])\d+\.\d+", numbers.PLACE.sub("", section))) <= settings
