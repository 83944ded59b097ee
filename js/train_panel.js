// The panel in the Train node: loss curve, step and time left, newest preview, Stop and keep.
// It shows what the server pushes; after a page reload it is redrawn from the run folder.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODE = "ZTurboTrainLoRA";
const HEIGHT = 300;
const MOST = 4000; // points of the curve
const SMOOTH = 0.95;
const PHASES = {
  encoding: "Preparing pictures and captions",
  walking: "Walking turbo's paths",
  validating: "Looking at the pictures held out",
  training: "Training",
  restoring: "Restoring turbo",
  drawing: "Drawing previews",
  saving: "Saving",
};
const STEPS = ["training", "restoring"]; // phases that take steps
const STYLE = `
.zturbo-panel { display: flex; flex-direction: column; gap: 6px; width: 100%; height: 100%; box-sizing: border-box; padding: 4px;
  font: 12px sans-serif; color: var(--input-text, #ddd); }
.zturbo-panel .zturbo-row { display: flex; justify-content: space-between; align-items: center; gap: 8px; }
.zturbo-panel .zturbo-status { flex: 1; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.zturbo-panel .zturbo-line { opacity: 0.7; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.zturbo-panel svg { width: 100%; height: 90px; flex: none; background: var(--comfy-input-bg, #222); border-radius: 4px; }
.zturbo-panel .zturbo-previews { display: flex; gap: 4px; flex: 1; min-height: 0; justify-content: center; }
.zturbo-panel .zturbo-previews img { min-width: 0; max-height: 100%; flex: 0 1 auto; object-fit: contain; border-radius: 4px; }
.zturbo-panel button { padding: 3px 10px; border-radius: 4px; border: 1px solid var(--border-color, #555);
  background: var(--comfy-menu-bg, #333); color: inherit; cursor: pointer; }
.zturbo-panel button:disabled { opacity: 0.4; cursor: default; }`;

function element(tag, className, parent) {
  const made = document.createElement(tag);
  made.className = className;
  parent?.append(made);
  return made;
}

function clock(seconds) {
  const whole = Math.round(seconds);
  const pad = (n) => String(n).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  return (hours ? `${hours}:` : "") + `${pad(Math.floor(whole / 60) % 60)}:${pad(whole % 60)}`;
}

function smoothed(points) {
  let mean = 0;
  let weight = 0;
  return points.map(({ step, loss }) => {
    mean = SMOOTH * mean + (1 - SMOOTH) * loss;
    weight = SMOOTH * weight + (1 - SMOOTH);
    return { step, loss: mean / weight };
  });
}

class Panel {
  constructor() {
    this.root = element("div", "zturbo-panel");
    const row = element("div", "zturbo-row", this.root);
    this.status = element("span", "zturbo-status", row);
    this.save = element("button", "zturbo-save", row);
    this.save.textContent = "Save now";
    this.save.title = "Write the LoRA and a checkpoint after this step, and go on.";
    this.save.addEventListener("click", () => this.ask("save", "Saving after this step…"));
    this.stop = element("button", "zturbo-stop", row);
    this.stop.textContent = "Stop and keep";
    this.stop.title = "End training after this step and hand the LoRA so far to the next node.";
    this.stop.addEventListener("click", () => this.ask("stop", "Stopping after this step…"));
    this.adapter = element("div", "zturbo-line", this.root);
    this.gauge = element("div", "zturbo-line zturbo-gauge", this.root);
    this.gauge.title = "How far turbo is worn: 0 untouched, 1 broken. Read on prompts that have nothing to do with your pictures.";
    this.notice = element("div", "zturbo-line zturbo-notice", this.root);
    this.chart = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    this.chart.setAttribute("viewBox", "0 0 300 90");
    this.chart.setAttribute("preserveAspectRatio", "none");
    this.chart.setAttribute("role", "img");
    this.chart.setAttribute("aria-label", "Loss curve");
    this.root.append(this.chart);
    this.previews = element("div", "zturbo-previews", this.root);
    this.begin({ run: null, total: 0 });
    this.say("Not trained yet.");
  }

  begin({ run, total, adapter = "" }) {
    this.run = run;
    this.total = total;
    this.points = [];
    this.looks = [];
    this.notes = [];
    this.stopping = false;
    this.doing = "";
    this.ended = false;
    this.previews.replaceChildren();
    this.chart.replaceChildren();
    this.stop.disabled = this.save.disabled = true; // until there is something to keep
    this.adapter.textContent = this.adapter.title = adapter;
    this.gauge.textContent = "";
    this.note([]);
    this.say(run ? "Preparing pictures…" : "");
  }

