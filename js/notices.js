// Guard rails on the canvas: a notice at a node that is wired or set so that its pictures will look wrong.
import { app } from "../../scripts/app.js";
import { element, button, source } from "./dom.js";
import { say } from "./words.js";

const TOP = 100; // px: ComfyUI's bars
const EVERY = 700; // ms between two looks at the graph
const ADAPTER = "ZTurboDeDistillAdapter";
const LOADER = "ZTurboLoadModel";
const TRAIN = "ZTurboTrainLoRA";
const SAMPLERS = ["ZTurboSampler", "KSampler", "KSamplerAdvanced", "SamplerCustom", "BasicGuider", "CFGGuider"];
const SAVERS = ["ModelSave", "CheckpointSave"];
const FEW = 6; // steps
const MANY = 12;
const [MUTED, BYPASSED] = [2, 4];

const value = (node, name) => (node.inputs?.some((input) => input.name === name && input.link != null) ? undefined : node.widgets?.find((widget) => widget.name === name)?.value);

/**
 * What the MODEL that comes into a node carries: {ours: did it pass a node of this pack, net: of the adapter, turbo: is the file
 * called so}. null: it cannot be told, for instance since it comes out of a subgraph or by a strength that another node brings.
 */
export function carried(node, name = "model", seen = new Set()) {
  const input = name === null ? node.inputs?.find(({ type, link }) => type === "MODEL" && link != null) : node.inputs?.find((one) => one.name === name);
  const from = source(node, input ?? (node.type === "Reroute" ? node.inputs?.[0] : null));
  if (!from || seen.has(from) || from.subgraph || from.mode === MUTED) return null;
  seen.add(from);
  if (from.type === LOADER) return { ours: true, net: 0, turbo: /turbo|tiny/i.test(value(from, "diffusion_model") ?? "") };
  const reaches = from.type === "Reroute" || from.inputs?.some(({ type, link }) => type === "MODEL" && link != null);
  if (!reaches) return from.type === ADAPTER ? null : { ours: false, net: 0 };
  const before = carried(from, from.type === ADAPTER ? "model" : null, seen);
  if (from.type !== ADAPTER || from.mode === BYPASSED || !before) return before;
  return after(before, from);
}

function after(before, node) {
  const [direction, strength, merged] = [value(node, "direction"), value(node, "strength"), value(node, "checkpoint_has_adapter")];
  if (direction === undefined || strength === undefined || merged === undefined) return null;
  const there = direction.startsWith("-") && merged ? 1 : 0; // in the file itself
  return { ...before, ours: true, net: before.net + there + (direction.startsWith("-") ? -strength : strength) };
}

/** Keys of what is to be said at a node, most important first. */
export function doubts(node) {
  if ([MUTED, BYPASSED].includes(node.mode)) return [];
  const found = [];
  const near = (a, b) => Math.abs(a - b) < 1e-6;
  if (SAMPLERS.includes(node.type)) {
    const model = carried(node);
    if (!model?.ours) return [];
    if (model.net > 1e-6) return ["adapter_on"];
    if (!model.turbo || (value(node, "denoise") ?? 1) < 1) return [];
    const [cfg, steps] = [value(node, "cfg"), value(node, "steps")];
    if (cfg !== undefined && !near(cfg, 1)) found.push("cfg");
    if (steps !== undefined && (steps < FEW || steps > MANY)) found.push("steps");
  } else if (node.type === ADAPTER) {
    const model = carried(node);
    const direction = value(node, "direction");
    if (!model || !direction) return [];
    if (direction.startsWith("+") && model.net > 1e-6) found.push("twice");
    if (direction.startsWith("-") && near(model.net, 0) && value(node, "checkpoint_has_adapter") === false) found.push("minus");
  } else if (SAVERS.includes(node.type)) {
    const model = carried(node);
    if (model?.ours && !near(model.net, 0)) found.push("saved");
  } else if (node.type === TRAIN) {
    const model = carried(node);
    const preview = node.inputs?.find(({ name }) => name === "preview_model")?.link;
    if (model?.turbo && near(model.net, 0) && preview == null) found.push("no_adapter");
  }
  return found;
}

const shown = new Map(); // "node:kind" -> {node, root}
let layer = null;
let frame = 0;

/** What a person has dismissed at a node; it is kept with the workflow. */
const quiet = (node) => node.properties?.zturbo_quiet ?? [];

function look() {
  if (document.hidden || !app.canvas?.graph) return;
  const wanted = new Map();
  for (const node of app.canvas.graph.nodes ?? []) {
    const found = doubts(node);
    const still = quiet(node).filter((kind) => found.includes(kind)); // once mended it may be said again
    if (still.length < quiet(node).length) node.properties.zturbo_quiet = still;
    for (const kind of found) if (!still.includes(kind)) wanted.set(`${node.id}:${kind}`, { node, kind });
  }
  for (const [key, { root, node }] of shown) {
    if (wanted.get(key)?.node === node) continue;
    root.remove();
    shown.delete(key);
  }
  for (const [key, { node, kind }] of wanted) if (!shown.has(key)) show(key, node, kind);
  if (shown.size && !frame) frame = requestAnimationFrame(follow);
}

function show(key, node, kind) {
  const parent = app.canvas.canvas.parentElement;
  if (layer?.parentElement !== parent) {
    layer?.remove();
    layer = element("div", "zturbo-notices", parent);
  }
  const root = element("div", "zturbo-warning", layer);
  root.setAttribute("role", "alert");
  element("span", "", root, say(`notices.${kind}`));
  button("", "×", say("notices.dismiss"), root, () => {
    (node.properties ??= {}).zturbo_quiet = [...quiet(node), kind];
    shown.delete(key);
    root.remove();
  });
  shown.set(key, { node, root });
}

/** Notices stay at their nodes while the canvas moves. */
function follow() {
  frame = shown.size ? requestAnimationFrame(follow) : 0;
  const { scale, offset } = app.canvas.ds;
  const above = new Map();
  for (const { node, root } of shown.values()) {
    const height = above.get(node) ?? 0;
    const small = Math.min(1, Math.max(0.6, scale)); // with the canvas, as far as it can be read
    const [x, y] = [(node.pos[0] + offset[0]) * scale, (node.pos[1] - 34 + offset[1]) * scale - height];
    const inside = node.pos[1] + node.size[1] + offset[1] > 0;
    root.style.maxWidth = `${Math.max(180, (node.size[0] * scale) / small)}px`;
    root.style.transform = `translate(${x}px, ${inside ? Math.max(y, TOP + small * root.offsetHeight) : y}px) scale(${small}) translateY(-100%)`;
    above.set(node, height + small * root.offsetHeight + 4);
  }
}

app.registerExtension({
  name: "zturbo.Notices",
  setup() {
    setInterval(look, EVERY);
  },
});
