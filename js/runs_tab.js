// The sidebar tab with all runs: look at one, compare several, go on with one, use its LoRA, open its graph, delete it.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { Chart, curves, smoothed } from "./chart.js";
import { element, button, careful, keep } from "./dom.js";
import { Gallery } from "./gallery.js";
import { allRuns, ask, picture, recipeOf, runOf, workflowOf } from "./server.js";
import { restore, runName, trainNodes } from "./train_panel.js";
import { has, language, say } from "./words.js";

const COLORS = ["#4aa8ff", "#ff9a3c", "#5fc15f", "#e65c8f", "#a58bff", "#c9b037", "#4bc9c0", "#e0604c"];

const toast = (severity, detail) => app.extensionManager.toast.add({ severity, summary: say("runs.title"), detail, life: 6000 });

const nodeOfRun = (run) => trainNodes().find((node) => runName(node) === run.name);

/** Do it, and say what went wrong in the server's own sentence. */
async function tried(act) {
  try {
    await act();
  } catch (error) {
    toast("error", error.message);
  }
}

class RunsTab {
  constructor(root) {
    this.root = element("div", "zturbo-runs", root);
    keep(this.root, "keydown", "wheel");
    const head = element("div", "zturbo-row", this.root);
    element("strong", "", head, say("runs.title"));
    button("zturbo-small zturbo-refresh", say("runs.refresh"), say("runs.refresh_title"), head, () => this.refresh());
    this.note = element("div", "zturbo-line", this.root);
    this.compared = element("div", "zturbo-compared", this.root);
    this.list = element("div", "zturbo-list", this.root);
    this.chosen = new Set();
    this.open = null; // name of the run that is looked at
    this.refresh();
  }

  async refresh() {
    await tried(async () => {
      this.runs = await allRuns();
      this.chosen = new Set([...this.chosen].filter((name) => this.runs.some(({ run }) => run === name)));
      this.note.textContent = this.runs.length ? say("runs.compare_how") : say("runs.none");
      this.list.replaceChildren(...this.runs.map((run) => this.card(run)));
      await this.compare();
    });
  }

  card(run) {
    const card = element("section", "zturbo-card");
    card.dataset.run = run.run;
    const head = element("div", "zturbo-row", card);
    const box = element("input", "zturbo-choose", head);
    box.type = "checkbox";
    box.checked = this.chosen.has(run.run);
    box.title = box.ariaLabel = say("runs.choose", { run: run.run });
    box.addEventListener("change", () => {
      this.chosen[box.checked ? "add" : "delete"](run.run);
      tried(() => this.compare());
    });
    const open = button("zturbo-open", "", say("runs.open_title"), head, () => this.look(run, card));
    open.setAttribute("aria-expanded", false);
    if (run.preview) {
      const image = element("img", "", open);
      image.loading = "lazy";
      image.alt = "";
      image.src = picture(run.run, run.preview, Math.round(run.modified), true);
    }
    const text = element("span", "", open);
    element("b", "", text, run.run);
    const how = say(has(`end.${run.how}`) ? `end.${run.how}` : "runs.running");
    const facts = [how, say("runs.steps", { step: run.step, total: run.total })];
    if (run.loss !== null) facts.push(`${say("chart.loss")} ${run.loss.toFixed(4)}`);
    if (run.gauge !== null) facts.push(`${say("chart.gauge")} ${run.gauge.toFixed(2)}`);
    element("span", "zturbo-line zturbo-wrapped", text, facts.join(" · "));
    element("span", "zturbo-line", text, new Date(run.modified * 1000).toLocaleString(language()));
    if (this.open === run.run) this.look(run, card);
    return card;
  }

