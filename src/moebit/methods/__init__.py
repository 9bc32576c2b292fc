"""Methods: one file per idea, functions from stacked tensors to stacked tensors, each citing its equations."""
