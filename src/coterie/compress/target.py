"""How small a result is to be. No torch here: a wrong target is refused before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from coterie.amounts import parse_bytes, parse_count
from coterie.compress.allocators import ALLOCATORS
from coterie.compress.recipes import RECIPES, Recipe
from coterie.compress.width_prices import STEPS
from coterie.errors import InputError, UnknownName
from coterie.model.disk.encodings.ggml import OWN_TYPES, SIZES, bits_of
from coterie.model.disk.encodings.integer_types import INTEGER_BITS, INTEGERS
from coterie.model.disk.encodings.plane_types import PLANE_NAMES, PLANES

#: Who is to read matrices in blocks: llama.cpp, by way of `coterie export`; whoever loads the result itself; or stock
#: transformers and vLLM.
Reader = Literal["gguf", "packed", "compressed-tensors"]

#: Fields of a target that say how small.
_SIZES = ("keep", "experts", "width", "budget", "params", "active_params", "bits", "type")

#: Bits of the smallest type.
LEAST_BITS = min(bits_of(name) for name in SIZES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """How small the result is to be; exactly one of these, and what its counts or widths are to be multiples of.

    Attributes:
        keep: share of the experts of each layer, or of the width of each expert, above 0 and up to 1. A recipe that
            cuts experts into parts keeps as many as take no more bytes than that share of whole experts.
        experts: experts in each layer.
        width: hidden neurons of each expert; for a ragged result, on average.
        budget: bytes of all tensors, as a number or like "12GiB".
        params: parameters in all at most, as a number or like "15B".
        active_params: parameters that one token uses at most, as a number or like "2B".
        bits: most bits that a number of a matrix takes, scales counted, where weights are stored in fewer bits.
        type: the type that matrices are stored in, in capitals or not: one of GGML, like "Q4_K"; planes of bits, like
            "PLANES4_G64"; or integers as compressed-tensors stores them, like "INT4_G128". "PLANES4" and "INT4" have
            the largest groups that fit.
        multiple_of: the number of experts, or their width, whichever the recipe lowers, is the nearest multiple of this
            that can be; None for any.
        reader: who is to read weights in fewer bits: "gguf" (when None), for what GGUF files can say, or "packed", for
            what they cannot: there blocks run on from row to row where a row is no whole blocks; or
            "compressed-tensors" (when None and `type` is one of its), for integers that transformers and vLLM read.
        experts_only: where weights are stored in fewer bits, leave all but those of routed experts as they are; `bits`
            are then those of experts.
    """

    keep: float | None = None
    experts: int | None = None
    width: int | None = None
    budget: str | int | None = None
    params: str | int | None = None
    active_params: str | int | None = None
    bits: float | None = None
    type: str | None = None
    multiple_of: int | None = None
    reader: Reader | None = None
    experts_only: bool = False

    def __post_init__(self) -> None:
        if self.type is not None:
            object.__setattr__(self, "type", self.type.upper())

    @property
    def integers(self) -> bool:
        """Whether matrices are stored in integers, as compressed-tensors does."""
        return self.reader == "compressed-tensors" or self.type in (*INTEGER_BITS, *INTEGERS)

    @property
    def usual_recipe(self) -> str:
        """The recipe that is taken where none is named.

        Bytes are spent on precision first: at equal bytes that costs a small part of what removing experts costs
        (benchmarks/bits.md); where the form can say it, widths and types are chosen together, which costs less still
        (benchmarks/bits-experts-packed.md). A share, or a number of experts or neurons, asks for structure.
        """
        if self.type is not None or (self.integers and self._in_bits):
            return "gptaq"
        if not self._in_bits:
            return "coterie"
        return "coterie-bits-width" if self.reader == "packed" else "coterie-bits"

    def recipe_meant(self, named: str | Recipe | None) -> str | Recipe:
        """Return the recipe that is meant by a name, or by none; one of the caller's own is meant itself.

        Under the name "coterie" goes what is taken where none is named, if that is a question of bytes or bits: fewer
        experts never win there (benchmarks/plain_quantisation.md).
        """
        return self.usual_recipe if named is None or (named == "coterie" and self._in_bits) else named

    @property
    def _in_bits(self) -> bool:
        return self.bits is not None or self.budget is not None

    @property
    def sizes(self) -> dict[str, Any]:
        """What says how small, by field; of a target that passes `check` it is one."""
        return {name: value for name in _SIZES if (value := getattr(self, name)) is not None}

    def check(self, recipe: Recipe) -> None:
        """Raise InputError unless this is one target, in range, that the recipe can fulfil."""
        given = list(self.sizes)
        if len(given) != 1:
            raise InputError(
                "say how small with exactly one of --keep, --experts, --width, --budget, --params, --active-params, "
                f"--bits and --type; got {given or 'none'}"
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise InputError(f"--keep {self.keep:g} is not a share: it must be above 0 and at most 1 (0.5 keeps half)")
        if self.budget is not None:
            parse_bytes(self.budget)
        for count in (self.params, self.active_params):
            if count is not None:
                parse_count(count)
        known = (*SIZES, *PLANE_NAMES, *PLANES, *INTEGER_BITS, *INTEGERS)
        if self.type is not None and self.type not in known:
            raise UnknownName("type", self.type, known)
        if self.type in (*OWN_TYPES, *PLANE_NAMES, *PLANES) and self.reader != "packed":
            raise InputError(
                f"{self.type} is a type that no GGUF file holds: say --target packed as well, or take one of GGML, "
                "such as --type Q4_K"
            )
        least = LEAST_BITS / STEPS if recipe.narrows else LEAST_BITS
        if self.bits is not None and not least <= self.bits <= 16:
            raise InputError(f"--bits {self.bits:g} is out of range: {least:g} to 16")
        allocator = ALLOCATORS[recipe.allocator]
        if self.reader not in (None, *get_args(Reader)):
            raise UnknownName("target", str(self.reader), get_args(Reader))
        if self.reader is not None and recipe.quantiser is None:
            raise InputError(
                f"--target {self.reader} is about weights in fewer bits, and recipe {recipe.name} {allocator.does}: "
                "leave it out; its result is a plain checkpoint, which `coterie export` makes a GGUF file of as well"
            )
        if recipe.packs and self.reader != "packed":
            raise InputError(
                f"recipe {recipe.name} {allocator.does}, which no GGUF file holds: say --target packed as well, or "
                "take coterie-bits"
            )
        if self.experts_only and recipe.quantiser is None:
            raise InputError(
                f"--experts-only is about weights in fewer bits, and recipe {recipe.name} {allocator.does}: leave it "
                "out; nothing but experts and routers is changed"
            )
        self._check_integers(recipe)
        if self.multiple_of is not None and self.multiple_of < 1:
            raise InputError(f"--multiple-of {self.multiple_of} is out of range: it must be 1 or more")
        if self.multiple_of is not None and recipe.allocator == "ragged":
            raise InputError(f"recipe {recipe.name} {allocator.does}; --multiple-of is for one width or number of all")
        if given[0] not in allocator.targets:
            *most, last = map(option_of, allocator.targets)
            instead = f"recipe that {allocator.instead}"
            if given[0] in ("bits", "type"):
                alike = [
                    name
                    for name, each in RECIPES.items()
                    if given[0] in ALLOCATORS[each.allocator].targets and not each.packs
                ]
                instead = f"recipe that stores weights in fewer bits, such as {alike[-1]}"
            raise InputError(
                f"recipe {recipe.name} {allocator.does}; say how small with {', '.join(most)} or {last}, or take a "
                f"{instead}"
            )

    def _check_integers(self, recipe: Recipe) -> None:
        """Raise InputError where type, reader and recipe do not go together."""
        if self.integers and self.reader not in (None, "compressed-tensors"):
            raise InputError(
                f"--type {self.type} is for transformers and vLLM: take --target compressed-tensors, or leave it out"
            )
        if self.integers and self.type in SIZES:
            raise InputError(
                f"--type {self.type} is a type of GGML, which --target compressed-tensors cannot say; it has "
                f"{', '.join((*INTEGER_BITS, *INTEGERS))}"
            )
        if self.integers and recipe.quantiser is not None and recipe.allocator != "one-type":
            alike = [name for name, each in RECIPES.items() if each.allocator == "one-type"]
            raise InputError(
                f"recipe {recipe.name} mixes types, and what reads compressed-tensors wants all experts alike: take "
                f"{', '.join(alike[:-1])} or {alike[-1]}"
            )


def option_of(name: str) -> str:
    """Return the option of the command line that a field of a target is: "--active-params"."""
    return f"--{name.replace('_', '-')}"
