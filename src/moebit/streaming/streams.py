"""The streams that a quantization sends through the layers side by side, and their state between two layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from moebit.storage.files import Entry
from moebit.streaming.stream import Stream


@dataclass(frozen=True)
class Streams:
    """Windows on their way through the model.

    Attributes:
        calibration: the calibration set, through quantized layers.
        reference: the same windows, through the layers in full precision; where something is compared with that.
        pool: further windows for experts that get too few tokens, through quantized layers.
    """

    calibration: Stream
    reference: Stream | None = None
    pool: Stream | None = None

    def _named(self) -> Iterator[tuple[str, Stream]]:
        yield "", self.calibration
        for prefix, stream in (("reference.", self.reference), ("pool.", self.pool)):
            if stream is not None:
                yield prefix, stream

    def state(self) -> dict[str, Tensor]:
        """All that going on needs, by name."""
        return {f"{p}{key}": value for p, s in self._named() for key, value in {"hidden": s.hidden, **s.handed_on()}.items()}

    def take_up(self, state: Mapping[str, Entry]) -> None:
        """Go on from a saved state."""
        for prefix, stream in self._named():
            stream.take_up({name.removeprefix(prefix): entry for name, entry in state.items() if name.startswith(prefix)})
