// What the pack says on the screen, in the language of ComfyUI. The texts are in locales/<language>/main.json.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const texts = await api
  .fetchApi("/i18n")
  .then((answer) => answer.json())
  .catch(() => ({}));

export function language() {
  return app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
}

/** A text by its key ("panel.stop"), with `{name}` filled in from values. */
export function say(key, values = {}) {
  const find = (all) => key.split(".").reduce((found, part) => found?.[part], all?.zturbo);
  const text = find(texts[language()]) ?? find(texts.en) ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** Is there such a text? */
export function has(key) {
  return say(key) !== key;
}

export function clock(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const pad = (n) => String(n).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  return (hours ? `${hours}:` : "") + `${pad(Math.floor(whole / 60) % 60)}:${pad(whole % 60)}`;
}
