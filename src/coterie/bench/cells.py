"""Cells: one compression and its evaluation each, named by a digest of all that decides what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coterie import __version__
from coterie.artifact import digest_of, file_digest
from coterie.bench.code import code_digests
from coterie.compress.recipes import EFFORTS, RECIPES, ROUTERS, Recipe, get_recipe
from coterie.errors import Infeasible, InputError, UnknownName
from coterie.paths import user_path
from coterie.profile.data_sets import DataSet, is_data_set_name
from coterie.profile.documents import QUESTIONS, text_files
from coterie.profile.sources import On
from coterie.profile.statistics import STATISTICS, needs_gradients

#: Raised when the bench itself comes to measure something else than before.
VERSION = 1

#: What a profile, the scores of a model and a cell come from.
_PROFILE = "coterie.profile.run"
_EVALUATE = "coterie.evaluate.evaluation"
_COMPRESS = "coterie.compress.apply"

#: Tables of which a cell uses some entries, and the one that is in its key with its content.
_PASSES = "coterie.compress.methods"
_ALLOCATORS = "coterie.compress.allocators"
_RESULT_STEPS = "coterie.compress.result_steps"
_STATISTICS = "coterie.profile.statistics"
_RECIPES = {"coterie.compress.recipes": "RECIPES"}

#: Packages whose version may change what comes out.
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSettings:
    """What all cells of a bench share.

    Attributes:
        text: the calibration text, a folder or ``hf:`` and the name of a data set, see `pin_source`.
        text_digest: digest of it.
        test: the test text, likewise.
        test_digest: digest of it.
        tokens: calibration tokens.
        test_tokens: test tokens; the whole text when None.
        questions: questions of each domain at most; all when None.
        on: which tokens count in statistics, losses and scores: "all", or those of answers, "assistant".
        seq_len: tokens in a sequence.
        sample_tokens: tokens of each layer's sample.
        effort: how long recipes that distil train the result.
        device: where layers are computed.
        max_memory: bytes that a cell may take, or None.
        allow_pickle: read weights that are stored as pickles.
    """

    text: str
    text_digest: str
    test: str
    test_digest: str
    tokens: int
    test_tokens: int | None
    questions: int | None
    on: On
    seq_len: int
    sample_tokens: int
    effort: str
    device: str
    max_memory: int | None
    allow_pickle: bool

    def calibration(self) -> dict[str, Any]:
        """Return what decides what a profile holds, the model and the seed apart."""
        return {
            "text": self.text_digest,
            "on": self.on,
            "tokens": self.tokens,
            "seq_len": self.seq_len,
            "sample_tokens": self.sample_tokens,
            "device": self.device,
            "versions": code_version(),
        }

    def test_of(self) -> dict[str, Any]:
        """Return what decides what an evaluation says, the models apart."""
        return {
            "test": self.test_digest,
            "on": self.on,
            "tokens": self.test_tokens,
            "questions": self.questions,
            "seq_len": self.seq_len,
            "device": self.device,
            "versions": code_version(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model of a bench.

    Attributes:
        name: its folder's name, or its hub id.
        path: where it is.
        digest: digest of its checkpoint.
    """

    name: str
    path: str
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One compression and its evaluation.

    Attributes:
        model: what is compressed.
        recipe: name of the recipe.
        router: form of the router, one of `coterie.compress.recipes.ROUTERS`.
        removed: share of the expert parameters that is removed.
        seed: seed of the draw of the calibration text, and of everything random in the recipe.
        settings: what it shares with the others.
    """

    model: Model
    recipe: str
    router: str
    removed: float
    seed: int
    settings: BenchSettings

    @property
    def method(self) -> str:
        """What it is called in tables."""
        return method_name(self.recipe, self.router)

    @property
    def key(self) -> str:
        """Digest of all that decides what comes out."""
        recipe = get_recipe(self.recipe)
        return digest_of(
            {
                "model": self.model.digest,
                "recipe": _decisive(recipe),
                "effort": self.settings.effort if recipe.trains else None,
                "passes": [[name, dict(options)] for name, options in recipe.with_router(self.router)],
                "code": cell_code(recipe, self.router),
                "router": self.router,
                "removed": self.removed,
                "seed": self.seed,
                "calibration": self.settings.calibration() | {"gradients": self.gradients},
                "test": self.settings.test_of(),
            }
        )

    @property
    def gradients(self) -> bool:
        """Whether its profile takes a backward pass."""
        return needs_gradients(get_recipe(self.recipe).needs)

    def identity(self) -> dict[str, Any]:
        """Return what names it in a table."""
        return {
            "model": self.model.name,
            "model_digest": self.model.digest,
            "recipe": self.recipe,
            "router": self.router,
            "removed": self.removed,
            "seed": self.seed,
        }

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON content, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Cell:
        """Return what `to_json` wrote."""
        entry = dict(content)
        return cls(model=Model(**entry.pop("model")), settings=BenchSettings(**entry.pop("settings")), **entry)


def method_name(recipe: str, router: str) -> str:
    """Return what a recipe with a router form is called in tables."""
    return recipe if router == "plain" else f"{recipe} ({router})"


def profile_key(model_digest: str, seed: int, settings: BenchSettings, *, gradients: bool) -> str:
    """Return the digest of all that decides what a profile holds."""
    return digest_of(
        {
            "model": model_digest,
            "seed": seed,
            "gradients": gradients,
            "calibration": settings.calibration(),
            "code": code_digests([_PROFILE]),
        }
    )


def original_key(model_digest: str, settings: BenchSettings) -> str:
    """Return the digest of all that decides what the original itself scores."""
    code = code_digests([_EVALUATE])
    return digest_of({"model": model_digest, "test": settings.test_of(), "code": code})


def code_version() -> dict[str, str]:
    """Return the versions of the bench, Coterie, and the packages that may change what comes out."""
    return {"bench": str(VERSION), "coterie": __version__} | {name: version(name) for name in PACKAGES}


def cell_code(recipe: Recipe, router: str) -> dict[str, str]:
    """Return digests of all code that can change a cell, by module: what it calls, however far away.

    Of the tables of passes, allocators, steps and statistics, the entries that the recipe uses; a table that is not
    known here counts with all of its entries. A pass of the user's own counts with the package that it is in.
    """
    passes = {name for name, _ in recipe.with_router(router)}
    # A value that has no entry of its own name may come from any of them.
    needs = set(recipe.needs)
    entries = {
        _PASSES: passes,
        _ALLOCATORS: {recipe.allocator},
        _RESULT_STEPS: {name for name, _ in recipe.result_steps},
        _STATISTICS: needs if needs <= STATISTICS.keys() else set(STATISTICS),
    }
    own = [name.partition(":")[0] for name in passes if ":" in name]
    return code_digests([_COMPRESS, _PROFILE, _EVALUATE, *own], entries=entries, without=_RECIPES)


def _decisive(recipe: Recipe) -> dict[str, Any]:
    """Return all that a recipe says, but for what it says to readers; its passes depend on the router's form."""
    described = {"summary", "paper", "passes"}
    return {field.name: getattr(recipe, field.name) for field in fields(recipe) if field.name not in described}


