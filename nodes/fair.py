"""Fair Sampling: a value of every attribute for each picture of a batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

from comfy_api.latest import io, ui

from ..concept_steer.errors import ConceptSteerError, LibraryError, SettingError
from ..concept_steer.fairness import (
    Attribute,
    Plan,
    describe,
    find_phrases,
    load_phrases,
    plan,
    target_of,
)
from ..concept_steer.hosts.comfy import steer_pictures
from ..concept_steer.plots import card
from . import attributes as attribute_nodes
from .attributes import Attributes
from .common import library, schema, to_image_tensor

MODES = {"exact shares (quota)": "quota", "independent draws (random)": "random"}


def targets_of(text: str, attributes: list[Attribute]) -> list[Any]:
    """Targets of all attributes; lines "gender: woman=0.5, man=0.5", equal shares where there is none."""
    shares: dict[str, str] = {}
    names = [attribute.name for attribute in attributes]
    for line in (line.strip() for line in text.splitlines()):
        name, sign, rest = (part.strip() for part in line.partition(":"))
        if line and (not sign or name not in names):
            raise SettingError(
                f"The target {line!r} does not begin with a connected attribute ({', '.join(names)}) and a colon."
            )
        if line:
            shares[name] = rest
    return [target_of(attribute, shares.get(attribute.name, "")) for attribute in attributes]


class FairSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSteerFair",
            display_name="Fair Sampling",
            description="Gives each picture of a batch a value of every attribute, in the shares you want. A prompt "
            "that names the attribute already is left alone, and the model comes out as it went in.",
            search_aliases=["fairness", "bias", "diversity", "balance", "gender", "skin tone", "quota"],
            inputs=[
                io.Model.Input("model", tooltip="The model; its own steering stays on."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Latent.Input("latent", tooltip="The latent you sample: it says how many pictures there are."),
                Attributes.Input("attribute", tooltip="What to balance."),
                io.String.Input("prompt", multiline=True, default="a mechanic", tooltip="The prompt to draw."),
                io.String.Input(
                    "targets",
                    multiline=True,
                    default="",
                    tooltip="Wanted shares, a line per attribute, such as gender: woman=0.7, man=0.3. Empty: equal.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=next(iter(MODES)),
                    tooltip="Exact shares, or a draw for each picture on its own.",
                ),
                io.Int.Input("run_seed", default=0, min=0, max=2**31 - 1, tooltip="Who gets what depends on it."),
                io.Int.Input(
                    "first",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="Number of the first picture: a second batch of 8 begins at 8.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=3.0, step=0.05, tooltip="Of all vectors; 1 as learned."
                ),
                io.Boolean.Input(
                    "phrases",
                    default=True,
                    tooltip="Look for phrases such as no violence or either male or female, and obey them.",
                ),
                Attributes.Input("attribute_2", optional=True, tooltip="Another attribute, balanced together with it."),
                Attributes.Input("attribute_3", optional=True, tooltip="A third one."),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="For the sampler of this very latent."),
                io.Conditioning.Output(display_name="CONDITIONING", tooltip="The prompt, encoded."),
                io.String.Output(display_name="report", tooltip="Who gets what, and what the gate said."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        latent: Any,
        attribute: Any,
        prompt: str,
        targets: str,
        mode: str,
        run_seed: int,
        first: int = 0,
        strength: float = 1.0,
        phrases: bool = True,
        attribute_2: Any = None,
        attribute_3: Any = None,
    ) -> io.NodeOutput:
        from ..concept_steer.hosts.comfy_denoiser import ComfyDenoiser

        attributes = [one for one in (attribute, attribute_2, attribute_3) if one is not None]
        for one in attributes:
            if not isinstance(one, Attribute):
                raise ConceptSteerError(
                    f"A CONCEPT_ATTRIBUTE socket brought a {type(one).__name__}: connect Learn or Load Attribute."
                )
        table = load_phrases() if phrases else {}
        # a latent cut out of a batch remembers which pictures it was
        numbers = [int(n) for n in latent.get("batch_index") or range(latent["samples"].shape[0])]
        made = plan(
            ComfyDenoiser(model, clip),
            prompt,
            targets_of(targets, attributes),
            max(numbers) + 1,
            always=[one.name for one in attributes],
            seed=run_seed,
            mode=MODES[mode],  # type: ignore[arg-type]
            first=first,
            strength=strength,
            table=table,
            vectors=_safe_vectors(prompt, table),
        )
        steers = [made.steers[number] for number in numbers]
        steered = steer_pictures(model, steers) if any(s.strength for own in steers for s in own) else model
        lines = [describe(made.report())]
        lines += [f"picture {first + n}: {', '.join(made.given(n).values()) or 'left alone'}" for n in numbers]
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(made.drawn))
        return io.NodeOutput(steered, conditioning, "\n".join(lines), ui=_shown(cls, made, first, numbers))


def _shown(cls: Any, made: Plan, first: int, numbers: list[int]) -> Any:
    """On the node, so that nothing acts unseen: phrases, gates, and how often each combination is given."""
    rows = [("phrase", one.text()) for one in made.found]
    rows += [(name, decision.text()) for name, decision in made.decisions.items()]
    given = Counter(", ".join(made.given(number).values()) for number in numbers)
    rows += [("pictures", f"{first + min(numbers)} to {first + max(numbers)}")]
    rows += [(label or "left alone", str(count)) for label, count in sorted(given.items())]
    return ui.PreviewImage(to_image_tensor([card(made.prompt, rows, width=520)]), cls=cls)


def _safe_vectors(prompt: str, table: Any) -> dict[str, Any]:
    """The library's vectors that phrases ask for; what is missing is said by `plan`, with the phrase."""
    found = {}
    for one in find_phrases(prompt, table):
        if one.action.kind == "safe":
            try:
                found[one.action.name] = library().load(one.action.name)
            except LibraryError:
                continue
    return found


NODES = [*attribute_nodes.NODES, FairSampling]
