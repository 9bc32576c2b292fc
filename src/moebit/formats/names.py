"""Names that outputs carry and that transformers has to know before anything of moebit's that needs torch is loaded."""

METHOD = "moebit"  # `quant_method` of native outputs
EXPERTS_IMPLEMENTATION = "moebit"  # `experts_implementation` of native outputs
ACTIVATIONS = "activations"  # what happens to inputs, in `quantization_config`
