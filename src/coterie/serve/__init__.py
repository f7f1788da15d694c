"""Serve a model that is larger than memory. A call of this package is a call of `coterie.serve.run.serve`."""

from coterie._callable import make_callable

make_callable(__name__, "coterie.serve.run:serve")
