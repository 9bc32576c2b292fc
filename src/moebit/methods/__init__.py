"""What is done to a model before or around rounding, one idea per file, each citing its source and listing its departures."""
