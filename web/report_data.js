/** What the transfer view shows, from the JSON of a transfer (`lorax/transfer/report.schema.json`); its form in a workflow. */

import { checkSchema, item, list, number, Problem, record, word } from "./checks.js";
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
/** How much of the effect to expect: keys of the texts. */
const GRADES = ["strong", "fair", "weak", "nothing", "unknown"];
const PACKED = "lorax-transfer-packed";

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
      block: word(row.block, "rows"),
      role: word(row.role, "rows"),
      target: word(row.target, "rows"),
      outcome: row.outcome,
      arrived: ARRIVED.includes(row.outcome),
      method: word(row.method, "rows"),
      rank: number(row.rank, "rows"),
      notes: list(row.notes, "rows").map((note) => readNote(note, "rows")),
      left: number(row.left?.phi ?? null, "rows"),
      right: number(row.right?.phi ?? null, "rows"),
      corrected: number(row.corrected, "rows"),
      kept: number(row.retained_norm, "rows"),
    };
  });
  const counted = Object.values(readCounts(plain.outcomes, "rows")).reduce((sum, count) => sum + count, 0);
  const [layers, arrived] = [number(plain.layers, "rows"), number(plain.arrived, "rows")];
  if (counted !== rows.length || !(arrived <= layers)) throw new Problem("damaged", { what: "rows" });
  if (!rows.length) throw new Problem("no_layers");
  if (!GRADES.includes(plain.grade)) throw new Problem("damaged", { what: "grade" });
  return {
    adapter: word(plain.adapter, "names"),
    source: word(plain.source, "names"),
    target: word(plain.target, "names"),
    method: word(plain.method, "method"),
    rank: number(plain.rank, "rank"),
    threshold: number(plain.threshold, "threshold"),
    summary: word(plain.summary, "summary"),
    warnings: list(plain.warnings, "warnings").map((note) => readNote(note, "warnings")),
    kept: number(plain.retained_norm, "retained_norm"),
    leftOut: plain.left_out === true,
    grade: plain.grade,
    strength: number(plain.suggested_strength, "suggested_strength"),
    mostStrength: number(plain.most_strength, "most_strength"),
    layers,
    arrived,
    rows,
  };
}

/** Read a note: its code, what belongs into its sentence (which may be another note), and that sentence in English. */
function readNote(note, what, isInner = false) {
  const values = Object.entries(record(note?.values, what)).map(([name, value]) => {
    if (typeof value === "number") return [name, number(value, what)];
    if (typeof value === "string") return [name, word(value, what)];
    if (value?.code === undefined) return [name, readCounts(value, what)];
    if (isInner) throw new Problem("damaged", { what });
    return [name, readNote(value, what, true)];
  });
  return { code: word(note.code, what), values: Object.fromEntries(values), text: word(note.text, what) };
}

/** Read how many there are of each outcome. */
function readCounts(counts, what) {
  for (const [outcome, count] of Object.entries(record(counts, what))) {
    if (!Object.hasOwn(SIGNS, outcome) || Number.isNaN(number(count, what))) throw new Problem("damaged", { what });
  }
  return counts;
}

/** Return how many rows had each outcome, those that there are, in the order of SIGNS. */
export function outcomes(rows) {
  const counts = Object.keys(SIGNS).map((outcome) => [outcome, rows.filter((row) => row.outcome === outcome).length]);
  return counts.filter(([, count]) => count);
}

/** Return the short name of a layer, by the number of its block if it has one. */
export function shortLayer({ block, role }) {
  return `${shortBlock(block)} ${role}`;
}

/** Return a report as text, to be sent to somebody. */
export function reportText(report) {
  const digits = (value) => (Number.isNaN(value) ? "-" : value.toFixed(3));
  const head = [
    `${report.adapter}: ${report.source} -> ${report.target}`,
    `method ${report.method}, rank ${report.rank}, threshold ${report.threshold}`,
    report.summary,
    ...report.warnings.map(({ text }) => `warning: ${text}`),
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
      row.notes.map(({ text }) => text).join("; "),
    ].join("\t"),
  );
  return [...head, ...lines].join("\n");
}

/** Return a report in a quarter of its size, for the workflow file: rows as arrays, what repeats once. */
export function packReport(report) {
  if (report?.schema !== REPORT_SCHEMA || !Array.isArray(report.rows)) return report;
  const places = new Map(); // what repeats, as JSON -> its place
  const place = (value) => {
    const key = JSON.stringify(value);
    if (!places.has(key)) places.set(key, places.size);
    return places.get(key);
  };
  const round = (value) => (typeof value === "number" ? Math.round(value * 1e4) / 1e4 : (value ?? null));
  const rows = report.rows.map((row) => [
    row.source === nameOf(row) ? 0 : row.source,
    place(row.block),
    place(row.role),
    row.target === row.source ? 0 : row.target,
    place(row.outcome),
    place(row.method),
    row.rank,
    round(row.left?.phi),
    round(row.right?.phi),
    round(row.corrected),
    round(row.retained_norm),
    place(row.notes),
  ]);
  const { assignment, unused, ...rest } = report;
  return { ...rest, schema: PACKED, words: [...places.keys()].map((key) => JSON.parse(key)), rows };
}

function unpackReport({ words, rows, ...rest }) {
  const said = (place) => item(list(words, "words"), place, "words");
  const opened = list(rows, "rows").map((row) => {
    const [name, block, role, target, outcome, method, rank, left, right, corrected, kept, notes] = list(row, "rows");
    const parts = { block: word(said(block), "words"), role: word(said(role), "words") };
    const source = name === 0 ? nameOf(parts) : name;
    return {
      ...parts,
      source,
      target: target === 0 ? source : target,
      outcome: said(outcome),
      method: said(method),
      rank,
      left: { phi: left },
      right: { phi: right },
      corrected,
      retained_norm: kept,
      notes: said(notes),
    };
  });
  return { ...rest, schema: REPORT_SCHEMA, rows: opened };
}

function nameOf({ block, role }) {
  return `${block}.${role}`;
}

/** Return what each target layer kept, by its name. */
export function keptShares(report) {
  return new Map(report.rows.filter((row) => row.arrived && row.target).map((row) => [row.target, row.kept]));
}
