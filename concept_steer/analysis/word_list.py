"""What an audit asks: roles, the values of attributes, and further words; the shipped list and the file of one's own.

neutral: a person                # what everything is compared with
context: a {}                    # how a role becomes a prompt
roles: [doctor, nurse]
attributes:
  gender:                        # two or more values, in an order that means something if there is one
    woman: a woman {}            # or a list of such templates: ways of saying the same
    man: a man {}
words:                           # whatever else is to be held against the roles
  places: [in a hospital, in a kitchen]
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import ConceptSteerError, SettingError
from ..fairness.templates import checked_template, fill, phrase_of
from ..learn.concept_file import parsed_file, parsed_text
from ..learn.request import lines_of

FILE = Path(__file__).with_name("words.json")
KEYS = ("neutral", "context", "roles", "attributes", "words")
CONTEXTS = 24  # prompts that a word's direction is the mean of; fewer tell near words apart less well
NOUNS = ("woman", "man", "girl", "boy", "child")  # they stand in the place of "person"
Templates = tuple[str, ...]


@dataclass(frozen=True)
class WordList:
    """roles: nouns without article. attributes: name -> value -> templates. words: group -> words or short phrases."""

    roles: tuple[str, ...]
    attributes: Mapping[str, Mapping[str, Templates]]
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    neutral: str = "a person"
    context: str = "a {}"

    def prompt(self, role: str) -> str:
        return fill(self.context, role)

    def named(self, role: str, attribute: str, value: str) -> Templates:
        """The prompts that name a value of a role, one a template: "a woman doctor"; of "sad person" "a sad woman"."""
        return tuple(_named(template, role) for template in self.attributes[attribute][value])

    def word_prompts(self) -> dict[str, str]:
        """Word -> prompt of all further words; {} in a word is the neutral prompt."""
        return {word: word.replace("{}", self.neutral) for word in chain(*self.words.values())}

    def directions(self) -> dict[str, str]:
        """Name -> prompt of the attributes' values and all further words: what other things are held against."""
        role = self.neutral.removeprefix("a ").removeprefix("an ")
        values = {
            value: self.named(role, attribute, value)[0]
            for attribute, many in self.attributes.items()
            for value in many
        }
        others = {name_of(word): prompt for word, prompt in self.word_prompts().items() if prompt != self.neutral}
        return {**values, **others}

    def prompts(self) -> list[str]:
        """All that an audit reads, every prompt once."""
        named = (
            self.named(role, attribute, value)
            for attribute, values in self.attributes.items()
            for value in values
            for role in self.roles
        )
        roles = [self.prompt(role) for role in self.roles]
        return list(dict.fromkeys([self.neutral, *roles, *chain(*named), *self.word_prompts().values()]))

    def as_dict(self) -> dict[str, Any]:
        """Ready for a file."""
        return {
            "neutral": self.neutral,
            "context": self.context,
            "roles": list(self.roles),
            "attributes": {
                name: {value: list(templates) for value, templates in values.items()}
                for name, values in self.attributes.items()
            },
            "words": {group: list(words) for group, words in self.words.items()},
        }


