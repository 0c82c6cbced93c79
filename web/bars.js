// @ts-check
/** A list of layers with bars, of which only what is in sight is in the page: thousands cost nothing. */

import { make } from "./elements.js";
import { say } from "./texts.js";

const ROW = 18; // height of a row in CSS pixels, as in view.css
const SPARE = 4; // rows kept above and below what is in sight

/**
 * A line of the list; values are NaN where there are none, and bars from 0 to 1.
 * @typedef {object} Line
 * @property {string} key
 * @property {string} name
 * @property {string} title
 * @property {string} mark
 * @property {boolean} faint
 * @property {Record<string, number>} values
 */

/**
 * Return a list of layers.
 * @template {Line} L
 * @param {object} options
 * @param {string[]} options.columns names of the values to draw, such as `left`
 * @param {(row: L | null) => void} options.onPoint a row is looked at
 * @param {(row: L | null) => void} options.onPin a row is pinned, or none
 */
export function bars({ columns, onPoint, onPin }) {
  const head = make("div", { class: "lorax-head", "aria-hidden": "true" });
  const inner = make("div", { class: "lorax-rows" });
  const scroll = make("div", { class: "lorax-scroll", tabindex: 0, role: "listbox" }, inner);
  scroll.setAttribute("aria-label", say("layers_label"));
  scroll.dataset.captureWheel = "true";
  const element = make("div", { class: "lorax-bars" }, head, scroll);
  const shown = { columns, threshold: NaN, at: -1 };
  /** @type {L[]} */
  let rows = [];
  /** @type {string | null} */
  let pinned = null;
  const prefix = `lorax-${Math.random().toString(36).slice(2)}-`;

  /**
   * @param {string} name
   * @param {number} number
   */
  function value(name, number) {
    const known = !Number.isNaN(number);
    const cell = make("span", { class: "lorax-value", "data-value": name });
    cell.style.setProperty("--lorax-share", String(known ? Math.min(Math.max(number, 0), 1) : 0));
    if (name === "corrected" && shown.threshold > 0) {
      cell.append(make("i", { style: `left: ${100 * Math.min(shown.threshold, 1)}%` }));
    }
    cell.append(make("b", {}, known ? number.toFixed(2) : "–"));
    return cell;
  }

  /**
   * @param {L} row
   * @param {number} i
   */
  function line(row, i) {
    const option = make(
      "div",
      { class: "lorax-row", role: "option", id: `${prefix}${i}`, style: `top: ${i * ROW}px`, title: row.title },
      make("span", { class: "lorax-sign", "aria-hidden": "true" }, row.mark),
      make("span", { class: "lorax-name" }, row.name),
      ...shown.columns.map((name) => value(name, row.values[name])),
    );
    option.dataset.place = String(i);
    option.setAttribute("aria-selected", String(row.key === pinned));
    option.classList.toggle("lorax-faint", row.faint);
    option.classList.toggle("lorax-at", i === shown.at);
    return option;
  }

  function render() {
    const from = Math.max(Math.floor(scroll.scrollTop / ROW) - SPARE, 0);
    const to = Math.min(from + Math.ceil(scroll.clientHeight / ROW) + 2 * SPARE, rows.length);
    inner.style.height = `${rows.length * ROW}px`;
    inner.replaceChildren(...rows.slice(from, to).map((row, i) => line(row, from + i)));
  }

  /** @param {number} i */
  function point(i) {
    shown.at = i;
    render();
    onPoint(rows[i] ?? null);
  }

  /** @param {number} i */
  function toggle(i) {
    const key = rows[i]?.key ?? null;
    pinned = key === pinned ? null : key;
    render();
    onPin(pinned === null ? null : rows[i]);
  }

  /** @param {number} i */
  function reveal(i) {
    if (i * ROW < scroll.scrollTop) scroll.scrollTop = i * ROW;
    if ((i + 1) * ROW > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = (i + 1) * ROW - scroll.clientHeight;
  }

  /** @param {Event} event */
  function placeOf({ target }) {
    const row = target instanceof Element ? target.closest(".lorax-row") : null;
    return row instanceof HTMLElement ? Number(row.dataset.place) : -1;
  }

  inner.addEventListener("pointermove", (event) => {
    if (placeOf(event) !== shown.at) point(placeOf(event));
  });
  inner.addEventListener("pointerleave", () => point(-1));
  inner.addEventListener("click", (event) => placeOf(event) >= 0 && toggle(placeOf(event)));
  scroll.addEventListener("scroll", render);
  scroll.addEventListener("keydown", (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (step) {
      const i = Math.min(Math.max(shown.at + step, 0), rows.length - 1);
      reveal(i);
      point(i);
      scroll.setAttribute("aria-activedescendant", `${prefix}${i}`);
    } else if (event.key === "Enter" && shown.at >= 0) {
      toggle(shown.at);
    } else if (event.key === "Escape" && pinned !== null) {
      toggle(rows.findIndex(({ key }) => key === pinned));
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  });
  new ResizeObserver(render).observe(scroll);

  return {
    element,
    /**
     * Show rows, with a line at a threshold of the corrected similarity.
     * @param {L[]} lines
     * @param {number} threshold
     */
    show(lines, threshold, names = columns) {
      rows = lines;
      Object.assign(shown, { threshold, columns: names });
      head.replaceChildren(
        make("span"),
        make("span", { class: "lorax-name" }, say("layer")),
        ...names.map((name) => make("span", { "data-value": name }, say(name))),
      );
      render();
    },
    /**
     * Pin the row of a key without telling, and bring it into sight.
     * @param {string | null} key
     */
    pin(key) {
      pinned = key;
      const i = rows.findIndex((row) => row.key === key);
      if (i >= 0) reveal(i);
      render();
    },
    /**
     * Bring the first row that passes a test into sight.
     * @param {(row: L) => boolean} test
     */
    reveal(test) {
      const i = rows.findIndex(test);
      if (i >= 0) scroll.scrollTop = i * ROW;
    },
  };
}
