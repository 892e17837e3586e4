"""What a side keeps of a vector: a code under a scale, behind transforms; what is split off first, and what codes the
error that is left."""

from __future__ import annotations

import dataclasses as dc
import math
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

from .codes import Additive, Bands, Chosen, Code, Codebook, Float, LowRank, Sketch, Sparse, Uniform, When
from .encoding import Feedback
from .part import ALL, Count, Part
from .scale import Range, Scale
from .transforms import (
    Balance,
    ChannelScale,
    ChannelShift,
    Eigenbasis,
    Permute,
    Pick,
    Polar,
    PreRope,
    Rotate,
    Size,
    Transform,
)

Side = Literal["keys", "values"]
_OWN_RANGE: dict[type[Part], Range] = {Uniform: "minmax", Float: "absmax", Codebook: "norm", Additive: "norm"}


@dataclass(frozen=True, repr=False)
class Store(Part):
    """What is stored of a vector: it is transformed, in the order given, then coded under a scale.

    outliers   what is split off first: channels that have a store of their own, this one being of the others, or
               single numbers that are kept as they are, this one being of what stands in for them
    residual   a store of its own for what is left, x - x^ of what is decoded; a Sketch or LowRank may stand for it.
               What is read is the sum of both
    feedback   how an error makes other channels' numbers others before they are coded, of keys that go to a tier
    """

    inner = ("code", "scale", "transform")
    code: Code = Float("fp16")
    _: KW_ONLY
    scale: Scale | None = None
    transform: tuple[Transform, ...] | Transform = ()
    outliers: TopChannels | Sparse | None = None
    residual: Store | Sketch | LowRank | None = None
    feedback: Feedback | None = None

    def __post_init__(self) -> None:
        if isinstance(self.residual, (Sketch, LowRank)):
            object.__setattr__(self, "residual", Store(self.residual))
        if self.outliers is not None and isinstance(code := getattr(self.outliers, "store", None), get_args(Code)):
            object.__setattr__(self, "outliers", self.outliers.with_(store=self._beside(code)))
        if isinstance(self.transform, (list, *get_args(Transform))):
            one = self.transform if isinstance(self.transform, list) else [self.transform]
            object.__setattr__(self, "transform", tuple(one))

    def _beside(self, code: Code) -> Store:
        """The store of outlier channels that a code alone stands for: under this store's scale, if it needs one."""
        bare = isinstance(code, Sketch) or isinstance(code, Float) and code.plain
        return Store(code) if bare else Store(code, scale=self.scale)

    @property
    def terms(self) -> tuple[Store, ...]:
        """What has codes and scales of its own, in the order of a page: this store, that of its outlier channels and
        the stores of what is left, what is read being the sum of them all; or its bands."""
        if isinstance(self.code, Bands):
            from .stretches import bands

            return bands(self)
        return tuple(store for _, store in self.placed(""))

    def placed(self, place: str) -> tuple[tuple[str, Store], ...]:
        """This store, that of its outlier channels and the stores of what is left, each a space of its own, with their
        places in a spec where this store stands at `place`.  Channels are picked by the first of the transforms; single
        numbers are of the vector itself, or of keys without their positions."""
        rest = self.residual.placed(f"{place}.residual") if isinstance(self.residual, Store) else ()
        if self.outliers is None:
            return ((place, self), *rest)
        if isinstance(self.outliers, Sparse):
            own = dc.replace(self, outliers=None)
            single = Store(self.outliers, transform=(self.rope,) if self.rope else ())
            return ((place, own), (f"{place}.outliers", single), *rest)
        if self.outliers.online:
            return (*self._beside_chosen(self.outliers, place), *rest)
        others, top = (
            dc.replace(store, transform=(Pick(self.outliers.n, taken), *store.transform), outliers=None)  # type: ignore
            for store, taken in ((self, False), (self.outliers.store, True))
        )
        return ((place, others), (f"{place}.outliers.store", top), *rest)

    def _beside_chosen(self, choice: TopChannels, place: str) -> tuple[tuple[str, Store], ...]:
        """The same where outlier channels are chosen anew every few tokens: two sketches, of vectors that have zeros
        where the other one looks; or this store, of all channels, and numbers of the chosen ones beside it."""
        own = Parted(self.code, scale=self.scale, transform=self.transform, residual=self.residual, choice=choice)
        match choice.store.code:
            case Sketch() as code:
                return ((place, own), (f"{place}.outliers.store", Parted(code, choice=choice, top=True)))
            case Uniform(bits=int() as bits):
                below = own.code.bits if isinstance(own.code, Uniform) else None
                numbers = Chosen(choice, bits - (below or 0), below or 0)
            case _:
                numbers = Chosen(choice)
        return ((place, own), (f"{place}.outliers", Store(numbers)))

    def rows(self, side: Side) -> tuple[bool, ...]:
        """Whether each term has numbers in a row: in what the query becomes for packed keys, one term behind the other,
        or in what sums of packed values are.  What is of single numbers of keys, or of channels that are chosen anew,
        gathers the query itself."""
        return tuple(side == "values" or not term.gathers for term in self.terms)

    @property
    def gathers(self) -> bool:
        """Whether keys of this term meet some of the query's channels, others for every token or few tokens."""
        return isinstance(self.code, (Sparse, Chosen))

    @property
    def chosen(self) -> TopChannels | None:
        """Which channels this term is of, where they are chosen anew every few tokens."""
        return self.code.choice if isinstance(self.code, Chosen) else None

    @property
    def own(self) -> Store:
        """This store as one of the channels that are not split off."""
        first = self.placed("")[0][1]
        return first.alone if isinstance(first, Parted) else first

    @property
    def pick(self) -> Pick | None:
        """Which channels of the vector are coded, where not all are."""
        first = self.transform[:1]  # type: ignore[index]
        return first[0] if first and isinstance(first[0], Pick) else None

    def given(self, head_dim: int) -> int:
        """How many channels of a head's `head_dim` it is of."""
        return self.pick.width(head_dim) if self.pick else head_dim

    def width(self, head_dim: int) -> int:
        """How many numbers are made of them, which are coded: a basis may keep its first ones alone."""
        last = self.linear[-1:]
        whole = self.given(head_dim)
        return last[0].width(whole) if last and isinstance(last[0], Eigenbasis) else whole

    @property
    def short(self) -> bool:
        """Whether fewer numbers are coded than the vector has channels, and the others are read as 0."""
        return any(isinstance(part, Eigenbasis) and part.rank is not ALL for part in self.linear)

    def numbered(self, place: str) -> tuple[tuple[str, Transform | Pick], ...]:
        """The maps of the vector in their order, each with the name of its parameters where the store stands at
        `place`.  Those of both picks are the outlier channels of the side."""
        side, before = place.partition(".")[0], int(self.pick is not None)
        return tuple(
            (f"{side}.outliers" if isinstance(part, Pick) else f"{place}.transform[{position - before}]", part)
            for position, part in enumerate(self.linear)
        )

    def coded(self, head_dim: int) -> int:
        """How many numbers a head's vector of `head_dim` channels is coded as."""
        if isinstance(self.code, Sketch) and isinstance(self.code.dim, int):
            return self.code.dim
        if isinstance(self.code, Chosen):
            return self.code.choice.count(head_dim)
        return self.width(head_dim)

    def measured(self, head_dim: int) -> int:
        """How many numbers of a head's vector scales are of: those of a sketch are of the vector itself."""
        return self.width(head_dim)

    @property
    def turned(self) -> bool:
        """Whether anything but the vector as it is, is coded."""
        return bool(self.transform) or isinstance(self.code, Sketch) or self.outliers is not None

    @property
    def rope(self) -> PreRope | None:
        """How rotary positions are taken off before anything else, where they are."""
        first = self.transform[:1]  # type: ignore[index]
        return first[0] if first and isinstance(first[0], PreRope) else None

    @property
    def polar(self) -> bool:
        """Whether what is coded is the radii and the angles of pairs of numbers."""
        return any(isinstance(part, Polar) for part in self.transform)  # type: ignore[union-attr]

    @property
    def levels(self) -> int:
        """How often pairs of radii are paired again, counting the first time; 0 without polar coordinates."""
        return sum(part.levels for part in self.transform if isinstance(part, Polar))  # type: ignore

    @cached_property
    def linear(self) -> tuple[Transform, ...]:
        """The transforms that are maps of a vector, in their order: polar coordinates and factors of tiles come behind
        all of them."""
        return tuple(part for part in self.transform if not isinstance(part, (Polar, Balance)))  # type: ignore

    @property
    def balance(self) -> Balance | None:
        """How tiles of what is coded get factors of their own, where they do."""
        last = self.transform[-1:]  # type: ignore[index]
        return last[0] if last and isinstance(last[0], Balance) else None

    @property
    def of_tokens(self) -> bool:
        """Whether those are one for each token; else for each channel of a tile."""
        return self.scale is not None and self.scale.block.channels == 1

    @cached_property
    def mapped(self) -> bool:
        """Whether what is coded is a matrix times the vector, one for all tokens, behind rotary positions if they come
        off first."""
        linear = any(not isinstance(part, PreRope) for part in self.linear)
        return linear or isinstance(self.code, Sketch) or self.split is not None

    @property
    def split(self) -> TopChannels | None:
        """The outlier channels that another store is of, once and for all tokens."""
        return self.outliers if isinstance(self.outliers, TopChannels) and not self.outliers.online else None

    @property
    def channelwise(self) -> bool:
        """Whether every number that is coded is one channel of the vector, times a factor, plus a shift: nothing adds
        up two channels."""
        own = (PreRope, Permute, ChannelScale, ChannelShift)
        whole = not isinstance(self.code, Sketch) and self.outliers is None
        return whole and all(isinstance(part, own) for part in self.linear)

    @property
    def permuted(self) -> bool:
        """Whether channels change places."""
        return any(isinstance(part, Permute) for part in self.linear)

    @property
    def scaled(self) -> bool:
        """Whether channels have factors."""
        return any(isinstance(part, ChannelScale) for part in self.linear)

    @cached_property
    def joined(self) -> int:
        """How many neighbouring kv heads are mapped as one vector."""
        return math.lcm(*(part.heads for part in self.linear if isinstance(part, Rotate)))

    @property
    def mixed(self) -> bool:
        """Whether that matrix stays in it, where numbers are sums over channels."""
        return self.mapped and self.rope is not None and not self.channelwise

    @property
    def hoisted(self) -> bool:
        """Whether that matrix leaves the loop over tokens, onto the query or the output: no positions are behind it."""
        return self.mapped and self.rope is None

    def hadamard(self, head_dim: int) -> int:
        """The size of its blocks where the map is a Hadamard rotation and nothing else, else 0."""
        match [part for part in self.linear if not isinstance(part, PreRope)]:
            case [Rotate("hadamard" | "random_hadamard", size, heads)] if not isinstance(self.code, Sketch):
                whole = 0 if isinstance(size, tuple) else heads * head_dim
                return size if isinstance(size, int) else whole
        return 0

    @property
    def apart(self) -> bool:
        """Whether packed tokens meet another query, or add to another output, than exact ones."""
        return self.mapped or self.rope is not None or self.residual is not None or self.outliers is not None

    @property
    def shifted(self) -> bool:
        """Whether reading adds a vector."""
        return any(isinstance(part, ChannelShift) for part in self.transform)  # type: ignore[union-attr]

    @cached_property
    def measure(self) -> Scale | None:
        """The scale with its range resolved: the code's own where the spec names none."""
        if isinstance(self.code, Sketch):
            return Scale(range="norm")
        if self.scale is None or self.scale.range is not None:
            return self.scale
        fitted = isinstance(self.code, Codebook) and self.code.levels == "calibrated"
        return dc.replace(self.scale, range="minmax" if fitted else _OWN_RANGE.get(type(self.code), "minmax"))


