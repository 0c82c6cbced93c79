/** What a transfer did: what arrived, how strong it will be, what was skipped and why, layer by layer. */

import { bars } from "./bars.js";
import { Problem, readState } from "./checks.js";
import { make } from "./elements.js";
import { outcomes, readReport, reportText, shortLayer, SIGNS } from "./report_data.js";
import { say, tell } from "./texts.js";

const REPORT_STATE = { outcome: "", pinned: "" }; // what the user chose

/**
 * Return the view.
 * @param {(state: object) => void} onState what the user chose changed: `{outcome, pinned}`
 */
export function reportView({ onState }) {
  const element = make("div", { class: "lorax-view lorax-report" });
  const message = make("div", { class: "lorax-message", role: "status" });
  const title = make("div", { class: "lorax-title" });
  const figures = make("div", { class: "lorax-figures" });
  const warnings = make("ul", { class: "lorax-warnings" });
  const chips = make("div", { class: "lorax-chips", role: "group", "aria-label": say("outcome") });
  const details = make("div", { class: "lorax-details", "aria-live": "polite" });
  const copy = make("button", { type: "button", class: "lorax-copy" }, say("copy"));
  const layers = bars({
    columns: ["left", "right", "corrected", "kept"],
    onPoint: describe,
    onPin: (row) => {
      change({ pinned: row?.key ?? "" });
      describe(row);
    },
  });
  let [report, rows, state] = [null, [], { ...REPORT_STATE }];

  function change(values) {
    state = { ...state, ...values };
    onState(state);
  }

  copy.addEventListener("click", async () => {
    copy.textContent = say((await copyText(reportText(report))) ? "copied" : "not_copied");
    setTimeout(() => (copy.textContent = say("copy")), 2000);
  });

  function figure(value, words, share, kind = "") {
    const found = make("div", { class: `lorax-figure ${kind}` }, make("b", {}, value), make("span", {}, words));
    found.style.setProperty("--lorax-share", share);
    return found;
  }

  function fill() {
    const { arrived, kept, grade, leftOut, strength, layers: count } = report;
    const known = !Number.isNaN(kept);
    const suggested = !Number.isNaN(strength);
    title.replaceChildren(make("b", {}, report.adapter), `: ${report.source} → ${report.target}`);
    title.title = title.textContent;
    figures.replaceChildren(
      figure(`${arrived} / ${count}`, say("arrived"), arrived / count),
      figure(
        known ? `${Math.round(kept * 100)} %` : "–",
        `${say(leftOut ? "norm_left_out" : "norm_kept")}: ${say(grade)}`,
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
    chips.replaceChildren(chip("", report.rows.length), ...outcomes(report.rows).map(([outcome, n]) => chip(outcome, n)));
    list();
  }

  function chip(outcome, count) {
    const words = outcome ? `${SIGNS[outcome]} ${say(outcome)} ${count}` : `${say("all")} ${count}`;
    const button = make("button", { type: "button", "aria-pressed": state.outcome === outcome }, words);
    button.addEventListener("click", () => {
      change({ outcome, pinned: "" });
      fill();
    });
    return button;
  }

  function list() {
    const found = report.rows.filter((row) => !state.outcome || row.outcome === state.outcome);
    rows = found.map((row) => ({
      key: row.source,
      name: shortLayer(row),
      title: row.source,
      mark: SIGNS[row.outcome],
      faint: !row.arrived,
      values: row,
      row,
    }));
    layers.show(rows, report.threshold);
    layers.pin(state.pinned || null);
    describe(null);
  }

  function describe(shown) {
    const { row } = shown ?? rows.find(({ key }) => key === state.pinned) ?? {};
    const number = (key) => `${say(key)} ${digits(row[key], 3)}`;
    const method = row?.method && (row.rank ? say("method_rank", row) : row.method);
    const lines = row
      ? [
          row.source,
          `→ ${row.target || "–"}`,
          [say(row.outcome), method, ...row.notes.map(tell)].filter(Boolean).join(" · "),
          ["left", "right", "corrected", "kept"].map(number).join(" · "),
        ]
      : [say("layers_hint")];
    details.replaceChildren(...lines.map((line) => make("div", { title: line }, line)));
  }

  function fail(text) {
    report = null;
    message.textContent = text;
    element.replaceChildren(message);
  }

  fail(say("waiting_report"));
  return {
    element,
    fail,
    /** Show the JSON of a transfer; where it cannot be read, say why. Returns what was read, or null. */
    show(data, saved) {
      try {
        report = readReport(data);
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        fail(say(error.message, error.values));
        return null;
      }
      state = readState(saved, REPORT_STATE);
      if (!outcomes(report.rows).some(([outcome]) => outcome === state.outcome)) state.outcome = "";
      element.replaceChildren(title, figures, warnings, chips, layers.element, details, copy);
      fill();
      return report;
    },
  };
}

function digits(value, count) {
  return Number.isNaN(value) ? "–" : value.toFixed(count);
}

/** Put text on the clipboard; without a secure connection only the old way is there. Return whether it is there. */
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
