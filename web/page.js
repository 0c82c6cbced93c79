// @ts-check
/** Starts the page that the command line writes: the view of the JSON that stands in it. */

import { reportView } from "./report_view.js";
import { similarityView } from "./similarity_view.js";
import { say } from "./texts.js";

/** @param {{ schema?: unknown }} data */
function viewOf({ schema }) {
  const ignore = () => {};
  if (schema === "lorax-transfer") return reportView({ onState: ignore });
  const note = (/** @type {number} */ threshold) => say("writes_option", { value: threshold.toFixed(2) });
  return similarityView({ onState: ignore, onThreshold: ignore, note });
}

const data = JSON.parse(document.getElementById("lorax-data")?.textContent ?? "{}");
const view = viewOf(data);
document.getElementById("lorax-view")?.append(view.element);
view.show(data);
