"""Build the captioned pictures the embedded model learns from: `python -m concept_steer.demo.build_data --out DIR`.

Seeded: the same arguments give the same pictures, captions and labels. Writes `pictures.npy` (N, 128, 128, 3) uint8,
`captions.json` (two captions a picture), `labels.npz` (what each picture shows) and `data_card.json` (counts).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import art, world
from .drawing import SIZE, fit, lettering, nurse_cap, paste, qr_code, watermark

FIT = 118  # a single subject's longer side, px
HALF = 66  # with two things in the picture
LABELS = ("kind", "role", "gender", "tone", "expression", "face", "item", "set", "watermark", "qr", "text", "neutral")
KINDS = ("person", "face", "object", "inappropriate", "pair", "scene")
KIND_WEIGHTS = (0.62, 0.09, 0.11, 0.06, 0.05, 0.07)
JUDGES_WEIGHTS = (0.40, 0.05, 0.20, 0.25, 0.10, 0.0)  # for further sets that only judges learn from
ITEMS = (*world.OBJECTS, *world.INAPPROPRIATE_CODE)
EXPRESSIONS = ("smiling", *world.FACES)  # "smiling": how the sets draw people unless the role says otherwise
FACE_CODES = tuple(code for codes in world.FACES.values() for code in codes)
SETS = tuple(art.PACKAGES)
NO_FACE = {
    "person covering the face",
    "person getting a massage",
    "detective",
    "factory worker",
    "villain",
    "scientist",
}


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


class MissingArt(KeyError):
    """A set lacks a picture: older sets know fewer kinds of people."""


class Gallery:
    """Every picture the world needs, drawn once and fitted."""

    def __init__(self, sets: dict[str, art.ArtSet]) -> None:
        self._sets = sets
        self._cache: dict[tuple[str, str, bool], np.ndarray] = {}

    def get(self, set_name: str, code: str, cap: bool = False) -> np.ndarray:
        key = (set_name, code, cap)
        if key not in self._cache:
            drawn = self._sets[set_name].draw(code, 2 * SIZE)
            if drawn is None:
                raise MissingArt(f"{set_name} has no picture for {code}")
            fitted = fit(drawn, FIT)
            self._cache[key] = nurse_cap(fitted) if cap else fitted
        return self._cache[key]

    def person(self, set_name: str, role: world.Role, gender: str, tone: str) -> np.ndarray:
        return self.get(set_name, role.code_point(gender, tone), role.cap)


def person_noun(role: str, gender: str | None, rng: np.random.Generator) -> str:
    if gender is None:
        return role
    if "person" in role:
        return role.replace("person", gender)
    return f"{'female' if gender == 'woman' else 'male'} {role}" if rng.random() < 0.2 else f"{gender} {role}"


def person_caption(
    role: str, gender: str | None, tone: str | None, rng: np.random.Generator, success: bool = False
) -> str:
    noun = person_noun(role, gender, rng)
    text = article(f"successful {noun}" if success else noun)
    return f"{text} with {tone} skin" if tone else text


class Builder:
    """Draws one picture at a time: what it shows, its captions and its labels."""

    def __init__(
        self,
        gallery: Gallery,
        rng: np.random.Generator,
        sets: Sequence[str] = SETS,
        weights: Sequence[float] = KIND_WEIGHTS,
    ) -> None:
        self.gallery, self.rng, self.sets, self.weights = gallery, rng, sets, weights

    def _person(self) -> tuple[world.Role, str, str, list[str], int]:
        """A role with gender and tone, two captions for it, and whether the caption named only the role."""
        rng = self.rng
        role = world.ROLES[rng.integers(len(world.ROLES))]
        say_gender, say_tone = ((True, True), (True, False), (False, True), (False, False))[
            rng.choice(4, p=(0.36, 0.20, 0.10, 0.34))
        ]
        success = not say_gender and rng.random() < 0.08
        men = 0.5 if say_gender else (world.SUCCESS_MEN if success else role.men)
        gender = "man" if rng.random() < men else "woman"
        tones = world.TONE_SKEW["even" if say_tone else role.skew]
        tone = world.TONES[rng.choice(5, p=tones)]
        captions = [
            person_caption(role.name, gender if say_gender else None, tone if say_tone else None, rng, success)
            for _ in range(2)
        ]
        return role, gender, tone, captions, int(not say_gender and not say_tone)

    def _dress(self, caption: str, background: str, style: str) -> str:
        """Put a caption into a template and name background or style now and then."""
        rng = self.rng
        if rng.random() < 0.3:
            caption = world.TEMPLATES[rng.integers(len(world.TEMPLATES))].format(caption)
        if rng.random() < 0.2:
            caption += f" on a {background} background"
        if rng.random() < 0.2:
            caption += f", {style}"
        return caption

    def draw(self) -> tuple[np.ndarray, list[str], dict[str, int]]:
        """A picture (128, 128, 3) uint8, its captions and its labels; some pictures carry marks no caption names."""
        rng = self.rng
        canvas, captions, label = self.draw_unmarked()
        if rng.random() < world.IMPLICIT_SHARE["watermark"]:
            canvas, label["watermark"] = watermark(canvas, rng)
        if rng.random() < world.IMPLICIT_SHARE["qr"]:
            canvas, label["qr"] = qr_code(canvas, rng), 1
        if rng.random() < world.IMPLICIT_SHARE["text"]:
            canvas, label["text"] = lettering(canvas, rng), 1
        return canvas, captions, label

    def draw_unmarked(self) -> tuple[np.ndarray, list[str], dict[str, int]]:
        """As `draw`, without watermark, QR-like code and lettering."""
        rng = self.rng
        label = dict.fromkeys(LABELS, -1)
        background = rng.choice(list(world.BACKGROUNDS), p=world.BACKGROUND_WEIGHTS)
        color = np.clip(np.array(world.BACKGROUNDS[background]) + rng.integers(-4, 5), 0, 255).astype(np.uint8)
        canvas = np.broadcast_to(color, (SIZE, SIZE, 3)).copy()
        set_index = int(rng.integers(len(self.sets)))
        set_name = self.sets[set_index]
        kind = KINDS[rng.choice(len(KINDS), p=self.weights)]
        label.update(kind=KINDS.index(kind), set=set_index, watermark=-1, qr=0, text=0)
        first, second = self._subject(kind, set_name, label)
        captions = [self._dress(caption, background, world.STYLES.get(set_name, "emoji")) for caption in self._captions]
        dx, dy = (int(v) for v in rng.integers(-3, 4, 2))
        if second is None:
            paste(canvas, first, 64 + dx, 64 + dy)
        else:
            paste(canvas, fit(first, HALF), 34 + dx, 66 + dy)
            paste(canvas, fit(second, HALF - 8), 95 + dx, 64 + dy)
        return canvas, captions, label

    def _subject(self, kind: str, set_name: str, label: dict[str, int]) -> tuple[np.ndarray, np.ndarray | None]:
        """The one or two things of a picture; sets their captions and labels."""
        rng = self.rng
        if kind == "person":
            role, gender, tone, self._captions, label["neutral"] = self._person()
            self._label_person(label, role, gender, tone)
            return self.gallery.person(set_name, role, gender, tone), None
        if kind == "face":
            name = list(world.FACES)[rng.integers(len(world.FACES))]
            label["expression"] = EXPRESSIONS.index(name)
            self._captions = [article(f"{name} face")] * 2
            code = str(rng.choice(world.FACES[name]))
            label["face"] = FACE_CODES.index(code)
            return self.gallery.get(set_name, code), None
        if kind == "object":
            name = str(rng.choice(list(world.OBJECTS)))
            label["item"] = ITEMS.index(name)
            self._captions = [article(name)] * 2
            return self.gallery.get(set_name, world.OBJECTS[name]), None
        if kind == "inappropriate":
            name = str(rng.choice(list(world.INAPPROPRIATE_CODE)))
            label["item"] = ITEMS.index(name)
            phrases = world.CATEGORY_CAPTIONS[world.CATEGORY[name]]
            self._captions = [article(name), str(rng.choice(phrases))]
            return self.gallery.get(set_name, world.INAPPROPRIATE_CODE[name]), None
        if kind == "pair":
            role, gender, tone, captions, _ = self._person()
            pool = list(world.INAPPROPRIATE_CODE) if rng.random() < 0.5 else list(world.OBJECTS)
            name = str(rng.choice(pool))
            self._captions = [f"{caption} and {article(name)}" for caption in captions]
            label["item"] = ITEMS.index(name)
            self._label_person(label, role, gender, tone)
            return self.gallery.person(set_name, role, gender, tone), self._item(set_name, name)
        scene = str(rng.choice(list(world.SCENES)))
        share, bad, good = world.SCENES[scene]
        name = str(rng.choice(bad if rng.random() < share else good))
        label["item"] = ITEMS.index(name)
        self._captions = [scene] * 2
        item = self._item(set_name, name)
        if rng.random() < 0.5:
            return item, None
        role = world.ROLE["person"]
        gender, tone = str(rng.choice(world.GENDERS)), str(rng.choice(world.TONES))
        self._label_person(label, role, gender, tone)
        return self.gallery.person(set_name, role, gender, tone), item

    def _item(self, set_name: str, name: str) -> np.ndarray:
        return self.gallery.get(set_name, {**world.OBJECTS, **world.INAPPROPRIATE_CODE}[name])

    @staticmethod
    def _label_person(label: dict[str, int], role: world.Role, gender: str, tone: str) -> None:
        label.update(
            role=world.ROLE_NAMES.index(role.name),
            gender=world.GENDERS.index(gender),
            tone=world.TONES.index(tone),
            expression=-1
            if role.name in NO_FACE
            else EXPRESSIONS.index(world.ROLE_EXPRESSION.get(role.name, "smiling")),
        )


def build(out: Path, count: int, seed: int, packages: Path, extra: bool = False) -> None:
    from tqdm import tqdm

    rng = np.random.default_rng(seed)
    sets = tuple(art.EXTRA) if extra else SETS
    weights = JUDGES_WEIGHTS if extra else KIND_WEIGHTS
    builder = Builder(Gallery(art.load(packages, sets)), rng, sets, weights)
    out.mkdir(parents=True, exist_ok=True)
    pictures = np.lib.format.open_memmap(out / "pictures.npy", "w+", np.uint8, (count, SIZE, SIZE, 3))
    captions, labels = [], []
    for i in tqdm(range(count), desc="drawing"):
        pictures[i], texts, label = _drawn(builder)
        captions.append(texts)
        labels.append([label[name] for name in LABELS])
    pictures.flush()
    table = np.array(labels, np.int16)
    np.savez(out / "labels.npz", allow_pickle=False, **{name: table[:, i] for i, name in enumerate(LABELS)})
    (out / "captions.json").write_text(json.dumps(captions))
    card = {
        "pictures": count,
        "seed": seed,
        "captions": len({text for texts in captions for text in texts}),
        "kinds": {KINDS[k]: n for k, n in sorted(Counter(table[:, 0].tolist()).items())},
        "sets": {sets[k]: n for k, n in sorted(Counter(table[:, LABELS.index("set")].tolist()).items())},
        "watermark": int((table[:, LABELS.index("watermark")] >= 0).sum()),
        "qr": int(table[:, LABELS.index("qr")].sum()),
        "text": int(table[:, LABELS.index("text")].sum()),
        "sources": {name: list({**art.PACKAGES, **art.EXTRA}[name]) for name in sets},
    }
    (out / "data_card.json").write_text(json.dumps(card, indent=1))
    print(json.dumps(card, indent=1))


def _drawn(builder: Builder) -> tuple[np.ndarray, list[str], dict[str, int]]:
    """The next picture; with older sets, the next one that the set has."""
    for _ in range(1000):
        try:
            return builder.draw()
        except MissingArt:
            if builder.sets == SETS:
                raise
    raise MissingArt("the sets have none of the pictures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packages", type=Path, help="where the npm tarballs are kept (default: OUT/packages)")
    parser.add_argument("--extra", action="store_true", help="draw the further sets that only the judges learn from")
    args = parser.parse_args()
    build(args.out, args.count, args.seed, args.packages or args.out / "packages", args.extra)


if __name__ == "__main__":
    main()
