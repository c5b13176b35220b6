"""Where a learning run that was killed goes on: its state in a small safetensors file, written atomically, no pickle.

The file also says with which settings and on which model it was made; going on with others is an error. What the
encoder half gives is not kept: it is computed again, from the same seeds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..denoiser import Cost, Denoiser
from ..errors import LearnError
from ..vector import ConceptVector
from ..vector_file import write_atomic

FORMAT = "concept-steer checkpoint 1"
SHOWN = 60  # characters of a setting in a message


@dataclass
class Bill:
    """Seconds and rows spent on a run, those before an interruption included (also what had to be done twice)."""

    denoiser: Denoiser
    earlier_seconds: float = 0.0
    earlier: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        self._began, self._cost = time.perf_counter(), self.denoiser.cost.snapshot()

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self._began

    @property
    def cost(self) -> Cost:
        new, old = self.denoiser.cost.since(self._cost), self.earlier
        return Cost(
            old.encoder_rows + new.encoder_rows,
            old.decoder_rows + new.decoder_rows,
            old.backward_rows + new.backward_rows,
        )


@dataclass(frozen=True)
class State:
    """Named tensors (on the CPU) and named numbers, texts and lists of them."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


@dataclass
class Checkpoint:
    """The file of one run. settings: all that decides its result, as texts. bill: what is spent is kept with it.

    A part is a file of its own beside it, for what is large and written at other times.
    """

    path: Path
    settings: Mapping[str, str]
    bill: Bill

    def read(self, part: str = "") -> State | None:
        """What was written last; None when there is no file. Errors: LearnError (damaged, of other settings)."""
        path = self._path(part)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LearnError(f"The checkpoint {path} cannot be read ({error.strerror}): check its rights.") from error
        meta, tensors = _parsed(path, data)
        self._check(path, json.loads(meta["settings"]))
        numbers = json.loads(meta["numbers"])
        spent = numbers.pop("spent")
        if spent["seconds"] > self.bill.earlier_seconds:  # of several parts the one written last
            self.bill.earlier_seconds = spent.pop("seconds")
            self.bill.earlier = Cost(**spent)
        return State(tensors, numbers)

    def write(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], part: str = "") -> None:
        """Replace what the file held. Errors: VectorFileError."""
        spent = {"seconds": self.bill.seconds, **vars(self.bill.cost)}
        meta = {
            "format": FORMAT,
            "settings": json.dumps(dict(self.settings)),
            "numbers": json.dumps({**numbers, "spent": spent}),
        }
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomic(self._path(part), safetensors.torch.save(kept, meta), overwrite=True)

    def remove(self, *parts: str) -> None:
        for part in ("", *parts):
            self._path(part).unlink(missing_ok=True)

    def part(self, name: str) -> Checkpoint:
        """A part as a checkpoint of its own, of the same run."""
        return Checkpoint(self._path(name), self.settings, self.bill)

    def _path(self, part: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{part}") if part else self.path

    def _check(self, path: Path, found: Mapping[str, str]) -> None:
        names = [name for name in {**found, **self.settings} if found.get(name) != self.settings.get(name)]
        if not names:
            return
        told = "; ".join(
            f"{name.replace('_', ' ')} {_short(found.get(name))} there and {_short(self.settings.get(name))} now"
            for name in names
        )
        raise LearnError(
            f"The checkpoint {path} was made with other settings ({told}): go on with those, or delete the file or "
            "give another name to begin anew."
        )


def open_checkpoint(
    path: Path | None, denoiser: Denoiser, bill: Bill, method: str, **settings: Any
) -> Checkpoint | None:
    """The checkpoint of a run with these settings on this model, or None for no path. Tensors count by their hash."""
    if path is None:
        return None
    own = {
        "method": method,
        "checkpoint_hash": denoiser.checkpoint_hash,
        "dtype": str(denoiser.dtype),
        "latent_shape": denoiser.latent_shape,
    }
    return Checkpoint(Path(path), {name: _text(value) for name, value in {**own, **settings}.items()}, bill)


def _text(value: Any) -> str:
    """A setting as a text that is equal for equal settings only."""
    if isinstance(value, Tensor):
        data = value.detach().to("cpu", torch.float32).contiguous()
        return f"tensor {list(data.shape)} {hashlib.sha256(data.numpy().tobytes()).hexdigest()}"
    if isinstance(value, ConceptVector):
        return value.fingerprint
    if isinstance(value, Sequence) and not isinstance(value, str):
        return json.dumps([_text(one) for one in value])
    return json.dumps(value)


def _short(text: str | None) -> str:
    if text is None:
        return "absent"
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _parsed(path: Path, data: bytes) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    try:
        length = int.from_bytes(data[:8], "little")
        meta = json.loads(data[8 : 8 + length].decode("utf-8"))["__metadata__"]
        if meta["format"] != FORMAT:
            raise ValueError(f"its format is {meta['format']!r}")
        return meta, safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise LearnError(
            f"{path} is damaged or not a checkpoint of learning ({error}): delete it, or give another name."
        ) from error
