"""Claims about a model, proved with random values before any work relies on them."""