def in_contexts(words: WordList, given: Sequence[str] = ()) -> dict[str, list[tuple[str, str]]]:
    """Name -> pairs (prompt with the word, the same without), in some roles, so that a direction is the word's own.

    given: words to use instead of the list's. "a sad person" is read as "a sad cook" too; one with neither {} nor the
    neutral noun is a prompt of its own, against the neutral one.
    """
    every = max(1, len(words.roles) // (CONTEXTS - 1))
    some = words.roles[::every][: CONTEXTS - 1]
    nouns = [words.neutral.removeprefix("a ").removeprefix("an "), *some]
    plain = [words.neutral, *map(words.prompt, some)]
    found: dict[str, list[tuple[str, str]]] = {}
    if not given:
        for attribute, values in words.attributes.items():
            for value in values:
                named = [words.named(noun, attribute, value)[0] for noun in nouns]
                found[value] = list(zip(named, plain, strict=True))
    for word in given or chain(*words.words.values()):
        pairs = list(zip(_everywhere(word, nouns, plain), plain, strict=False))
        if all(prompt != one for prompt, one in pairs):
            found[name_of(word)] = pairs
    return found


def _everywhere(word: str, nouns: Sequence[str], plain: Sequence[str]) -> list[str]:
    """A word in every prompt: {} stands for the prompt, the first noun for any; without either it is just itself."""
    if "{}" in word:
        return [word.replace("{}", one) for one in plain]
    apart = re.split(rf"\b{re.escape(nouns[0])}\b", word, maxsplit=1)
    return [noun.join(apart) for noun in nouns] if len(apart) == 2 else [word]


def name_of(word: str) -> str:
    """What a word such as "{} in an office" is called: "in an office"."""
    return " ".join(word.replace("{}", " ").strip(" ,").split()) or word


def _named(template: str, role: str) -> str:
    phrase = phrase_of(template)
    if phrase in NOUNS and re.search(r"\bperson\b", role):
        return fill("a {}", re.sub(r"\bperson\b", phrase, role))
    return fill(template, role)


def shipped() -> WordList:
    """Roles after WinoBias (Zhao et al. 2018), gender, skin tone and age; places and objects."""
    return parsed(json.loads(FILE.read_text(encoding="utf-8")), FILE.name)


def read_words(path: Path | str) -> WordList:
    """A .yaml, .yml or .json file. Errors: ConceptSteerError, which names the file and what is wrong with it."""
    return parsed(parsed_file(Path(path).expanduser()), str(path))


def typed_words(text: str) -> WordList:
    """What a person typed as YAML or JSON, with all that a file has. Errors: ConceptSteerError."""
    return parsed(parsed_text(text, "The list of words", text.lstrip().startswith("{")), "The list of words")


def from_lines(usual: WordList, roles: str, attributes: str, words: str) -> WordList:
    """What a person typed, one a line, with the usual list in place of what is left empty.

    attributes: "gender: woman = a woman {} | a female {}; man = a man {}". Errors: SettingError.
    """
    given = usual.as_dict()
    if lines := lines_of(roles):
        given["roles"] = lines
    if lines := lines_of(attributes):
        given["attributes"] = dict(_attribute_line(line) for line in lines)
    if lines := lines_of(words):
        given["words"] = {"words": lines}
    return parsed(given, "the list")


def _attribute_line(line: str) -> tuple[str, dict[str, list[str]]]:
    name, sign, rest = line.partition(":")
    values = [part.partition("=") for part in rest.split(";") if part.strip()]
    if not sign or not name.strip() or not all(equals for _, equals, _ in values):
        raise SettingError(f"{line!r} is no attribute: write it like 'gender: woman = a woman {{}}; man = a man {{}}'.")
    return name.strip(), {value.strip(): text.split("|") for value, _, text in values}


def parsed(found: Any, where: str) -> WordList:
    """Checked. Errors: SettingError."""
    if not isinstance(found, Mapping) or "roles" not in found:
        raise SettingError(f"{where} is no list of words: it needs 'roles' and 'attributes' at its top.")
    if unknown := [str(key) for key in found if key not in KEYS]:
        raise SettingError(f"{where} has {unknown[0]!r} at its top; known there are {', '.join(KEYS)}.")
    roles = _texts(found["roles"], f"{where}, roles")
    attributes = found.get("attributes")
    if not isinstance(attributes, Mapping) or not attributes:
        raise SettingError(f"{where} names no attributes: write at least one with two values, such as gender.")
    words = found.get("words") or {}
    if not isinstance(words, Mapping):
        raise SettingError(f"{where}, words: expected groups of words such as 'places: [in a city]'.")
    neutral, context = str(found.get("neutral", "a person")).strip(), str(found.get("context", "a {}"))
    if context.count("{}") != 1 or not neutral:
        raise SettingError(f"{where}: the context {context!r} needs one {{}} for the role, and neutral a prompt.")
    return WordList(
        roles,
        {str(name): _values(values, f"{where}, {name}") for name, values in attributes.items()},
        {str(group): _texts(many, f"{where}, {group}") for group, many in words.items()},
        neutral,
        context,
    )


def _values(values: Any, where: str) -> dict[str, Templates]:
    if not isinstance(values, Mapping) or len(values) < 2:
        raise SettingError(f"{where}: expected two or more values with a template each, such as 'woman: a woman {{}}'.")
    found = {}
    for value, given in values.items():
        templates = _texts([given] if isinstance(given, str) else given, f"{where}, {value}")
        try:
            found[str(value)] = tuple(checked_template(template) for template in templates)
        except ConceptSteerError as error:
            raise SettingError(f"{where}, {value}: {error}") from None
    return found


def _texts(given: Any, where: str) -> tuple[str, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(one, str) for one in given):
        raise SettingError(f"{where}: expected a list of texts, found {given!r}.")
    found = tuple(dict.fromkeys(one.strip() for one in given if one.strip()))
    if not found:
        raise SettingError(f"{where}: the list is empty; write at least one.")
    return found
