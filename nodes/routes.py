"""What the panel and the runs tab ask for: a run redrawn from its folder, wishes to a run, the list of all runs.

Who asks from another site, with another kind of body or for a folder that is no run's gets a sentence, and nothing is
done. Files are read by threads, so that the server goes on.
"""

import asyncio
import functools
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web
from server import PromptServer

from ..zturbo import files, overview, runfolder, runlog
from ..zturbo.errors import ZTurboError
from ..zturbo.hosts import comfy_paths

log = logging.getLogger("zturbo")
POINTS = 2000  # most points of a curve that are sent
LONGEST = 4096  # bytes of a body
WISHES = {wish: functools.partial(runfolder.request, wish=wish) for wish in runfolder.WISHES}
WISHES["go_on"] = functools.partial(runfolder.take_back, wish=runfolder.PAUSE)
TAKING = asyncio.Lock()  # one after the other, as each looks for a name that is free
Handler = Callable[[web.Request], Awaitable[web.Response]]


class Refused(ZTurboError):
    """status: of the answer."""

    def __init__(self, sentence: str, status: int):
        super().__init__(sentence)
        self.status = status


def register():
    routes = PromptServer.instance.routes
    for path, find in (("run", run), ("runs", runs), ("recipe", recipe), ("workflow", workflow)):
        routes.get(f"/zturbo/{path}")(guarded(told(find)))
    for wish, act in WISHES.items():
        routes.post(f"/zturbo/{wish}")(guarded(asked(act)))
    routes.post("/zturbo/delete")(guarded(asked(overview.delete)))
    routes.post("/zturbo/take")(guarded(take))


def guarded(handler: Handler) -> Handler:
    """A handler that says in a sentence what it refuses, and why."""

    async def answer(request: web.Request) -> web.Response:
        try:
            need_own_site(request)
            return await handler(request)
        except OSError as error:  # of the disk
            return web.json_response({"error": f"{error.strerror or error}. {files.advice(error)}"}, status=500)
        except ZTurboError as error:
            log.warning("%s %s from %s was refused: %s", request.method, request.path, request.remote, error)
            return web.json_response({"error": str(error)}, status=getattr(error, "status", 400))

    return answer


def need_own_site(request: web.Request):
    """Raise Refused for what a page of another site asks. Browsers say which one a request comes from."""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site is not None:
        foreign = site not in ("same-origin", "none")
    else:
        hosts = [request.headers.get(name) for name in ("Host", "X-Forwarded-Host")]
        foreign = origin is not None and origin.partition("://")[2] not in hosts
    if foreign:
        raise Refused("Another site cannot ask for this.", 403)


async def body(request: web.Request) -> dict:
    """The JSON object that came. Raises Refused."""
    if request.content_type != "application/json":
        raise Refused(f"The body is {request.content_type[:100]}; it must be application/json.", 415)
    raw = b""
    async for piece in request.content.iter_chunked(LONGEST):
        raw += piece
        if len(raw) > LONGEST:
            raise Refused(f"The body is longer than {LONGEST} bytes.", 413)
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refused("The body is no JSON object.", 400)
    return found


def folder_of(name) -> Path:
    """The run folder of exactly this name. Raises Refused."""
    folder = comfy_paths.runs().folder(name) if isinstance(name, str) else None
    if folder is None:
        raise Refused(f"There is no run named {str(name)[:200]!r}.", 404)
    return folder


def asked(act: Callable[[Path], None]) -> Handler:
    """Does something with the run that the body names."""

    async def handler(request: web.Request) -> web.Response:
        name = (await body(request)).get("run")
        await asyncio.to_thread(lambda: act(folder_of(name)))
        return web.json_response({"run": name})

    return handler


def told(find: Callable[[dict[str, str]], dict]) -> Handler:
    """Answers with what is found by a request's query."""

    async def handler(request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(find, dict(request.query)))

    return handler


def run(query: dict[str, str]) -> dict:
    """A curve, previews and notes: of the newest run of a name, or of a folder. how: None while it runs."""
    found = [folder_of(query["folder"])] if "folder" in query else comfy_paths.runs().named(query.get("name", ""))
    if not found:
        return {"run": None}
    folder = runfolder.RunFolder(found[-1])
    facts = runlog.summary(folder.path, POINTS)
    how = overview.how(folder, facts["how"])
    asked_of = {"paused": folder.pause.exists(), "stopping": folder.stop.exists()}
    return {**facts, **asked_of, "how": None if how == overview.RUNNING else how}


def runs(query: dict[str, str]) -> dict:
    return {"runs": overview.runs_of(comfy_paths.runs())}


def recipe(query: dict[str, str]) -> dict:
    return {"recipe": overview.recipe(folder_of(query.get("folder")))}


def workflow(query: dict[str, str]) -> dict:
    return overview.workflow(folder_of(query.get("folder")))


async def take(request: web.Request) -> web.Response:
    """Copy a run's LoRA into models/loras, beside what is there. Answers with its name in ComfyUI's lists."""
    wish = await body(request)
    async with TAKING:
        file = await asyncio.to_thread(_take, wish.get("run"), wish.get("lora", "newest"))
    return web.json_response({"file": file})


def _take(name, kind) -> str:
    source = overview.lora(folder_of(name), str(kind))
    target = comfy_paths.lora_path(name if kind == "newest" else f"{name}_{kind}", overwrite=False)
    try:
        files.write(target, source.read_bytes())
    except OSError as error:
        raise ZTurboError(f"{target.name} cannot be written: {error.strerror}. {files.advice(error)}") from error
    return target.name
