// @ts-check
/** The line above what a view shows: that the node works, what went wrong, or that its settings are others now. */

import { make } from "./elements.js";

/** @typedef {"" | "busy" | "error" | "old"} NoticeKind */

/**
 * Return the line of a view; there is none while its kind is empty.
 * @param {HTMLElement} view
 */
export function noticeOf(view) {
  const line = make("div", { "data-capture-wheel": "" });
  const found = {
    /** @type {NoticeKind} */
    kind: "",
    /**
     * @param {NoticeKind} kind
     * @param {string} text
     */
    set(kind, text = "") {
      found.kind = kind;
      line.className = `lorax-notice lorax-${kind}`;
      line.setAttribute("role", kind === "error" ? "alert" : "status");
      line.textContent = text;
      found.place();
    },
    /** Stand first again in a view that was filled anew. */
    place() {
      if (found.kind) view.prepend(line);
      else line.remove();
    },
  };
  return found;
}
