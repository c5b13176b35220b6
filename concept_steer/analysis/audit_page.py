"""An audit as one HTML page, and its charts as pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from PIL import Image

from ..pictures import grid, stacked
from .audit import Audit, Finding, Fix
from .charts import change_chart, heat_map, lean_chart, map_picture
from .defaults import Default, Estimate
from .html import MAP_SIZE, details, document, figure, map_section, slug, table

LIMITS = (
    "The prediction is read from the model's inner picture of each prompt at the beginning of drawing, and holds as "
    "far as that is a mixture of the values' own. On a small model whose biases are known it goes along with what is "
    "drawn (correlations of .7 to .9), but single roles are read wrong: take it as a hint where to look, and look at "
    "pictures.",
    "The intervals cover the choice of noise only. They do not say how true the method is.",
    "Guidance, negative prompts and long prompts change what is drawn; the audit reads the bare prompt.",
    "Only the values on the list are told apart. People are more than the values of a list, and what a picture seems "
    "to show of a person says nothing about anyone.",
)


def page(audit: Audit) -> str:
    """The whole page."""
    about = audit.about
    title = f"What {about['checkpoint']} takes for granted"
    parts = [_summary(audit), _method(audit)]
    parts += [_attribute(audit, name) for name in audit.words.attributes]
    parts += [_findings(audit), _associations(audit), _map(audit), _fixes(audit), _settings(audit)]
    return document(title, parts)


def pictures_of(audit: Audit) -> dict[str, Image.Image]:
    """Name -> picture of every chart, as they stand in the page."""
    found = {f"defaults-{slug(name)}": lean_chart(audit.of(name), _lean_title(name)) for name in audit.words.attributes}
    if audit.associations:
        found["associations"] = heat_map(audit.associations, "Associations (cosine, hundredths)")
    if audit.clusters:
        found["map"] = map_picture(audit.mapped, audit.places, audit.groups, "Map of the roles", MAP_SIZE)
    for number, finding in enumerate(audit.findings, 1):
        if finding.images:
            found[f"finding-{number}-{slug(finding.default.role)}"] = _sheet(finding)
    for fix in audit.fixes:
        name = fix.attribute.name
        found[f"fix-{slug(name)}"] = change_chart(fix.changes, f"{name}: with the learned vectors (grey: without)")
    return found


def summary_picture(audit: Audit) -> Image.Image:
    """The attributes' charts one above the other: what a node shows."""
    return stacked([lean_chart(audit.of(name), _lean_title(name)) for name in audit.words.attributes])


def _lean_title(name: str) -> str:
    return f"{name}: what each role's prompt takes for granted (95 % over seeds)"


def _summary(audit: Audit) -> tuple[str, str, str]:
    told = "".join(f"<li>{escape(line.strip())}</li>" for line in audit.summary().splitlines())
    about = audit.about
    rows = about["unet_rows"]
    spent = f"the cost of {rows:.0f} evaluations of the network" if rows else "all of them kept from an earlier run"
    cost = f"Read from {about['prompts']} prompts in {about['seconds']:.0f} seconds, {spent}."
    return "summary", "In short", f"<ul>{told}</ul><p>{escape(cost)}</p>"


def _method(audit: Audit) -> tuple[str, str, str]:
    reading = audit.settings.defaults
    kind = "the network's prediction" if reading.space == "prediction" else "the network's innermost layer (h-space)"
    text = (
        f"For each role the bare prompt (such as {audit.words.prompt(audit.words.roles[0])!r}) is compared with the "
        f"prompts that name a value. From the same noise each is read in {kind}, for {reading.seeds} seeds, at "
        f"{reading.moments[0]:.0%} of drawing. Where the bare one lies between the named ones is the prediction: "
        "a share for two values, a place on the scale for more. No picture needs to be drawn for that."
    )
    limits = "".join(f"<li>{escape(limit)}</li>" for limit in LIMITS)
    return "method", "What was asked, how, and what it cannot say", f"<p>{escape(text)}</p><ul>{limits}</ul>"


def _attribute(audit: Audit, name: str) -> tuple[str, str, str]:
    mine = audit.of(name)
    clear = [one for one in mine if one.clear]
    chart = lean_chart(mine, _lean_title(name))
    alt = f"{name}: {len(clear)} of {len(mine)} roles lean clearly; the figures are in the table below"
    caption = "Filled dots are told from an even share, rings are not. Lines are 95 % intervals over seeds."
    return (
        f"attribute-{slug(name)}",
        f"By role: {name}",
        figure(chart, alt, caption) + details(f"The figures: {name}", _default_table(name, mine)),
    )


def _default_table(name: str, mine: Sequence[Default]) -> str:
    ordered = sorted(mine, key=lambda one: one.lean[0])
    two = len(mine[0].values) == 2
    rows = [
        (one.role, one.towards, _signed(one.lean), *([_range(one.share)] if two else []), "yes" if one.clear else "no")
        for one in ordered
    ]
    first, last = mine[0].values[0], mine[0].values[-1]
    head = ["role", "leans to", f"lean (-1 {first}, +1 {last})", *(["share"] if two else []), "told from even"]
    return table(f"Predicted, {name}", head, rows, text=(1,))


