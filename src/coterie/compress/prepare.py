"""Prepare a compression: everything is opened once, checked and announced, and nothing is computed yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from coterie.amounts import parse_bytes, parse_share
from coterie.compress.allocators.expert_types import are_small
from coterie.compress.damages import PRICED_TOKENS
from coterie.compress.decide import (
    check_prices,
    check_profile,
    check_sequential,
    checked,
    completed,
    needs_of_plan,
    outline,
)
from coterie.compress.memory_budget import weights_budget
from coterie.compress.output import check_space
from coterie.compress.pack_forecast import PackForecast
from coterie.compress.plan import Mtp, Plan
from coterie.compress.prices import FILE as PRICES_FILE
from coterie.compress.prices import KEPT, Prices, Pricing, pricing_of
from coterie.compress.recipes import Recipe, get_recipe, training_tokens, trains_in
from coterie.compress.request import Request
from coterie.compress.result_steps import LeftOut, load_result_step
from coterie.compress.search.run import Search, search_of
from coterie.compress.source import Source
from coterie.compress.stock import NAME as STOCK
from coterie.compress.stock import prepare_stock
from coterie.compress.target import Reader, Target, option_of
from coterie.compress.times import checking_time, compressing_time, unit_seconds
from coterie.errors import InputError
from coterie.model.arch.run_settings import Running
from coterie.model.device import check_device
from coterie.model.disk.checkpoint import Checkpoint, Fetch
from coterie.model.disk.manifest import RouterForm
from coterie.model.stream.memory import COMPRESS_COPIES, Forecast, Stage, sample_lines, unit_lines
from coterie.model.stream.stream import Stream
from coterie.outputs import check_output, is_empty_folder
from coterie.paths import user_path
from coterie.profile.calibration import TokenSet
from coterie.profile.data_sets import local_place
from coterie.profile.measure import Measure, ProfileSettings
from coterie.profile.profile import FILE as PROFILE_FILE
from coterie.profile.profile import Profile
from coterie.profile.sources import On, check_on
from coterie.profile.statistics import needs_gradients, wanted_statistics
from coterie.profile.text import CalibrationText, TextSettings, UnwrittenText
from coterie.progress import StageTime

Inputs = Literal["original", "compressed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """All that `coterie.compress` can be told; see there. `dry` for a run that is only to be foretold."""

    model: str | Path
    out: Path
    target: Target
    plan: Plan | str | Path | None
    recipe: str | Recipe | None
    effort: str
    train_tokens: int | None
    router: RouterForm | None
    profile: Profile | str | Path | None
    text: str | Path | None
    weights: Mapping[str, float] | None
    tokens: int
    seq_len: int
    seed: int
    sample_tokens: int
    device: str
    inputs: Inputs
    output_dtype: str
    max_memory: int | str | None
    allow_pickle: bool
    cache: Path | None
    prices: Prices | str | Path | None
    mtp: Mtp | None
    on: On | None
    search: int | None = None
    dry: bool = False

    @classmethod
    def of(
        cls,
        *,
        out: str | Path,
        keep: float | str | None,
        experts: int | None,
        width: int | None,
        budget: str | int | None,
        params: str | int | None,
        active_params: str | int | None,
        bits: float | None,
        type: str | None,
        multiple_of: int | None,
        target: Reader | None,
        experts_only: bool,
        running: Running | None,
        cache: str | Path | None,
        **others: Any,
    ) -> Options:
        """Return the arguments of `coterie.compress` in one."""
        share = None if keep is None else parse_share(keep)
        budget = weights_budget(others["model"], budget, running, target)
        size = Target(
            keep=share, experts=experts, width=width, budget=budget, params=params,
            active_params=active_params, bits=bits, type=type, multiple_of=multiple_of, reader=target,
            experts_only=experts_only,
        )  # fmt: skip
        return cls(out=user_path(out), target=size, cache=None if cache is None else Path(cache), **others)

    @property
    def limit(self) -> int | None:
        """Bytes of memory that the run may take."""
        return None if self.max_memory is None else parse_bytes(self.max_memory)

    def request(self) -> Request | None:
        """Return what is asked for; None where a plan says it all.

        Raises:
            InputError: both a plan and what a plan says already, or something that no model could be given.
        """
        if self.plan is not None:
            target = self.target
            settings: dict[str, object] = {option_of(name): value for name, value in target.sizes.items()}
            settings |= {
                "--recipe": self.recipe,
                "--router": self.router,
                "--mtp": self.mtp,
                "--multiple-of": target.multiple_of,
                "--target": target.reader,
                "--experts-only": target.experts_only or None,
                "--search": self.search or None,
            }
            if given := [name for name, value in settings.items() if value is not None]:
                raise InputError(f"the plan says how small and how; leave {', '.join(given)} out, or --plan")
            return None
        recipe = get_recipe(self.target.recipe_meant(self.recipe))
        request = Request(
            recipe=recipe, target=self.target, router=self.router or "plain", seed=self.seed, search=self.search or 0
        )  # fmt: skip
        request.check()
        return request


@dataclass(kw_only=True)
class Job:
    """A compression that can begin.

    Attributes:
        options: what was asked for.
        source: the original.
        stream: the same, to run text through.
        request: what was asked for; None where a plan was given.
        outline: what each layer becomes; without a plan that was given, it names no experts yet.
        profile: what was measured already; None where that is still to be done.
        measure: what is to be measured; None where there is a profile.
        forecast: the memory that each stage takes.
        seconds: how long each unit is reckoned to take to be compressed, by its name.
        calibration: the text, tokenized once; None where none was given.
        result_steps: what each step on the whole result prepared; `LeftOut` for one that cannot be done, None for one
            that was not asked for.
        recorded: what the header of the run that goes on says of these steps; empty for a run that begins.
        numerics: what is computed with, see `coterie.model.numerics`.
        prices: what types cost, where that was measured before.
        pricing: what measures it; None where that is done or not asked for.
        search: what looks for better types than those that were chosen; None where that is not asked for.
        stock: what loading the result with transformers takes, or why that is left out; None where it is not integers.
    """

    options: Options
    source: Source
    stream: Stream
    request: Request | None
    outline: Plan
    profile: Profile | None
    measure: Measure | None
    forecast: Forecast
    calibration: CalibrationText | None
    result_steps: dict[str, Any] = field(default_factory=dict)
    recorded: Mapping[str, Any] = field(default_factory=dict)
    numerics: Mapping[str, str | int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    prices: Prices | None = None
    pricing: Pricing | None = None
    search: Search | None = None
    stock: Stage | LeftOut | None = None

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """Statistics that the passes read."""
        return needs_of_plan(self.outline)

    @property
    def planned(self) -> Plan:
        """What each layer becomes; with the experts named where a profile is there."""
        profile = self.profile
        return self.outline if profile is None else completed(self.source, self.outline, self.request, profile)

    @property
    def left_out(self) -> dict[str, str]:
        """Why steps of the recipe on the whole result, or its check, are left out, by name."""
        steps = {**self.result_steps, STOCK: self.stock}
        return {name: step.reason for name, step in steps.items() if isinstance(step, LeftOut)}

    @property
    def times(self) -> tuple[StageTime, ...]:
        """The stages of the run, and how long each is reckoned to take."""
        layers, here = self.source.architecture.layers, self.options.inputs == "compressed"
        measuring = () if self.measure is None or here else (self.measure.time(self.stream, layers),)
        steps = (stage for prepared in self.result_steps.values() if prepared is not None for stage in prepared.times)
        compressing = compressing_time(self.stream, self.outline, self.seconds, self.measure if here else None)
        pricing = () if self.pricing is None else (self.pricing.forecast.time(),)
        searching = () if self.search is None else (self.search.forecast.time(),)
        return (*measuring, *pricing, *searching, compressing, *steps, checking_time(self.outline))

    @property
    def profile_folder(self) -> Path | None:
        """Where a profile that is made here is to be kept; None for nowhere."""
        profile = self.options.profile
        return user_path(profile) if isinstance(profile, str | Path) else None

    def text(self, tokens: int, *, up_to: bool = False) -> TokenSet:
        """Draw calibration text; see `coterie.profile.text.CalibrationText.draw`."""
        assert self.calibration is not None, "no text was given"
        return self.calibration.draw(tokens, up_to=up_to)

    def header(self, profile: Profile | None, prices: Prices | None) -> dict[str, Any]:
        """Return all that decides what comes out, for the header of the run.

        Args:
            profile: what was measured before the run; None where it is measured in it.
            prices: the same of what types cost.
        """
        checkpoint = self.source.checkpoint
        return {
            "wanted": self.outline.body() if self.request is None else self.request.content(),
            "inputs": self.options.inputs,
            "mtp": self.outline.mtp,
            "result_steps": {
                name: None if prepared is None else prepared.header() for name, prepared in self.result_steps.items()
            },
            "output_dtype": self.options.output_dtype,
            "model": checkpoint.digest,
            "model files": checkpoint.file_stamps(),
            "device": self.stream.device.type,
            "profile": None if profile is None else profile.digest(),
            **({} if prices is None else {"prices": prices.digest()}),
            "measured": None if self.measure is None or profile is not None else self.measure.header(self.stream),
        }


def prepare(
    options: Options, *, recorded: Mapping[str, Any] | None = None, numerics: Mapping[str, str | int] | None = None
) -> Job:
    """Open the model, check all that is asked for, and announce what it takes.

    Args:
        options: what is asked for.
        recorded: header of the interrupted run that goes on; None where one begins.
        numerics: what is computed with.

    Raises:
        As `coterie.compress`, for everything that can be known beforehand.
    """
    check_device(options.device)
    if options.on is not None:
        check_on(options.on)
    request = options.request()
    output = options.out
    _check_places(options)
    given = _given(options)
    if not user_path(options.model).exists():
        _outlined(options, request, given, fetch="samples")  # what cannot be is said before weights are fetched
    source, outlined = _outlined(options, request, given)
    trains = trains_in(outlined.result_steps)
    training_tokens(outlined.recipe, options.effort, options.train_tokens, trains=trains)
    needs = needs_of_plan(outlined)
    if outlined.packed:  # codes are chosen for what really comes in
        if options.profile is not None or options.text is None:
            raise InputError(
                f"recipe {outlined.recipe} chooses codes by what comes into every matrix, which no profile holds: give "
                "calibration text with --text, and no --profile"
            )
        options = replace(options, inputs="compressed")
    if options.inputs == "compressed":
        if options.profile is not None or options.text is None:
            raise InputError("with compressed inputs every layer is measured anew: give --text, and no --profile")
        check_sequential(outlined.recipe, needs)
    profile = _present_profile(options.profile, source.checkpoint)
    if profile is not None:
        check_profile(profile, source, needs)
    on = _on(options.on, profile)
    check_space(output.parent, outlined.predicted_bytes)
    if profile is None and options.text is None:
        raise InputError("no profile yet: give calibration text with --text, or a profile with --profile")
    stream = Stream(source.checkpoint, device=options.device, scratch=output.parent)
    calibration = None if options.text is None else _calibration(source, options, on)
    measure = None
    if profile is None:
        assert calibration is not None
        measure = _measure(source, options, needs, calibration)
    prices, pricing = _prices(options, request, source, stream, calibration, outlined)
    search = None
    if request is not None and request.search:
        assert calibration is not None
        search = search_of(stream, source, request, calibration, outlined.types, options.tokens)
    packing = None
    if outlined.packed:
        assert measure is not None
        packing = PackForecast(
            stream=stream, source=source, plan=outlined, measure=measure,
            narrows=may_narrow(outlined, request),
        )  # fmt: skip
    job = Job(
        options=options,
        source=source,
        stream=stream,
        request=request,
        outline=outlined,
        profile=profile,
        measure=measure,
        forecast=(
            _forecast(stream, source, measure, profile, options.inputs)
            if packing is None
            else Forecast(
                stages=(
                    *(() if pricing is None else pricing.forecast.stages()),
                    *(() if search is None else search.forecast.stages()),
                    *packing.stages(),
                )
            )
        ),
        prices=prices,
        pricing=pricing,
        search=search,
        calibration=calibration,
        recorded=(recorded or {}).get("result_steps", {}),
        numerics=numerics or {},
    )
    for stage in job.forecast.stages:  # before text is drawn for more
        stage.check(options.limit)
    for name, step_options in outlined.result_steps:
        prepared = job.result_steps[name] = load_result_step(name).prepare(job, **step_options)
        if prepared is not None:
            job.forecast = Forecast(stages=(*job.forecast.stages, *prepared.stages))
    job.stock = prepare_stock(source, outlined, options.limit)
    if isinstance(job.stock, Stage):
        job.forecast = Forecast(stages=(*job.forecast.stages, job.stock))
    job.forecast.check(options.limit)
    seconds = unit_seconds(
        stream, source.architecture.layers, outlined, sample_tokens=_sample_tokens(measure, profile),
        measure=measure if options.inputs == "compressed" else None,
    )  # fmt: skip
    codes = {} if packing is None else packing.seconds()
    job.seconds = {name: each + codes.get(name, 0.0) for name, each in seconds.items()}
    return job


def _outlined(
    options: Options, request: Request | None, given: Plan | None, fetch: Fetch = "weights"
) -> tuple[Source, Plan]:
    """Open the model, and say how large each layer becomes."""
    mtp = options.mtp if given is None else given.mtp
    source = Source.open(
        options.model, output_dtype=options.output_dtype, allow_pickle=options.allow_pickle, mtp=mtp or "keep",
        fetch=fetch, target=options.target.reader or "gguf",
    )  # fmt: skip
    if request is not None:
        return source, outline(source, request)
    assert given is not None
    return source, checked(source, given)


def _check_places(options: Options) -> None:
    """Raise OutputExists or InputError where the result, or a profile that is made on the way, cannot go."""
    text = None if options.text is None else local_place(options.text)
    reads: dict[str, list[Any]] = {"model folder": [options.model], "text folder": [text]}
    if isinstance(options.profile, str | Path):
        if not (user_path(options.profile) / PROFILE_FILE).exists():
            check_output(options.profile, kind="profile", reads=reads, accepts=is_empty_folder, folder=True)
        reads["profile"] = [options.profile]
    if isinstance(options.prices, str | Path):
        if not (user_path(options.prices) / PRICES_FILE).exists():
            check_output(options.prices, kind="prices", reads=reads, accepts=is_empty_folder, folder=True)
        reads["prices"] = [options.prices]
    check_output(options.out, kind="checkpoint", reads=reads, accepts=lambda place: False, folder=True)


def _given(options: Options) -> Plan | None:
    plan = options.plan
    return plan if plan is None or isinstance(plan, Plan) else Plan.load(user_path(plan))


def _calibration(source: Source, options: Options, on: On) -> CalibrationText:
    settings = TextSettings(
        source=str(options.text), weights=options.weights, tokens=options.tokens, seq_len=options.seq_len,
        seed=options.seed, on=on,
    )  # fmt: skip
    kind = UnwrittenText if options.dry and settings.own else CalibrationText
    return kind(source.checkpoint, settings, device=options.device, limit=options.limit, scratch=options.out.parent)


def _measure(source: Source, options: Options, needs: tuple[str, ...], text: CalibrationText) -> Measure:
    # A profile that is kept is to serve other recipes as well.
    usual = () if options.profile is None else wanted_statistics(gradients=needs_gradients(needs))
    settings = ProfileSettings(sample_tokens=options.sample_tokens, statistics=wanted_statistics({*usual, *needs}))
    return settings.measure(source.checkpoint, source.architecture, text)


def _forecast(
    stream: Stream, source: Source, measure: Measure | None, profile: Profile | None, inputs: Inputs
) -> Forecast:
    layers = source.architecture.layers
    stages = () if measure is None else measure.forecast(stream, layers).stages
    sample = sample_lines(layers, _sample_tokens(measure, profile))
    lines = (*unit_lines(stream, copies=COMPRESS_COPIES), *sample)
    if measure is not None and inputs == "compressed":  # layers are measured while they are compressed
        lines = (*stages[0].lines, *lines[1:])
    return Forecast(stages=(*stages, Stage(name="compressing a layer", lines=lines)))


def may_narrow(plan: Plan, request: Request | None) -> bool:
    """Tell whether experts get widths of their own, or may get them once that is decided."""
    return plan.ragged or (request is not None and request.recipe.narrows)


def may_differ(plan: Plan, request: Request | None) -> bool:
    """Tell whether experts of a layer differ in width or in type, or may once that is decided."""
    if request is not None and request.by_expert and request.recipe.prices:
        return True
    return may_narrow(plan, request)


def _prices(
    options: Options, request: Request | None, source: Source, stream: Stream, calibration: CalibrationText | None,
    outlined: Plan,
) -> tuple[Prices | None, Pricing | None]:  # fmt: skip
    """Return what types cost where that is known, else what measures it; neither where nobody asks.

    Raises:
        InputError: prices for what does not choose types by them.
        StaleArtifact: they are of another model.
    """
    given = options.prices
    if given is not None and (request is None or not request.recipe.takes_prices):
        raise InputError("--prices is for recipes that choose types by what they cost, such as coterie-bits")
    if request is None or not request.recipe.prices:
        return None, None
    if given is not None and not isinstance(given, Prices) and (user_path(given) / PRICES_FILE).exists():
        given = Prices.load(given, model_digest=source.checkpoint.digest)
    if isinstance(given, Prices):
        check_prices(source, request.recipe, given)
        return given, None
    assert calibration is not None
    if given is not None:  # what is kept serves every target, as what `coterie price` measures
        source = replace(source, target="packed")
    allocator = KEPT if request.recipe.takes_prices else request.recipe.allocator
    small = allocator != KEPT and are_small(outlined.types.values())
    tokens = min(PRICED_TOKENS, options.tokens)
    return None, pricing_of(stream, source, calibration, tokens, allocator, small=small)


def _on(on: On | None, profile: Profile | None) -> On:
    """Return which tokens count: those that a profile was measured on, where there is one."""
    if profile is not None and on not in (None, profile.on):
        raise InputError(
            f"the profile was measured on {profile.on}, and --on {on} is asked for: leave one of them out, or profile "
            "again"
        )
    return on or ("all" if profile is None else profile.on)


def _sample_tokens(measure: Measure | None, profile: Profile | None) -> int:
    if profile is not None:
        return len(profile.samples[0].domain_T)
    return 0 if measure is None else min(measure.sample_tokens, sum(measure.token_set.num_tokens.values()))


def _present_profile(profile: Profile | str | Path | None, checkpoint: Checkpoint) -> Profile | None:
    """Return the profile that was given; None where a folder was named that holds none yet."""
    if profile is None or isinstance(profile, Profile):
        return profile
    folder = user_path(profile)
    return Profile.load(folder, model_digest=checkpoint.digest) if (folder / PROFILE_FILE).exists() else None
