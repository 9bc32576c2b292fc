"""The steps of a layer, one a file: each takes a context and a state and returns the next state."""