@dataclass(frozen=True, repr=False)
class TopChannels(Part):
    """The largest channels of every kv head, which are coded apart from the others.

    n      how many, or their share of the head's channels
    per    ALL: the same ones for all tokens, found in calibration data; a store of them sees no other channels, nor the
           others theirs.  Of keys a count: the largest of every so many tokens, chosen anew when these are packed
    by     what is large: the `norm` of a channel, the mean of its sizes, or the largest
    store  what codes them; a code alone is under the scale of the store that they are split off.  Of channels that are
           chosen anew: fp16, beside codes of what is left without them; Uniform of more bits under the same scale,
           the lowest of which stand among the codes of the others (Kitty, arXiv 2511.18643, section 3); or, beside a
           Sketch, another one, each of vectors that have zeros where the other one looks (QJL, arXiv 2406.03482,
           section 4)
    when   None: `calibrated` if `per` is ALL, else `online`
    """

    inner = ("store",)
    n: int | float = 8
    _: KW_ONLY
    per: Count = ALL
    by: Size = "norm"
    store: Store = Store()
    when: When | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            n: int | float = 8,
            *,
            per: Count = ALL,
            by: Size = "norm",
            store: Store | Code = Store(),  # noqa: B008  (a frozen value)
            when: When | None = None,
        ) -> None: ...  # a code becomes a store where this becomes part of one

    @property
    def online(self) -> bool:
        """Whether channels are chosen anew, every `per` tokens."""
        return isinstance(self.per, int)

    @property
    def tokens(self) -> int:
        """Tokens that a choice is of."""
        assert isinstance(self.per, int)
        return self.per

    def count(self, head_dim: int) -> int:
        """How many of a head's `head_dim` channels."""
        return Pick(self.n, True).width(head_dim)


@dataclass(frozen=True, repr=False)
class Parted(Store):
    """A store beside that of outlier channels which are chosen anew every few tokens: no part of a spec.

    choice   which channels these are
    top      whether it is the one of them
    """

    choice: TopChannels = TopChannels()
    top: bool = False

    @property
    def gathers(self) -> bool:
        return self.top

    @property
    def chosen(self) -> TopChannels | None:
        return self.choice if self.top else None

    @property
    def alone(self) -> Store:
        """The same as a store of what it is given: with higher bits of some codes it is none but this."""
        if self.raised:
            return self
        return Store(self.code, scale=self.scale, transform=self.transform, residual=self.residual)

    @property
    def masked(self) -> bool:
        """Whether it is of vectors that have zeros where the other store looks, and is read as one."""
        return isinstance(self.choice.store.code, Sketch)

    @property
    def raised(self) -> Store | None:
        """What codes outlier channels with more bits, of which the lowest stand among the codes of this store."""
        return self.choice.store if isinstance(self.choice.store.code, Uniform) else None
