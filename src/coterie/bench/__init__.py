"""The bench: many methods on many models, every cell of the table measured, kept and never computed twice.

A call of this package is a call of `coterie.bench.run.bench`.
"""

from coterie._callable import make_callable

make_callable(__name__, "coterie.bench.run:bench")
