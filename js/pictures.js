// The pictures of an Image Dataset, to look at and to caption: crops, what may not be meant, and the text file of each.
import { app } from "../../scripts/app.js";
import { button, dialog, element } from "./dom.js";
import { picturesOf, smallPicture, writeCaption } from "./server.js";
import { say } from "./words.js";

const NODE = "ZTurboImageDataset";
const PROBLEMS = ["broken", "small", "cropped", "alike", "silent", "trigger"];
const ASKED = ["folder", "trigger", "resolution", "more_resolutions", "upscale", "masks"];

const widget = (node, name) => node.widgets?.find((one) => one.name === name);

class Pictures {
  constructor(node) {
    this.node = node;
    this.root = dialog(say("pictures.title"), "zturbo-album");
    this.writes = new Set(); // that are under way
    this.asks = 0; // of pages; an answer that comes late is not shown
    this.warned = false; // of captions that are not saved
    const head = element("div", "zturbo-row", this.root);
    this.title = element("strong", "", head);
    this.only = element("select", "zturbo-only", head);
    this.only.ariaLabel = say("pictures.only");
    this.only.addEventListener("change", () => this.turn(0));
    const pages = element("span", "zturbo-row", head);
    this.back = button("zturbo-small", "‹", say("pictures.back"), pages, () => this.turn(this.page.first - 1));
    this.where = element("span", "", pages);
    this.forth = button("zturbo-small", "›", say("pictures.forth"), pages, () => this.turn(this.page.first + this.page.pictures.length));
    button("zturbo-small zturbo-close", say("gallery.close"), "", head, async () => (await this.settled()) && this.root.close());
    this.notes = element("div", "zturbo-line zturbo-wrapped", this.root);
    this.notes.setAttribute("role", "status");
    this.list = element("div", "zturbo-cards", this.root);
    this.root.addEventListener("cancel", async (event) => {
      event.preventDefault(); // a text that is being written is saved first
      document.activeElement?.blur();
      if (await this.settled()) this.root.close();
    });
    this.root.showModal();
    this.look(0);
  }

  get unsaved() {
    return [...this.list.querySelectorAll("textarea")].some((text) => text.value.trim() !== text.dataset.was);
  }

  /** Once all captions are written. false: some could not be; whoever asks again leaves them. */
  async settled() {
    await Promise.all(this.writes);
    if (!this.unsaved || this.warned) return true;
    this.warned = true;
    this.notes.textContent = say("pictures.left");
    return false;
  }

  async turn(first) {
    if (await this.settled()) await this.look(first);
  }

  get asked() {
    return Object.fromEntries(ASKED.map((name) => [name, String(widget(this.node, name)?.value ?? "")]));
  }

  async look(first) {
    this.notes.textContent = say("pictures.reading");
    this.warned = false;
    const number = ++this.asks;
    try {
      const page = await picturesOf({ ...this.asked, only: this.only.value, first: Math.max(0, first) });
      if (number !== this.asks) return;
      this.page = page;
    } catch (error) {
      if (number !== this.asks) return;
      this.notes.textContent = error.message;
      this.back.disabled = this.forth.disabled = true;
      this.list.replaceChildren();
      return;
    }
    const { pictures, wanted, notes } = this.page;
    this.title.textContent = `${this.asked.folder} (${this.page.total})`;
    this.where.textContent = wanted ? say("pictures.where", { first: this.page.first + 1, last: this.page.first + pictures.length, wanted }) : say("pictures.nothing");
    this.back.disabled = this.page.first === 0;
    this.forth.disabled = this.page.first + pictures.length >= wanted;
    this.notes.textContent = [...notes, ...(this.page.writable ? [] : [say("pictures.bundled")])].join(" ");
    this.choices();
    this.list.replaceChildren(...pictures.map((one) => this.card(one)));
    this.list.scrollTop = 0;
  }

  choices() {
    const { counts, total } = this.page;
    const chosen = this.only.value;
    const some = PROBLEMS.filter((problem) => counts[problem] || problem === chosen);
    const named = [["", say("pictures.all", { count: total })], ["any", say("pictures.any")], ...some.map((problem) => [problem, `${say(`pictures.${problem}`)} (${counts[problem]})`])];
    this.only.replaceChildren(...(some.length || chosen ? named : named.slice(0, 1)).map(([value, text]) => new Option(text, value)));
    this.only.value = chosen;
  }

