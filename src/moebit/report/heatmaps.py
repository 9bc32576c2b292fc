"""Heat maps, layers by experts, of what a profile and a plan say: tokens, significance, its dynamics, bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebit.errors import BadInputError
from moebit.formats.profile import Profile
from moebit.methods.significance import dynamics, expert_shares


def layer_maps(profile: Profile) -> dict[str, Tensor]:
    """Title -> [layers, E] (experts that a layer lacks are NaN): share of tokens and of significance per data set, and dynamics.

    1 is the share that every expert would have if they were alike.
    """
    tokens, significance, moving = [], [], []
    for name in profile.experts:
        count = profile.stacked(f"{name}.tokens").double()
        shares = torch.stack([expert_shares(s) for (s,) in profile.over_sets(f"{name}.significance")])
        tokens.append(count / count.sum(1, keepdim=True).clamp(min=1) * count.shape[1])
        significance.append(shares * shares.shape[1])
        moving.append(dynamics(shares * shares.shape[1]).sqrt())
    maps = {}
    for number, name in enumerate(profile.sets):
        maps[f"tokens, {name}"] = _rows([layer[number] for layer in tokens])
        maps[f"significance, {name}"] = _rows([layer[number] for layer in significance])
    if len(profile.sets) > 1:
        maps["dynamics of significance over data sets"] = _rows(moving)
    return maps


def bit_map(profile: Profile, widths: Mapping[str, Mapping[str, int | list[int]]]) -> Tensor:
    """[layers, E] mean width of every expert's weights under a plan's `experts`; NaN where it names none."""
    rows = []
    for name, module in profile.experts.items():
        parts = []
        for part in module.parts:
            given = widths.get(name, {}).get(part, float("nan"))
            parts.append(given if isinstance(given, list) else [given] * module.experts)
        rows.append(torch.tensor(parts, dtype=torch.float64).mean(0))
    return _rows(rows)


def heatmaps(
    profile: str | Path | Profile, directory: str | Path, *, widths: Mapping[str, Mapping[str, Any]] | None = None, format: str = "svg"
) -> list[Path]:
    """Draw every map of a profile, and the bits where `widths` (a plan's experts) are given; returns the files.

    Raises:
        BadInputError: a directory that cannot be made, a format that it does not write.
    """
    import matplotlib
    from matplotlib.figure import Figure

    if format not in ("svg", "png"):
        raise BadInputError(f"heat maps in {format}: choose svg or png")
    found = profile if isinstance(profile, Profile) else Profile.read(profile)
    maps = layer_maps(found) | ({"bits": bit_map(found, widths)} if widths is not None else {})
    target = Path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"{target}: cannot be made ({error.strerror}); choose another directory") from error
    layers, files = [module.layer for module in found.experts.values()], []
    for title, values in maps.items():
        # The same profile gives the same bytes: no date, no random ids.
        with matplotlib.rc_context({"svg.hashsalt": "moebit", "svg.fonttype": "none"}):
            figure = Figure(figsize=(min(16.0, 2.5 + 0.16 * values.shape[1]), min(12.0, 1.5 + 0.28 * len(values))), layout="constrained")
            axes = figure.add_subplot()
            image = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", cmap="viridis")
            axes.set_title(title)
            axes.set_xlabel("expert")
            axes.set_ylabel("layer")
            axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
            figure.colorbar(image, ax=axes, label="bits" if title == "bits" else "share × experts")
            files.append(target / f"{title.replace(', ', '-').replace(' ', '-')}.{format}")
            figure.savefig(files[-1], metadata={"Date": None} if format == "svg" else {})
    return files


def _rows(layers: list[Tensor]) -> Tensor:
    """[layers, E], shorter layers filled with NaN."""
    return torch.nn.utils.rnn.pad_sequence([layer.double() for layer in layers], batch_first=True, padding_value=float("nan"))
