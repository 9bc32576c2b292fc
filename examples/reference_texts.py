"""Cut the shipped reference texts and the training parts out of the source corpora.

    python examples/reference_texts.py --data DATA --out reference/text --train runs/corpus

`DATA` holds the public files named in `SOURCES` below (NOTICE says where they come from and under which
licence). Of every domain three disjoint pieces are shipped: `calib` (text the models were trained on, for
calibration), `tune` (held out, for choosing between settings) and `eval` (held out, only for the tables).
What the models are trained on is written to the `--train` directory and is not shipped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

KIB = 1024
CALIB, TUNE, EVAL = 256 * KIB, 128 * KIB, 256 * KIB

# domain -> (train, tune, eval) files; one file means that its tail is held out.
SOURCES: dict[str, tuple[str, ...]] = {
    "wiki": ("wikitext2/wiki.train.tokens", "wikitext2/wiki.valid.tokens", "wikitext2/wiki.test.tokens"),
    "novels": ("text/en_novels.txt",),
    "python": ("text/code_python_stdlib.py",),
    "speeches": ("text/en_speeches.txt",),
    "shakespeare": ("text/en_shakespeare.txt",),
    "c": ("text/code_c_curl.c",),
    "german": ("text/de_novels.txt",),
    "french": ("text/fr_novels.txt",),
}
TRAINED = ("wiki", "novels", "python", "speeches")


def cut(text: str, start: int, size: int) -> str:
    """`size` bytes of `text` from byte `start`, moved to the next line starts on both ends."""
    raw = text.encode()
    begin = 0 if start == 0 else raw.index(b"\n", start) + 1
    end = raw.rindex(b"\n", begin, min(len(raw), begin + size)) + 1
    return raw[begin:end].decode()


def split(data: Path, files: tuple[str, ...]) -> tuple[str, str, str, str]:
    """(train, calib, tune, eval) texts of one domain."""
    texts = [(data / name).read_text(encoding="utf-8") for name in files]
    if len(texts) == 3:
        train, tune, held = texts
        return train, cut(train, 0, CALIB), cut(tune, 0, TUNE), cut(held, 0, EVAL)
    raw = len(texts[0].encode())
    held_out = cut(texts[0], raw - TUNE - EVAL - 2 * KIB, raw)
    train = texts[0].encode()[: -len(held_out.encode())].decode()
    tune = cut(held_out, 0, TUNE)
    return train, cut(train, 0, CALIB), tune, cut(held_out, len(tune.encode()), EVAL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.train.mkdir(parents=True, exist_ok=True)
    for domain, files in SOURCES.items():
        train, *pieces = split(args.data, files)
        for kind, text in zip(("calib", "tune", "eval"), pieces, strict=True):
            (args.out / f"{domain}.{kind}.txt").write_text(text, encoding="utf-8")
        if domain in TRAINED:
            (args.train / f"{domain}.txt").write_text(train, encoding="utf-8")


if __name__ == "__main__":
    main()
