"""A checkpoint in another runtime's file format. A call of this package is a call of `coterie.export.run.export`."""

from coterie._callable import make_callable

make_callable(__name__, "coterie.export.run:export")
