"""What arrives at modules of a layer while a stream runs through it: full precision's side of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from moebit.streaming.stream import Stream


@contextmanager
def captured_inputs(stream: Stream, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collects what arrives at some modules of a layer while it runs inside this context.

    A layer that runs more than once over all windows (its experts are computed in chunks in between) leaves what the last run delivers.

    Args:
        names: of modules inside the layer.

    Yields a dict that will hold [T, N] by name, in the stream's store; without those that are not called once for every token.
    """
    total, found, seen = stream.windows.numel(), dict[str, Tensor](), dict.fromkeys(names, 0)

    def note(name: str, rows: Tensor) -> None:
        if name not in found:
            found[name] = stream.store.allocate((total, rows.shape[1]), rows.dtype)
        begin = seen[name] % total
        kept = rows[: total - begin]
        found[name][begin : begin + len(kept)] = kept
        seen[name] += len(rows)

    with stream.watching(names, note):
        yield found
    for name, count in seen.items():
        if not count or count % total:
            found.pop(name, None)
