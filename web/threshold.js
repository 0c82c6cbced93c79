// @ts-check
/** A threshold that can be dragged, under a histogram of what it parts. */

import { draw, keepKeys, make } from "./elements.js";
import { say } from "./texts.js";

export const [LOW, HIGH, STEPS] = [-0.25, 0.99, 62];

/**
 * Return the slider.
 * @param {object} options
 * @param {(value: number) => void} options.onDrag the user set another threshold
 */
export function thresholdSlider({ onDrag }) {
  const input = make("input", { type: "range", min: LOW, max: HIGH, step: 0.01, "aria-label": say("threshold") });
  const bins = draw("svg", { viewBox: `0 0 ${STEPS} 1`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const shown = make("output");
  const count = make("span", { class: "lorax-count", role: "status" });
  const note = make("div", { class: "lorax-note" });
  const element = make(
    "div",
    { class: "lorax-threshold" },
    make("div", { class: "lorax-line" }, make("span", {}, `${say("threshold")} `, shown), count),
    make("div", { class: "lorax-track" }, bins, input),
    note,
  );
  input.addEventListener("input", () => onDrag(Number(input.value)));
  keepKeys(input);
  return {
    element,
    /**
     * Show a value, how many pairs are above it, and what dragging does.
     * @param {number} value
     * @param {number} above
     * @param {number} all
     * @param {string} words
     */
    show(value, above, all, words) {
      input.value = String(value);
      shown.value = value.toFixed(2);
      input.setAttribute("aria-valuetext", `${value.toFixed(2)}: ${say("counted", { above, count: all })}`);
      count.textContent = say("counted", { above, count: all });
      note.textContent = words;
    },
    /**
     * Show how many pairs lie where.
     * @param {number[]} counts
     */
    fill(counts) {
      const most = Math.max(...counts, 1);
      const bar = (/** @type {number} */ n, /** @type {number} */ i) =>
        n ? `M${i},1v${-Math.max(n / most, 0.06)}h0.8V1z` : "";
      bins.replaceChildren(draw("path", { d: counts.map(bar).join("") }));
    },
  };
}
