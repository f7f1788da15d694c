"""One page with plots from any run folder. A call of this package is a call of `coterie.report.page.report`."""

from coterie._callable import make_callable

make_callable(__name__, "coterie.report.page:report")
