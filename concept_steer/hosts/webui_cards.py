"""The card tab "Concepts" beside Lora: a card for each vector, which puts its tag into the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from modules import sd_models, shared, ui_extra_networks

from ..errors import ConceptSteerError, FamilyMismatch
from ..family import check
from ..library import Entry
from ..vector import ConceptVector
from . import webui
from .webui_denoiser import family_of
from .webui_rows import TAG
from .webui_settings import ALL_CARDS


class ConceptCards(ui_extra_networks.ExtraNetworksPage):
    def __init__(self) -> None:
        super().__init__("Concepts")

    def create_item(self, name: str, index: int | None = None, enable_filter: bool = True) -> dict[str, Any] | None:
        entry = next((one for one in webui.library().entries() if one.name == name), None)
        return None if entry is None else self._item(entry, index, enable_filter)

    def list_items(self) -> Iterator[dict[str, Any]]:
        """Vectors that cannot be read have no card; the accordion's line says why when one is chosen.

        Those of other models have none either, unless the settings ask for all.
        """
        for index, entry in enumerate(webui.library().entries()):
            item = self._item(entry, index, True)
            if item is not None:
                yield item

    def allowed_directories_for_previews(self) -> list[str]:
        return [str(folder) for folder in webui.library().folders]

    def _item(self, entry: Entry, index: int | None, fitting: bool) -> dict[str, Any] | None:
        try:
            vector = ConceptVector.load(entry.path)
        except ConceptSteerError as error:
            print(f"Concept Steer: {error}")
            return None
        if fitting and not getattr(shared.opts, ALL_CARDS, False) and not _fits(vector):
            return None
        stem = str(entry.path.with_suffix(""))
        quote = ui_extra_networks.quote_js
        return {
            "name": entry.name,
            "filename": str(entry.path),
            "shorthash": vector.fingerprint[:10],
            "preview": self.find_preview(stem),
            "description": self.find_description(stem) or vector.info.get("description", ""),
            "search_terms": [entry.name, vector.title, vector.family, vector.fingerprint],
            "prompt": quote(f"<{TAG}:{entry.name}:") + " + opts.extra_networks_default_multiplier + " + quote(">"),
            "local_preview": f"{stem}.preview.{shared.opts.samples_format}",
            "metadata": {"family": vector.family, **vector.info},
            "sort_keys": {"default": index, **self.get_sort_keys(str(entry.path))},
        }


def _fits(vector: ConceptVector) -> bool:
    """Whether it was made for the model that is loaded; True while there is none that one could ask."""
    try:
        family, channels = family_of(sd_models.model_data.sd_model)
    except ConceptSteerError:
        return True
    try:
        check(vector.family, vector.channels, family, channels, source=vector.name)
    except FamilyMismatch:
        return False
    return True


def register() -> None:
    ui_extra_networks.register_page(ConceptCards())
