"""Geom-Erasing (Liu et al., ECCV 2024, arXiv 2310.05873): learn a thing that no prompt names by where it is.

A picture in which a detector finds the thing is told by y' = y + the thing's name + a location token for each place
it covers, and the denoising loss weighs the covered cells: what the captions left out gets words. "Model removal"
learns these tokens alone (the model stays as it is); "data removal" also trains a LoRA of the UNet on all pictures,
clean ones with their own caption, so that fine-tuning on spoiled pictures learns the pictures and not the spoilage. In
use the thing's name and all its tokens are the negative prompt.

Ours beside it, the way "masked": the LoRA alone, from everything but the covered cells. It needs no words at all, and
so also works on a model whose text cannot reach what it paints unasked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..denoiser import Denoiser
from ..errors import LearnError
from ..learn.checkpoint import Bill, open_checkpoint
from . import lora
from .descent import Progress, TextReader, Tokens, Training
from .embedding import ROOM, LocationTokens
from .settings import ErasingSettings, Examples

FEWEST = 4  # pictures with the thing


@dataclass(frozen=True)
class ErasingResult:
    """tokens: None unless told. lora: peft's weights, None for tokens alone.

    untold, told: error of the prediction where the thing is, on held-out pictures with it, by their caption alone and
    by the tokens; NaN without held-out ones. What the tokens take off is what they can steer.
    """

    concept: str
    tokens: LocationTokens | None
    lora: dict[str, torch.Tensor] | None
    losses: list[float]
    untold: float
    told: float
    unet_rows: float
    backward_rows: int
    seconds: float
    stopped: str

    @property
    def gain(self) -> float:
        """Share of the error that the tokens take off."""
        return 1 - self.told / self.untold if self.untold > 0 else math.nan

    def summary(self) -> str:
        """Two to four lines in plain words."""
        cost = f"Cost: {self.seconds:.1f} s, {self.unet_rows:.0f} UNet rows forward, {self.backward_rows} backward."
        if self.tokens is None:
            return f"A LoRA against {self.concept!r}, {self.stopped}. Use it like any LoRA, at strength 1.\n{cost}"
        what = "tokens and a LoRA" if self.lora is not None else "tokens"
        lines = [
            f"{self.tokens.name}: {what} for {self.concept!r}, {self.tokens.bins} x {self.tokens.bins} places, "
            f"{self.stopped}.",
            "Too few pictures show it to keep some aside, so what the tokens can do was not measured."
            if math.isnan(self.gain)
            else f"On unseen pictures the tokens take {self.gain:.1%} off the prediction's error where the thing is.",
        ]
        if self.gain < 0.01:
            way_out = "Learn a LoRA with it, or a masked one." if self.lora is None else "Take a masked LoRA instead."
            lines.append(f"That is next to nothing: this model's text does not reach what it paints there. {way_out}")
        lines.append(
            f"In use: {self.tokens.name} in the negative prompt; it takes {len(self.tokens)} of {ROOM} tokens."
        )
        return "\n".join([*lines, cost])


def learn_erasing(
    denoiser: Denoiser,
    examples: Examples,
    concept: str,
    *,
    name: str = "",
    settings: ErasingSettings | None = None,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    checkpoint: Path | None = None,
    average: Callable[[Iterable[Any]], None] | None = None,
    rank: int = 0,
) -> ErasingResult:
    """Learn the location tokens of `concept`, and with settings.rank a LoRA too. The model itself is not changed.

    progress(step, steps, loss, tokens): tokens() are those so far. stop: asked before each step; what is learned is
    kept, and with `checkpoint` a later call with the same arguments goes on. average: of gradients over the processes
    of a distributed run; rank: this process's number there. autocast: what matrix products are computed in.
    Errors: LearnError (too few pictures, no room in a prompt, a model whose text encoder cannot be read, NaN at once).
    """
    s = settings or ErasingSettings()
    spoiled = examples.spoiled
    if len(spoiled) < FEWEST:
        raise LearnError(
            f"The detector found {concept!r} in {len(spoiled)} of {len(examples.latents)} pictures; learning needs at "
            f"least {FEWEST}, better 50. Give more pictures that show it, or lower the detector's threshold."
        )
    order = torch.randperm(len(spoiled), generator=torch.Generator().manual_seed(s.seed)).tolist()
    held = [spoiled[i] for i in order[: min(32, len(spoiled) // 5)]]
    learned = set(range(len(examples.latents))) if s.rank else set(spoiled)
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as inside:
        tokens = _tokens(denoiser, concept, name, s)
        inside.enter_context(lora.adapted(denoiser, s.rank, s.seed) if s.rank else denoiser.frozen())
        bill = Bill(denoiser)
        own = Examples(examples.latents.detach().clone(), list(examples.captions), list(examples.boxes))
        saved = open_checkpoint(
            checkpoint, denoiser, bill, "geom-erasing", concept=concept, name=name, pictures=own.latents,
            captions=own.captions, boxes=str(own.boxes), **{f"with_{key}": value for key, value in vars(s).items()},
        )  # fmt: skip
        weights = [p for p in cast(Any, denoiser).unet.parameters() if p.requires_grad] if s.rank else []
        training = Training(
            denoiser, tokens, own, s, sorted(learned - set(held)), weights,
            (lambda: torch.autocast(denoiser.device.type, autocast)) if autocast else nullcontext, saved, average, rank,
        )  # fmt: skip
        losses, stopped = training.descend(progress, stop)
        if not losses:
            raise LearnError("Learning was stopped before its first step, so there is nothing to keep.")
        untold, told = (math.nan, math.nan) if s.way != "told" else (training.held_out(held, t) for t in (False, True))
        state = lora.state_of(denoiser) if s.rank else None
        if saved is not None and len(losses) == s.steps:
            saved.remove()
    cost = bill.cost
    info = {
        "method": "Geom-Erasing, arXiv 2310.05873" if s.way == "told" else f"{s.way} LoRA",
        "family": denoiser.family,
        "checkpoint_hash": denoiser.checkpoint_hash,
        "pictures": f"{len(examples.latents)}, {len(spoiled)} with it",
        "steps": str(len(losses)),
        "lora_rank": str(s.rank),
        "alpha": f"{s.alpha:g}",
        "seed": str(s.seed),
    }
    return ErasingResult(
        concept, tokens.at(**info) if s.way == "told" else None, state, losses, untold, told,
        cost.unet_rows, cost.backward_rows, bill.seconds, stopped,
    )  # fmt: skip


def _tokens(denoiser: Denoiser, concept: str, name: str, s: ErasingSettings) -> Tokens:
    make = getattr(denoiser, "text_reader", None)
    if make is None:
        raise LearnError("The text encoder of this model cannot learn tokens here: use ComfyUI or the command line.")
    if not concept.strip():
        raise LearnError("The thing to erase has no name: call it what it is, for example 'watermark'.")
    reader: TextReader = make()
    found = Tokens(reader, concept, name or "no-" + "-".join(concept.lower().split()), s)
    if any(len(rows) + s.bins**2 > ROOM for rows in found.words.values()):
        raise LearnError(
            f"{concept!r} and {s.bins**2} places do not fit into a prompt's {ROOM} tokens: take fewer bins or a "
            "shorter name."
        )
    return found
