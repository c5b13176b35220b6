"""Who gets what: target shares, and for each picture of a run a value of every attribute.

Picture i depends on (targets, seed, i) alone, so a run may be cut into batches in any way.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from types import MappingProxyType
from typing import Literal

from ..errors import SettingError
from ..schedule import Schedule
from ..steering import Steer
from .attributes import Attribute

Mode = Literal["quota", "random"]
MODES: tuple[Mode, ...] = ("quota", "random")
LONGEST_BLOCK = 120  # pictures that one quota is laid out over when the shares have no shorter common block
TRIES = 6  # orders of a block that are compared when several attributes are balanced at once
Assignment = dict[str, str]  # attribute name -> label


@dataclass(frozen=True, eq=False)
class Target:
    """Wanted shares of an attribute's labels, which sum to 1; without shares all labels are wanted alike.

    Errors: SettingError for labels that are not the attribute's, negative shares, or another sum.
    """

    attribute: Attribute
    shares: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        labels = self.attribute.labels
        given = {label: 1 / len(labels) for label in labels} if self.shares is None else dict(self.shares)
        unknown = [label for label in given if label not in labels]
        if unknown:
            raise SettingError(
                f"{unknown[0]!r} is no value of {self.attribute.name!r}; its values are {', '.join(labels)}."
            )
        total = math.fsum(given.values())
        if not all(math.isfinite(share) and share >= 0 for share in given.values()) or abs(total - 1) > 1e-6:
            raise SettingError(
                f"The shares of {self.attribute.name!r} are {given}, which sum to {total:g}: give shares from 0 to 1 "
                "that sum to 1."
            )
        full = MappingProxyType({label: given.get(label, 0.0) for label in labels})
        object.__setattr__(self, "shares", full)

    @property
    def wanted(self) -> Mapping[str, float]:
        """Shares of all labels, in the attribute's order."""
        assert self.shares is not None
        return self.shares


def target_of(attribute: Attribute, text: str = "") -> Target:
    """A target from "woman=0.5,man=0.5"; empty: equal shares. Errors: SettingError."""
    if not text.strip():
        return Target(attribute)
    shares: dict[str, float] = {}
    for part in text.split(","):
        label, sign, number = (piece.strip() for piece in part.partition("="))
        try:
            shares[label] = float(number) if sign and label not in shares else math.nan
        except ValueError:
            shares[label] = math.nan
        if math.isnan(shares[label]):
            raise SettingError(
                f"The target {text!r} of {attribute.name!r} is not understood at {part.strip()!r}: write it like "
                f"{','.join(f'{label}={1 / len(attribute.labels):.2g}' for label in attribute.labels)}."
            )
    return Target(attribute, shares)


def assign(
    targets: Sequence[Target], count: int, *, seed: int = 0, mode: Mode = "quota", first: int = 0
) -> list[Assignment]:
    """A label of every attribute for the pictures first .. first + count - 1 of a run.

    quota: the run is laid out in blocks. The cells of all attributes together (gender x skin tone, shares multiplied)
    get their numbers in a block by largest remainder, and within a block every prefix stays near its quota in each
    attribute: within one picture for a single attribute (Tijdeman 1980), as near as a few tries find for several.
    random: each picture draws on its own. Ties and draws come from the seed. Errors: SettingError.
    """
    names = [target.attribute.name for target in targets]
    if len(set(names)) != len(names):
        raise SettingError(f"An attribute is balanced once, but these were given: {', '.join(names)}.")
    if mode not in MODES:
        raise SettingError(f"The mode is {mode!r}; known are {', '.join(MODES)}.")
    if count < 0 or first < 0:
        raise SettingError(f"A run counts pictures from 0 upwards, not {count} from {first}.")
    if not targets:
        return [{} for _ in range(count)]
    shares = tuple(tuple(target.wanted.values()) for target in targets)
    labels = [target.attribute.labels for target in targets]
    pick = _drawn if mode == "random" else _in_block
    cells = [pick(shares, seed, number) for number in range(first, first + count)]
    return [{n: own[i] for n, own, i in zip(names, labels, cell, strict=True)} for cell in cells]


Shares = tuple[tuple[float, ...], ...]
Cell = tuple[int, ...]  # the number of a label of each attribute


def _drawn(shares: Shares, seed: int, number: int) -> Cell:
    chance = _generator(seed, "picture", number)
    return tuple(chance.choices(range(len(own)), weights=own)[0] for own in shares)


