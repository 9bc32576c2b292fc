"""Pictures of pages for the docs: python -m docs.pictures.screens PAGE.html PICTURE.png [--width 1100] [--dark] [--until HEADING]

Needs Chromium on PATH, as tests/report/test_screens.py does.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

from tests.report.browser import Browser, chromium

COLOURS = 254  # of the picture: a third of the bytes, and none is off by more than an eye sees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1100)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--until", default="Layers", help="the heading that is not shown any more, nor what follows it")
    given = parser.parse_args()
    program = chromium()
    if program is None:
        sys.exit("no Chromium on PATH")
    with Browser(program) as browser:
        browser.show(given.page, width=given.width, dark=given.dark)
        found = browser.problems() + browser.complaints()
        heading = f"[...document.querySelectorAll('h2')].find(one => one.textContent === {json.dumps(given.until)})"
        end = browser.value(f"({heading})?.getBoundingClientRect().top ?? document.body.scrollHeight")
        browser.screenshot(given.picture)
    image = Image.open(given.picture).convert("RGB")
    shown = image.crop((0, 0, image.width, min(image.height, round(end))))
    shown.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE).save(given.picture, optimize=True)
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()
