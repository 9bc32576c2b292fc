"""Ways to put a quantized model on disk, one file each, and reading them back."""
