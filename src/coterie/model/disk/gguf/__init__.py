"""GGUF files: what their names, shapes and fields mean in those of transformers, told once for both directions."""
