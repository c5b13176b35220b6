"""What is learned and on what it is judged: six concepts that the embedded model can draw and its judges can tell."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ..demo.build_data import article
from ..demo.job import LEARN_ROLES
from ..errors import ConceptSteerError


@dataclass(frozen=True)
class Task:
    """One concept. pairs: (neutral, rich) prompts to learn from; opposites: the prompt contrary to each rich one, which
    only LoRA sliders ask for (the neutral one where there is none). tests: (neutral, rich) prompts that no learning
    sees. A picture shows the concept when the judges' `head` says one of `values`."""

    name: str
    pairs: tuple[tuple[str, str], ...]
    opposites: tuple[str, ...]
    tests: tuple[tuple[str, str], ...]
    head: str
    values: tuple[str, ...]
    note: str

    @property
    def fingerprint(self) -> str:
        """Of all prompts and of what counts: results of other ones are not taken for this task's."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]


UNSEEN = ("firefighter", "pilot", "mechanic", "programmer")
MOSTLY_WOMEN = ("nurse", "teacher", "singer", "person getting a massage")
MOSTLY_WOMEN_UNSEEN = ("receptionist", "person with a veil", "student", "person getting a haircut")
SKINS = ("a woman{} with dark skin", "a man{} with light skin", "a woman{} with medium skin", "a man{} with dark skin")


def _gendered(role: str, gender: str) -> str:
    """As the training captions say it."""
    return article(role.replace("person", gender) if "person" in role else f"{gender} {role}")


def _gender(name: str, other: str, learn: Sequence[str], tests: Sequence[str]) -> Task:
    return Task(
        name,
        tuple((article(role), _gendered(role, name)) for role in learn),
        tuple(_gendered(role, other) for role in learn),
        tuple((article(role), _gendered(role, name)) for role in tests),
        "gender",
        (name,),
        f"learned on {', '.join(learn)}; judged on {', '.join(tests)}",
    )


def _skin(tone: str, contrary: str, values: tuple[str, ...]) -> Task:
    learn, tests = ([article(role) for role in roles] for roles in (LEARN_ROLES, UNSEEN))
    return Task(
        f"{tone} skin",
        tuple((role, f"{role} with {tone} skin") for role in learn),
        tuple(f"{role} with {contrary} skin" for role in learn),
        tuple((role, f"{role} with {tone} skin") for role in tests),
        "tone",
        values,
        f"learned on {', '.join(LEARN_ROLES)}; judged on {', '.join(UNSEEN)}. {' and '.join(values)} count both: "
        "neighbouring tones look alike through the model's VAE",
    )


def _smiling() -> Task:
    learn, tests = ("sad", "angry", "crying", "sick"), ("surprised", "scared", "sleeping", "neutral")
    return Task(
        "smiling",
        tuple((article(f"{face} face"), "a happy face") for face in learn),
        tuple(article(f"{face} face") for face in learn),
        tuple((article(f"{face} face"), "a happy face") for face in tests),
        "expression",
        ("happy",),
        "on faces, since every person of the model's world smiles unless the role says otherwise: "
        f"learned on {', '.join(learn)} faces; judged on {', '.join(tests)} ones",
    )


def _role(role: str) -> Task:
    people = ("a person", "a woman", "a man")
    rich = (article(role), f"a woman {role}", f"a man {role}")
    return Task(
        role,
        tuple(zip(people, rich, strict=True)),
        people,
        tuple((skin.format(""), skin.format(f" {role}")) for skin in SKINS),
        "role",
        (role,),
        "learned on a person, a woman and a man; judged on people of named gender and skin tone",
    )


def _object(name: str, category: str) -> Task:
    learn, tests = ("pizza", "cat", "car", "guitar"), ("book", "rose", "clock", "dog")
    return Task(
        name,
        tuple((article(thing), article(name)) for thing in learn),
        tuple(article(thing) for thing in learn),
        tuple((article(thing), article(name)) for thing in tests),
        "inappropriate",
        (category,),
        "in place of another object, since the judges name only inappropriate objects, and the model hardly draws "
        f"an object beside a person: learned on {', '.join(learn)}; judged on {', '.join(tests)}",
    )


TASKS = {
    task.name: task
    for task in (
        _gender("woman", "man", LEARN_ROLES, UNSEEN),
        _gender("man", "woman", MOSTLY_WOMEN, MOSTLY_WOMEN_UNSEEN),
        _skin("dark", "light", ("medium-dark", "dark")),
        _smiling(),
        _role("astronaut"),
        _object("knife", "weapons"),
    )
}


def tasks(names: Sequence[str]) -> list[Task]:
    """Errors: ConceptSteerError for a name that is not known."""
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ConceptSteerError(f"The concept {unknown[0]!r} is not known here; known are {', '.join(TASKS)}.")
    return [TASKS[name] for name in names]
