// Small help with the page and the graph.

const style = document.createElement("link");
style.rel = "stylesheet";
style.href = new URL("./style.css", import.meta.url);
document.head.append(style);

export function element(tag, className, parent, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

export function button(className, text, title, parent, act) {
  const made = element("button", className, parent, text);
  made.type = "button";
  made.title = title;
  if (text.length === 1) made.ariaLabel = title; // a sign says nothing to who cannot see it
  made.addEventListener("click", act);
  return made;
}

/** A button that asks once more before it acts. */
export function careful(className, text, sure, title, parent, act) {
  let timer = 0;
  let since = 0;
  const calm = () => {
    clearTimeout(timer);
    timer = 0;
    made.textContent = text;
  };
  const made = button(className, text, title, parent, () => {
    if (timer) {
      if (performance.now() - since < 500) return; // a double click
      calm();
      return act();
    }
    made.textContent = sure;
    since = performance.now();
    timer = setTimeout(calm, 4000);
  });
  return made;
}

export function svg(tag, attributes, parent) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent?.append(made);
  return made;
}

/** Put a text into an element; as other letters of the same text node, where it has one: that costs a page less than a new one. */
export function write(target, text) {
  if (target.textContent === text) return;
  if (text && target.childNodes.length === 1 && target.firstChild.nodeType === Node.TEXT_NODE) target.firstChild.data = text;
  else target.textContent = text;
}

/** Elements of one kind that are drawn again and again: those that are there are changed, which costs a page far less than new ones. */
export class Pool {
  constructor(tag, parent) {
    Object.assign(this, { tag, parent, made: [] });
  }

  /** entries: [{attributes, text}]; gives the elements. */
  draw(entries) {
    while (this.made.length > entries.length) this.made.pop().remove();
    entries.forEach(({ attributes, text }, n) => {
      const one = (this.made[n] ??= svg(this.tag, {}, this.parent));
      for (const [name, value] of Object.entries(attributes)) if (one.getAttribute(name) !== String(value)) one.setAttribute(name, value);
      if (text !== undefined) write(one, text);
    });
    return this.made;
  }
}

/** A dialog over the page, which goes with its closing; the canvas' shortcuts rest. To be shown by showModal(). */
export function dialog(label, className = "") {
  const made = element("dialog", `zturbo-dialog ${className}`, document.body);
  made.ariaLabel = label;
  made.addEventListener("keydown", (event) => event.stopPropagation());
  made.addEventListener("close", () => made.remove());
  return made;
}

/** The node that feeds an input; null where nothing does. */
export function source(node, input) {
  const link = input?.link == null ? null : (node.graph.links.get?.(input.link) ?? node.graph.links[input.link]);
  return link ? node.graph.getNodeById(link.origin_id) : null;
}

/** What happens on an element of ours is not the canvas' business. */
export function keep(target, ...events) {
  for (const name of events) target.addEventListener(name, (event) => event.stopPropagation());
}
