"""What a compressed model cost: quality by domain, bytes, memory and speed, each next to the base.

A call of this package is a call of `coterie.evaluate.run.evaluate`.
"""

from coterie._callable import make_callable

make_callable(__name__, "coterie.evaluate.run:evaluate")
