// @ts-check
/** What a transfer did: what arrived, how strong it will be, what was skipped and why, layer by layer. */

import { bars } from "./bars.js";
import { Problem, readState } from "./checks.js";
import { make } from "./elements.js";
import { outcomes, readReport, reportText, shortLayer, SIGNS } from "./report_data.js";
import { say, tell } from "./texts.js";

/** @import { Line } from "./bars.js" */
/** @import { Report, Row } from "./report_data.js" */
/** @typedef {Line & { row: Row }} RowLine */

const REPORT_STATE = { outcome: "", pinned: "" }; // what the user chose

/**
 * Return the view.
 * @param {object} options
 * @param {(state: typeof REPORT_STATE) => void} options.onState what the user chose changed
 * @param {(value: number) => void} [options.onStrength] the suggested strength shall be used
 * @param {() => unknown[]} [options.strengths] the strengths that would be set then, as they are now
 */
export function reportView({ onState, onStrength = () => {}, strengths = () => [] }) {
  const element = make("div", { class: "lorax-view lorax-report" });
  const message = make("div", { class: "lorax-message", role: "status" });
  const title = make("div", { class: "lorax-title" });
  const figures = make("div", { class: "lorax-figures" });
  const warnings = make("ul", { class: "lorax-warnings" });
  const chips = make("div", { class: "lorax-chips", role: "group", "aria-label": say("outcome") });
  const details = make("div", { class: "lorax-details", "aria-live": "polite" });
  const use = make("button", { type: "button" });
  const copy = make("button", { type: "button" }, say("copy"));
  const actions = make("div", { class: "lorax-actions" }, use, copy);
  const layers = bars({
    columns: ["left", "right", "corrected", "kept"],
    onPoint: describe,
    onPin: (row) => {
      change({ pinned: row?.key ?? "" });
      describe(row);
    },
  });
  /** @type {Report | null} */
  let report = null;
  /** @type {RowLine[]} */
  let rows = [];
  let state = { ...REPORT_STATE };
  /** @type {RowLine | null} */
  let pointed = null; // what was looked at last, until the pointer leaves the view

  element.addEventListener("pointerleave", () => {
    pointed = null;
    describe(null);
  });

  /** @param {Partial<typeof REPORT_STATE>} values */
  function change(values) {
    state = { ...state, ...values };
    onState(state);
  }

  /** The widgets take two digits. */
  const suggestion = () => Math.round(100 * (report?.strength ?? NaN)) / 100;

  use.addEventListener("click", () => {
    onStrength(suggestion());
    showStrength();
  });

  /** Offer to use the suggested strength, where there is one and a place for it. */
  function showStrength() {
    const [value, now] = [suggestion(), strengths()];
    const used = now.every((one) => one === value);
    use.hidden = Number.isNaN(value) || !now.length;
    use.disabled = used;
    use.textContent = say(used ? "strength_used" : "use_strength", { strength: digits(value, 2) });
  }

  copy.addEventListener("click", async () => {
    if (!report) return;
    copy.textContent = say((await copyText(reportText(report))) ? "copied" : "not_copied");
    setTimeout(() => (copy.textContent = say("copy")), 2000);
  });

  /**
   * @param {string} value
   * @param {string} words
   * @param {number} share
   */
  function figure(value, words, share, kind = "") {
    const found = make("div", { class: `lorax-figure ${kind}` }, make("b", {}, value), make("span", {}, words));
    found.style.setProperty("--lorax-share", String(share));
    return found;
  }

  /** @param {Report} report */
  function fill(report) {
    const { arrived, kept, grade, leftOut, strength, layers: count } = report;
    const known = !Number.isNaN(kept);
    const suggested = !Number.isNaN(strength);
    title.replaceChildren(make("b", {}, report.adapter), `: ${report.source} → ${report.target}`);
    title.title = title.textContent ?? "";
    figures.replaceChildren(
      figure(`${arrived} / ${count}`, say("arrived"), arrived / count),
      figure(
        known ? `${Math.round(kept * 100)} %` : "–",
        say(leftOut ? "norm_left_out" : "norm_kept", { grade: say(grade) }),
        known ? Math.min(kept, 1) : 0,
        `lorax-${grade}`,
      ),
      figure(
        digits(strength, 2),
        say(suggested ? "strength" : "no_strength"),
        suggested ? Math.min(strength / report.mostStrength, 1) : 0,
      ),
    );
    warnings.replaceChildren(...report.warnings.map((warning) => make("li", {}, tell(warning))));
    warnings.hidden = !warnings.children.length;
    const all = { outcome: "", count: report.rows.length };
    chips.replaceChildren(...[all, ...outcomes(report.rows)].map((found) => chip(report, found)));
    list(report);
  }

  /**
   * @param {Report} report
   * @param {{ outcome: string, count: number }} found
   */
  function chip(report, { outcome, count }) {
    const words = outcome ? `${SIGNS[outcome]} ${say(outcome)} ${count}` : `${say("all")} ${count}`;
    const button = make("button", { type: "button", "aria-pressed": state.outcome === outcome }, words);
    button.addEventListener("click", () => {
      change({ outcome, pinned: "" });
      fill(report);
    });
    return button;
  }

  /** @param {Report} report */
  function list(report) {
    const found = report.rows.filter((row) => !state.outcome || row.outcome === state.outcome);
    rows = found.map((row) => ({
      key: row.source,
      name: shortLayer(row),
      title: row.source,
      mark: SIGNS[row.outcome],
      faint: !row.arrived,
      values: { left: row.left, right: row.right, corrected: row.corrected, kept: row.kept },
      row,
    }));
    pointed = null;
    layers.show(rows, report.threshold);
    layers.pin(state.pinned || null);
    describe(null);
  }

  /** @param {RowLine | null} row */
  function describe(row) {
    const pinned = row ? undefined : rows.find(({ key }) => key === state.pinned);
    pointed = row ?? (pinned ? null : pointed);
    const line = pinned ?? pointed;
    const lines = line ? ofRow(line) : [];
    details.hidden = !line;
    if (line) lines[3] += ` · ${say(pinned ? "pinned" : "pin")}`;
    details.replaceChildren(...lines.map((text) => make("div", { title: text }, text)));
  }

  /** @param {RowLine} line */
  function ofRow({ row, values }) {
    const method = row.rank ? say("method_rank", { method: row.method, rank: row.rank }) : row.method;
    return [
      row.source,
      `→ ${row.target || "–"}`,
      [say(row.outcome), method, ...row.notes.map(tell)].filter(Boolean).join(" · "),
      Object.entries(values)
        .map(([key, value]) => `${say(key)} ${digits(value, 3)}`)
        .join(" · "),
    ];
  }

  /** @param {string} text */
  function fail(text) {
    report = null;
    message.textContent = text;
    element.replaceChildren(message);
  }

  fail(say("waiting_report"));
  return {
    element,
    fail,
    showStrength,
    /**
     * Show the JSON of a transfer; where it cannot be read, say why.
     * @param {unknown} data
     * @param {unknown} [saved] the state of before
     */
    show(data, saved) {
      /** @type {Report} */
      let found;
      try {
        found = readReport(data);
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        return fail(say(error.message, error.values));
      }
      report = found;
      state = readState(saved, REPORT_STATE);
      if (!outcomes(found.rows).some(({ outcome }) => outcome === state.outcome)) state.outcome = "";
      const list = make("div", { class: "lorax-list" }, layers.element, details);
      element.replaceChildren(title, figures, warnings, chips, list, actions);
      fill(found);
      showStrength();
    },
  };
}

/**
 * @param {number} value
 * @param {number} count
 */
function digits(value, count) {
  return Number.isNaN(value) ? "–" : value.toFixed(count);
}

/**
 * Put text on the clipboard; without a secure connection only the old way is there. Return whether it is there.
 * @param {string} text
 */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = make("textarea", { style: "position: fixed; opacity: 0" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
