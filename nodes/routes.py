"""What the pages ask for: a run redrawn from its folder, wishes to a run, the list of all runs, a dataset's pictures.

Who asks from another site, with another kind of body or for a folder that is no run's gets a sentence, and nothing is
done. Files are read by threads, so that the server goes on.
"""

import asyncio
import functools
import io
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web
from server import PromptServer

from ..zturbo import album, buckets, files, overview, runfolder, runlog
from ..zturbo.album import Album
from ..zturbo.errors import CaptionChangedError, ZTurboError
from ..zturbo.hosts import comfy_paths

log = logging.getLogger("zturbo")
POINTS = 2000  # most points of a curve that are sent
LONGEST = 4096  # bytes of a body
CAPTION = 8 * album.LONGEST  # bytes of one with a caption in it
SIDE = 320  # pixels of a dataset's small pictures
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
    for find in (run, runs, recipe, workflow, pictures):
        routes.get(f"/zturbo/{find.__name__}")(guarded(told(find)))
    for wish, act in WISHES.items():
        routes.post(f"/zturbo/{wish}")(guarded(asked(act)))
    routes.post("/zturbo/delete")(guarded(asked(overview.delete)))
    routes.post("/zturbo/take")(guarded(take))
    routes.get("/zturbo/picture")(guarded(picture))
    routes.post("/zturbo/caption")(guarded(caption))


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


async def body(request: web.Request, longest: int = LONGEST) -> dict:
    """The JSON object that came. Raises Refused."""
    if request.content_type != "application/json":
        raise Refused(f"The body is {request.content_type[:100]}; it must be application/json.", 415)
    raw = b""
    async for piece in request.content.iter_chunked(LONGEST):
        raw += piece
        if len(raw) > longest:
            raise Refused(f"The body is longer than {longest} bytes.", 413)
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


@functools.lru_cache(4)
def _album(folder: Path) -> Album:
    """As the folder was when somebody looked at it last."""
    return Album(folder, comfy_paths.runs().cache)


def album_of(name, anew: bool = False) -> Album:
    """Of a dataset's folder, by its name in Image Dataset. Raises DatasetError."""
    if not isinstance(name, str):
        raise Refused("The folder has no name.", 400)
    if anew:
        _album.cache_clear()
    return _album(comfy_paths.dataset_folder(name))


def pictures(query: dict[str, str]) -> dict:
    """A page of a dataset's pictures, as the node of these settings will train them."""
    sides = buckets.read_sides(",".join((query.get("resolution", ""), query.get("more_resolutions", ""))))
    if not sides:
        raise Refused("There is no resolution.", 400)
    seen = album_of(query.get("folder"), anew=True)
    upscale, masks = query.get("upscale") == "true", query.get("masks", "files")
    found = seen.pictures(album.Asked(sides, query.get("trigger", ""), upscale, masks))
    first = query.get("first", "0")
    shown = album.page(found, query.get("only", ""), int(first) if first.isdecimal() and len(first) < 9 else 0)
    return {**shown, "notes": seen.listing.notes, "writable": query["folder"].strip() != comfy_paths.BUNDLED}


async def picture(request: web.Request) -> web.Response:
    """A small picture of a dataset."""
    content = await asyncio.to_thread(_small, request.query.get("folder"), request.query.get("name", ""))
    return web.Response(body=content, content_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


def _small(folder, name: str) -> bytes:
    content = io.BytesIO()
    album_of(folder).thumbnail(name, SIDE).save(content, "JPEG", quality=85)
    return content.getvalue()


async def caption(request: web.Request) -> web.Response:
    """Write a picture's caption. Answers with it as it is now, also where somebody else has written another."""
    wish = await body(request, CAPTION)
    name, text, was = (wish.get(key) for key in ("name", "caption", "was"))
    if not (isinstance(name, str) and isinstance(text, str) and isinstance(was, str)):
        raise Refused("name, caption and was must be texts.", 400)
    try:
        async with TAKING:
            await asyncio.to_thread(_write, wish.get("folder"), name, text, was)
    except CaptionChangedError as error:
        return web.json_response({"error": str(error), "caption": error.now}, status=409)
    return web.json_response({"caption": text.strip()})


def _write(folder, name: str, text: str, was: str):
    if isinstance(folder, str) and folder.strip() == comfy_paths.BUNDLED:
        raise Refused("The bundled pictures stay as they are.", 403)
    album_of(folder, anew=True).write(name, text, was)
