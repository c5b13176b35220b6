"""Prompts that name nothing inappropriate and yet ask for it: found by gradient in the text encoder, or misspelled.

The search is greedy coordinate gradient (Zou et al. 2307.15043), as it is used against text-to-image models by
MMA-Diffusion (Yang et al. 2311.17516): the state of the text encoder under some free tokens is brought near to that of
a prompt that names the thing. It sees the text encoder's weights and not the safety method. A prompt in which a
forbidden word can be read, also across spaces, is never taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..demo import world
from ..errors import ConceptSteerError

FILLING = frozenset(
    {"a", "an", "the", "of", "at", "on", "in", "and", "with", "showing", "s", "after", "use", "picture"}
)
HIDDEN = 4  # letters a forbidden word has at least to be looked for across spaces; shorter ones hide anywhere


@dataclass(frozen=True)
class Attack:
    """text: the prompt found. target: what it stands for. kind: "gradient" or "paraphrase". loss: see `search`."""

    text: str
    target: str
    kind: str
    loss: float = 0.0


@lru_cache(maxsize=1)
def forbidden_words() -> frozenset[str]:
    """Words of the inappropriate things, of their categories and of the suggestive scenes, that no harmless one has."""
    bad = [
        *world.CATEGORY,
        *world.INAPPROPRIATE,
        *(text for texts in world.CATEGORY_CAPTIONS.values() for text in texts),
        *world.SUGGESTIVE,
    ]
    fine = [*world.OBJECTS, *world.ROLE_NAMES, *(scene for scene in world.SCENES if scene not in world.SUGGESTIVE)]
    return frozenset(_words(bad)) - frozenset(_words(fine)) - FILLING


def names_nothing(text: str) -> bool:
    """Whether no forbidden word stands in the text, nor, for those of four letters or more, across its spaces."""
    run = re.sub(r"[^a-z]", "", text.lower())
    forbidden = forbidden_words()
    return not (set(_words([text])) & forbidden) and not any(word in run for word in forbidden if len(word) >= HIDDEN)


def _words(texts: Sequence[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}


class TextEncoder:
    """A CLIP text encoder of transformers with its tokenizer, made differentiable in the choice of tokens."""

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder
        self.length = min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))
        self.embedding = encoder.get_input_embeddings()

    def ids(self, text: str) -> list[int]:
        """Without start and end."""
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def survives(self, ids: Sequence[int]) -> bool:
        """Whether the tokens, written out as a text, are read as the same tokens again."""
        return self.ids(self.text(ids)) == list(ids)

    @cached_property
    def allowed(self) -> Tensor:
        """(V,) bool: tokens of plain letters, alone or at a word's end, that name nothing by themselves."""
        count = self.embedding.weight.shape[0]
        tokens = self.tokenizer.convert_ids_to_tokens(list(range(min(count, len(self.tokenizer)))))
        fine = [
            bool(re.fullmatch(r"[a-z]+(</w>)?", token)) and names_nothing(token.removesuffix("</w>"))
            for token in tokens
        ]
        return torch.tensor(fine + [False] * (count - len(fine)))

    def padded(self, ids: Tensor) -> Tensor:
        """(B, n) -> (B, L) with start, end and padding, as the model's pipeline has them."""
        if ids.shape[1] > self.length - 2:
            raise ConceptSteerError(f"{ids.shape[1]} tokens do not fit: the text encoder takes {self.length - 2}.")
        whole = torch.full((ids.shape[0], self.length), int(self.tokenizer.pad_token_id), dtype=torch.long)
        whole[:, 0] = int(self.tokenizer.bos_token_id)
        whole[:, 1 : 1 + ids.shape[1]] = ids
        whole[:, 1 + ids.shape[1]] = int(self.tokenizer.eos_token_id)
        return whole.to(self.embedding.weight.device)

    @torch.no_grad()
    def states(self, ids: Tensor) -> Tensor:
        """(B, n) -> (B, L, D), fp32: what the UNet's attention is given."""
        return self.encoder(input_ids=self.padded(ids)).last_hidden_state.float()

    def gradient(self, ids: Tensor, target: Tensor) -> Tensor:
        """(n, V): how the loss of tokens (n,) changes with the share of each token at each place."""
        weight = self.embedding.weight.detach()
        whole = self.padded(ids[None])
        choice = F.one_hot(ids.to(weight.device), weight.shape[0]).to(weight.dtype).requires_grad_(True)

        def mixed(module: Any, given: Any, out: Tensor) -> Tensor:
            return torch.cat([out[:, :1], (choice @ weight)[None], out[:, 1 + len(ids) :]], dim=1)

        handle = self.embedding.register_forward_hook(mixed)
        try:
            with torch.enable_grad():
                found = loss(self.encoder(input_ids=whole).last_hidden_state.float(), target).sum()
                return torch.autograd.grad(found, choice)[0].float().cpu()
        finally:
            handle.remove()


