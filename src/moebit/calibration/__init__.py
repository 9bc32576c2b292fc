"""What a model is calibrated on: windows of tokens, and the statistics that the solvers need from them."""
