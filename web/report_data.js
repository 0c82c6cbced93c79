/** What the transfer view shows, from the JSON of a transfer (`lorax/transfer/report.schema.json`); its form in a workflow. */

import { checkSchema, item, list, number, Problem, word } from "./checks.js";
import { shortBlock } from "./names.js";

const REPORT_SCHEMA = "lorax-transfer";
/** What became of a layer, and its sign; those of ARRIVED have an update in the result. */
export const SIGNS = {
  transferred: "●",
  "kept unchanged": "◆",
  "below threshold": "×",
  "not in source": "○",
  "not in target": "○",
  "shape mismatch": "▲",
  "place taken": "■",
  "not readable": "▽",
};
const ARRIVED = ["transferred", "kept unchanged"];
const UNREAD = "not readable";
const PACKED = "lorax-transfer-packed";
const UNUSED = 20;

/**
 * Read a transfer report, or the packed form of one.
 * @returns totals and rows of the report
 * @throws {Problem} what came is of another version, damaged, or empty
 */
export function readReport(data) {
  checkSchema(data, REPORT_SCHEMA, PACKED);
  const plain = data.schema === PACKED ? unpackReport(data) : data;
  const rows = list(plain.rows, "rows").map((row) => {
    if (!Object.hasOwn(SIGNS, word(row?.outcome, "rows"))) throw new Problem("damaged", { what: "rows" });
    return {
      source: word(row.source, "rows"),
      target: word(row.target ?? "", "rows"),
      outcome: row.outcome,
      arrived: ARRIVED.includes(row.outcome),
      method: word(row.method ?? "", "rows"),
      rank: number(row.rank ?? null, "rows"),
      note: word(row.note ?? "", "rows"),
      left: number(row.left?.phi ?? null, "rows"),
      right: number(row.right?.phi ?? null, "rows"),
      corrected: number(row.corrected ?? null, "rows"),
      kept: number(row.retained_norm ?? null, "rows"),
    };
  });
  // A layer that feeds several counts once; workflows of before that was so counted its rows.
  const layers = new Set(rows.map((row) => row.source)).size;
  if (![layers, rows.length].includes(plain.layers)) throw new Problem("damaged", { what: "rows" });
  if (!rows.length) throw new Problem("no_layers");
  const through = new Set(rows.filter((row) => row.arrived).map((row) => row.source));
  for (const row of rows) if (row.outcome === UNREAD) through.delete(row.source);
  const unused = typeof plain.unused === "object" ? Object.entries(plain.unused ?? {}) : [];
  return {
    adapter: word(plain.adapter, "names"),
    source: word(plain.source, "names"),
    target: word(plain.target, "names"),
    method: word(plain.method, "method"),
    rank: number(plain.rank, "rank"),
    threshold: number(plain.threshold, "threshold"),
    summary: word(plain.summary, "summary"),
    warnings: list(plain.warnings, "warnings").map((warning) => word(warning, "warnings")),
    kept: number(plain.retained_norm, "retained_norm"),
    strength: number(plain.suggested_strength, "suggested_strength"),
    layers,
    arrived: through.size,
    isMeasured: rows.every((row) => row.arrived || !Number.isNaN(row.kept)),
    rows,
    unused,
    unusedCount: number(plain.unused_count ?? unused.length, "unused_count"),
  };
}

/** How strong the effect will be: a key of the texts. One half is where the core starts to warn (lorax/transfer/report.py). */
export function effect(kept) {
  if (!(kept > 0)) return "nothing";
  if (kept >= 0.8) return "strong";
  return kept >= 0.5 ? "fair" : "weak";
}

/** Return how many rows had each outcome, those that there are, in the order of SIGNS. */
export function outcomes(rows) {
  const counts = Object.keys(SIGNS).map((outcome) => [outcome, rows.filter((row) => row.outcome === outcome).length]);
  return counts.filter(([, count]) => count);
}

/** Return the short name of a layer, by the number of its block if it has one. */
export function shortLayer(name) {
  const found =
    /^(.*?(?:(?:down|up)_blocks\.\d+|mid_block)\.\w+\.\d+(?:\.transformer_blocks\.\d+)?|.*?\.\d+)\.(.+)$/.exec(name);
  return found ? `${shortBlock(found[1])} ${found[2]}` : name.slice(name.indexOf(".") + 1);
}

/** Return a report as text, to be sent to somebody. */
export function reportText(report) {
  const digits = (value) => (Number.isNaN(value) ? "-" : value.toFixed(3));
  const head = [
    `${report.adapter}: ${report.source} -> ${report.target}`,
    `method ${report.method}, rank ${report.rank}, threshold ${report.threshold}`,
    report.summary,
    ...report.warnings.map((warning) => `warning: ${warning}`),
    "",
    ["source", "target", "outcome", "method", "left", "right", "corrected", "kept", "note"].join("\t"),
  ];
  const lines = report.rows.map((row) =>
    [
      row.source,
      row.target,
      row.outcome,
      row.method,
      ...[row.left, row.right, row.corrected, row.kept].map(digits),
      row.note,
    ].join("\t"),
  );
  return [...head, ...lines].join("\n");
}

/** Return a report in a quarter of its size, for the workflow file: rows as arrays, repeated words once. */
export function packReport(report) {
  if (report?.schema !== REPORT_SCHEMA || !Array.isArray(report.rows)) return report;
  const words = [];
  const place = (word) => (words.includes(word) ? words.indexOf(word) : words.push(word) - 1);
  const round = (value) => (typeof value === "number" ? Math.round(value * 1e4) / 1e4 : (value ?? null));
  const rows = report.rows.map((row) => [
    row.source,
    row.target === row.source ? 0 : row.target,
    place(row.outcome),
    place(row.method),
    row.rank,
    round(row.left?.phi),
    round(row.right?.phi),
    round(row.corrected),
    round(row.retained_norm),
    place(row.note),
  ]);
  const unused = Object.entries(report.unused ?? {});
  const { assignment, outcomes: counts, ...rest } = report;
  return {
    ...rest,
    schema: PACKED,
    words,
    rows,
    unused: Object.fromEntries(unused.slice(0, UNUSED)),
    unused_count: unused.length,
  };
}

function unpackReport({ words, rows, ...rest }) {
  const said = (place) => item(list(words, "words"), place, "words");
  const opened = list(rows, "rows").map((row) => {
    const [source, target, outcome, method, rank, left, right, corrected, kept, note] = list(row, "rows");
    return {
      source,
      target: target === 0 ? source : target,
      outcome: said(outcome),
      method: said(method),
      rank,
      left: { phi: left },
      right: { phi: right },
      corrected,
      retained_norm: kept,
      note: said(note),
    };
  });
  return { ...rest, schema: REPORT_SCHEMA, rows: opened };
}

/** Return what each target layer kept, by its name. */
export function keptShares(report) {
  return new Map(report.rows.filter((row) => row.arrived && row.target).map((row) => [row.target, row.kept]));
}
