// What the pages ask of the server. Each raises an Error with the server's own sentence, and all that it answered in `found`.
import { api } from "../../scripts/api.js";

async function answered(path, options) {
  const answer = await api.fetchApi(`/zturbo/${path}`, options);
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw Object.assign(new Error(found.error ?? answer.statusText), { found });
  return found;
}

/** query: {name} for the newest run of a name, {folder} for one run. */
export const runOf = (query) => answered(`run?${new URLSearchParams(query)}`);
export const allRuns = async () => (await answered("runs")).runs;
export const recipeOf = async (folder) => (await answered(`recipe?${new URLSearchParams({ folder })}`)).recipe;
export const workflowOf = (folder) => answered(`workflow?${new URLSearchParams({ folder })}`);

/** wish: stop, save, pause, go_on, cancel, delete, or take (which copies its LoRA into models/loras). */
export const ask = (wish, run, more = {}) =>
  answered(wish, { method: "POST", body: JSON.stringify({ run, ...more }), headers: { "Content-Type": "application/json" } });

/** A page of a dataset's pictures. query: the settings of Image Dataset, `only` and `first`. */
export const picturesOf = (query) => answered(`pictures?${new URLSearchParams(query)}`);

/** was: what stood there when its person began to write. */
export const writeCaption = (folder, name, caption, was) =>
  answered("caption", { method: "POST", body: JSON.stringify({ folder, name, caption, was }), headers: { "Content-Type": "application/json" } });

/** Address of a dataset's picture, made small. time: of the file. */
export const smallPicture = (folder, name, time) => api.apiURL(`/zturbo/picture?${new URLSearchParams({ folder, name, t: time })}`);

/** Address of a preview. time: of the file, as one that is drawn anew has the same name. small: compressed. */
export function picture(run, file, time, small = false) {
  const query = { filename: file, subfolder: `zturbo/${run}/previews`, type: "output", t: time, ...(small ? { preview: "webp;60" } : {}) };
  return api.apiURL(`/view?${new URLSearchParams(query)}`);
}
