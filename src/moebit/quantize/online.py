"""Online transforms: made when they are first asked for, checked, and written beside the weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moebit.methods.online import check_orthogonal, duquant_transform, hadamard_transform, site_generator
from moebit.quantize.context import LayerContext
from moebit.tensor.blocks import BlockTransform

Transforms = Mapping[str, BlockTransform]


def with_transform(context: LayerContext, known: Transforms, name: str, sample: Tensor | None) -> Transforms:
    """The known transforms with that of one site, which is made and written if it is not among them.

    Args:
        sample: [S, N] some of the site's inputs, for transforms that are made from them.
    """
    if name in known:
        return known
    spec, generator = context.plan.activations.transforms[name], site_generator(context.seed, name)
    if spec.kind == "hadamard":
        made = hadamard_transform(spec.channels, generator, spec.count)
    else:
        assert sample is not None
        made = duquant_transform(sample.unsqueeze(0), generator)
    put_transform(context, name, made)
    return {**known, name: made}


def chunk_transform(context: LayerContext, name: str, samples_CSN: Tensor, start: int) -> BlockTransform:
    """Transforms of the down projections of experts from `start` on, made from inputs of their own."""
    made = duquant_transform(samples_CSN, site_generator(context.seed, f"{name}.{start}"))
    put_transform(context, name, made, start)
    return made


def put_transform(context: LayerContext, name: str, made: BlockTransform, start: int = 0) -> None:
    """Check a transform and write it."""
    check_orthogonal(made, context.plan.activations.transforms[name].channels, name)
    context.sink.put_transform(context.shard, name, made, start)


def transformed(transform: BlockTransform | None, w_EOI: Tensor, h_EII: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weights and second moments for transformed inputs."""
    if transform is None:
        return w_EOI, h_EII
    return transform.apply(w_EOI.float()), None if h_EII is None else transform.moments(h_EII)


def on_plain_inputs(value_EOI: Tensor, transform: BlockTransform | None) -> Tensor:
    """Weights that were quantized for transformed inputs, as they act on inputs as they are, in the type they come in."""
    return value_EOI if transform is None else transform.undo(value_EOI.float()).to(value_EOI.dtype)
