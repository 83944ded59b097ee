"""What the panel asks for: a run redrawn from its folder, and Stop and keep."""

from aiohttp import web
from server import PromptServer

from ..zturbo import runfolder, runlog
from ..zturbo.hosts import comfy_paths

POINTS = 2000  # most points of a curve that are sent


def register():
    routes = PromptServer.instance.routes

    @routes.get("/zturbo/run")
    async def run(request: web.Request) -> web.Response:
        found = comfy_paths.runs().named(request.query.get("name", ""))
        if not found:
            return web.json_response({"run": None})
        facts = runlog.summary(found[-1], POINTS)
        if facts["how"] is None and not runfolder.RunFolder(found[-1]).is_live():
            facts["how"] = "died"  # its process went away before it could say how it ended
        return web.json_response(facts)

    async def ask(request: web.Request, wish) -> web.Response:
        name = (await request.json()).get("run", "")
        folder = comfy_paths.runs().folder(name)
        if folder is None:
            return web.json_response({"error": f"There is no run named {name!r}."}, status=404)
        wish(folder)
        return web.json_response({"run": name})

    @routes.post("/zturbo/stop")
    async def stop(request: web.Request) -> web.Response:
        """Ask the run (its folder's exact name) to stop after the step it is in and hand its LoRA on."""
        return await ask(request, runfolder.request_stop)

    @routes.post("/zturbo/save")
    async def save(request: web.Request) -> web.Response:
        """Ask the run to save its LoRA and a checkpoint after the step it is in."""
        return await ask(request, runfolder.request_save)
