"""`concept-steer analyse ...`: one look at a time into what a model associates, each with a picture and JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from .analyse_parts import begin, captions_of, finish, prompts_of, read, read_folder, reader_of, words_of
from .audit import MAPS
from .help import Commands, command, positive
from .models import add_model_options, bar, load_checkpoint, load_vector, vector_spec
from .output import ready_folder

SPACES = ("mean", "map", "prediction")  # as analysis.reading.SPACES, which would need torch to look up
SEEDS, NAMING_SEEDS = 8, 4  # as analysis.names.SEEDS: with its many contexts, more seeds name no better
PICTURE_MOMENT = 0.5  # of reading pictures: enough of the picture is left, and enough noise to compare


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "analyse",
        parents=[common],
        help="what a model associates: defaults, descriptors, associations, map, clusters, names, compare",
        description="Prompts are directions in h, no vector is learned: name words and see how the model associates "
        "them.",
    )
    below = parser.add_subparsers(title="analyses", metavar="ANALYSIS", required=True)
    for name, run, text in ANALYSES:
        one = command(below, common, name, run, help=text, description=text[0].upper() + text[1:] + ".")
        OPTIONS[name](one)
        _add_common(one, NAMING_SEEDS if name == "name" else SEEDS)


def _add_common(parser: argparse.ArgumentParser, seeds: int) -> None:
    parser.add_argument("--words", type=Path, metavar="FILE", help="a list of words as `concept-steer audit` takes")
    parser.add_argument("--neutral", default="", help="what prompts are compared with (default: the list's)")
    parser.add_argument(
        "--seeds", type=positive, default=seeds, help=f"noises that each prompt is read from (default: {seeds})"
    )
    parser.add_argument("--moment", type=float, help="share of sampling at which h is read (default: 0, pure noise)")
    parser.add_argument("--space", choices=SPACES, help="what is read (default: mean, h over its positions)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep readings there, for the next time")
    parser.add_argument("--batch", type=positive, default=32, help="rows at once (default: 32)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the JSON and the picture there")
    add_model_options(parser)


def _prompts_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", dest="prompts", action="append", default=[], help="repeatable (default: the roles)")
    parser.add_argument("--prompts", dest="file", type=Path, metavar="FILE", help="prompts, one a line")


def _picture_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="a folder of pictures, read into the same space")
    parser.add_argument("--captions", type=Path, metavar="DIR", help="a folder's .txt files, each a caption")


def _defaults_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--role", dest="roles", action="append", default=[], help="repeatable (default: all)")
    parser.add_argument("--attribute", dest="attributes", action="append", default=[], help="repeatable (default: all)")


def _compare_options(parser: argparse.ArgumentParser) -> None:
    _defaults_options(parser)
    parser.add_argument("--with", dest="other", metavar="CHECKPOINT", help="another checkpoint of the same family")
    parser.add_argument(
        "--vector", dest="vectors", action="append", default=[], type=vector_spec, metavar="NAME:STRENGTH"
    )


def _descriptors_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--concept", required=True, help="a prompt, such as 'a nurse'")
    parser.add_argument("--word", dest="given", action="append", default=[], help="repeatable (default: the list's)")


def _associations_options(parser: argparse.ArgumentParser) -> None:
    _prompts_options(parser)
    parser.add_argument("--word", dest="given", action="append", default=[], help="repeatable (default: the list's)")


def _map_options(parser: argparse.ArgumentParser) -> None:
    _prompts_options(parser)
    _picture_options(parser)
    parser.add_argument("--method", choices=MAPS, default="pca", help="umap needs the extra 'umap' (default: pca)")
    parser.add_argument("--clusters", type=int, default=0, help="how many (default: as the silhouette says)")


def _name_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("vectors", nargs="+", metavar="NAME_OR_FILE", help="vectors to name")
    parser.add_argument("--word", dest="given", action="append", default=[], help="repeatable (default: the list's)")
    parser.add_argument("--captions", type=Path, metavar="DIR", help="a folder's .txt files, each a caption")
    parser.add_argument("--count", type=positive, default=5, help="names each (default: 5)")


def _defaults(args: argparse.Namespace) -> int:
    from ..analysis.charts import lean_chart
    from ..analysis.defaults import defaults
    from ..pictures import stacked

    denoiser, words = begin(args)
    reader = reader_of(denoiser, words, args, predicted=True)
    with bar("reading") as progress:
        found = defaults(reader, words, args.roles, attributes=args.attributes, progress=progress.at)
    by = {name: [one for one in found if one.attribute == name] for name in words.attributes}
    charts = [lean_chart(mine, name) for name, mine in by.items() if mine]
    lines = [f"{one.attribute}, {one.text()}" for one in found]
    return finish(args, "defaults", lines, [one.as_dict() for one in found], stacked(charts))


def _compare(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from ..analysis.charts import change_chart
    from ..analysis.defaults import compare, defaults
    from ..pictures import stacked
    from ..steering import Steer

    if bool(args.other) == bool(args.vectors):
        args.parser.error("give either --with CHECKPOINT or --vector NAME")
    denoiser, words = begin(args)
    reader = reader_of(denoiser, words, args, predicted=True)
    steered = None
    if args.vectors:
        steers = [Steer(load_vector(spec.name)[0], spec.strength) for spec in args.vectors]
        acting = replace(reader, steers=[steers] * args.seeds, _inputs=[])
        other, steered = reader, dict.fromkeys(words.attributes, acting)
    else:
        other = reader_of(load_checkpoint(args.other, args.device, args.dtype), words, args, predicted=True)
    with bar("before") as progress:
        before = defaults(reader, words, args.roles, attributes=args.attributes, progress=progress.at)
    with bar("after") as progress:
        after = defaults(other, words, args.roles, attributes=args.attributes, steered=steered, progress=progress.at)
    changes = compare(before, after)
    by = {name: [one for one in changes if one.attribute == name] for name in words.attributes}
    charts = [change_chart(mine, f"{name} (grey: before)") for name, mine in by.items() if mine]
    lines = [
        f"{c.attribute}, {c.role}: lean {c.before.lean[0]:+.2f} before, {c.after.lean[0]:+.2f} after"
        f"{'' if c.clear else ', not told apart'}"
        for c in changes
    ]
    told = [{"role": c.role, "attribute": c.attribute, "before": c.before.lean, "after": c.after.lean} for c in changes]
    return finish(args, "compare", lines, told, stacked(charts))


def _descriptors(args: argparse.Namespace) -> int:
    from ..analysis.associations import descriptors
    from ..plots import card

    denoiser, words = begin(args)
    table = words_of(args, words)
    h = read(reader_of(denoiser, words, args), [words.neutral, args.concept, *table.values()])
    ranked = descriptors(h[args.concept], {name: h[prompt] for name, prompt in table.items()}, h[words.neutral])
    lines = [f"{name}: {value:+.2f} ({low:+.2f} to {high:+.2f})" for name, value, low, high in ranked]
    rows = [(name, f"{value:+.2f}   ({low:+.2f} to {high:+.2f})") for name, value, low, high in ranked[:24]]
    told = [dict(zip(("word", "cosine", "low", "high"), one, strict=True)) for one in ranked]
    return finish(args, "descriptors", lines, told, card(f"{args.concept}: nearest words (cosine)", rows))


def _associations(args: argparse.Namespace) -> int:
    from ..analysis.associations import associations
    from ..analysis.charts import heat_map

    denoiser, words = begin(args)
    rows, table = prompts_of(args, words), words_of(args, words)
    h = read(reader_of(denoiser, words, args), [words.neutral, *rows.values(), *table.values()])
    found = associations(
        {name: h[p] for name, p in rows.items()}, {name: h[p] for name, p in table.items()}, h[words.neutral]
    )
    lines = [f"{row} with {column}: {value:+.2f}" for row, column, value in found.strongest(20)]
    return finish(args, "associations", lines, found.as_dict(), heat_map(found, "Associations (cosine, hundredths)"))


def _map(args: argparse.Namespace) -> int:
    import torch

    from ..analysis.charts import map_picture
    from ..analysis.html import document, map_section
    from ..analysis.maps import check_method, clusters, principal_map, umap_map
    from ..pictures import picture_files
    from ..vector_file import write_atomic

    check_method(args.method)
    denoiser, words = begin(args)
    rows, table = prompts_of(args, words), words_of(args, words)
    if args.captions:
        rows |= captions_of(args.captions)
    files = picture_files(args.pictures) if args.pictures else []
    if files and args.moment is None:
        args.moment = PICTURE_MOMENT
    reader = reader_of(denoiser, words, args)
    h = read(reader, [words.neutral, *rows.values(), *table.values()])
    neutral = h[words.neutral]
    named = {name: (h[prompt] - neutral).mean(0) for name, prompt in rows.items()}
    if files:
        named |= {name: (value - neutral).mean(0) for name, value in read_folder(reader, denoiser, files).items()}
    names, points = list(named), torch.stack(list(named.values()))
    directions = {name: (h[prompt] - neutral).mean(0) for name, prompt in table.items()}
    grouped = clusters(names, points, directions, count=args.clusters)
    number = {member: i for i, cluster in enumerate(grouped) for member in cluster.members}
    groups = [number[name] for name in names]
    places = umap_map(points) if args.method == "umap" else principal_map(points)[0]
    if args.out:
        section = map_section(names, places, groups, grouped, args.method)
        html = document("Map of prompts", [("map-of-prompts", "Map and clusters", section)])
        write_atomic(ready_folder(args.out) / "map.html", html.encode(), overwrite=True)
    lines = [f"{i + 1}. {cluster.title()}: {', '.join(cluster.members)}" for i, cluster in enumerate(grouped)]
    told = {
        "places": [{"name": n, "x": x, "y": y} for n, (x, y) in zip(names, places.tolist(), strict=True)],
        "clusters": [cluster.as_dict() for cluster in grouped],
    }
    return finish(args, "map", lines, told, map_picture(names, places, groups, "Map of prompts"))


def _name(args: argparse.Namespace) -> int:
    from ..analysis.names import read_names
    from ..analysis.word_list import in_contexts
    from ..family import check
    from ..plots import card

    vectors = [load_vector(name)[0] for name in args.vectors]
    denoiser, words = begin(args)
    contexts = in_contexts(words, args.given)
    if args.captions:
        contexts |= {name: [(text, words.neutral)] for name, text in captions_of(args.captions).items()}
    with bar("reading") as progress:
        known = read_names(reader_of(denoiser, words, args), contexts, progress.at)
    lines, rows, told = [], [], []
    for vector in vectors:
        check(vector.family, vector.channels, denoiser.family, denoiser.channels, source=f"The vector {vector.name!r}")
        found = known.nearest(vector, args.count)
        text = ", ".join(f"{name} {value:+.2f}" for name, value in found)
        lines.append(f"{vector.name}: {text}")
        rows.append((vector.name, text))
        told.append({"vector": vector.name, "fingerprint": vector.fingerprint, "names": [list(pair) for pair in found]})
    return finish(args, "names", lines, told, card("Nearest words (likeness)", rows))


ANALYSES = (
    ("defaults", _defaults, "which value of an attribute does each role's prompt take for granted"),
    ("descriptors", _descriptors, "rank words by how near they lie to a concept"),
    ("associations", _associations, "prompts against words, as a heat map"),
    ("map", _map, "prompts, captions and pictures in two dimensions, with clusters named by their nearest words"),
    ("name", _name, "the words and captions nearest to a concept vector"),
    ("compare", _compare, "defaults of two checkpoints, or of one without and with vectors"),
)
OPTIONS = {
    "defaults": _defaults_options,
    "descriptors": _descriptors_options,
    "associations": _associations_options,
    "map": _map_options,
    "name": _name_options,
    "compare": _compare_options,
}
