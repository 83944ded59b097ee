// Curves over steps: losses, readings of the gauge. Once it has the focus, wheel or + and - zooms, dragging or Page Up and
// Down moves; hovering or the arrows read.
import { Pool, element, button, svg, keep } from "./dom.js";
import { say } from "./words.js";

const SMOOTH = 0.95;
const LEFT = 44;
const BOTTOM = 16;
const TOP = 6;
const RIGHT = 8;

/** Of {step, y}: the mean of the newest, older ones count less and less. */
export function smoothed(points) {
  let mean = 0;
  let weight = 0;
  let before = null;
  return points.map(({ step, y }) => {
    const stays = SMOOTH ** Math.max(1, step - (before ?? step - 1)); // of thinned points each stands for several
    before = step;
    mean = stays * mean + (1 - stays) * y;
    weight = stays * weight + (1 - stays);
    return { step, y: mean / weight };
  });
}

/** The series of a run. points: {step, loss}; looks: validations and readings of the gauge, as its log has them. */
export function curves(points, looks) {
  const series = (key) => looks.filter((look) => key in look).map((look) => ({ step: look.step, y: look[key] }));
  const losses = points.map(({ step, loss }) => ({ step, y: loss }));
  return [
    { key: "raw", faint: true, points: losses },
    { key: "loss", name: say("chart.loss"), points: smoothed(losses) },
    { key: "trained", name: say("chart.trained"), points: series("trained") },
    { key: "held", name: say("chart.held"), points: series("held_out") },
    { key: "gauge", name: say("chart.gauge"), unit: true, points: series("gauge") },
  ];
}

/** Of {step}: the one at a step, or next to it; null of none. */
export function nearest(points, step) {
  return points.reduce((best, point) => (!best || Math.abs(point.step - step) < Math.abs(best.step - step) ? point : best), null);
}

/** Of [x, y] in their order: of each pixel's column the first, the lowest, the highest and the last, which is all that is seen of it. */
export function thinned(points) {
  const found = [];
  for (let first = 0, end; first < points.length; first = end) {
    end = first + 1;
    while (end < points.length && Math.floor(points[end][0]) === Math.floor(points[first][0])) end++;
    if (end - first < 5) found.push(...points.slice(first, end));
    else {
      let [low, high] = [first, first];
      for (let n = first; n < end; n++) {
        if (points[n][1] < points[low][1]) low = n;
        if (points[n][1] > points[high][1]) high = n;
      }
      for (const n of [...new Set([first, low, high, end - 1])].sort((a, b) => a - b)) found.push(points[n]);
    }
  }
  return found;
}

/** Round numbers between low and high, about `count` of them. */
export function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].find((n) => n * power >= rough) * power;
  const found = [];
  for (let n = Math.ceil(low / size); n * size <= high + size * 1e-9; n++) found.push(n * size);
  return found;
}

const short = (n) => (n === 0 ? "0" : Math.abs(n) >= 1000 ? `${+(n / 1000).toFixed(1)}k` : Math.abs(n) < 0.001 ? n.toExponential(0) : `${+n.toPrecision(3)}`);

/** A colour that stands out from a light ground and from a dark one. */
const readable = (color) => `color-mix(in oklab, ${color} 62%, var(--zturbo-text))`;

