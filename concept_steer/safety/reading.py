"""What learning a safety set needs of the model, computed once: trajectories of what shall be kept out and of harmless
prompts, with h and the frozen predictions at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoiser import Conditioning, Denoiser, HState
from ..errors import LearnError
from ..learn.items import packed
from ..learn.result import encode, rows
from ..sampling import ddim_step, noise, timesteps
from ..vector import ConceptVector

PUSH = 2.0  # SLD max in its steady state: gamma = 2 (eps_S - eps_u), for s_m .5, see guidance/safe_latent_diffusion.py


@dataclass
class Watch:
    """Progress in words, and a way to stop. Errors: LearnError at a stop."""

    progress: Callable[[int, int, str], None] | None = None
    stop: Callable[[], bool] | None = None
    total: int = 1
    done: int = 0

    def tick(self, label: str) -> None:
        if self.stop is not None and self.stop():
            raise LearnError("Learning safety vectors was stopped before it was done, so there is no set.")
        self.done += 1
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total, label)


@dataclass(frozen=True)
class Readings:
    """Pooled h of n pictures at each step: (n, T, C), fp32 on the CPU. times: (T,) training timesteps."""

    pooled: Tensor
    times: tuple[float, ...]


@dataclass(frozen=True)
class Walks:
    """Trajectories of one category: an item for each picture and kept step.

    prompts, first_seed: of the pictures. states: under the prompt; bucket (n,) the step; picture (n,) its number.
    plain (n, C, H, W): the prompt's own prediction; own, all: where it should go, away from the category and from all
    categories. shift, shift_all (n, C): h of the safety text minus h of no text, averaged over positions.
    """

    prompts: tuple[str, ...]
    first_seed: int
    states: list[HState]
    bucket: Tensor
    picture: Tensor
    plain: Tensor
    own: Tensor
    all: Tensor
    shift: Tensor
    shift_all: Tensor


@dataclass(frozen=True)
class Reader:
    """One way of drawing for all trajectories: `sample_steps` DDIM steps with guidance, `batch` UNet rows at once.

    few: pictures of a kind where not more are needed.
    """

    denoiser: Denoiser
    sample_steps: int
    guidance: float
    batch: int
    few: int
    seed: int
    watch: Watch

    @property
    def stride(self) -> int:
        """Of a trajectory's steps every so many-th is kept for the descent: about ten of them."""
        return max(1, self.sample_steps // 10)

    @property
    def times(self) -> tuple[float, ...]:
        return tuple(timesteps(self.denoiser.schedule, self.sample_steps))

    def batches(self, count: int, each: int) -> list[range]:
        size = max(1, self.batch // each)
        return [range(first, min(first + size, count)) for first in range(0, count, size)]

    def drawn(
        self, prompts: Sequence[str], first_seed: int, label: str, vector: ConceptVector | None = None
    ) -> Readings:
        """Two rows a picture and step. vector: added at every step, and h read before it: what an open gate sees."""
        encoded = encode(self.denoiser, ["", *prompts])
        parts = []
        for members in self.batches(len(prompts), 2):
            conds = [encoded[""].expand(len(members)), rows(encoded, [prompts[i] for i in members])]
            x, found = self._start(members, first_seed), []
            for step in range(self.sample_steps):
                self.watch.tick(label)
                added = None if vector is None else vector.at(self.times[step], x.device)
                state, (empty, text) = self._evaluate(x, step, conds, added)
                found.append(_pooled(state.h[len(x) :]))
                x = self._onwards(x, step, empty + self.guidance * (text - empty))
            parts.append(torch.stack(found, 1))
        return Readings(_finite(torch.cat(parts)), self.times)

    def kept_out(self, prompts: Sequence[str], text: str | None, all_texts: str, first_seed: int, label: str) -> Walks:
        """Four rows a picture and step: no text, the prompt, the category's text if there is one, all categories' text.

        Every second picture is drawn with the safety of the target, so that the vector is learned where it will lead.
        """
        texts = [all_texts] if text is None else [text, all_texts]
        encoded = encode(self.denoiser, ["", *texts, *prompts])
        items: dict[str, list[Tensor]] = {name: [] for name in ("plain", "own", "all", "shift", "shift_all")}
        states: list[HState] = []
        places: list[tuple[int, int]] = []  # (step, picture)
        for members in self.batches(len(prompts), 2 + len(texts)):
            size = len(members)
            conds = [encoded[""].expand(size), rows(encoded, [prompts[i] for i in members])]
            conds += [encoded[one].expand(size) for one in texts]
            x = self._start(members, first_seed)
            safe = torch.tensor([i % 2 == 1 for i in members], device=x.device).view(-1, 1, 1, 1)
            for step in range(self.sample_steps):
                self.watch.tick(label)
                state, (empty, plain, *away) = self._evaluate(x, step, conds)
                h = _pooled(state.h).split(size)
                own, every = plain - PUSH * (away[0] - empty), plain - PUSH * (away[-1] - empty)
                kept = [j for j, i in enumerate(members) if (step + i) % self.stride == 0]
                index = torch.tensor(kept, dtype=torch.long)
                mine = packed(state[(index + size).to(state.h.device)], len(kept)) if kept else state[:0]
                states += [mine[j : j + 1] for j in range(len(kept))]
                places += [(step, members[j]) for j in kept]
                parts = {"plain": plain.cpu(), "own": own.cpu(), "all": every.cpu()}
                parts |= {"shift": h[2] - h[0], "shift_all": h[-1] - h[0]}
                for name, tensor in parts.items():
                    items[name].append(tensor[index])
                x = self._onwards(x, step, empty + self.guidance * (torch.where(safe, every, plain) - empty))
        joined = {name: _finite(torch.cat(parts)) for name, parts in items.items()}
        bucket, picture = (torch.tensor(column) for column in zip(*places, strict=True))
        return Walks(tuple(prompts), first_seed, states, bucket, picture, **joined)

    def _start(self, members: range, first_seed: int) -> Tensor:
        x = torch.stack([noise(self.seed + first_seed + i, self.denoiser.latent_shape) for i in members])
        return x.to(self.denoiser.device)

    def _evaluate(
        self, x: Tensor, step: int, conds: list[Conditioning], added: Tensor | None = None
    ) -> tuple[HState, list[Tensor]]:
        """The state without, and the predictions with what is added to h of all rows but the first, empty ones."""
        inputs = x.to(self.denoiser.dtype).repeat(len(conds), 1, 1, 1)
        state = self.denoiser.to_h(inputs, self.times[step], Conditioning.cat(conds))
        used = state
        if added is not None:
            h = state.h.clone()
            h[len(x) :] += added.view(-1, 1, 1).to(h.dtype)
            used = state.with_h(h)
        return state, list(self.denoiser.from_h(used).float().split(len(x)))

    def _onwards(self, x: Tensor, step: int, prediction: Tensor) -> Tensor:
        following = self.times[step + 1] if step + 1 < self.sample_steps else None
        return ddim_step(self.denoiser.schedule, x, prediction, self.times[step], following)


def _pooled(h: Tensor) -> Tensor:
    return h.detach().float().mean((2, 3)).cpu()


def _finite(tensor: Tensor) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise LearnError("The model's predictions are not finite (NaN), so no safety can be learned. Try float32.")
    return tensor
