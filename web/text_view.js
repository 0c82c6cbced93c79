// @ts-check
/** What a node says in a few lines: names in it come from files, and are shown as they are. */

import { Problem, word } from "./checks.js";
import { make } from "./elements.js";
import { say } from "./texts.js";

/** Return the view. */
export function textView() {
  const element = make("div", { class: "lorax-view lorax-text" });
  const message = make("div", { class: "lorax-message", role: "status" });
  const said = make("div", { class: "lorax-said", "data-capture-wheel": "" });

  /** @param {string} text */
  function fail(text) {
    message.textContent = text;
    element.replaceChildren(message);
  }

  fail(say("waiting_text"));
  return {
    element,
    fail,
    /**
     * Show a text; where it is none, say so.
     * @param {unknown} data
     */
    show(data) {
      try {
        said.textContent = word(data, "text");
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        return fail(say(error.message, error.values));
      }
      element.replaceChildren(said);
    },
  };
}