/** series: [{key, name, points: [{step, y}], faint, unit: on a scale of its own from 0 to 1}] */
export class Chart {
  constructor(parent, label) {
    this.root = element("div", "zturbo-chart", parent);
    this.svg = svg("svg", { role: "img", tabindex: 0, "aria-label": label }, this.root);
    this.label = label;
    const clip = `zturbo-clip-${Math.random().toString(36).slice(2)}`;
    this.clip = new Pool("rect", svg("clipPath", { id: clip }, svg("defs", {}, this.svg)));
    [this.grid, this.ticks] = [new Pool("line", svg("g", {}, this.svg)), new Pool("text", svg("g", {}, this.svg))];
    this.lines = new Pool("polyline", svg("g", { "clip-path": `url(#${clip})` }, this.svg));
    this.cross = new Pool("line", svg("g", {}, this.svg));
    const row = element("div", "zturbo-row", this.root);
    this.legend = element("span", "zturbo-legend", row);
    this.logButton = button("zturbo-small", "log", say("chart.log"), row, () => {
      this.log = !this.log;
      this.logButton.setAttribute("aria-pressed", this.log);
      this.draw();
    });
    this.logButton.setAttribute("aria-pressed", false);
    this.whole = button("zturbo-small", say("chart.whole"), say("chart.whole_title"), row, () => this.zoom());
    this.read = element("div", "zturbo-readout", this.root);
    this.read.hidden = true;
    this.wanted = () => []; // gives the series
    this.series = [];
    this.total = 1;
    this.view = null; // [first, last] step; null: all
    this.at = null; // the step that is read
    this.listen();
    [this.width, this.height] = [0, 0]; // of the drawing; asking the page for them would have it lay itself out anew
    new ResizeObserver(([{ contentRect }]) => {
      [this.width, this.height] = [Math.round(contentRect.width), Math.round(contentRect.height)];
      this.soon();
    }).observe(this.svg);
  }

  listen() {
    const step = (event) => this.stepAt((event.offsetX - LEFT) / this.inner());
    keep(this.svg, "pointerdown", "dblclick", "contextmenu");
    this.svg.addEventListener("wheel", (event) => {
      if (document.activeElement !== this.svg && !event.ctrlKey) return; // else nobody could scroll past it
      event.preventDefault();
      event.stopPropagation();
      this.zoom(event.deltaY < 0 ? 0.8 : 1.25, step(event));
    }, { passive: false });
    this.svg.addEventListener("pointermove", (event) => {
      if (event.buttons & 1) this.move((this.held - event.offsetX) / this.inner());
      else this.point(step(event));
      this.held = event.offsetX;
    });
    this.svg.addEventListener("pointerleave", () => this.point(null));
    this.svg.addEventListener("dblclick", () => this.zoom());
    this.svg.addEventListener("keydown", (event) => {
      const [first, last] = this.range();
      const here = this.at ?? last;
      const acts = {
        ArrowLeft: () => this.point(Math.max(first, here - (last - first) / 50)),
        ArrowRight: () => this.point(Math.min(last, here + (last - first) / 50)),
        "+": () => this.zoom(0.8, here),
        "-": () => this.zoom(1.25, here),
        0: () => this.zoom(),
        PageUp: () => this.move(-0.5),
        PageDown: () => this.move(0.5),
      };
      if (!acts[event.key]) return;
      event.preventDefault();
      event.stopPropagation();
      acts[event.key]();
    });
  }

  inner() {
    return Math.max(1, this.width - LEFT - RIGHT);
  }

  range() {
    return this.view ?? [0, Math.max(1, this.total)];
  }

  stepAt(share) {
    const [first, last] = this.range();
    return first + Math.min(1, Math.max(0, share)) * (last - first);
  }

  zoom(factor, around) {
    if (factor === undefined) this.view = null;
    else {
      const [first, last] = this.range();
      const size = Math.min(this.total, Math.max(5, (last - first) * factor));
      const start = Math.min(Math.max(0, around - ((around - first) / (last - first)) * size), this.total - size);
      this.view = size >= this.total ? null : [start, start + size];
    }
    this.draw();
  }

  move(share) {
    if (!this.view) return;
    const [first, last] = this.view;
    const way = Math.min(Math.max(share * (last - first), -first), this.total - last);
    this.view = [first + way, last + way];
    this.draw();
  }

  point(step) {
    this.at = step;
    this.draw();
  }

  /** series: a function that gives them, called when they are drawn. */
  set(series, total) {
    this.wanted = series;
    this.total = Math.max(1, total);
    this.soon();
  }

  /** Draw with the next frame; several wishes are one drawing. */
  soon() {
    if (!this.waiting) requestAnimationFrame(() => this.draw());
    this.waiting = true;
  }

