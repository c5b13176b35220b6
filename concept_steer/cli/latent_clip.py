"""`concept-steer latent-clip ...`: score, classify, rank and search pictures in the latent, without decoding."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConceptSteerError
from .help import Commands, command, positive
from .models import DTYPES, add_model_options, bar, load_checkpoint, picture_size, usable_device
from .output import ready_files, write_picture

if TYPE_CHECKING:
    import torch

    from ..denoiser import Denoiser
    from ..latent_clip import Index, LatentClipModel, Ranking

SPACES = ("sd1", "sdxl", "demo")  # as latent_clip.SPACES, which would need torch to look up
TEMPLATES = ("published", "simple", "demo")
ENDS = (".png", ".safetensors")  # of what `rank` keeps
EPILOG = """examples:
  concept-steer latent-clip rank --prompt 'a woman doctor' --seeds 16 --pick 2 --out best
  concept-steer latent-clip search best --text 'a doctor'
  concept-steer latent-clip classify best --class 'a doctor' --class 'a nurse'
  concept-steer latent-clip convert epoch_34.pt --out latent-clip-b8.safetensors
"""


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "latent-clip",
        parents=[common],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="judge pictures in the latent, without decoding: score, classify, rank seeds, search",
        description="Hold latents against texts with a latent CLIP: the embedded model's own, or a published one.",
        epilog=EPILOG,
    )
    below = parser.add_subparsers(title="uses", metavar="USE", required=True)
    for name, run, options, text in USES:
        one = command(below, common, name, run, help=text, description=text[0].upper() + text[1:] + ".")
        options(one)


def _clip_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="demo", metavar="FILE", help="a latent CLIP that `convert` wrote (default: demo, embedded)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--batch", type=positive, default=16, help="latents at once (default: 16)")


def _file_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="latents, pictures, or folders of them")
    parser.add_argument("--space", choices=SPACES, help="whose latents they are, for files that do not say")
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--scaled", action="store_true", default=None, help="such files hold what the UNet sees")
    scale.add_argument("--unscaled", dest="scaled", action="store_false", help="such files hold what the VAE gives")
    _clip_options(parser)
    parser.add_argument("--checkpoint", metavar="PATH", help="the model whose VAE reads pictures (with demo: demo)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps ...; default: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")


def _text_options(parser: argparse.ArgumentParser) -> None:
    _file_options(parser)
    parser.add_argument("--text", dest="texts", action="append", required=True, help="repeatable")


def _class_options(parser: argparse.ArgumentParser) -> None:
    _file_options(parser)
    parser.add_argument("--class", dest="classes", action="append", required=True, metavar="NAME", help="repeatable")
    parser.add_argument(
        "--templates", choices=TEMPLATES, help="published: the 80 of CLIP; simple: 7 of them (default: by the model)"
    )
    parser.add_argument("--template", action="append", help="one of your own instead, with {}; repeatable")


def _against(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", action="append", default=[], metavar="TEXT", help="what to avoid; repeatable")


def _search_options(parser: argparse.ArgumentParser) -> None:
    _file_options(parser)
    parser.add_argument("--text", required=True, help="what to look for")
    _against(parser)
    parser.add_argument("--count", type=positive, default=10, help="results (default: 10)")


def _rank_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--text", help="what the seeds are ranked by (default: the prompt)")
    _against(parser)
    parser.add_argument("--seeds", type=positive, default=16, help="how many to try (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="the first of them (default: 0)")
    parser.add_argument("--pick", type=positive, help="how many to decode and write to --out (default: 4)")
    parser.add_argument("--steps", type=positive, default=20, help="DDIM steps (default: 20)")
    parser.add_argument("--guidance", type=float, default=5.0, help="default: 5")
    parser.add_argument("--negative", default="", metavar="PROMPT")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the best there, as pictures and latents")
    parser.add_argument("--overwrite", action="store_true", help="replace files of that name")
    _clip_options(parser)
    add_model_options(parser)


def _convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="epoch_34.pt of a public latent CLIP")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="CLIP's vocabulary: a folder with vocab.json and merges.txt"
    )
    parser.add_argument(
        "--space", choices=SPACES, default="sdxl", help="whose latents it was trained on (default: sdxl, as published)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file of that name")


def _convert(args: argparse.Namespace) -> int:
    from ..latent_clip import convert, find_tokenizer, read_tokenizer

    ready_files([args.out], args.overwrite)
    tokenizer = read_tokenizer(args.tokenizer) if args.tokenizer else find_tokenizer()
    made = convert(args.file, args.out, tokenizer, space_name=args.space, overwrite=args.overwrite)
    sizes = made.config
    print(
        f"{args.out}: reads latents of {made.space.words()}, {sizes.size} x {sizes.size} cells in patches of "
        f"{sizes.patch}; {sizes.embed} dimensions. Use it with --model {args.out}"
    )
    return 0


def _score(args: argparse.Namespace) -> int:
    from ..latent_clip import Scores

    clip, found = _read(args)
    made = Scores(tuple(args.texts), found.vectors @ clip.encode_text(args.texts).cpu().T, clip.scale)
    rows = [dict(zip(args.texts, row, strict=True)) for row in made.cosines.tolist()]
    names = _names(found)
    for name, row in zip(names, rows, strict=True):
        print(f"{name}: " + ", ".join(f"{value:.3f} {text}" for text, value in row.items()))
    return _finish(args, [{"file": name, "cosines": row} for name, row in zip(names, rows, strict=True)])


def _classify(args: argparse.Namespace) -> int:
    from ..latent_clip import Scores, class_vectors

    clip, found = _read(args)
    vectors = class_vectors(clip, args.classes, args.template or _templates(args.templates, clip.space.name))
    made = Scores(tuple(args.classes), found.vectors @ vectors.T, clip.scale)
    rows = []
    for name, best, row in zip(_names(found), made.best(), made.probabilities.tolist(), strict=True):
        rows.append({"file": name, "class": best, "probabilities": dict(zip(args.classes, row, strict=True))})
        print(f"{name}: {best} ({max(row):.0%})")
    return _finish(args, rows)


def _search(args: argparse.Namespace) -> int:
    from ..latent_clip import search

    clip, found = _read(args)
    hits = search(clip, found, args.text, against=args.against, count=args.count)
    names = dict(zip(zip(found.files, found.places, strict=True), _names(found), strict=True))
    for hit in hits:
        print(f"{hit.value:.3f} {names[hit.file, hit.place]}")
    return _finish(args, [{"file": str(hit.file), "place": hit.place, "value": hit.value} for hit in hits])


def _rank(args: argparse.Namespace) -> int:
    from ..demo.latent_clip import load_any
    from ..latent_clip import rank

    if args.pick and not args.out:
        args.parser.error("--pick needs --out, the folder for the best ones")
    if (args.pick or 1) > args.seeds:
        args.parser.error(f"--pick {args.pick} of --seeds {args.seeds}: there are not so many")
    seeds = list(range(args.seed, args.seed + args.seeds))
    stems = [f"{place + 1:02d}" for place in range(min(args.pick or 4, args.seeds))]
    if args.out:
        ready_files([args.out / f"{stem}{end}" for stem in stems for end in ENDS], args.overwrite)
    _ready_json(args)
    denoiser = load_checkpoint(args.checkpoint, args.device, args.dtype)
    clip = load_any(args.model, device=str(denoiser.device))
    with bar("drawing") as progress:
        ranking = rank(
            denoiser,
            clip,
            args.prompt,
            seeds,
            text=args.text,
            against=args.against,
            progress=progress.at,
            steps=args.steps,
            guidance=args.guidance,
            negative=args.negative,
            batch=args.batch,
        )
    for seed, value in zip(ranking.seeds, ranking.values, strict=True):
        print(f"{value:.3f} seed {seed}")
    if args.out:
        _keep(args, denoiser, clip, ranking.best(len(stems)), stems)
    values = zip(ranking.seeds, ranking.values, strict=True)
    return _finish(args, [{"seed": seed, "value": value} for seed, value in values])


def _keep(
    args: argparse.Namespace, denoiser: Denoiser, clip: LatentClipModel, best: Ranking, stems: Sequence[str]
) -> None:
    """The picked ones as PNG with their settings, and as latents that `search` and `score` read."""
    import torch

    from ..latent_clip import save_latents
    from ..pictures import to_images

    given = ("prompt", "text", "against", "steps", "guidance", "negative", "checkpoint", "model")
    settings = {name: getattr(args, name) for name in given}
    for stem, seed, value, latents in zip(stems, best.seeds, best.values, best.latents, strict=True):
        with torch.inference_mode():
            (image,) = to_images(denoiser.decode(latents[None]))
        about = {"prompt": args.prompt, "seed": str(seed)}
        write_picture(image, args.out / f"{stem}{ENDS[0]}", {**settings, "seed": seed, "value": value})
        save_latents(latents, args.out / f"{stem}{ENDS[1]}", clip.space, overwrite=True, **about)
    print(f"Written to {args.out}: {', '.join(stems)}, each as picture and latent")


def _read(args: argparse.Namespace) -> tuple[LatentClipModel, Index]:
    """The latent CLIP, and all that the paths hold as unit vectors."""
    from ..demo.latent_clip import load_any
    from ..latent_clip.search import Stated, files_of, index
    from ..pictures import READ

    files = [file for path in args.paths for file in (files_of(path) if path.is_dir() else [path])]
    _ready_json(args)
    clip = load_any(args.model, device=usable_device(args.device))
    reader: dict[str, Any] = {}
    if any(file.suffix.lower() in READ for file in files):
        reader = _picture_reader(args, clip)
    with bar("reading") as progress:
        stated = Stated(args.space, args.scaled)
        found = index(clip, files, stated=stated, batch=args.batch, progress=progress.at, **reader)
    return clip, found


def _picture_reader(args: argparse.Namespace, clip: LatentClipModel) -> dict[str, Any]:
    from ..latent_clip import check_space, space_of

    checkpoint = args.checkpoint or ("demo" if args.model == "demo" else "")
    if not checkpoint:
        raise ConceptSteerError(f"Pictures are read through a VAE: name a model with {clip.space.title}, --checkpoint.")
    denoiser = load_checkpoint(checkpoint, args.device, args.dtype)
    check_space(clip.space, space_of(denoiser.family), checkpoint)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return denoiser.encode_pictures(pixels)

    return {"encode": encode, "size": picture_size(denoiser)}


def _templates(name: str | None, space: str) -> Sequence[str]:
    from ..demo.latent_clip import TEMPLATES as OWN
    from ..latent_clip import PUBLISHED, SIMPLE

    return {"published": PUBLISHED, "simple": SIMPLE, "demo": OWN}[name or ("demo" if space == "demo" else "published")]


def _names(found: Index) -> list[str]:
    several = {file for file, place in zip(found.files, found.places, strict=True) if place > 0}
    pairs = zip(found.files, found.places, strict=True)
    return [f"{file} [{place}]" if file in several else str(file) for file, place in pairs]


def _ready_json(args: argparse.Namespace) -> None:
    if args.json:
        ready_files([args.json], overwrite=True)


def _finish(args: argparse.Namespace, rows: list[dict[str, Any]]) -> int:
    from ..vector_file import write_atomic

    if args.json:
        write_atomic(args.json, (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode(), overwrite=True)
    return 0


USES = (
    ("score", _score, _text_options, "how well latents or pictures fit each text (cosines)"),
    ("classify", _classify, _class_options, "zero-shot: which class each latent or picture shows"),
    ("rank", _rank, _rank_options, "draw many seeds, rank their latents by a text, decode the best only"),
    ("search", _search, _search_options, "search latents and pictures by text"),
    ("convert", _convert, _convert_options, "a public latent CLIP as a safetensors file, once"),
)
