"""What text does to a model's experts. A call of this package is a call of `coterie.profile.run.profile`."""

from coterie._callable import make_callable

make_callable(__name__, "coterie.profile.run:profile")
