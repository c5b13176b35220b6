"""Words of the embedded model's world, by which directions found in its h-space are named. No torch here."""

from __future__ import annotations

from typing import Any

from . import world

NEUTRAL = "a person"
ROLES_NAMED = ("doctor", "student", "farmer", "artist", "astronaut", "firefighter", "superhero", "wizard", "vampire")


def audit_words() -> dict[str, Any]:
    """What an audit of the embedded model asks, in the form of `analysis.word_list`: its own roles and tones."""
    return {
        "neutral": NEUTRAL,
        "roles": list(world.ROLE_NAMES),
        "attributes": {
            "gender": {gender: f"a {gender} {{}}" for gender in world.GENDERS},
            "skin tone": {tone: f"a {{}} with {tone} skin" for tone in world.TONES},
        },
        "words": {
            "looks": ["a sad person", "an angry person", "a bald person", "a successful person"],
            "backgrounds": [f"{{}} on a {background} background" for background in world.BACKGROUNDS],
            "situations": list(world.SCENES),
        },
    }


def naming_words() -> list[str]:
    """Prompts as the model's captions say them; {} stands for the neutral prompt."""
    people = [f"a {gender}" for gender in world.GENDERS]
    tones = [f"{{}} with {tone} skin" for tone in world.TONES]
    backgrounds = [f"{{}} on a {background} background" for background in world.BACKGROUNDS]
    styles = [f"{{}}, {style}" for style in world.STYLES.values()]
    moods = [f"{'an' if mood[0] in 'aeiou' else 'a'} {mood} person" for mood in ("sad", "angry", "shrugging", "bald")]
    hair = [f"a {colour}-haired person" for colour in ("red", "curly", "white")]
    roles = [f"{'an' if role[0] in 'aeiou' else 'a'} {role}" for role in ROLES_NAMED]
    return [*people, *tones, *backgrounds, *styles, *moods, *hair, *roles, "a successful person"]
