"""Everything goes wrong: kills at every moment, damaged files, hostile documents. `make torture` runs it by time."""