  say(text) {
    this.status.textContent = this.status.title = text;
  }

  /** What a person should know of the run: the newest is shown, all of them on hovering. */
  note(texts) {
    this.notes.push(...texts);
    this.notice.textContent = this.notes.at(-1) ?? "";
    this.notice.title = this.notes.join("\n");
  }

  /** Losses at fixed noise levels ("validation": of pictures held out, and of pictures that are trained on), and the gauge ("health"). */
  look(looks) {
    for (const look of looks) this.looks = [...this.looks.filter(({ event, step }) => step < look.step || event !== look.event), look];
    const reading = this.looks.filter(({ event }) => event === "health").at(-1);
    this.gauge.textContent = reading ? `Turbo wear ${reading.gauge.toFixed(2)} at step ${reading.step} (0 untouched, 1 broken)` : "";
    this.drawCurve();
  }

  /** What the run does now. The steps of a phase that takes steps are said by `add`, once there are some. */
  phase({ phase: name, done, of }) {
    if (this.ended) return;
    if (STEPS.includes(name) && this.points.length) return this.sayStep();
    const words = PHASES[name] ?? name;
    const count = of ? ` ${Math.min(done + 1, of)} of ${of}` : "";
    this.say(`${this.stopping ? "Stopping. " : ""}${words}${STEPS.includes(name) ? ": step" : ""}${count}…`);
  }

  sayStep() {
    const now = this.points.at(-1);
    const recent = this.points.slice(-50);
    const pace = recent.reduce((sum, { seconds }) => sum + seconds, 0) / recent.length;
    const step = this.doing === "restoring" ? "Restoring turbo: step" : "Step";
    this.say(`${step} ${now.step} of ${this.total}, loss ${smoothed(this.points).at(-1).loss.toFixed(4)}, ${clock((this.total - now.step) * pace)} left`);
  }

  add(steps) {
    const first = steps[0]?.step ?? Infinity; // a run that goes back takes its curve back, too
    this.points = [...this.points.filter(({ step }) => step < first), ...steps];
    if (this.points.length > MOST) this.points = this.points.filter((_, index) => index % 2 || index > MOST / 2); // the older half, thinner
    this.drawCurve();
    const now = this.points.at(-1);
    if (!now) return;
    this.stop.disabled = this.save.disabled = this.stopping || now.step >= this.total; // behind the last there is nothing to stop
    this.sayStep();
  }

  drawCurve() {
    const series = (key) => this.looks.filter((look) => key in look).map((look) => ({ step: look.step, loss: look[key] }));
    const [heldOut, trained] = [series("held_out"), series("trained")];
    const losses = [...this.points, ...heldOut, ...trained].map(({ loss }) => loss);
    const top = Math.max(...losses);
    const bottom = Math.min(...losses, top - 1e-9);
    const place = (high, low) => ({ step, loss }) => `${((300 * step) / Math.max(this.total, 1)).toFixed(1)},${(86 - (82 * (loss - low)) / (high - low)).toFixed(1)}`;
    const line = (points, color, width, high = top, low = bottom) => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
      made.setAttribute("points", points.map(place(high, low)).join(" "));
      made.setAttribute("fill", "none");
      made.setAttribute("stroke", color);
      made.setAttribute("stroke-width", width);
      made.setAttribute("vector-effect", "non-scaling-stroke");
      return made;
    };
    this.chart.replaceChildren(line(this.points, "#567", 1), line(smoothed(this.points), "#6cf", 2), line(trained, "#9c6", 1.5), line(heldOut, "#fa6", 1.5), line(series("gauge"), "#e55", 1.5, 1, 0));
  }

  show(files) {
    const images = files.slice(0, 4).map((file) => {
      const image = document.createElement("img");
      const query = new URLSearchParams({ filename: file, subfolder: `zturbo/${this.run}/previews`, type: "output" });
      image.src = api.apiURL(`/view?${query}`);
      image.title = image.alt = file;
      return image;
    });
    this.previews.replaceChildren(...images);
    if (files.length > images.length) element("span", "", this.previews).textContent = `+${files.length - images.length} in the run folder`;
  }

  /** how: finished, stopped, cancelled, failed, or died; saved: the step of the LoRA in the run folder, 0 for none. */
  end(how, saved) {
    this.ended = true;
    this.stopping = this.stop.disabled = this.save.disabled = true;
    const done = this.points.at(-1)?.step ?? 0;
    const words = { finished: "Finished", stopped: "Stopped, LoRA kept", cancelled: "Cancelled", failed: "Ended with an error", died: "ComfyUI went away" };
    const kept = saved === done ? "" : saved ? ` The run folder has the LoRA of step ${saved}.` : " No LoRA is in the run folder.";
    this.say(`${words[how] ?? how} at step ${done} of ${this.total}.${how === "died" ? "" : kept}`);
  }

  /** wish: stop or save. */
  async ask(wish, text) {
    const before = this.stopping;
    this.stopping ||= wish === "stop";
    this.stop.disabled = this.save.disabled = this.stopping;
    try {
      const answer = await api.fetchApi(`/zturbo/${wish}`, { method: "POST", body: JSON.stringify({ run: this.run }), headers: { "Content-Type": "application/json" } });
      if (!answer.ok) throw new Error(answer.statusText);
      this.say(text);
    } catch {
      this.stopping = this.stop.disabled = this.save.disabled = before;
      this.say("The run could not be reached. Try again.");
    }
  }

  async restore(name) {
    const before = this.run;
    const answer = await api.fetchApi(`/zturbo/run?${new URLSearchParams({ name })}`).catch(() => ({ ok: false }));
    const run = answer.ok ? await answer.json() : { run: null };
    if (!run.run || (this.run !== before && this.run !== run.run)) return; // nothing there, or another run has begun meanwhile
    const [live, doing] = this.run === run.run ? [this.points, this.doing] : [[], ""];
    this.begin(run);
    this.doing = doing;
    this.note(run.notes);
    this.look(run.looks);
    this.add(run.steps);
    this.add(live);
    this.show(run.files);
    if (run.how) this.end(run.how, run.saved);
  }
}

