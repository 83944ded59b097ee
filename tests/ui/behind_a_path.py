"""A ComfyUI under a path, as `https://host/comfy/`.

It is a reverse proxy in front of the real one, as notebooks and shared machines have.
"""

import asyncio
import threading
from contextlib import contextmanager

import aiohttp
from aiohttp import web

PATH = "/comfy"
# headers of one connection, not of what it carries
OWN = {"connection", "keep-alive", "transfer-encoding", "content-length", "upgrade"}


class Proxy:
    """Answers under PATH with what the server says, and nowhere else. `strays`: what was asked for outside of it."""

    def __init__(self, server: str):
        self.server, self.strays = server, []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if not request.raw_path.startswith(PATH + "/"):
            self.strays.append(request.raw_path)
            return web.Response(status=404)
        target = self.server + request.raw_path.removeprefix(PATH)
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self.websocket(request, target)
        kept = {name: value for name, value in request.headers.items() if name.lower() not in OWN}
        async with self.client.request(
            request.method, target, headers=kept, data=await request.read(), allow_redirects=False
        ) as got:
            answer = web.StreamResponse(
                status=got.status,
                headers={name: value for name, value in got.headers.items() if name.lower() not in OWN},
            )
            await answer.prepare(request)
            async for piece in got.content.iter_any():
                await answer.write(piece)
            return answer

    async def websocket(self, request: web.Request, target: str) -> web.WebSocketResponse:
        here = web.WebSocketResponse(max_msg_size=0)
        await here.prepare(request)
        async with self.client.ws_connect(target, max_msg_size=0) as there:
            await asyncio.wait(
                [asyncio.ensure_future(carry(*way)) for way in ((here, there), (there, here))],
                return_when=asyncio.FIRST_COMPLETED,
            )
        return here

    async def serve(self, started: threading.Event, stop: asyncio.Event):
        async with aiohttp.ClientSession(auto_decompress=False) as self.client:
            app = web.Application(client_max_size=2**30)
            app.router.add_route("*", "/{rest:.*}", self.answer)
            runner = web.AppRunner(app, shutdown_timeout=1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.address = f"http://127.0.0.1:{runner.addresses[0][1]}{PATH}/"
            started.set()
            await stop.wait()
            await runner.cleanup()


async def carry(source, target):
    async for message in source:
        if message.type == aiohttp.WSMsgType.TEXT:
            await target.send_str(message.data)
        elif message.type == aiohttp.WSMsgType.BINARY:
            await target.send_bytes(message.data)


@contextmanager
def proxied(server: str):
    """While open, a Proxy to the server at this address, in a thread of its own."""
    proxy, started, loop = Proxy(server.rstrip("/")), threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(proxy.serve(started, stop),), daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
