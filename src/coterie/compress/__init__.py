"""Making a model smaller. A call of this package is a call of `coterie.compress.apply.compress`."""

from coterie._callable import make_callable

make_callable(__name__, "coterie.compress.apply:compress")
