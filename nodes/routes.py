"""What the panel asks for: a run redrawn from its folder, and Stop and keep."""

from aiohttp import web
from server import PromptServer

from ..zturbo import runfolder
from ..zturbo.hosts import comfy_paths

POINTS = 2000  # most points of a curve that are sent


def register():
    routes = PromptServer.instance.routes

    @routes.get("/zturbo/run")
    async def run(request: web.Request) -> web.Response:
        found = comfy_paths.runs_named(request.query.get("name", ""))
        return web.json_response(runfolder.summary(found[-1], POINTS) if found else {"run": None})

    @routes.post("/zturbo/stop")
    async def stop(request: web.Request) -> web.Response:
        """Ask the run (its folder's exact name) to stop after the step it is in and hand its LoRA on."""
        name = (await request.json()).get("run", "")
        folder = comfy_paths.run_folder(name)
        if folder is None:
            return web.json_response({"error": f"There is no run named {name!r}."}, status=404)
        runfolder.request_stop(folder)
        return web.json_response({"run": name})
