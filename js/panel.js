// The panel of a run: what it does, its curve, its previews, and what can be asked of it.
import { Chart, curves, nearest, smoothed } from "./chart.js";
import { element, button, careful, keep, write } from "./dom.js";
import { Gallery } from "./gallery.js";
import { ask, runOf } from "./server.js";
import { clock, has, say } from "./words.js";

const MOST = 2000; // points of the curve
const RECENT = 50; // steps whose pace counts
const EVERY = 1000; // ms between two times that steps are said
const STEPS = ["training", "restoring"]; // phases that take steps
const PAUSED = "paused";
const WISHES = ["stop", "save", "pause", "cancel"];

/** Half as many as there may be, one of so many steps; but the newest all. */
function sparse(points) {
  const each = Math.ceil((2 * points.at(-1).step) / MOST);
  const newest = points.length - RECENT;
  return points.filter(({ step }, n) => !n || n >= newest || Math.floor(step / each) !== Math.floor(points[n - 1].step / each));
}

export class Panel {
  constructor() {
    this.root = element("div", "zturbo-panel");
    keep(this.root, "keydown", "keyup", "paste", "copy");
    this.status = element("div", "zturbo-status", this.root);
    this.status.setAttribute("role", "status");
    this.bar = element("progress", "zturbo-progress", this.root);
    this.facts = element("div", "zturbo-line zturbo-facts", this.root);
    const row = element("div", "zturbo-row zturbo-buttons", this.root);
    this.buttons = Object.fromEntries(WISHES.map((wish) => [wish, this.wish(wish, row)]));
    this.adapter = element("div", "zturbo-line zturbo-adapter", this.root);
    this.gauge = element("div", "zturbo-line zturbo-gauge", this.root);
    this.gauge.title = say("panel.gauge_title");
    this.more = element("details", "zturbo-more", this.root);
    this.notice = element("summary", "zturbo-line zturbo-notice", this.more);
    this.said = element("div", "zturbo-said", this.more);
    this.chart = new Chart(this.root, say("chart.label"));
    this.chart.reading = (step) => this.rateAt(step);
    this.gallery = new Gallery(this.root);
    this.begin({ run: null, total: 0 });
    this.say(say("panel.not_trained"));
  }

  wish(wish, row) {
    const [text, title] = [say(`panel.${wish}`), say(`panel.${wish}_title`)];
    const act = () => this.ask(wish === "pause" && this.paused ? "go_on" : wish);
    return wish === "cancel" ? careful("zturbo-cancel", text, say("panel.cancel_sure"), title, row, act) : button(`zturbo-${wish}`, text, title, row, act);
  }

  begin({ run, total, adapter = "" }) {
    this.due = clearTimeout(this.due);
    this.chart.at = null;
    Object.assign(this, { run, total, points: [], looks: [], notes: [], doing: "", stopping: false, paused: false, ended: !run });
    this.gallery.clear(run);
    this.chart.view = null;
    this.adapter.textContent = this.adapter.title = adapter;
    this.gauge.textContent = this.facts.textContent = "";
    this.progress(null);
    this.note([]);
    this.drawCurve();
    this.enable();
    this.say(run ? say("panel.preparing") : "");
  }

  /** quiet: it is not read out, as it comes again and again. */
  say(text, quiet = false) {
    this.status.ariaLive = quiet ? "off" : "polite";
    write(this.status, text);
  }

  /** share: of the whole, 0 to 1; null: nobody knows, or nothing goes on. */
  progress(share) {
    this.bar.hidden = this.ended;
    if (share === null) this.bar.removeAttribute("value");
    else this.bar.value = share;
  }

  /** Before the first step there is nothing to keep, behind the last nothing to stop. */
  enable() {
    const done = this.points.at(-1)?.step ?? 0;
    const idle = this.ended || this.stopping;
    const between = done > 0 && done < this.total;
    this.buttons.stop.disabled = idle || !between;
    this.buttons.save.disabled = idle || this.paused || !between;
    this.buttons.pause.disabled = idle || (done > 0 && done >= this.total);
    this.buttons.cancel.disabled = this.ended;
    write(this.buttons.pause, say(this.paused ? "panel.go_on" : "panel.pause"));
    this.buttons.pause.title = say(this.paused ? "panel.go_on_title" : "panel.pause_title");
  }

  /** What a person should know of the run: the newest is shown, all of them on hovering, or unfolded. */
  note(texts) {
    this.notes.push(...texts);
    this.more.hidden = !this.notes.length;
    this.notice.textContent = this.notes.at(-1) ?? "";
    this.notice.title = this.said.textContent = this.notes.join("\n");
  }

  /** Losses at fixed noise levels ("validation": of pictures held out, and of pictures that are trained on), and the gauge ("health"). */
  look(looks) {
    const first = {}; // a run that goes back takes its readings back, too
    for (const { event, step } of looks) first[event] = Math.min(step, first[event] ?? Infinity);
    this.looks = [...this.looks.filter(({ event, step }) => step < (first[event] ?? Infinity)), ...looks];
    const reading = this.looks.filter(({ event }) => event === "health").at(-1);
    this.gauge.textContent = reading ? say("panel.gauge", { gauge: reading.gauge.toFixed(2), step: reading.step }) : "";
    this.gauge.style.setProperty("--zturbo-wear", Math.min(1, reading?.gauge ?? 0));
    this.drawCurve();
  }

