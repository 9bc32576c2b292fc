"""Judging a model: perplexity, KL divergence to a reference and routing agreement, streamed layer by layer."""
