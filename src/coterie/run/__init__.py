"""Executing a model that is larger than memory: experts are read from its files when a token needs them."""
