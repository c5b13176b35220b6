"""Pieces of a page that needs nothing else: it works offline, with a keyboard, read aloud and on paper."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image
from torch import Tensor

from .charts import GROUP_COLOURS, label_shifts, on_page
from .maps import Cluster

MAP_SIZE = (900, 640)
STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;color:#1e1e24;background:#fff;
max-width:60rem;margin:0 auto;padding:1rem 1.25rem}
h1{font-size:1.7rem;line-height:1.25}h2{margin-top:2.2rem;border-bottom:2px solid #d6d8de}h3{margin-top:1.6rem}
a{color:#1d4fa8}a:focus,summary:focus,input:focus,[tabindex]:focus{outline:3px solid #de6e14;outline-offset:2px}
.skip{position:absolute;left:-99rem}.skip:focus{position:static}
figure{margin:1rem 0}img,svg{max-width:100%;height:auto;border:1px solid #d6d8de}figcaption{color:#44464f}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:.5rem 0}caption{text-align:left;font-weight:600}
th,td{border:1px solid #d6d8de;padding:.15rem .5rem;text-align:right}th[scope=row],td.text{text-align:left}
.note{background:#f3f5fa;border-left:4px solid #2662cc;padding:.4rem .8rem}
.dim{opacity:.15}nav ul{columns:2}
@media print{body{max-width:none;font-size:11pt}nav,.tool,.skip{display:none}h2,h3,figcaption{break-after:avoid}
figure,tr{break-inside:avoid}a{color:inherit;text-decoration:none}}
"""
SCRIPT = """
const box=document.getElementById('find'),said=document.getElementById('said');
if(box){box.closest('.tool').hidden=false;
box.addEventListener('input',()=>{const t=box.value.trim().toLowerCase();let n=0;
document.querySelectorAll('#map [data-name]').forEach(g=>{const hit=!t||g.dataset.name.toLowerCase().includes(t);
g.classList.toggle('dim',!hit);n+=hit});said.textContent=t?n+' found':''})}
"""


def document(title: str, parts: Iterable[tuple[str, str, str]]) -> str:
    """A page of sections (anchor, heading, HTML); those without content are left out."""
    shown = [(anchor, heading, body) for anchor, heading, body in parts if body]
    links = "".join(f'<li><a href="#{anchor}">{escape(heading)}</a></li>' for anchor, heading, _ in shown)
    sections = "".join(
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{escape(heading)}</h2>{body}</section>'
        for anchor, heading, body in shown
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>'
        '<a class="skip" href="#main">Skip to the results</a>'
        f'<header><h1>{escape(title)}</h1></header><nav aria-label="Contents"><ul>{links}</ul></nav>'
        f'<main id="main">{sections}</main><script>{SCRIPT}</script></body></html>\n'
    )


def map_section(
    names: Sequence[str], places: Tensor, groups: Sequence[int], clusters: Sequence[Cluster], method: str
) -> str:
    """The interactive map (named places (N, 2), each with its cluster's number) and the table of clusters, as HTML."""
    points = []
    scaled = on_page(places, MAP_SIZE)
    for name, (x, y), group, dy in zip(names, scaled, groups, label_shifts(names, scaled), strict=True):
        red, green, blue = GROUP_COLOURS[group % len(GROUP_COLOURS)]
        near = clusters[group].title()
        points.append(
            f'<g data-name="{escape(name)}"><title>{escape(name)}: cluster {group + 1}, {escape(near)}</title>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="rgb({red},{green},{blue})"/>'
            f'<text x="{x:.1f}" y="{y + 3.5:.1f}" font-size="10" fill="#fff" text-anchor="middle">{group + 1}</text>'
            f'<text x="{x + 11:.1f}" y="{y + dy + 4:.1f}" font-size="12" fill="#1e1e24">{escape(name)}</text></g>'
        )
    kind = "UMAP" if method == "umap" else "principal components"
    tool = (
        '<p class="tool" hidden><label for="find">Find a name on the map: </label><input id="find" type="search"> '
        '<span id="said" role="status"></span></p>'
    )
    drawing = (
        f'<figure><svg id="map" viewBox="0 0 {MAP_SIZE[0]} {MAP_SIZE[1]}" role="img" '
        f'aria-label="Map of {len(names)} prompts by likeness in h; the clusters are listed below">'
        f"{''.join(points)}</svg><figcaption>By {kind}. What lies near is alike to the model; the numbers are the "
        "clusters below.</figcaption></figure>"
    )
    rows = [(str(i + 1), cluster.title(), ", ".join(cluster.members)) for i, cluster in enumerate(clusters)]
    listing = table("Clusters, named by the nearest words", ["number", "nearest words", "members"], rows, text=(1, 2))
    return tool + drawing + listing


def slug(text: str) -> str:
    """Safe in a file name and an anchor."""
    return "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()) or "x"


def figure(image: Image.Image, alt: str, caption: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" width="{image.width}" height="{image.height}" '
        f'alt="{escape(alt)}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def details(summary: str, body: str) -> str:
    return (
        f"<details><summary>{escape(summary)}</summary>"
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(summary)}">{body}</div></details>'
    )


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], text: tuple[int, ...] = ()) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{' class=text' if i in text else ''}>{escape(cell)}</td>" for i, cell in enumerate(row[1:], 1))
        + "</tr>"
        for row in rows
    )
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
