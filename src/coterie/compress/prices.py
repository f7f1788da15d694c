"""Prices: what storing each matrix in each type would cost, measured once (`coterie.compress.damages`) and kept.

They are kept in a folder as ``prices.json``, so that any number of budgets can be planned with them in seconds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from coterie.amounts import format_bytes, parse_bytes
from coterie.artifact import digest_of, open_artifact, write_artifact
from coterie.compress.allocators import ALLOCATORS
from coterie.compress.allocators.problem import load_meter
from coterie.compress.damages import PRICED_TOKENS, PRIOR_TOKENS, DamageMeter, Damages, Shares
from coterie.compress.plan import Mtp
from coterie.compress.price_forecast import BATCH, PRICING, PricingForecast
from coterie.compress.source import Source
from coterie.compress.weights import PRICED_TYPES, Weight
from coterie.compress.width_prices import STEPS, WidthPrices, priced_widths
from coterie.errors import CorruptArtifact, StaleArtifact
from coterie.fields import Fields, shown
from coterie.journal import Run
from coterie.model.device import check_device
from coterie.model.disk.encodings.ggml import SIZES, bits_of, unwrapped
from coterie.model.stream.memory import Forecast, peak_bytes
from coterie.model.stream.stream import Stream
from coterie.outputs import check_output, is_empty_folder
from coterie.paths import user_path
from coterie.profile.calibration import TokenSet
from coterie.profile.data_sets import local_place
from coterie.profile.measure import check_predicts
from coterie.profile.run import measuring_run
from coterie.profile.sources import On, check_on
from coterie.profile.text import CalibrationText, TextSettings
from coterie.progress import track, waiting

log = logging.getLogger(__name__)

FILE = "prices.json"

#: The allocator whose prices are kept for other runs: what all matrices cost in all types.
KEPT = "mixed-types"

#: A matrix that no token passed has no measured price: it costs nothing in what was read, and is not to become
#: worthless for what was not. Types of fewer bits than this are not offered to it.
UNSEEN_BITS = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """What types cost, and what that was measured on.

    Attributes:
        damages: by the pattern of a matrix and the name of a type, the expected rise of the loss in nats a token.
        model_digest: of the checkpoint.
        text_digest: of the tokens.
        num_tokens: how many of them counted.
        seq_len: tokens of a sequence.
        seed: seed of the draw of text.
        on: which tokens counted, "all" or "assistant".
        widths: what experts would cost at other widths, see `coterie.compress.width_prices`; empty where experts have
            no tensors of their own, or an earlier version measured.
        shares: how what the experts of a layer cost is shared among them, by the pattern of a matrix; empty as widths.
    """

    damages: Damages
    model_digest: str
    text_digest: str
    num_tokens: int
    seq_len: int
    seed: int
    on: On
    widths: WidthPrices = field(default_factory=dict)
    shares: Shares = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Return all but the digests of what they were made from, as JSON content."""
        damages = {pattern: dict(by_type) for pattern, by_type in self.damages.items()}
        return {
            "num_tokens": self.num_tokens,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "on": self.on,
            "damages": damages,
            **({"widths": {name: dict(each) for name, each in self.widths.items()}} if self.widths else {}),
            **({"shares": {pattern: list(each) for pattern, each in self.shares.items()}} if self.shares else {}),
        }

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of what they were made from."""
        return {"model": self.model_digest, "text": self.text_digest}

    def digest(self) -> str:
        """Return the digest of all that they say."""
        return digest_of({"inputs": self.inputs, "body": self.body()})

    def write(self, folder: Path) -> None:
        """Write ``prices.json`` into a folder."""
        write_artifact(folder / FILE, kind="prices", body=self.body(), inputs=self.inputs)

    @classmethod
    def load(cls, folder: str | Path, *, model_digest: str | None = None) -> Prices:
        """Read the prices in a folder, or in a file of them.

        Raises:
            CorruptArtifact: missing, not prices, or damaged.
            StaleArtifact: of another model than that with `model_digest`.
        """
        path = user_path(folder)
        file = path if path.is_file() else path / FILE
        artifact = open_artifact(file, kind="prices")
        content = Fields(artifact.body, where=str(file))
        with content.all_read():
            by_pattern = content.each_by_name("damages")
            damages = {
                pattern: {name: types.number(name, least=0.0) for name in types.names()}
                for pattern, types in by_pattern.items()
            }
            by_expert = content.each_by_name("widths") if content.said("widths") else {}
            widths = {
                expert: {width: each.number(width, least=0.0) for width in each.names()}
                for expert, each in by_expert.items()
            }
            by_layer = content.nested("shares") if content.said("shares") else None
            names = () if by_layer is None else by_layer.names()
            shares = {} if by_layer is None else {name: by_layer.numbers(name, least=0.0) for name in names}
            on = content.text("on", choices=get_args(On))
            counts = {name: content.whole(name) for name in ("num_tokens", "seq_len", "seed")}
        unknown = sorted({unwrapped(name) for by_type in damages.values() for name in by_type} - SIZES.keys())
        if unknown:
            raise CorruptArtifact(f"{file}: damages name the type {shown(unknown[0])}, which there is not")
        for expert, by_width in widths.items():
            priced = priced_widths(max((int(width) for width in by_width if width.isdecimal()), default=0))
            if not priced or by_width.keys() != set(map(str, priced)):
                raise CorruptArtifact(
                    f"{file}: widths of {shown(expert)} are {shown(', '.join(by_width))}; run coterie price again"
                )
        for pattern, each in shares.items():
            if pattern not in damages or not math.isclose(math.fsum(each), 1.0, rel_tol=1e-6):
                raise CorruptArtifact(
                    f"{file}: shares of {shown(pattern)} are of no matrix that is priced, or do not add up to 1; run "
                    "coterie price again"
                )
        missing = {"model", "text"} - artifact.inputs.keys()
        if missing:
            raise CorruptArtifact(f"{file} does not say which {' and '.join(sorted(missing))} it was made from")
        if model_digest is not None and artifact.inputs["model"] != model_digest:
            raise StaleArtifact(
                f"the prices in {file} are of another model ({artifact.inputs['model'][:12]}; this one is "
                f"{model_digest[:12]}); run coterie price again"
            )
        return cls(
            damages=damages, model_digest=artifact.inputs["model"], text_digest=artifact.inputs["text"],
            on=cast(On, on), widths=widths, shares=shares, **counts,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Pricing:
    """A measurement of prices that can begin.

    Attributes:
        stream: the model.
        source: the same by its headers.
        token_set: the text.
        seed: seed of its draw.
        allocator: name of who chooses types by what is measured.
        small: whether a published one has its types for less.
    """

    stream: Stream
    source: Source
    token_set: TokenSet
    seed: int
    allocator: str = KEPT
    small: bool = False

    def header(self) -> dict[str, Any]:
        """Return all that decides what is measured, for the header of a run."""
        return {
            "model": self.source.checkpoint.digest,
            "model files": self.source.checkpoint.file_stamps(),
            "text": self.token_set.digest,
            "on": self.token_set.on,
            "allocator": self.allocator,
            "types": list(PRICED_TYPES),
            "widths": STEPS,
            "shares": PRIOR_TOKENS,
            **({} if self.source.target == "gguf" else {"target": self.source.target}),
            "device": self.stream.device.type,
            "mtp": self.source.mtp,
        }

    def in_run(self, run: Run) -> Prices:
        """Measure in a run, which goes on with the unit that it had come to.

        Args:
            run: keeps what was measured; the stream is open.
        """
        if _WHOLE not in run.finished:
            meter = load_meter(self.allocator)(
                stream=self.stream, source=self.source,
                batches=[ids_BS for _, ids_BS in self.token_set.batches(BATCH)],
                counts=list(self.token_set.batch_counts(BATCH)),
                **({"small": True} if self.small else {}),
            )  # fmt: skip
            done = {name.removeprefix(_STEP) for name in run.finished if name.startswith(_STEP)}
            for name, damages in track(meter.measure(skip=done), PRICING, len(self.stream.units)):
                by_expert = {"widths": meter.widths, "shares": meter.shares} if isinstance(meter, DamageMeter) else {}
                run.finish(_STEP + name, files=[], content={"damages": damages, **by_expert})
            run.finish(_WHOLE, files=[])
        measured: dict[str, dict[str, float]] = {}
        narrower: dict[str, dict[str, float]] = {}
        shares: dict[str, tuple[float, ...]] = {}
        for name, step in run.finished.items():
            if name.startswith(_STEP):
                measured |= step.content["damages"]
                narrower |= step.content.get("widths", {})
                shares |= {pattern: tuple(each) for pattern, each in step.content.get("shares", {}).items()}
        kept = self.allocator == KEPT
        return Prices(
            damages=_with_unseen(measured, self.source.weights) if kept else measured,
            model_digest=self.source.checkpoint.digest, text_digest=self.token_set.digest,
            num_tokens=sum(self.token_set.num_counted.values()), seq_len=self.token_set.seq_len, seed=self.seed,
            on=self.token_set.on, widths=narrower, shares=shares,
        )  # fmt: skip

    @property
    def forecast(self) -> PricingForecast:
        """What it takes."""
        return PricingForecast(
            stream=self.stream, source=self.source, token_set=self.token_set,
            measures=ALLOCATORS[self.allocator].measures, small=self.small,
        )  # fmt: skip

    def in_folder(self, folder: Path) -> Prices:
        """Measure into a folder of its own, in a run that goes on where it was killed.

        Raises:
            OutputExists: the folder is taken.
        """
        with measuring_run(folder, self.stream, self.header(), kind="prices") as run:
            self.in_run(run).write(run.folder)
            if "prices" not in run.finished:
                run.finish("prices", files=[FILE])
            run.publish()
        return Prices.load(folder)


_STEP, _WHOLE = "prices of ", "all prices"


def price(
    model: str | Path,
    out: str | Path,
    *,
    text: str | Path,
    tokens: int = PRICED_TOKENS,
    seq_len: int = 512,
    seed: int = 0,
    weights: Mapping[str, float] | None = None,
    device: str = "cpu",
    mtp: Mtp | None = None,
    on: On = "all",
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
) -> Prices:
    """Measure what storing each matrix of a model in each type of fewer bits would cost, one layer in memory at a time.

    A run that was ended early goes on from the last finished layer when it is called again in the same way.

    Args:
        model: a model folder or hub id; it is only read.
        out: folder for the prices; not there, or empty.
        text: folder with calibration text, see `coterie.profile`.
        tokens: tokens in all; with fewer, what is chosen fits those and no others.
        seq_len: tokens in a sequence.
        seed: seed of the draw of text.
        weights: share of the text by domain.
        device: where layers are computed.
        mtp: what is to become of prediction layers (MTP): "keep" (when None) or "drop".
        on: the loss of which tokens counts: "all", or those of answers and completions, "assistant".
        max_memory: bytes, or an amount like "8GiB", that the run may take.
        allow_pickle: read weights that are stored as pickles.

    Raises:
        OutputExists: `out` is taken.
        OutputBusy: another run writes to `out`.
        StaleArtifact: an earlier run to `out` that was ended early had other settings or another input.
        Infeasible: `max_memory` is too little.
        ArchitectureMismatch: the model predicts no next token.
        InputError: the model or the text is not usable, see `coterie.profile`.
    """
    check_device(device)
    check_on(on)
    folder = user_path(out)
    reads = {"model folder": [model], "text folder": [local_place(text)]}
    check_output(folder, kind="prices", reads=reads, accepts=is_empty_folder, folder=True)
    source = Source.open(model, allow_pickle=allow_pickle, mtp=mtp or "keep", target="packed")
    limit = None if max_memory is None else parse_bytes(max_memory)
    settings = TextSettings(source=text, weights=weights, tokens=tokens, seq_len=seq_len, seed=seed, on=on)
    calibration = CalibrationText(source.checkpoint, settings, device=device, limit=limit, scratch=folder.parent)
    stream = Stream(source.checkpoint, device=device, scratch=folder.parent)
    pricing = pricing_of(stream, source, calibration, tokens)
    Forecast(stages=pricing.forecast.stages()).check(limit)
    with waiting([pricing.forecast.time()]):
        prices = pricing.in_folder(folder)
    log.info("memory: the peak was %s", format_bytes(peak_bytes()))
    return prices


def pricing_of(
    stream: Stream, source: Source, calibration: CalibrationText, tokens: int, allocator: str = KEPT, *,
    small: bool = False,
) -> Pricing:  # fmt: skip
    """Return a measurement that can begin, on so many tokens of a text at most.

    Args:
        stream: the model.
        source: the same by its headers.
        calibration: the text.
        tokens: how many of it.
        allocator: who is to choose types by it.
        small: whether a published one has its types for less, see `coterie.compress.allocators.expert_types.Ladders`.

    Raises:
        ArchitectureMismatch: the model predicts no next token, and the allocator goes by the loss.
    """
    if ALLOCATORS[allocator].measures == "losses":
        check_predicts(source.architecture)
    token_set = calibration.draw(tokens, up_to=True)
    return Pricing(
        stream=stream, source=source, token_set=token_set, seed=calibration.settings.seed, allocator=allocator,
        small=small,
    )  # fmt: skip


def _with_unseen(measured: Damages, weights: Sequence[Weight]) -> Damages:
    """Return damages in which matrices that no token passed cost nothing in types that are wide enough for the rest."""
    whole = {pattern: dict(by_type) for pattern, by_type in measured.items()}
    for weight in weights:
        if not whole.get(weight.pattern):
            fitting = {kind for name in PRICED_TYPES for kind in weight.fittings(name)}
            free = {kind: 0.0 for kind in sorted(fitting) if bits_of(kind) >= UNSEEN_BITS}
            if free:
                log.info("%s: no token passes it; it gets %g bits or more", weight.pattern, UNSEEN_BITS)
                whole[weight.pattern] = free
    return whole
