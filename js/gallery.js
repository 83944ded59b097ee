// Previews of a run: a strip by step, the chosen one beside an earlier one under a slider, enlarged on a click.
import { element, button, dialog, keep } from "./dom.js";
import { picture } from "./server.js";
import { say } from "./words.js";

const STRIP = 40; // pictures of the strip at most, evenly out of all

export class Gallery {
  constructor(parent) {
    this.root = element("div", "zturbo-gallery", parent);
    this.pair = new Pair(this.root, () => this.enlarge());
    const row = element("div", "zturbo-row", this.root);
    this.beforeRow = element("label", "zturbo-before-row", row, say("gallery.before"));
    this.before = element("select", "zturbo-before-step", this.beforeRow);
    this.before.addEventListener("change", () => this.show());
    this.prompts = element("span", "zturbo-prompts", row);
    this.strip = element("div", "zturbo-strip", this.root);
    this.strip.setAttribute("role", "group");
    this.strip.setAttribute("aria-label", say("gallery.strip"));
    keep(this.root, "wheel", "pointerdown", "contextmenu");
    this.clear(null);
  }

  clear(run) {
    this.run = run;
    this.previews = []; // {step, files: one a prompt}
    this.prompt = 0;
    this.chosen = null; // a step; null: the newest
    this.draw();
  }

  /** previews: [{step, files, time}], in place of those of the same steps. */
  add(previews) {
    const steps = new Set(previews.map(({ step }) => step));
    this.previews = [...this.previews.filter(({ step }) => !steps.has(step)), ...previews].sort((a, b) => a.step - b.step);
    this.draw();
  }

  /** Forget what is behind a step: the run has gone back. */
  rewind(step) {
    const kept = this.previews.filter((preview) => preview.step <= step);
    if (kept.length === this.previews.length) return;
    this.previews = kept;
    this.draw();
  }

  get shown() {
    return this.previews.filter(({ files }) => files[this.prompt]);
  }

  get current() {
    return this.shown.find(({ step }) => step === this.chosen) ?? this.shown.at(-1);
  }

  draw() {
    const shown = this.shown;
    this.root.hidden = !shown.length;
    const each = Math.max(1, Math.ceil(shown.length / STRIP));
    const some = shown.filter((preview, n) => n % each === 0 || n === shown.length - 1 || preview === this.current);
    this.strip.replaceChildren(...some.map((preview) => this.thumbnail(preview)));
    this.strip.hidden = shown.length < 2;
    const steps = shown.slice(0, -1).map(({ step }) => String(step));
    if (steps.join() !== [...this.before.options].map(({ value }) => value).slice(1).join()) {
      const chosen = this.before.value;
      this.before.replaceChildren(...["", ...steps].map((step) => new Option(step || say("gallery.none"), step)));
      this.before.value = steps.includes(chosen) ? chosen : "";
    }
    this.beforeRow.hidden = shown.length < 2;
    this.choosePrompt();
    this.show();
  }

  thumbnail(preview) {
    const title = say("gallery.step", { step: preview.step });
    const made = button("zturbo-thumb", "", title, null, () => {
      this.chosen = preview === this.shown.at(-1) ? null : preview.step;
      this.draw();
    });
    const image = element("img", "", made);
    image.loading = "lazy";
    image.alt = title;
    image.src = picture(this.run, preview.files[this.prompt], preview.time, true);
    element("span", "", made, preview.step);
    made.setAttribute("aria-pressed", preview === this.current);
    return made;
  }

  choosePrompt() {
    const count = Math.max(0, ...this.previews.map(({ files }) => files.length));
    this.prompts.replaceChildren();
    if (count < 2) return;
    const go = (way) => {
      this.prompt = (this.prompt + way + count) % count;
      this.draw();
    };
    button("zturbo-small", "‹", say("gallery.last_prompt"), this.prompts, () => go(-1));
    element("span", "", this.prompts, say("gallery.prompt", { number: this.prompt + 1, count }));
    button("zturbo-small", "›", say("gallery.next_prompt"), this.prompts, () => go(1));
  }

  show() {
    const [now, before] = [this.current, this.shown.find(({ step }) => String(step) === this.before.value)];
    const one = (preview) => preview && { step: preview.step, file: preview.files[this.prompt], time: preview.time };
    this.pair.show(this.run, one(now), one(before));
  }

  enlarge() {
    const large = dialog(say("gallery.strip"));
    const pair = new Pair(large, () => large.close(), say("gallery.close"));
    const show = () => pair.show(this.pair.run, this.pair.now, this.pair.before);
    const go = (way) => {
      const steps = this.shown.map(({ step }) => step);
      const place = steps.indexOf(this.current?.step) + way;
      if (place < 0 || place >= steps.length) return;
      this.chosen = place === steps.length - 1 ? null : steps[place];
      this.draw();
      show();
    };
    const row = element("div", "zturbo-row", large);
    button("zturbo-small", "‹", say("gallery.earlier"), row, () => go(-1));
    button("zturbo-small", "›", say("gallery.later"), row, () => go(1));
    button("zturbo-small zturbo-close", say("gallery.close"), "", row, () => large.close());
    large.addEventListener("keydown", (event) => {
      if (event.target.type === "range") return;
      if (event.key === "ArrowLeft") go(-1);
      if (event.key === "ArrowRight") go(1);
    });
    large.addEventListener("click", (event) => event.target === large && large.close());
    show();
    large.showModal();
  }
}

/** A picture, and where there is one an earlier one on its left, up to a slider. */
class Pair {
  constructor(parent, act, title = say("gallery.enlarge")) {
    this.root = element("figure", "zturbo-pair", parent);
    this.frame = button("zturbo-frame", "", title, this.root, act);
    this.image = element("img", "zturbo-now", this.frame);
    this.under = element("img", "zturbo-then", this.frame);
    this.slider = element("input", "zturbo-slider", this.root);
    this.slider.type = "range";
    this.slider.title = this.slider.ariaLabel = say("gallery.slider");
    this.slider.addEventListener("input", () => this.cut());
    this.caption = element("figcaption", "", this.root);
  }

  show(run, now, before) {
    Object.assign(this, { run, now, before });
    this.root.hidden = !now;
    if (!now) return;
    this.set(this.image, now);
    this.under.hidden = this.slider.hidden = !before;
    if (before) this.set(this.under, before);
    const step = (one) => say("gallery.step", { step: one.step });
    this.caption.textContent = before ? `${step(before)} | ${step(now)}` : step(now);
    this.cut();
  }

  set(image, { step, file, time }) {
    const address = picture(this.run, file, time);
    if (image.getAttribute("src") !== address) image.src = address;
    image.alt = image.title = say("gallery.picture", { step, file });
  }

  cut() {
    this.under.style.clipPath = `inset(0 ${100 - this.slider.value}% 0 0)`;
  }
}