  draw() {
    const { width, height } = this;
    this.waiting = false;
    if (!width || !height) return;
    this.series = this.wanted();
    const [first, last] = this.range();
    const seen = (points) => points.filter(({ step }) => step >= first && step <= last);
    const [low, high] = this.heights(seen);
    const x = (step) => LEFT + (this.inner() * (step - first)) / (last - first || 1);
    const scale = (y, from, to) => height - BOTTOM - ((height - TOP - BOTTOM) * (y - from)) / (to - from || 1);
    const place = (one) => (one.unit ? (y) => scale(Math.min(1, y), 0, 1) : (y) => scale(this.up(y), low, high));
    const across = ticks(low, high, 4);
    const along = ticks(first, last, Math.max(2, Math.floor(this.inner() / 70)));
    this.grid.draw(across.map((y) => ({ attributes: { class: "zturbo-grid", x1: LEFT, x2: width - RIGHT, y1: scale(y, low, high), y2: scale(y, low, high) } })));
    this.ticks.draw([
      ...across.map((y) => ({ attributes: { class: "zturbo-tick", x: LEFT - 4, y: scale(y, low, high) + 3, "text-anchor": "end" }, text: short(this.log ? 10 ** y : y) })),
      ...along.map((step) => ({ attributes: { class: "zturbo-tick", x: x(step), y: height - 3, "text-anchor": "middle" }, text: short(step) })),
    ]);
    this.clip.draw([{ attributes: { x: LEFT, y: 0, width: this.inner(), height: height - BOTTOM } }]);
    this.lines.draw(
      this.series.map((one) => {
        const points = thinned(seen(one.points).map(({ step, y }) => [x(step), place(one)(y)]));
        const style = one.color ? { style: `stroke: ${readable(one.color)}` } : {};
        return { attributes: { class: `zturbo-line-${one.key}${one.faint ? " zturbo-faint" : ""}`, points: points.map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`).join(" "), fill: "none", ...style } };
      }),
    );
    this.cross.draw(this.at === null ? [] : [{ attributes: { class: "zturbo-cross", x1: x(this.at), x2: x(this.at), y1: TOP, y2: height - BOTTOM } }]);
    this.sayWhat();
    this.whole.hidden = !this.view;
  }

  /** A loss on the scale that is drawn. */
  up(y) {
    return this.log ? Math.log10(Math.max(y, 1e-12)) : y;
  }

  /** Lowest and highest of what is seen; of the faint, which scatter, the outermost do not count. */
  heights(seen) {
    const found = [];
    for (const one of this.series.filter((one) => !one.unit)) {
      const ys = Float64Array.from(seen(one.points), ({ y }) => y).sort();
      const spare = one.faint ? Math.floor(ys.length / 50) : 0;
      if (ys.length) found.push(ys[spare], ys[ys.length - 1 - spare]);
    }
    if (!found.length) return [0, 1];
    const [low, high] = [this.up(Math.min(...found)), this.up(Math.max(...found))];
    const air = (high - low || Math.abs(high) || 1) * 0.05;
    return [this.log ? low - air : Math.max(0, low - air), high + air];
  }

  sayWhat() {
    const shown = this.series.filter((one) => !one.faint && one.points.length);
    const names = shown.map(({ key, name }) => `${key}:${name}`).join("/");
    if (names !== this.named) {
      this.named = names;
      this.legend.replaceChildren();
      for (const one of shown) {
        const entry = element("span", `zturbo-key zturbo-key-${one.key}`, this.legend, one.name);
        if (one.color) entry.style.setProperty("--zturbo-color", readable(one.color));
      }
    }
    this.read.hidden = this.at === null;
    if (this.at === null) return;
    const parts = shown.map((one) => `${one.name} ${nearest(one.points, this.at).y.toPrecision(3)}`);
    const more = this.reading?.(this.at) ?? [];
    this.read.textContent = [say("chart.step", { step: Math.round(this.at) }), ...parts, ...more].join(" · ");
    this.svg.setAttribute("aria-label", `${this.label}. ${this.read.textContent}`);
  }
}