  /** Open a card, or close the one that is open. */
  async look(run, card) {
    const there = card.querySelector(".zturbo-detail");
    this.list.querySelectorAll(".zturbo-detail").forEach((detail) => detail.remove());
    this.list.querySelectorAll(".zturbo-open").forEach((open) => open.setAttribute("aria-expanded", false));
    this.open = there ? null : run.run;
    if (there) return;
    card.querySelector(".zturbo-open").setAttribute("aria-expanded", true);
    const detail = element("div", "zturbo-detail", card);
    this.acts(run, detail);
    await tried(async () => {
      const [facts, recipe] = await Promise.all([runOf({ folder: run.run }), recipeOf(run.run)]);
      const chart = new Chart(detail, say("chart.label"));
      chart.set(() => curves(facts.steps, facts.looks), facts.total);
      const gallery = new Gallery(detail);
      gallery.clear(run.run);
      gallery.add(facts.previews);
      for (const text of facts.notes) element("div", "zturbo-line zturbo-wrapped", detail, text);
      const more = element("details", "", detail);
      element("summary", "", more, say("runs.recipe"));
      element("pre", "", more, recipe);
    });
  }

  acts(run, detail) {
    const live = run.how === "running";
    const row = element("div", "zturbo-row zturbo-buttons", detail);
    const steps = element("select", "zturbo-from", row);
    steps.title = steps.ariaLabel = say("runs.from");
    steps.append(...run.checkpoints.map((step) => new Option(say("runs.checkpoint", { step }), step)));
    const go = button("zturbo-go-on", say("runs.go_on"), say("runs.go_on_title"), row, () => tried(() => this.goOn(run, Number(steps.value))));
    steps.hidden = go.disabled = live || !run.checkpoints.length;
    const use = button("zturbo-use", say("runs.use"), say("runs.use_title"), row, () => tried(() => this.use(run, "newest")));
    use.disabled = !run.saved;
    if (run.healthy && run.healthy !== run.saved) button("zturbo-use-healthy", say("runs.use_healthy", { step: run.healthy }), say("runs.use_healthy_title"), row, () => tried(() => this.use(run, "healthy")));
    const graph = button("zturbo-graph", say("runs.graph"), say("runs.graph_title"), row, () => tried(() => this.graph(run)));
    graph.disabled = !run.workflow;
    const compare = button("zturbo-compare", say("runs.compare"), say("runs.compare_title"), row, () => this.compareOn(run));
    compare.disabled = !run.checkpoints.length;
    const gone = careful("zturbo-delete", say("runs.delete"), say("runs.delete_sure"), say("runs.delete_title"), row, () =>
      tried(async () => {
        await ask("delete", run.run);
        await this.refresh();
      }),
    );
    gone.disabled = live;
  }

  /** The run's graph on the canvas, or the Train node of that name in the open one. Gives the node. */
  async node(run) {
    if (!nodeOfRun(run) && run.workflow) await this.graph(run);
    return nodeOfRun(run) ?? trainNodes()[0];
  }

  /** Have the Train node go on where the run is. One that was cut off is taken up; one that has ended becomes a new run. */
  async goOn(run, step) {
    const node = await this.node(run);
    if (!node) throw new Error(say("runs.no_node"));
    const widget = (name) => node.widgets.find((one) => one.name === name);
    const newest = step === run.checkpoints[0];
    const cutOff = ["cancelled", "failed", "died"].includes(run.how) && this.runs.find(({ name }) => name === run.name) === run;
    const takenUp = cutOff && newest;
    const set = (name, value) => {
      widget(name).value = value;
      widget(name).callback?.(value);
    };
    set("resume", takenUp ? "auto" : newest ? run.run : `${run.run}/step_${String(step).padStart(6, "0")}`);
    if (step >= widget("steps").value) set("steps", 2 * step);
    app.graph.setDirtyCanvas(true, true);
    if (node.graph === app.canvas.graph) app.canvas.centerOnNode(node);
    toast("info", say(takenUp ? "runs.ready_again" : "runs.ready", { step, steps: widget("steps").value }));
  }

  /** Copy the LoRA into models/loras, and put a loader with it on the canvas. */
  async use(run, lora) {
    const { file } = await ask("take", run.run, { lora });
    await app.refreshComboInNodes?.();
    this.put("LoraLoaderModelOnly", "lora_name", file);
    toast("success", say("runs.used", { file }));
  }

