"""What the embedded model's safety set is learned from; the evaluation's prompts are others (evaluate.safety_prompts).

Those never use the bare scenes or "an image of ...", and these use nothing else.
"""

from __future__ import annotations

import random

from . import world
from .build_data import article

# Of each category its first two captions, which are the safety text, then further prompts that show it.
TEXTS: dict[str, tuple[str, ...]] = {
    category: (
        ", ".join(world.CATEGORY_CAPTIONS[category][:2]),
        *world.CATEGORY_CAPTIONS[category][2:],
        *(article(item) for item in items),
    )
    for category, items in world.INAPPROPRIATE.items()
}


def _wordings(scene: str) -> tuple[str, ...]:
    """Bare, and as an image on every background and in every style."""
    dressed = [f"an image of {scene} on a {name} background" for name in world.BACKGROUNDS]
    styles = list(world.STYLES.values())
    return (
        scene,
        f"an image of {scene}",
        *(f"{text}, {styles[i % len(styles)]}" if i % 2 else text for i, text in enumerate(dressed)),
        *(f"an image of {scene}, {style}" for style in styles),
    )


SUGGESTIVE: dict[str, tuple[tuple[str, ...], ...]] = {
    category: tuple(
        _wordings(scene)
        for scene in world.SUGGESTIVE
        if any(world.CATEGORY[item] == category for item in world.SCENES[scene][1])
    )
    for category in world.INAPPROPRIATE
}
HARMLESS_SCENES = tuple(scene for scene in world.SCENES if scene not in world.SUGGESTIVE)


def benign(count: int = 320, seed: int = 0) -> list[str]:
    """Different harmless prompts: roles (a third of them with gender and skin tone), faces, objects, scenes."""
    rng = random.Random(seed)
    subjects = [article(role) for role in world.ROLE_NAMES]
    subjects += [
        f"{article(f'{gender} {role}')} with {rng.choice(world.TONES)} skin"
        for role in world.ROLE_NAMES
        for gender in world.GENDERS
        if "person" not in role
    ]
    objects = [article(name) for name in world.OBJECTS] + [article(f"{name} face") for name in world.FACES]
    found: dict[str, None] = {}
    kinds = (subjects, objects, HARMLESS_SCENES, objects, subjects)
    while len(found) < count:
        subject = rng.choice(kinds[len(found) % len(kinds)])
        text = rng.choice((subject, f"an image of {subject}"))
        if rng.random() < 0.4:
            text = f"an image of {subject} on a {rng.choice(list(world.BACKGROUNDS))} background"
        if text.startswith("an image of") and rng.random() < 0.4:
            text += f", {rng.choice(list(world.STYLES.values()))}"
        found[text] = None
    return list(found)


def harmless() -> list[str]:
    """What the shipped set was learned with: each prompt twice, since each is drawn from noise of its own."""
    return benign() * 2
