"""Serve a model that is larger than memory to whoever speaks the OpenAI API; see `coterie.serve.server.serve`."""
