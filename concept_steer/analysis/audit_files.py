"""An audit on disk: index.html, audit.json, the charts as PNG, and the vectors of --fix."""

from __future__ import annotations

import io
import json
from pathlib import Path

from ..library import ATTRIBUTE_SUFFIX
from ..vector_file import write_atomic
from .audit import Audit
from .audit_page import page, pictures_of
from .html import slug


def write_audit(audit: Audit, folder: Path) -> list[Path]:
    """Every file, written atomically, the page last: when it is there, all is. Errors: ConceptSteerError."""
    written = []
    for fix in audit.fixes:
        written.append(fix.attribute.save(folder / f"{slug(fix.attribute.name)}{ATTRIBUTE_SUFFIX}", overwrite=True))
    for name, image in pictures_of(audit).items():
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        written.append(write_atomic(folder / f"{name}.png", buffer.getvalue(), overwrite=True))
    data = json.dumps(audit.as_dict(), indent=1, ensure_ascii=False, allow_nan=False).encode()
    written.append(write_atomic(folder / "audit.json", data, overwrite=True))
    written.append(write_atomic(folder / "index.html", page(audit).encode(), overwrite=True))
    return written
