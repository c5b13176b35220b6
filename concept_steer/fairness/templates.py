"""How prompts name a value: templates such as "a woman {}" and "a {} with dark skin", and words within prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import SettingError

ARTICLES = ("a", "an", "the")
WORD = re.compile(r"\w[\w'\u2019-]*")


def checked_template(template: str) -> str:
    """Errors: SettingError when there is not exactly one {} or no word that names a value."""
    if template.count("{}") != 1 or not phrase_of(template):
        raise SettingError(f"{template!r} names nothing: write it like 'a woman {{}}', with {{}} where the role goes.")
    return template


def phrase_of(template: str) -> str:
    """What a template adds to "a {}": "woman" of "a woman {}", "with dark skin" of "a {} with dark skin"."""
    words = template.replace("{}", " ").split()
    return " ".join(words[1:] if words and words[0].lower() in ARTICLES else words)


def is_tail(template: str) -> bool:
    """Whether the phrase follows the role."""
    return template.rstrip().rfind("{}") < template.rfind(phrase_of(template).split()[-1])


def fill(template: str, role: str) -> str:
    """The template about a role, with "an" before a vowel: fill("a {}", "elf") is "an elf"."""
    text = template.format(role)
    return re.sub(r"\b([Aa])n? (?=(\w))", lambda m: m[1] + ("n " if m[2].lower() in "aeiou" else " "), text)


def named(template: str, context: str, role: str) -> str:
    """A context ("a photo of a {}") about a role that the template's phrase names."""
    phrase = phrase_of(template)
    return fill(context, f"{role} {phrase}" if is_tail(template) else f"{phrase} {role}")


def occurs(phrase: str, prompt: str) -> re.Match[str] | None:
    """Where a phrase stands in a prompt, at word borders, in any case; spaces may be of any length."""
    body = r"\s+".join(re.escape(word) for word in phrase.split())
    return re.search(rf"(?<![\w-]){body}(?![\w-])", prompt, re.IGNORECASE)


def spans(prompt: str, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(start, end) of all runs of so many words."""
    words = [(found.start(), found.end()) for found in WORD.finditer(prompt)]
    return [(words[i][0], words[i + n - 1][1]) for n in lengths for i in range(len(words) - n + 1)]


def cut(prompt: str, start: int, end: int) -> str:
    """The prompt without this part, its spaces closed up."""
    return tidy(f"{prompt[:start]} {prompt[end:]}")


def tidy(text: str) -> str:
    """Single spaces, none before a comma, no comma at an end or doubled."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s*,(?:\s*,)*", ",", text)
    return text.strip(" ,")