  /** What the run does now. The steps of a phase that takes steps are said by `add`, once there are some. */
  phase({ phase: name, done, of }) {
    if (this.ended) return;
    this.paused = name === PAUSED;
    this.enable();
    if (STEPS.includes(name) && this.points.length) return this.sayStep();
    const words = has(`phase.${name}`) ? say(`phase.${name}`) : name;
    const count = of ? say(STEPS.includes(name) ? "panel.step_of" : "panel.count_of", { done: Math.min(done + 1, of), of }) : "";
    this.say(`${this.stopping ? say("panel.stopping") : ""}${words}${count}…`);
    if (!this.paused && !STEPS.includes(name)) this.progress(of ? done / of : null);
  }

  sayStep() {
    const now = this.points.at(-1);
    const recent = this.points.slice(-RECENT);
    const pace = recent.reduce((sum, { seconds }) => sum + seconds, 0) / recent.length;
    const loss = smoothed(recent.map(({ step, loss }) => ({ step, y: loss }))).at(-1).y;
    const left = clock((this.total - now.step) * pace);
    const text = say(this.doing === "restoring" ? "panel.restoring" : "panel.step", { step: now.step, total: this.total, loss: loss.toFixed(4), left });
    this.say(`${this.stopping ? say("panel.stopping") : ""}${text}`, true);
    const speed = pace < 1 ? say("panel.per_second", { pace: (1 / pace).toPrecision(3) }) : say("panel.per_step", { pace: pace.toPrecision(3) });
    const memory = now.memory === undefined ? "" : say("panel.memory", { memory: now.memory.toFixed(1) });
    write(this.facts, [speed, now.lr === undefined ? "" : say("panel.rate", { rate: now.lr.toPrecision(3) }), memory].filter(Boolean).join(" · "));
    this.progress(now.step / this.total);
  }

  rateAt(step) {
    const near = nearest(this.points, step);
    return near?.lr === undefined ? [] : [say("panel.rate", { rate: near.lr.toPrecision(3) })];
  }

  add(steps) {
    const first = steps[0]?.step ?? Infinity; // a run that goes back takes its curve back, too
    if (first <= (this.points.at(-1)?.step ?? -Infinity)) this.points = this.points.filter(({ step }) => step < first);
    this.points.push(...steps);
    if (this.points.length > MOST) this.points = sparse(this.points);
    if (steps.length) this.gallery.rewind(this.points.at(-1).step);
    if (this.due) return;
    const wait = EVERY - (performance.now() - (this.told ?? -Infinity));
    if (wait <= 0) this.tell();
    else this.due = setTimeout(() => this.tell(), wait);
  }

  /** What came with the newest steps. */
  tell() {
    this.due = clearTimeout(this.due);
    this.told = performance.now();
    this.drawCurve();
    this.enable();
    if (this.points.length && !this.ended && !this.paused && STEPS.includes(this.doing)) this.sayStep();
  }

  drawCurve() {
    this.chart.set(() => curves(this.points, this.looks), this.total);
  }

  show(step, files) {
    if (files.length) this.gallery.add([{ step, files, time: Math.round(Date.now() / 1000) }]);
  }

  /** how: finished, stopped, cancelled, failed, or died; saved: the step of the LoRA in the run folder, 0 for none. */
  end(how, saved) {
    this.tell(); // what still waits
    this.ended = true;
    this.enable();
    this.progress(null);
    const done = this.points.at(-1)?.step ?? 0;
    const kept = how === "died" || saved === done ? "" : saved ? ` ${say("end.saved", { saved })}` : ` ${say("end.none")}`;
    this.say(say("end.at", { how: has(`end.${how}`) ? say(`end.${how}`) : how, step: done, total: this.total }) + kept);
  }

  /** wish: as `server.ask` knows them. */
  async ask(wish) {
    const [before, run] = [this.stopping, this.run];
    const still = (text) => this.run === run && !this.ended && this.say(text); // it may have ended meanwhile
    this.due = clearTimeout(this.due);
    this.stopping ||= wish === "stop" || wish === "cancel";
    this.enable();
    try {
      await ask(wish, run);
      still(say(`asked.${wish}`));
    } catch (error) {
      if (this.run === run) this.stopping = before;
      this.enable();
      still(say("panel.unreached", { error: error.message }));
    }
  }

  /** Redraw from the run folder, with what comes meanwhile behind it. query: as `server.runOf`. */
  async restore(query) {
    const waiting = (this.waiting = []);
    const run = await runOf(query).catch(() => ({ run: null }));
    if (this.waiting !== waiting) return; // it was asked for again
    this.waiting = null;
    if (run.run) this.redraw(run);
    for (const act of waiting) act();
  }

  /** What an event does, now or once the panel is redrawn. */
  take(act) {
    if (this.waiting) this.waiting.push(act);
    else act();
  }

  redraw(run) {
    const doing = this.run === run.run ? this.doing : "";
    this.begin(run);
    Object.assign(this, { doing, paused: run.paused && !run.how, stopping: run.stopping && !run.how });
    this.note(run.notes);
    this.look(run.looks);
    this.add(run.steps);
    this.gallery.add(run.previews);
    if (this.paused) this.phase({ phase: PAUSED });
    if (run.how) this.end(run.how, run.saved);
  }
}
