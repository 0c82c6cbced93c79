// @ts-check
/** The loss of a training while it runs. */

import { Problem } from "./checks.js";
import { draw, make } from "./elements.js";
import { lossLines, readLoss } from "./loss_data.js";
import { say } from "./texts.js";

/** @import { Loss } from "./loss_data.js" */

const [WIDTH, HEIGHT] = [300, 110];

/** Return the view. */
export function lossView() {
  const element = make("div", { class: "lorax-view lorax-loss" });
  const message = make("div", { class: "lorax-message", role: "status" });
  const [line, mean] = [draw("path", { class: "lorax-raw" }), draw("path", { class: "lorax-mean" })];
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" }, line, mean);
  const scale = make("div", { class: "lorax-scale" });
  const steps = make("div", { class: "lorax-line lorax-steps" });
  const now = make("div", { class: "lorax-count" });

  /** @param {string} text */
  function fail(text) {
    message.textContent = text;
    element.replaceChildren(message);
  }

  fail(say("waiting_loss"));
  return {
    element,
    fail,
    /**
     * Show all points so far; where they cannot be read, say why.
     * @param {unknown} data
     */
    show(data) {
      /** @type {Loss} */
      let loss;
      try {
        loss = readLoss(data);
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        return fail(say(error.message, error.values));
      }
      const { points, total } = loss;
      const [first, last] = [points[0], points[points.length - 1]];
      const lines = lossLines(loss, WIDTH, HEIGHT);
      line.setAttribute("d", lines.line);
      mean.setAttribute("d", lines.mean);
      const digits = (/** @type {number} */ value) => value.toPrecision(3);
      scale.replaceChildren(make("span", {}, digits(lines.high)), make("span", {}, digits(lines.low)));
      steps.replaceChildren(make("span", {}, "0"), make("span", {}, String(total)));
      now.textContent = say("step_loss", { step: last.step, total, loss: digits(last.loss) });
      svg.setAttribute(
        "aria-label",
        say("loss_label", { first: digits(first.loss), last: digits(last.loss), step: last.step, total }),
      );
      element.replaceChildren(now, make("div", { class: "lorax-curve" }, scale, svg), steps);
    },
  };
}
