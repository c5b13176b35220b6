"""Routes of the web UI's API: the vectors there are, and one of them. Names of the library, never paths."""

from __future__ import annotations

from secrets import compare_digest
from typing import Any

from fastapi import Depends, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from modules import shared

from ..describe import lines
from ..errors import ConceptSteerError, LibraryError
from ..vector import ConceptVector
from . import webui, webui_fair, webui_learning_api

ROOT = "/concept-steer/v1"
BASIC = HTTPBasic()


def allowed(credentials: HTTPBasicCredentials = Depends(BASIC)) -> None:  # noqa: B008 (FastAPI's way)
    """The web UI's own --api-auth, which it does not apply to the routes of extensions."""
    for user, _, password in (pair.partition(":") for pair in shared.cmd_opts.api_auth.split(",")):
        if credentials.username == user and compare_digest(credentials.password.encode(), password.encode()):
            return
    raise HTTPException(401, "Incorrect username or password", {"WWW-Authenticate": "Basic"})


def add_routes(demo: Any, app: Any) -> None:
    """on_app_started; only where the web UI has its own API, and behind the same password."""
    if not (shared.cmd_opts.api or shared.cmd_opts.nowebui):
        return
    guard = [Depends(allowed)] if shared.cmd_opts.api_auth else []
    app.add_api_route(f"{ROOT}/vectors", vectors, methods=["GET"], dependencies=guard)
    app.add_api_route(f"{ROOT}/vectors/{{name:path}}", vector, methods=["GET"], dependencies=guard)
    app.add_api_route(f"{ROOT}/attributes", attributes, methods=["GET"], dependencies=guard)
    app.add_api_route(f"{ROOT}/learn", webui_learning_api.learn, methods=["POST"], dependencies=guard)
    app.add_api_route(f"{ROOT}/erase", webui_learning_api.erase, methods=["POST"], dependencies=guard)


def vectors() -> list[dict[str, Any]]:
    """All vectors; a file that cannot be read says why."""
    found = []
    for entry in webui.library().entries():
        try:
            one = ConceptVector.load(entry.path)
            about = {"title": one.title, "family": one.family, "hash": one.fingerprint, "channels": one.channels}
        except ConceptSteerError as error:
            about = {"error": str(error).replace(str(entry.path), entry.name)}
        found.append({"name": entry.name, **about})
    return found


def vector(name: str) -> dict[str, Any]:
    """One vector by name or hash: everything its file says."""
    try:
        entry = webui.library().find(name)
        one = ConceptVector.load(entry.path)
    except LibraryError as error:
        raise HTTPException(404, str(error).split(" Searched: ")[0]) from error
    except ConceptSteerError as error:
        raise HTTPException(422, str(error).replace(str(entry.path), entry.name)) from error
    return {
        "name": entry.name,
        "title": one.title,
        "family": one.family,
        "hash": one.fingerprint,
        "channels": one.channels,
        "shape": list(one.tensor.shape),
        "info": dict(one.info),
        "lines": [list(line) for line in lines(one)],
    }


def attributes() -> list[str]:
    """What the Fair group can balance."""
    return list(webui_fair.attributes())
