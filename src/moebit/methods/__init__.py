"""Methods of quantization: one file per idea, each citing its source and listing its departures."""
