"""How many experts a token gets. A call of this package is a call of `coterie.route.run.route`."""

from coterie._callable import make_callable

make_callable(__name__, "coterie.route.run:route")