def choose_recipes(recipes: str | Sequence[str]) -> tuple[str, ...]:
    """Return names of recipes: all of them for "all", else those that are named, separated by commas.

    Raises:
        UnknownName: no such recipe.
        InputError: none was named.
    """
    if recipes == "all":
        return tuple(RECIPES)
    names = [name.strip() for name in recipes.split(",")] if isinstance(recipes, str) else list(recipes)
    chosen = tuple(dict.fromkeys(name for name in names if name))
    if not chosen:
        raise InputError('no recipe was named; use "all", or names separated by commas')
    for name in chosen:
        get_recipe(name)
    return chosen


def grid(
    models: Sequence[Model],
    *,
    recipes: Sequence[str],
    routers: Sequence[str],
    removed: Sequence[float],
    seeds: Sequence[int],
    settings: BenchSettings,
) -> list[Cell]:
    """Return the cells, model by model and seed by seed; router forms that a recipe has no use for are left out.

    Raises:
        InputError: a share that removes nothing or all, or no router, share or seed.
        UnknownName: no such router form, or effort.
    """
    if settings.effort not in EFFORTS:
        raise UnknownName("effort", settings.effort, EFFORTS)
    for name in routers:
        if name not in ROUTERS:
            raise UnknownName("router form", name, ROUTERS)
    for share in removed:
        if not 0 < share < 1:
            raise InputError(f"{share:g} of the experts cannot be removed: give shares between 0 and 1, like 0.5")
    for what, values in (("router form", routers), ("share to remove", removed), ("seed", seeds)):
        if not values:
            raise InputError(f"no {what} was given; give one or more")
    return [
        Cell(model=model, recipe=recipe, router=router, removed=share, seed=seed, settings=settings)
        for model in models
        for seed in dict.fromkeys(seeds)
        for share in dict.fromkeys(removed)
        for recipe in recipes
        for router in dict.fromkeys(routers)
        if _has_form(get_recipe(recipe), router)
    ]


def _has_form(recipe: Recipe, router: str) -> bool:
    try:
        recipe.with_router(router)
    except Infeasible:
        return False
    return True


def pin_source(source: str | Path) -> str:
    """Return a source of text such that all workers, however late, read the same: a place, or a commit of the hub.

    Raises:
        TextError: a data set that the hub does not have, or no network.
    """
    if is_data_set_name(source):
        return str(DataSet.parse(str(source)).pinned())
    return str(user_path(source).resolve())


def source_digest(source: str) -> str:
    """Return a digest of a source of text that is pinned.

    It is one of the texts and questions in a folder, of all files of a data set's folder, and of a data set of the hub
    that of its commit's name, with configuration and split.

    Raises:
        TextError: a folder without text.
    """
    if not is_data_set_name(source):
        return _folder_digest(Path(source))
    data_set = DataSet.parse(source)
    content: str | dict[str, str] = str(data_set)
    if data_set.folder is not None:
        folder = data_set.folder
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        content = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
    return digest_of([data_set.domain, data_set.config, data_set.split, content])


def _folder_digest(folder: Path) -> str:
    questions = [file for end in QUESTIONS for file in folder.glob(f"*{end}")]
    digests: dict[str, str] = {}
    for file in (*text_files(folder).values(), *questions):
        parts = sorted(part for part in file.rglob("*") if part.is_file()) if file.is_dir() else [file]
        digests |= {part.relative_to(file.parent).as_posix(): file_digest(part) for part in parts}
    return digest_of(digests)