def _in_block(shares: Shares, seed: int, number: int) -> Cell:
    length = block_length(shares)
    return _block(shares, seed, number // length)[number % length]


def _generator(*about: object) -> random.Random:
    """Its own generator for each picture or block; the same on every machine."""
    return random.Random(hashlib.sha256(repr(about).encode()).digest())


@lru_cache(maxsize=64)
def block_length(shares: Shares) -> int:
    """The fewest pictures in which every cell's quota is a whole number, at most LONGEST_BLOCK."""
    cells = [math.prod(one) for one in product(*shares)]
    for length in range(1, LONGEST_BLOCK):
        if all(abs(cell * length - round(cell * length)) < 1e-6 for cell in cells):
            return length
    return LONGEST_BLOCK


def largest_remainder(shares: Sequence[float], count: int, order: Sequence[int] | None = None) -> list[int]:
    """`count` seats by Hamilton's method: the whole part of each quota, the rest to the largest fractions.

    order: among equal fractions, who comes first.
    """
    quotas = [share * count for share in shares]
    seats = [math.floor(quota + 1e-9) for quota in quotas]
    rank = list(order or range(len(seats)))
    late = sorted(range(len(seats)), key=lambda i: (-round(quotas[i] - seats[i], 9), rank[i]))
    for i in late[: count - sum(seats)]:
        seats[i] += 1
    return seats


@lru_cache(maxsize=256)
def _block(shares: Shares, seed: int, block: int) -> tuple[Cell, ...]:
    cells = list(product(*(range(len(own)) for own in shares)))
    length = block_length(shares)
    chance = _generator(seed, "block", block, shares)
    seats = largest_remainder(
        [math.prod(own[i] for own, i in zip(shares, cell, strict=True)) for cell in cells],
        length,
        chance.sample(range(len(cells)), len(cells)),
    )
    if len(shares) == 1:
        return tuple(cells[i] for i in _tijdeman(seats, chance))
    tried = [_greedy(cells, seats, chance) for _ in range(TRIES)]
    return tuple(min(tried, key=lambda found: found[0])[1])


def _tijdeman(seats: Sequence[int], chance: random.Random) -> list[int]:
    """An order of `seats` in which after j places label i has had within 1 of seats_i j / n (Tijdeman 1980).

    Of those whose share is overdue by at least 1 / (2k - 2), the one that must come soonest; ties by chance.
    """
    length, alive = sum(seats), [i for i, many in enumerate(seats) if many]
    if len(alive) == 1:
        return alive * length
    slack = 1 / (2 * len(alive) - 2)
    had, result = dict.fromkeys(alive, 0), []
    for place in range(1, length + 1):
        owed = {i: seats[i] * place / length - had[i] for i in alive}
        due = [i for i in alive if owed[i] >= slack - 1e-9]
        chosen = min(due, key=lambda i: (round((1 - slack - owed[i]) * length / seats[i], 9), chance.random()))
        had[chosen] += 1
        result.append(chosen)
    return result


def _greedy(
    cells: Sequence[Cell], seats: Sequence[int], chance: random.Random
) -> tuple[tuple[float, float], list[Cell]]:
    """(how far prefixes are off at worst and in sum, an order): each place goes where the attributes stay nearest."""
    length, left = sum(seats), list(seats)
    attributes = range(len(cells[0]))
    quota: list[dict[int, int]] = [{} for _ in attributes]
    for cell, many in zip(cells, seats, strict=True):
        for a in attributes:
            quota[a][cell[a]] = quota[a].get(cell[a], 0) + many
    had: list[dict[int, int]] = [dict.fromkeys(own, 0) for own in quota]
    worst, total, result = 0.0, 0.0, []
    for place in range(1, length + 1):
        off = [{v: had[a][v] - quota[a][v] * place / length for v in quota[a]} for a in attributes]
        best: tuple[tuple[float, float, float], int] | None = None
        for i, cell in enumerate(cells):
            if left[i] == 0:
                continue
            after = [abs(off[a][v] + (v == cell[a])) for a in attributes for v in off[a]]
            key = (round(max(after), 9), round(sum(d * d for d in after), 9), chance.random())
            if best is None or key < best[0]:
                best = (key, i)
        assert best is not None
        worst, total = max(worst, best[0][0]), total + best[0][1]
        left[best[1]] -= 1
        for a in attributes:
            had[a][cells[best[1]][a]] += 1
        result.append(cells[best[1]])
    return (round(worst, 9), total), result


def steers(
    assignments: Sequence[Assignment],
    attributes: Sequence[Attribute],
    *,
    strength: float = 1.0,
    schedule: Schedule | None = None,
) -> list[list[Steer]]:
    """One list of steers per picture, for `sampling.sample(steers=...)` and `hosts.comfy.steer_pictures`.

    Only `attributes` act (those that the gate left open); what was assigned of others is passed over.
    """
    window = schedule or Schedule()
    made = {
        (attribute.name, label): Steer(value.vector, value.strength * strength, window)
        for attribute in attributes
        for label, value in attribute.values.items()
    }
    names = [attribute.name for attribute in attributes]
    return [[made[name, one[name]] for name in names] for one in assignments]
