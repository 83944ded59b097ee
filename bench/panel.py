"""What the panel costs: bytes a step on the wire, the page's time for a step, and its memory over 10,000 steps.

A real server and a real Chromium with the shipped demo on the canvas. The steps come as events of ComfyUI's websocket
do, as often and as many at once as `ComfyControl` sends them for a step of 20 ms, the fastest that was seen; nothing is
trained. Time is that of the page's thread over some seconds at a run's own pace, with all steps in the curve, less what
it takes when the same events have a name that nobody listens to. Counted by Chromium itself, after its garbage is
collected: JavaScript's heap and the page's elements. What the training process pays for a step's event is `panel` in
`bench overhead`.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import dev
from lab.setup import ROOT

sys.path.append(str(ROOT / "tests"))
DEMO = ROOT / "workflows" / "tiny_demo.json"
AT_ONCE = 10  # steps of 20 ms between two events
STEP = 20  # ms
BLOCKS, SECONDS = 8, 5.0  # of time with the panel's events and without, in turns
SEND = """([first, count, total, name]) => {
    const node = String(window.app.graph.nodes.find((n) => n.type === 'ZTurboTrainLoRA').id);
    const about = { node, run: 'bench', total, phase: 'training' };
    const send = (kind, more) =>
        window.app.api.dispatchEvent(new CustomEvent(`${name}.${kind}`, { detail: { ...about, ...more } }));
    if (first === 1) send('start', { adapter: 'bench' });
    const steps = Array.from({ length: count }, (_, n) => ({
        step: first + n, loss: 0.3 + 0.1 * Math.random(), lr: 1e-4, seconds: 0.02, memory: 12.345 }));
    send('steps', { steps });
    if ((first - 1) % 250 === 0)
        send('look', { looks: [{ event: 'health', step: first, gauge: 0.1, deviation: 0.1 }] });
    return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() =>
        done(JSON.stringify({ ...about, steps }).length / count))));
}"""


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="bench panel")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    from ui.browser import Canvas, chromium

    comfyui = dev.find_comfyui(None)
    found = {}
    with tempfile.TemporaryDirectory() as folder, dev.Server(comfyui, Path(sys.executable), Path(folder)) as server:
        browsers = chromium()
        browser = next(browsers)
        for vue in (False, True):
            canvas = Canvas(browser, server, vue)
            canvas.drop(DEMO)
            canvas.widget("ZTurboTrainLoRA", "name", "bench")
            found["nodes2" if vue else "classic"] = measured(canvas.page, args.steps)
            canvas.context.close()
        browsers.close()
    for name, facts in found.items():
        print(name + ": " + ", ".join(f"{what} {value:g}" for what, value in facts.items()), flush=True)
    if args.json:
        print(json.dumps(found))


def measured(page, steps: int) -> dict[str, float]:
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    size, curve = 0.0, []
    for first in range(1, steps + 1, AT_ONCE):
        size = page.evaluate(SEND, [first, AT_ONCE, steps, "zturbo"])
        if first % (steps // 10) == 1:
            curve.append(counted(session))
    curve.append(counted(session))
    half = curve[len(curve) // 2]
    busy, idle = [], []
    for _ in range(BLOCKS):  # all points are there now
        busy.append(paced(page, session, steps, "zturbo"))
        idle.append(paced(page, session, steps, "nobody"))
    ours = [one - other for one, other in zip(busy, idle)]
    return {
        "bytes a step": round(size, 1),
        "panel's ms a step": round(median(ours), 3),
        "least": round(min(ours), 3),
        "most": round(max(ours), 3),
        "ComfyUI's own ms in that time": round(median(idle), 3),
        "share of a step of 20 ms": round(median(ours) / STEP, 4),
        "heap MB at the start": round(curve[0][0] / 1e6, 2),
        "heap MB at half": round(half[0] / 1e6, 2),
        "heap MB at the end": round(curve[-1][0] / 1e6, 2),
        "elements at the start": curve[0][1],
        "elements at the end": curve[-1][1],
    }


def paced(page, session, steps: int, name: str) -> float:
    """The page's ms a step while events come as a run sends them."""
    before, events = metric(session, "TaskDuration"), int(SECONDS * 1e3 / (STEP * AT_ONCE))
    for number in range(events):
        first = steps - (events - number) * AT_ONCE + 1
        page.evaluate(SEND, [first, AT_ONCE, steps, name])
        page.wait_for_timeout(STEP * AT_ONCE)
    return (metric(session, "TaskDuration") - before) / (events * AT_ONCE) * 1e3


def counted(session) -> tuple[float, float]:
    """(bytes of the heap, elements), once the garbage is collected."""
    session.send("HeapProfiler.collectGarbage")
    return metric(session, "JSHeapUsedSize"), metric(session, "Nodes")


def metric(session, name: str) -> float:
    return next(one["value"] for one in session.send("Performance.getMetrics")["metrics"] if one["name"] == name)
