"""GGUF files: written through llama.cpp's own converter, read back, and mapped onto the checkpoint's tensors row by row."""