  card(one) {
    const card = element("article", "zturbo-picture");
    card.dataset.name = one.name;
    const frame = element("div", "zturbo-crop", card);
    const [width, height] = one.size;
    if (width) {
      const image = element("img", "", frame);
      image.loading = "lazy";
      image.alt = one.name;
      image.src = smallPicture(this.asked.folder, one.name, one.time);
    }
    if (width && one.sizes.length) this.crop(frame, width, height, one.sizes.at(-1));
    const facts = element("div", "", card);
    element("b", "zturbo-wrapped", facts, one.name);
    const sizes = one.sizes.map(([w, h]) => `${w}×${h}`).join(", ");
    const repeats = one.repeats > 1 ? [say("pictures.repeats", { count: one.repeats })] : [];
    const mask = one.mask ? [say("pictures.mask")] : [];
    element("div", "zturbo-line zturbo-wrapped", facts, [...(width ? [`${width}×${height}${sizes && ` → ${sizes}`}`] : []), ...repeats, ...mask].join(" · "));
    for (const problem of one.problems) element("div", `zturbo-doubt zturbo-doubt-${problem}`, facts, this.doubt(one, problem));
    if (one.problems[0] !== "broken") this.caption(one, card);
    return card;
  }

  doubt(one, problem) {
    if (problem === "broken") return one.sentence;
    return problem === "alike" ? `${say("pictures.alike")}: ${one.alike.join(", ")}` : say(`pictures.${problem}`);
  }

  /** The part that is trained, in a frame over the whole picture. */
  crop(frame, width, height, [w, h]) {
    const part = Math.min(width / w, height / h); // picture's pixels of one that is trained
    const [x, y] = [1 - (w * part) / width, 1 - (h * part) / height];
    frame.style.aspectRatio = `${width} / ${height}`;
    const box = element("span", "zturbo-cropped", frame);
    Object.assign(box.style, { left: `${50 * x}%`, right: `${50 * x}%`, top: `${50 * y}%`, bottom: `${50 * y}%` });
    box.title = say("pictures.crop", { width: w, height: h });
  }

  caption(one, card) {
    const text = element("textarea", "", card);
    text.value = text.dataset.was = one.caption;
    text.rows = 3;
    text.ariaLabel = say("pictures.caption", { name: one.name });
    text.placeholder = one.trained;
    text.readOnly = !this.page.writable;
    const said = element("div", "zturbo-line zturbo-wrapped", card);
    said.setAttribute("role", "status");
    if (!this.page.writable) return;
    const choice = element("div", "zturbo-row", card); // between two texts
    choice.hidden = true;
    const choose = (name, act) => button(`zturbo-small zturbo-${name}`, say(`pictures.${name}`), say(`pictures.${name}_title`), choice, act);
    const written = (now) => {
      text.dataset.was = now;
      choice.hidden = true;
      said.textContent = text.value.trim() === now ? say("pictures.saved") : say("pictures.unsaved");
      card.querySelectorAll(".zturbo-doubt-trigger").forEach((doubt) => doubt.remove()); // of what stood there
      if (now) card.querySelectorAll(".zturbo-doubt-silent").forEach((doubt) => doubt.remove());
    };
    const write = async () => {
      if (text.value.trim() === text.dataset.was) return;
      try {
        written((await writeCaption(this.asked.folder, one.name, text.value, text.dataset.was)).caption);
      } catch (error) {
        const now = error.found?.caption; // somebody else has written it
        if (now === text.value.trim()) return written(now);
        choice.hidden = now === undefined;
        choice.dataset.now = now ?? "";
        said.textContent = error.message;
      }
    };
    let last = Promise.resolve(); // one after the other: each is told what stood there before
    const act = () => {
      const mine = (last = last.then(write));
      this.writes.add(mine);
      mine.then(() => this.writes.delete(mine));
    };
    choose("mine", () => {
      text.dataset.was = choice.dataset.now;
      choice.hidden = true;
      text.focus();
      act();
    });
    choose("theirs", () => {
      text.value = choice.dataset.now;
      written(text.value);
      text.focus();
    });
    text.addEventListener("input", () => {
      said.textContent = text.value.trim() === text.dataset.was ? "" : say("pictures.unsaved");
      choice.hidden = true; // it comes back where it is still to be made
      this.warned = false;
    });
    text.addEventListener("change", act);
    text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      act();
    });
  }
}

app.registerExtension({
  name: "zturbo.Pictures",

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const open = node.addWidget("button", say("pictures.open"), null, () => new Pictures(node), { serialize: false });
    open.serialize = false;
    open.tooltip = say("pictures.open_title");
  },
});
