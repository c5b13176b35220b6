"""The file that names many concepts at once, YAML or JSON, read strictly: a typing error must not cost a night.

    defaults:                      # optional; an entry's own settings win
      steps: 100
      seed: 0
    concepts:
      woman:                       # the name of the vector and of its file
        pairs:
          - [a doctor, a woman doctor]
          - [a judge, a woman judge]
      smiling:                     # a single pair
        neutral: a face
        positive: a smiling face
        method: difference

Further settings are the numbers, words and switches of the method's own function (`learn_score`, `learn_difference`).
Concepts with the same neutral prompts in the same order share most of what those cost.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LearnError, LibraryError
from ..library import safe_name
from .difference import learn_difference
from .result import LearnResult, checked_pairs
from .score import learn_score

METHODS: dict[str, Callable[..., LearnResult]] = {"score": learn_score, "difference": learn_difference}
CHOICES = {"start": ("difference", "zero")}
OWN = ("summary", "strips")  # files that the run itself writes beside the vectors
PROMPTS = ("pairs", "neutral", "positive")
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number such as 0.1",
    str: "a word",
    tuple: "a list of numbers",
}


@dataclass(frozen=True)
class Concept:
    """One entry: its name, pairs of (neutral, positive) prompts, the method and settings that differ from its own."""

    name: str
    pairs: tuple[tuple[str, str], ...]
    method: str = "score"
    options: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """All settings of the method, those not given at its defaults."""
        return {**method_options(self.method), **self.options}


def method_options(method: str) -> dict[str, Any]:
    """The settings of a method that a file may give, with their defaults: numbers, words, switches, lists of numbers.

    Not `title`, which is the concept's name, nor lists that begin empty: those are of vectors.
    """
    defaults = {p.name: p.default for p in inspect.signature(METHODS[method]).parameters.values()}
    return {key: value for key, value in defaults.items() if type(value) in KINDS and value != () and key != "title"}


def read_concepts(path: Path | str) -> list[Concept]:
    """The concepts of a .yaml, .yml or .json file in its order. Errors: LearnError, which names file and entry."""
    path = Path(path).expanduser()
    found = parsed_file(path)
    if not isinstance(found, dict) or not isinstance(found.get("concepts"), dict) or not found["concepts"]:
        raise LearnError(
            f"{path} names no concepts: it needs a mapping 'concepts' of names, each with 'pairs' or with "
            "'neutral' and 'positive'."
        )
    if unknown := [str(key) for key in found if key not in ("defaults", "concepts")]:
        raise LearnError(f"{path} has {unknown[0]!r} beside 'concepts'; expected only 'defaults' and 'concepts' there.")
    defaults = found.get("defaults") or {}
    where = f"{path}, defaults"
    if not isinstance(defaults, dict) or any(key in PROMPTS for key in defaults):
        raise LearnError(f"{where}: expected settings such as 'steps: 100', and no prompts.")
    _method(where, defaults)
    concepts = [_concept(path, name, entry, defaults) for name, entry in found["concepts"].items()]
    _check_defaults(where, defaults, concepts)
    _check_names(path, concepts)
    return concepts


def parsed_file(path: Path) -> Any:
    """What a .yaml, .yml or .json file holds; a key given twice is refused. Errors: LearnError (names the file)."""
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise LearnError(f"{path} must end in .yaml, .yml or .json: no other file can be read.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LearnError(f"{path} cannot be read ({reason}): check the name and that it is text (UTF-8).") from error
    return parsed_text(text, str(path), path.suffix.lower() == ".json")


def parsed_text(text: str, where: str, is_json: bool) -> Any:
    """What JSON or YAML holds. where: begins the message. Errors: LearnError."""
    try:
        return json.loads(text, object_pairs_hook=_once) if is_json else _yaml(where, text)
    except (ValueError, RecursionError) as error:  # json.JSONDecodeError is a ValueError
        raise LearnError(f"{where} cannot be understood: {error}") from error


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping that refuses a key given twice, of which most readers silently keep the last."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is given twice. Give each name once.")
        found[key] = value
    return found


def _yaml(where: str, text: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise LearnError(
            f"{where} is YAML, which needs PyYAML: run pip install 'concept-steer[many]', or write the file as JSON."
        ) from error

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        return _once([(loader.construct_object(k, deep=True), loader.construct_object(v, True)) for k, v in node.value])

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, TypeError) as error:  # TypeError: a mapping as a key
        raise ValueError(str(error)) from error


def _concept(path: Path, name: Any, entry: Any, defaults: Mapping[str, Any]) -> Concept:
    where = f"{path}, concept {name!r}"
    if not isinstance(name, str):
        raise LearnError(f"{where}: a name is text; put it into quotes.")
    try:
        safe_name(name)
    except LibraryError as error:
        raise LearnError(f"{path}: {error}") from error
    if not isinstance(entry, dict):
        raise LearnError(f"{where}: expected 'pairs' or 'neutral' and 'positive' below it, found {entry!r}.")
    pairs = _pairs(where, entry)
    given = {key: value for key, value in entry.items() if key not in PROMPTS}
    method = _method(where, given, defaults.get("method", "score"))
    own = {key: value for key, value in given.items() if key != "method"}
    known = method_options(method)
    # a default that only the other method has is meant for the other concepts
    options = {**{key: value for key, value in defaults.items() if key in known}, **own}
    return Concept(name, pairs, method, {key: _value(where, method, key, value) for key, value in options.items()})


def _method(where: str, given: Mapping[str, Any], default: str = "score") -> str:
    method = given.get("method", default)
    if method not in METHODS:
        raise LearnError(f"{where}: the method is {method!r}; expected one of {', '.join(METHODS)}.")
    return str(method)


def _pairs(where: str, entry: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    alone = [entry[key] for key in ("neutral", "positive") if key in entry]
    if ("pairs" in entry) == bool(alone) or len(alone) == 1:
        raise LearnError(f"{where}: give 'pairs', or both 'neutral' and 'positive'.")
    found = entry.get("pairs", [alone])
    if not isinstance(found, list):
        raise LearnError(f"{where}: 'pairs' is a list of [neutral, positive]; found {found!r}.")
    for pair in found:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(prompt, str) for prompt in pair):
            raise LearnError(f"{where}: a pair is [neutral, positive], two texts; found {pair!r}.")
    try:
        return tuple(checked_pairs(found))
    except LearnError as error:
        raise LearnError(f"{where}: {error}") from error


def _value(where: str, method: str, key: Any, value: Any) -> Any:
    known = method_options(method)
    if key not in known:
        raise LearnError(f"{where}: {key!r} is no setting of {method}; expected one of {', '.join(sorted(known))}.")
    kind = type(known[key])
    if kind is tuple and isinstance(value, list) and value:
        return tuple(_number(where, key, one) for one in value)
    if kind is float:
        return _number(where, key, value)
    if type(value) is not kind:
        raise LearnError(f"{where}: {key} is {value!r}; expected {KINDS[kind]}.")
    if kind is int and key != "seed" and value < 1:
        raise LearnError(f"{where}: {key} is {value}; expected a whole number from 1 upwards.")
    if key in CHOICES and value not in CHOICES[key]:
        raise LearnError(f"{where}: {key} is {value!r}; expected one of {', '.join(CHOICES[key])}.")
    return value


def _number(where: str, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise LearnError(f"{where}: {key} has {value!r}; expected {KINDS[float]}.")
    return float(value)


def _check_defaults(where: str, defaults: Mapping[str, Any], concepts: list[Concept]) -> None:
    methods = {concept.method for concept in concepts}
    known = {key for method in methods for key in method_options(method)} | {"method"}
    if unknown := [key for key in defaults if key not in known]:
        raise LearnError(
            f"{where}: {unknown[0]!r} is no setting of {' or '.join(sorted(methods))}; expected one of "
            f"{', '.join(sorted(known))}."
        )


def _check_names(path: Path, concepts: list[Concept]) -> None:
    seen: dict[str, str] = {}
    for concept in concepts:
        name = concept.name.casefold()
        if name in OWN:
            raise LearnError(f"{path}: a concept cannot be named {concept.name!r}, as a file of the run is called.")
        if name in seen:
            raise LearnError(
                f"{path}: {seen[name]!r} and {concept.name!r} would be one file on many systems: rename one of them."
            )
        seen[name] = concept.name
