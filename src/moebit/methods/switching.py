"""Which channels are kept in full precision because their importance changes with the data (MoQa, 2503.21135), and their later widths.

Dynamics of channel c of expert e: the variance over data sets of `S_ch[e,c|D] / sum S_ch[.|D]`. The most dynamic share of each expert's
channels (the paper) or of each layer's is kept beside the quantized model. When the data changes, experts are clustered again by their
significance on the new text; the kept channels of an expert whose width rises are rounded again, from their full-precision values, to
that width.

Departures. A channel's column of down cannot change its width inside a packed group, so rounded channels are stored by themselves, with
codes and scales of their own, and stand in for the base's. The paper also lowers widths; here an expert whose width falls keeps the
codes it has: the base holds them anyway, and lower ones beside it would cost bytes and accuracy.

Shape suffixes: E experts, I intermediate, D data sets, n channels, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebit.methods.significance import channel_shares, dynamics


def switchable(significance_DEI: Tensor, share: float, per: str = "expert") -> tuple[Tensor, Tensor]:
    """The most dynamic channels, (expert int32 [n], channel int32 [n]) in rising order; ties go to the lower number.

    Args:
        share: of the channels of every expert, rounded, at least one; or of the layer's with `per` layer.
    """
    variance = dynamics(channel_shares(significance_DEI))
    experts, channels = variance.shape
    if per == "layer":
        count = max(1, round(share * experts * channels))
        flat = variance.flatten().argsort(dim=0, descending=True, stable=True)[:count].sort().values
    else:
        count = max(1, round(share * channels))
        chosen = variance.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values
        flat = (torch.arange(experts).unsqueeze(1) * channels + chosen).flatten()
    return (flat // channels).to(torch.int32), (flat % channels).to(torch.int32)


def usage_distance(a_LE: Tensor, b_LE: Tensor) -> Tensor:
    """float64 [L] how far two distributions over a layer's experts are apart: half the sum of absolute differences, 0 to 1.

    It is the share of routed tokens that would have to go to other experts to make one the other.
    """
    return (a_LE.double() - b_LE.double()).abs().sum(-1) / 2