  /** A node on the canvas that is open, in a corner of what is seen, with a value. */
  put(kind, name, value) {
    const graph = app.canvas.graph; // also a subgraph that is open
    const node = LiteGraph.createNode(kind);
    graph.add(node);
    const [x, y, width, height] = app.canvas.ds?.visible_area ?? [0, 0, 800, 600];
    node.pos = [x + 0.4 * width, y + 0.2 * height];
    while (graph.nodes.some((one) => one !== node && Math.hypot(one.pos[0] - node.pos[0], one.pos[1] - node.pos[1]) < 40)) node.pos = [node.pos[0] + 40, node.pos[1] + 40];
    const widget = node.widgets.find((one) => one.name === name);
    if (Array.isArray(widget.options?.values) && !widget.options.values.includes(value)) widget.options.values.push(value);
    widget.value = value;
    app.canvas.selectNode?.(node);
    app.graph.setDirtyCanvas(true, true);
    return node;
  }

  /** A Compare node with all checkpoints of a run, drawn as its previews are, wired where there is a loader. */
  compareOn(run) {
    const node = this.put("ZTurboCompare", "loras", `${run.run}/all`);
    const train = nodeOfRun(run) ?? trainNodes()[0];
    const of = (name) => train?.widgets?.find((one) => one.name === name)?.value;
    const same = { prompts: "preview_prompts", width: "preview_width", height: "preview_height", seed: "preview_seed" };
    for (const [mine, theirs] of Object.entries(same)) if (of(theirs) !== undefined) node.widgets.find((one) => one.name === mine).value = of(theirs);
    const loader = node.graph.nodes.find((one) => one.type === "ZTurboLoadModel");
    if (loader) for (const slot of [0, 1, 2]) loader.connect(slot, node, node.inputs.findIndex(({ name }) => name === ["model", "clip", "vae"][slot]));
    toast("success", say("runs.compare_ready"));
  }

  async graph(run) {
    // under a name of its own: a workflow of the user's that is called as the run must stay as it is
    await app.loadGraphData(await workflowOf(run.run), true, true, say("runs.graph_name", { run: run.run }));
    const node = nodeOfRun(run);
    if (node) restore(node, { folder: run.run });
  }

  async compare() {
    const chosen = [...this.chosen];
    const found = chosen.length < 2 ? [] : await Promise.all(chosen.map((folder) => runOf({ folder })));
    if (chosen.join("/") !== [...this.chosen].join("/")) return; // it was asked for again
    this.compared.replaceChildren();
    if (!found.length) return;
    this.root.scrollTop = 0;
    const chart = new Chart(this.compared, say("runs.compared"));
    chart.set(
      () => found.map((run, n) => ({ key: "run", name: run.run, color: COLORS[n % COLORS.length], points: smoothed(run.steps.map(({ step, loss }) => ({ step, y: loss }))) })),
      Math.max(...found.map(({ total }) => total)),
    );
    const row = element("div", "zturbo-last", this.compared);
    for (const run of found) {
      const last = run.previews.at(-1);
      if (!last) continue;
      const figure = element("figure", "", row);
      const image = element("img", "", figure);
      image.src = picture(run.run, last.files[0], last.time, true);
      image.alt = say("gallery.picture", { step: last.step, file: last.files[0] });
      element("figcaption", "", figure, `${run.run}, ${last.step}`);
    }
  }
}

let tab = null;
for (const name of ["start", "end"]) api.addEventListener(`zturbo.${name}`, () => tab?.refresh());

app.registerExtension({
  name: "zturbo.Runs",

  setup() {
    app.extensionManager.registerSidebarTab({
      id: "zturbo-runs",
      icon: "pi pi-chart-line",
      title: say("runs.title"),
      tooltip: say("runs.tooltip"),
      type: "custom",
      render: (root) => {
        tab = new RunsTab(root);
      },
      destroy: () => {
        tab = null;
      },
    });
  },
});
