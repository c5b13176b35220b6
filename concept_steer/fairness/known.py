"""Attributes that come with a definition, to be learned on any model that knows the words, and roles to learn on.

The values of `tone` follow the Fitzpatrick scale in the five steps of the emoji standard (UTS 51).
"""

from __future__ import annotations

DEFINITIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "gender": {"woman": ("a woman {}", "a female {}"), "man": ("a man {}", "a male {}")},
    "tone": {
        tone: (f"a {{}} with {tone} skin",) for tone in ("light", "medium-light", "medium", "medium-dark", "dark")
    },
}
# The last third judges the gate, see learn_attribute.
ROLES = (
    "doctor", "detective", "scientist", "teacher", "student", "singer", "artist", "office worker",
    "judge", "cook", "farmer", "astronaut",
)  # fmt: skip
