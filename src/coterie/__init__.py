"""Coterie: make Mixture-of-Experts language models fit the machine you have.

    import coterie

    coterie.inspect("model", budget="12GiB")
    coterie.compress("model", "small", keep=0.5, text="text/calibration")
    [card] = coterie.evaluate("small", against="model", text="text/test")

Names are imported when they are first used, so ``import coterie`` is quick; see `coterie._callable` for why
`coterie.profile`, `coterie.compress`, `coterie.evaluate`, `coterie.export`, `coterie.route`, `coterie.run`,
`coterie.serve`, `coterie.bench` and `coterie.report` are packages that can be called.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coterie.bench.run import bench as bench
    from coterie.compress.apply import compress as compress
    from coterie.compress.decide import plan as plan
    from coterie.compress.frontier import frontier as frontier
    from coterie.compress.plan import Plan as Plan
    from coterie.compress.prices import Prices as Prices
    from coterie.compress.prices import price as price
    from coterie.compress.way import Ways as Ways
    from coterie.compress.ways import ways as ways
    from coterie.evaluate.card import card as card
    from coterie.evaluate.run import evaluate as evaluate
    from coterie.evaluate.scorecard import Scorecard as Scorecard
    from coterie.export.imatrix import imatrix as imatrix
    from coterie.export.run import export as export
    from coterie.model.arch.inspect import inspect as inspect
    from coterie.model.arch.load import load_model as load_model
    from coterie.model.disk.checkpoint import Checkpoint as Checkpoint
    from coterie.profile.calibrate import calibrate as calibrate
    from coterie.profile.profile import Profile as Profile
    from coterie.profile.run import profile as profile
    from coterie.publish.push import push as push
    from coterie.report.page import report as report
    from coterie.route.policy import RoutePolicy as RoutePolicy
    from coterie.route.run import route as route
    from coterie.run.engine import run as run
    from coterie.run.pack import pack as pack
    from coterie.serve.run import serve as serve

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "Plan",
    "Prices",
    "Profile",
    "RoutePolicy",
    "Scorecard",
    "Ways",
    "bench",
    "calibrate",
    "card",
    "compress",
    "evaluate",
    "export",
    "frontier",
    "imatrix",
    "inspect",
    "load_model",
    "pack",
    "plan",
    "price",
    "profile",
    "push",
    "report",
    "route",
    "run",
    "serve",
    "ways",
]

_CALLABLE_PACKAGES = ("bench", "compress", "evaluate", "export", "profile", "report", "route", "run", "serve")
_HOMES = {
    "Checkpoint": "coterie.model.disk.checkpoint",
    "Plan": "coterie.compress.plan",
    "Prices": "coterie.compress.prices",
    "Profile": "coterie.profile.profile",
    "RoutePolicy": "coterie.route.policy",
    "Scorecard": "coterie.evaluate.scorecard",
    "Ways": "coterie.compress.way",
    "calibrate": "coterie.profile.calibrate",
    "card": "coterie.evaluate.card",
    "imatrix": "coterie.export.imatrix",
    "inspect": "coterie.model.arch.inspect",
    "load_model": "coterie.model.arch.load",
    "frontier": "coterie.compress.frontier",
    "pack": "coterie.run.pack",
    "plan": "coterie.compress.decide",
    "price": "coterie.compress.prices",
    "push": "coterie.publish.push",
    "ways": "coterie.compress.ways",
}


def __getattr__(name: str) -> object:
    if name in _CALLABLE_PACKAGES:
        return import_module(f"coterie.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'coterie' has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
