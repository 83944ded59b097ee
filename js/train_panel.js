// Puts the panel into the Train node, and brings it what the server pushes. After a page reload it is redrawn from the run folder.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { source } from "./dom.js";
import { Panel } from "./panel.js";
import { say } from "./words.js";

const NODE = "ZTurboTrainLoRA";
const HEIGHT = 620;
const panels = new WeakMap(); // LiteGraph node -> Panel

/** As the node takes it; undefined where another node brings it and it cannot be told what. */
export function runName(node) {
  const wire = node.inputs?.find((input) => input.name === "name" && input.link != null);
  if (!wire) return node.widgets?.find((widget) => widget.name === "name")?.value?.trim?.();
  const texts = source(node, wire)?.widgets?.filter(({ value }) => typeof value === "string") ?? [];
  return texts.length === 1 ? texts[0].value.trim() : undefined;
}

/** Every Train node of the open workflow, in subgraphs too. */
export function trainNodes(graph = app.rootGraph ?? app.graph) {
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

function follow(kind, detail, act) {
  const node = nodeOf(detail.node);
  const panel = node && panels.get(node);
  panel?.take(() => brought(kind, node, panel, detail, act));
}

/**
 * Events go to every open page, and a node of another workflow may have the same number: a panel takes a new run as its own
 * only when it is named as the node says. It may have missed the start event (after a reload).
 */
function brought(kind, node, panel, detail, act) {
  const linked = node.inputs?.some((input) => input.name === "name" && input.link != null);
  const own = linked || detail.run.replace(/_\d+$/, "") === runName(node) || detail.run === runName(node);
  if (panel.run !== detail.run && !own) return;
  if (panel.run !== detail.run) {
    panel.begin(detail);
    if (kind !== "start") panel.restore({ folder: detail.run }); // it has begun before this page was there
  }
  panel.take(() => {
    panel.doing = detail.phase; // also of a page that was opened in mid-phase
    act(panel);
  });
}

// At import and not in setup: after a reload in mid-run events arrive before the app is set up.
const on = (name, act) => api.addEventListener(`zturbo.${name}`, ({ detail }) => follow(name, detail, (panel) => act(panel, detail)));
on("start", (panel, detail) => {
  panel.begin(detail);
  if (detail.goes_on) panel.restore({ folder: detail.run }); // it has a curve already
});
on("phase", (panel, detail) => panel.phase(detail));
on("steps", (panel, detail) => panel.add(detail.steps));
on("look", (panel, detail) => panel.look(detail.looks));
on("note", (panel, detail) => panel.note(detail.notes));
on("preview", (panel, detail) => panel.show(detail.step, detail.files));
on("end", (panel, detail) => panel.end(detail.how, detail.saved));
// Events of the time without a connection are lost: redraw from the run folders.
api.addEventListener("reconnected", () => trainNodes().forEach((node) => restore(node)));

/** query: as `server.runOf`; the newest run of the node's name, unless another is said. */
export function restore(node, query = { name: runName(node) }) {
  if (query.name || query.folder) panels.get(node)?.restore(query);
}

app.registerExtension({
  name: "zturbo.TrainPanel",

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const panel = new Panel();
    panels.set(node, panel);
    const widget = node.addDOMWidget("zturbo_panel", "zturbo_panel", panel.root, { serialize: false, hideOnZoom: false, getMinHeight: () => HEIGHT });
    widget.label = say("panel.label"); // where a form shows it
  },

  loadedGraphNode(node) {
    if (node.comfyClass === NODE) restore(node);
  },
});
