"""Run a model that is larger than memory. A call of this package is a call of `coterie.run.engine.run`."""

from coterie._callable import make_callable

make_callable(__name__, "coterie.run.engine:run")