def _findings(audit: Audit) -> tuple[str, str, str]:
    blocks = []
    for finding in audit.findings:
        one = finding.default
        heading = f"<h3>{escape(finding.prompt)}: {escape(one.attribute)}</h3>"
        said = f"Predicted: {_lean_words(one, one.lean)}. {_observed(finding)}"
        body = f"<p>{escape(said)}</p>"
        if finding.images:
            alt = f"{len(finding.images)} pictures that the model draws for {finding.prompt!r}"
            body += figure(_sheet(finding), alt, "Drawn with no value named; different seeds.")
        blocks.append(heading + body)
    return "findings", "The strongest findings, with pictures", "".join(blocks)


def _lean_words(one: Default, lean: Estimate) -> str:
    if len(one.values) > 2:
        return f"{_signed(lean)} on the scale from {one.values[0]} (-1) to {one.values[-1]} (+1)"
    as_read = Default(one.role, one.attribute, one.values, lean)
    value, low, high = as_read.share
    return f"{as_read.towards} {value:.0%} ({low:.0%} to {high:.0%})"


def _observed(finding: Finding) -> str:
    if finding.observed:
        return f"Observed in {finding.judged} pictures: {_lean_words(finding.default, finding.observed)}."
    return "Nothing judged the pictures: look at them." if finding.images else "No pictures were drawn."


def _sheet(finding: Finding) -> Image.Image:
    wide = 8
    rows = [list(finding.images[i : i + wide]) for i in range(0, len(finding.images), wide)]
    return grid(rows, title=finding.prompt, cell=max(96, min(160, finding.images[0].width)))


def _associations(audit: Audit) -> tuple[str, str, str]:
    found = audit.associations
    if found is None:
        return "associations", "Associations", ""
    strongest = "; ".join(f"{row} with {column} ({value:+.2f})" for row, column, value in found.strongest(8))
    alt = f"heat map of {len(found.rows)} roles and {len(found.columns)} words; the figures are in the table below"
    caption = "Blue: nearer than the other roles. Orange: farther. A number stands where the interval leaves 0 out."
    rows = [
        (name, *(f"{value:+.2f}" for value in values))
        for name, values in zip(found.rows, found.values.tolist(), strict=True)
    ]
    figures = table("Cosines of roles and words", ["role", *found.columns], rows)
    body = f"<p>Strongest: {escape(strongest or 'none that is told from 0')}.</p>"
    body += figure(heat_map(found, "Associations (cosine, hundredths)"), alt, caption)
    return "associations", "Associations of roles with words", body + details("The figures: associations", figures)


def _map(audit: Audit) -> tuple[str, str, str]:
    body = ""
    if audit.clusters:
        body = map_section(audit.mapped, audit.places, audit.groups, audit.clusters, audit.settings.map_method)
    return "map-of-roles", "Map and clusters", body


def _fixes(audit: Audit) -> tuple[str, str, str]:
    blocks = [_fix(fix) for fix in audit.fixes]
    return "fixes", "Vectors that counter it", "".join(blocks)


def _fix(fix: Fix) -> str:
    name = fix.attribute.name
    before, after = fix.covered()
    said = (
        f"A vector for each value of {name} was learned ({', '.join(fix.attribute.labels)}). Given in turn to the "
        f"seeds, they bring the interval over an even share for {after} of {len(fix.changes)} roles ({before} before)."
    )
    chart = change_chart(fix.changes, f"{name}: with the learned vectors (grey: without)")
    rows = [
        (c.role, f"{c.before.lean[0]:+.2f}", _signed(c.after.lean), "no" if c.after.clear else "yes")
        for c in fix.changes
    ]
    figures = table(
        f"Lean without and with the vectors, {name}", ["role", "without", "with", "even in its interval"], rows
    )
    alt = f"{name} with the learned vectors; the figures are in the table below"
    return (
        f"<h3>{escape(name)}</h3><p>{escape(said)}</p>"
        + figure(chart, alt, "Grey marks: without the vectors.")
        + details(f"The figures: {name} with vectors", figures)
    )


def _settings(audit: Audit) -> tuple[str, str, str]:
    told = {"about": dict(audit.about), "settings": audit.as_dict()["settings"], "words": audit.words.as_dict()}
    text = escape(json.dumps(told, indent=1, ensure_ascii=False))
    return "settings", "Settings and words", details("Everything that decides the numbers", f"<pre>{text}</pre>")


def _range(estimate: Estimate) -> str:
    value, low, high = estimate
    return f"{value:.0%} ({low:.0%} to {high:.0%})"


def _signed(estimate: Estimate) -> str:
    value, low, high = estimate
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"
