// @ts-check
/** Starts the page that the command line writes: the view of the JSON that stands in it. */

import { reportView } from "../../web/report_view.js";
import { similarityView } from "../../web/similarity_view.js";
import { say, speak } from "../../web/texts.js";

/** @param {{ schema?: unknown }} data */
function viewOf({ schema }) {
  const ignore = () => {};
  if (schema === "lorax-transfer") return reportView({ onState: ignore });
  const note = (/** @type {number} */ threshold) => say("writes_option", { value: threshold.toFixed(2) });
  return similarityView({ onState: ignore, onThreshold: ignore, note });
}

/** @param {string} id */
function jsonOf(id) {
  return JSON.parse(document.getElementById(id)?.textContent ?? "{}");
}

const [data, translations] = [jsonOf("lorax-data"), jsonOf("lorax-texts")];
const languages = navigator.languages.map((tag) => tag.split("-")[0]);
const language = languages.find((name) => name === "en" || Object.hasOwn(translations, name)) ?? "en";
document.documentElement.lang = language;
speak(translations[language]);
const view = viewOf(data);
document.getElementById("lorax-view")?.append(view.element);
view.show(data);
