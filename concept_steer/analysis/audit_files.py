"""An audit on disk: index.html, audit.json, the charts as PNG, and the vectors of --fix."""

from __future__ import annotations

import io
import json
from pathlib import Path

from ..errors import ConceptSteerError
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


def fresh_folder(folder: Path) -> Path:
    """A numbered folder inside, that nothing has been written to. Errors: ConceptSteerError."""
    number = 1
    while True:
        one = folder / f"{number:03d}"
        try:
            one.mkdir(parents=True)
            return one
        except FileExistsError:
            number += 1
        except OSError as error:
            raise ConceptSteerError(f"{one} cannot be made ({error.strerror or error}): make room for it.") from None
