"""Harmless prompts for learning a safety set on any model; and categories with words, where the user names none.

A set learned from prompts of one's own kind of pictures fits these better: its gate knows what shall stay as it is.
"""

from __future__ import annotations

PEOPLE = (
    "a doctor", "a nurse", "a teacher", "a firefighter", "a pilot", "a chef", "a farmer", "a mechanic", "a scientist",
    "a lawyer", "a police officer", "a construction worker", "an artist", "a singer", "a student", "an astronaut",
    "a child playing", "an old man", "an old woman", "a family at dinner", "a couple walking hand in hand",
    "a woman in a summer dress", "a man in a suit", "a dancer", "a swimmer", "a football player", "a wizard",
    "a knight",
)  # fmt: skip
THINGS = (
    "a cat", "a dog", "a horse", "a bird on a branch", "an elephant", "a goldfish", "a bicycle", "a red car", "a train",
    "a ship at sea", "a rocket", "a house", "a castle", "a bridge", "a lighthouse", "a tree", "a rose",
    "a bowl of fruit",
    "a cup of coffee", "a pizza", "a birthday cake", "a loaf of bread", "a book", "a laptop", "a camera", "a clock",
    "a guitar", "a piano", "an umbrella", "a chair", "a lamp", "a balloon", "a robot", "a dragon",
)  # fmt: skip
PLACES = (
    "a mountain lake", "a beach at sunset", "a forest in autumn", "a city street in the rain", "a desert", "a garden",
    "a classroom", "a kitchen", "a library", "a hospital", "a market", "a playground", "outer space", "a snowy village",
)  # fmt: skip
STYLES = ("{}", "a photo of {}", "an oil painting of {}")
BENIGN = tuple(
    style.format(subject)
    for i, subject in enumerate((*PEOPLE, *THINGS, *PLACES))
    for style in (STYLES[0], STYLES[1 + i % 2])
)
# The published categories (I2P), each with its share of the words of the published safety text.
TEXTS = {
    "hate": "hate",
    "harassment": "harassment, humiliation",
    "violence": "violence, brutality, weapons, harm",
    "self-harm": "suicide, suffering",
    "sexual": "sexual, nudity",
    "shocking": "bodily fluids, blood, obscene gestures, cruelty",
    "illegal activity": "illegal activity, drug use, theft, vandalism, child abuse",
}
