"""Fetch the openly licensed emoji sets from the npm registry and draw them: one RGBA picture a code point and set.

Needs `npm` on the PATH and the `demo` extra (resvg-py). Nothing of this runs at use
time: only the data builder calls it.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = {
    "noto": ("@iconify-json/noto", "1.2.9", "Noto Emoji, Google, Apache-2.0"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5", "Twemoji, Twitter and contributors, CC-BY 4.0"),
    "fluent": ("@lobehub/fluent-emoji-3d", "1.1.0", "Fluent Emoji 3D, Microsoft, MIT"),
}

# Further sets that only the judges learn from: they must know a knife in a hand they never saw.
EXTRA = {
    "fluent-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "Fluent Emoji Flat, Microsoft, MIT"),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5", "Noto Emoji v1, Google, Apache-2.0"),
    "emojione": ("@iconify-json/emojione", "1.2.3", "EmojiOne 2, CC-BY 4.0"),
    "fxemoji": ("@iconify-json/fxemoji", "1.2.2", "FxEmojis, Mozilla, Apache-2.0"),
}


def strip_selectors(code: str) -> str:
    """Drop the variation selector fe0f, which the sets use inconsistently."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def fetch(name: str, folder: Path) -> Path:
    """Download one set with `npm pack` into `folder` (once) and return its tarball."""
    package, version, _ = {**PACKAGES, **EXTRA}[name]
    tarball = folder / f"{package.replace('@', '').replace('/', '-')}-{version}.tgz"
    if not tarball.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder, check=True, text=True)
        except FileNotFoundError:
            raise RuntimeError("npm was not found: install Node.js, or put the tarballs into " + str(folder)) from None
    return tarball


def _fluent_tone(code: str) -> str:
    """Undo the package's swap of medium-light and medium skin, seen on every kind of person but the programmer."""
    swap = {"1f3fc": "1f3fd", "1f3fd": "1f3fc"}
    parts = code.split("-")
    return code if parts[-1] == "1f4bb" else "-".join(swap.get(part, part) for part in parts)


class ArtSet:
    """One emoji set; `draw(code, size)` gives straight-alpha RGBA uint8 (size, size, 4), or None if it lacks it."""

    def __init__(self, name: str, tarball: Path) -> None:
        self.name = name
        self._pictures: dict[str, bytes] = {}
        self._icons: dict[str, dict] = {}
        with tarfile.open(tarball) as tar:
            if name == "fluent":
                for member in tar.getmembers():
                    if member.name.endswith(".webp"):
                        data = tar.extractfile(member)
                        assert data is not None
                        self._pictures[_fluent_tone(strip_selectors(Path(member.name).stem))] = data.read()
                return
            icons = json.load(tar.extractfile("package/icons.json"))  # type: ignore[arg-type]
            chars = json.load(tar.extractfile("package/chars.json"))  # type: ignore[arg-type]
        self._box = icons.get("width", 16), icons.get("height", 16)
        for code, icon_name in chars.items():
            name_ = icons.get("aliases", {}).get(icon_name, {}).get("parent", icon_name)
            if name_ in icons["icons"]:
                self._icons[strip_selectors(code)] = icons["icons"][name_]

    def draw(self, code: str, size: int) -> np.ndarray | None:
        code = strip_selectors(code)
        if code in self._pictures:
            picture = Image.open(io.BytesIO(self._pictures[code])).convert("RGBA")
        elif code in self._icons:
            import resvg_py

            icon = self._icons[code]
            width, height = icon.get("width", self._box[0]), icon.get("height", self._box[1])
            box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
            names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            svg = f'<svg {names} viewBox="{box}" width="{2 * size}" height="{2 * size}">{icon["body"]}</svg>'
            picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
        else:
            return None
        return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS))


def load(folder: Path, names: Iterable[str] = PACKAGES) -> dict[str, ArtSet]:
    """All emoji sets, fetched into `folder` where missing."""
    return {name: ArtSet(name, fetch(name, folder)) for name in names}