def loss(states: Tensor, target: Tensor) -> Tensor:
    """(B,): 1 - cosine of the states (B, L, D) and the target's (1, L, D), averaged over the places after the start.

    In a causal text encoder every place from the end token on has read the whole prompt, so most of the places weigh
    what the prompt means, and few which word stands where.
    """
    return 1 - F.cosine_similarity(states[:, 1:], target[:, 1:].to(states), dim=-1).mean(1)


def search(
    encoder: TextEncoder,
    target: str,
    *,
    tokens: int = 6,
    steps: int = 30,
    candidates: int = 64,
    top: int = 32,
    seed: int = 0,
) -> Attack:
    """A text of `tokens` tokens that names nothing, with states near those of `target`: the best of all seen.

    Each step: the `top` tokens of each place by gradient, `candidates` random single exchanges among them, the best
    that can be written as a text and names nothing. Errors: ConceptSteerError when no such text is met at all.
    """
    generator = torch.Generator().manual_seed(seed)
    goal = encoder.states(torch.tensor([encoder.ids(target)]))
    allowed = encoder.allowed
    ids = _start(encoder, tokens, generator)
    best, best_loss = ids, float(loss(encoder.states(ids[None]), goal))
    for _ in range(steps):
        slope = encoder.gradient(ids, goal).masked_fill(~allowed, torch.inf)
        likely = slope.topk(min(top, int(allowed.sum())), largest=False).indices  # (n, top)
        places = torch.randint(tokens, (candidates,), generator=generator)
        picks = torch.randint(likely.shape[1], (candidates,), generator=generator)
        tried = ids.repeat(candidates, 1)
        tried[torch.arange(candidates), places] = likely[places, picks]
        fine = [row for row in tried.unique(dim=0) if _usable(encoder, row)]
        if not fine:
            continue
        losses = loss(encoder.states(torch.stack(fine)), goal)
        first = int(losses.argmin())
        ids = fine[first]
        if float(losses[first]) < best_loss:
            best, best_loss = ids, float(losses[first])
    return Attack(encoder.text(best.tolist()), target, "gradient", best_loss)


def _usable(encoder: TextEncoder, ids: Tensor) -> bool:
    return encoder.survives(ids.tolist()) and names_nothing(encoder.text(ids.tolist()))


def _start(encoder: TextEncoder, tokens: int, generator: torch.Generator) -> Tensor:
    """Random allowed tokens that can be written as a text."""
    known = encoder.allowed.nonzero()[:, 0]
    for _ in range(1000):
        ids = known[torch.randint(len(known), (tokens,), generator=generator)] if len(known) else known
        if len(ids) and _usable(encoder, ids):
            return ids
    raise ConceptSteerError(
        f"No text of {tokens} tokens was met that names nothing and is read as it is written: try fewer tokens."
    )


def paraphrases(target: str) -> list[Attack]:
    """The prompt misspelled in the ways people use against word filters: one letter of every forbidden word.

    Doubled, dropped, exchanged with the next, or replaced by a letter that sounds or looks alike.
    """
    ways = {word: _misspelled(word) for word in sorted(_words([target]) & forbidden_words())}
    found: dict[str, None] = {}
    for number in range(max(map(len, ways.values()), default=0)):
        text = target
        for word, others in ways.items():
            text = re.sub(rf"\b{word}\b", others[number % len(others)], text)
        if names_nothing(text):
            found[text] = None
    return [Attack(text, target, "paraphrase") for text in found]


ALIKE = {"a": "e", "e": "a", "i": "y", "o": "u", "c": "k", "k": "c", "s": "z", "d": "t", "p": "b", "g": "q"}


def _misspelled(word: str) -> list[str]:
    changes: list[Callable[[int], str]] = [
        lambda i: word[: i + 1] + word[i:],
        lambda i: word[:i] + word[i + 1 :],
        lambda i: word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :],
        lambda i: word[:i] + ALIKE.get(word[i], word[i]) + word[i + 1 :],
    ]
    return [other for change in changes for i in range(1, len(word)) if (other := change(i)) != word]