const panels = new WeakMap(); // LiteGraph node -> Panel

function runName(node) {
  return node.widgets?.find((widget) => widget.name === "name")?.value?.trim?.(); // as the node takes it
}

/** Every Train node of the open workflow, in subgraphs too. */
function trainNodes(graph = app.rootGraph ?? app.graph) {
  return (graph?.nodes ?? []).flatMap((node) => (node.subgraph ? trainNodes(node.subgraph) : panels.has(node) ? [node] : []));
}

/** The node of an execution id: "4", or "12:4" for node 4 inside subgraph node 12. */
function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

/**
 * Events go to every open page, and a node of another workflow may have the same number: a panel takes a new run as its own
 * only when it is named as the node says. It may have missed the start event (after a reload).
 */
function follow(detail, act) {
  const node = nodeOf(detail.node);
  const panel = node && panels.get(node);
  if (!panel) return;
  const linked = node.inputs?.some((input) => input.name === "name" && input.link != null);
  const own = linked || detail.run.replace(/_\d+$/, "") === runName(node) || detail.run === runName(node);
  if (panel.run !== detail.run && !own) return;
  if (panel.run !== detail.run) panel.begin(detail);
  panel.doing = detail.phase; // also of a page that was opened in mid-phase
  act(panel);
}

// At import and not in setup: after a reload in mid-run events arrive before the app is set up.
api.addEventListener("zturbo.start", ({ detail }) => follow(detail, (panel) => panel.begin(detail)));
api.addEventListener("zturbo.phase", ({ detail }) => follow(detail, (panel) => panel.phase(detail)));
api.addEventListener("zturbo.steps", ({ detail }) => follow(detail, (panel) => panel.add(detail.steps)));
api.addEventListener("zturbo.look", ({ detail }) => follow(detail, (panel) => panel.look(detail.looks)));
api.addEventListener("zturbo.note", ({ detail }) => follow(detail, (panel) => panel.note(detail.notes)));
api.addEventListener("zturbo.preview", ({ detail }) => follow(detail, (panel) => panel.show(detail.files)));
api.addEventListener("zturbo.end", ({ detail }) => follow(detail, (panel) => panel.end(detail.how, detail.saved)));
// Events of the time without a connection are lost: redraw from the run folders.
api.addEventListener("reconnected", () => trainNodes().forEach((node) => runName(node) && panels.get(node).restore(runName(node))));

app.registerExtension({
  name: "zturbo.TrainPanel",

  async setup() {
    const style = document.createElement("style");
    style.textContent = STYLE;
    document.head.append(style);
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const panel = new Panel();
    panels.set(node, panel);
    node.addDOMWidget("zturbo_panel", "zturbo_panel", panel.root, { serialize: false, hideOnZoom: false, getMinHeight: () => HEIGHT });
  },

  loadedGraphNode(node) {
    if (node.comfyClass === NODE && runName(node)) panels.get(node)?.restore(runName(node));
  },
});
