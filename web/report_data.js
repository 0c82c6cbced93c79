// @ts-check
/** What the transfer view shows, from the JSON of a transfer (`lorax/transfer/report.schema.json`). */

import { checkSchema, list, number, Problem, record, word } from "./checks.js";
import { shortBlock } from "./names.js";
import { PACKED, REPORT_SCHEMA, unpackReport } from "./report_pack.js";

/**
 * What became of a layer, and its sign; those of ARRIVED have an update in the result.
 * @type {Record<string, string>}
 */
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
/** @type {unknown[]} */
const ARRIVED = ["transferred", "kept unchanged"];
/** How much of the effect to expect: keys of the texts. */
const GRADES = ["strong", "fair", "weak", "nothing", "unknown"];

/** @typedef {Record<string, number>} Counts how many there are of each outcome */
/** @typedef {Note | Counts | number | string} Value */

/**
 * What a report tells: its code, what belongs into its sentence, and that in English.
 * @typedef {{ code: string, values: Record<string, Value>, text: string }} Note
 */

/**
 * A layer, or one of those of the target that it feeds; similarities and `kept` are NaN where there are none.
 * @typedef {object} Row
 * @property {string} source
 * @property {string} block
 * @property {string} role
 * @property {string} target
 * @property {string} outcome
 * @property {boolean} arrived
 * @property {string} method
 * @property {number} rank
 * @property {Note[]} notes
 * @property {number} left
 * @property {number} right
 * @property {number} corrected
 * @property {number} kept the norm after, by that before
 */

/**
 * What a transfer did; `lorax/transfer/report.schema.json` says what each is.
 * @typedef {object} Report
 * @property {string} adapter
 * @property {string} source
 * @property {string} target
 * @property {string} method
 * @property {number} rank
 * @property {number} threshold
 * @property {string} summary
 * @property {Note[]} warnings
 * @property {number} kept
 * @property {boolean} leftOut
 * @property {string} grade
 * @property {number} strength
 * @property {number} mostStrength
 * @property {number} layers
 * @property {number} arrived
 * @property {Row[]} rows
 */

/**
 * Read a transfer report, or the packed form of one.
 * @param {unknown} given
 * @returns {Report}
 * @throws {Problem} what came is of another version, damaged, or empty
 */
export function readReport(given) {
  const data = checkSchema(given, REPORT_SCHEMA, PACKED);
  const plain = data.schema === PACKED ? unpackReport(data) : data;
  const rows = list(plain.rows, "rows").map(readRow);

  const counted = Object.values(readCounts(plain.outcomes, "rows")).reduce((sum, count) => sum + count, 0);
  const [layers, arrived] = [number(plain.layers, "rows"), number(plain.arrived, "rows")];
  if (counted !== rows.length || !(arrived <= layers)) throw new Problem("damaged", { what: "rows" });
  if (!rows.length) throw new Problem("no_layers");
  const grade = word(plain.grade, "grade");
  if (!GRADES.includes(grade)) throw new Problem("damaged", { what: "grade" });
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
    grade,
    strength: number(plain.suggested_strength, "suggested_strength"),
    mostStrength: number(plain.most_strength, "most_strength"),
    layers,
    arrived,
    rows,
  };
}

/**
 * @param {unknown} given
 * @returns {Row}
 */
function readRow(given) {
  const row = record(given, "rows");
  const phi = (/** @type {unknown} */ score) => (score === null ? NaN : number(record(score, "rows").phi, "rows"));
  return {
    source: word(row.source, "rows"),
    block: word(row.block, "rows"),
    role: word(row.role, "rows"),
    target: word(row.target, "rows"),
    outcome: readOutcome(row.outcome, "rows"),
    arrived: ARRIVED.includes(row.outcome),
    method: word(row.method, "rows"),
    rank: number(row.rank, "rows"),
    notes: list(row.notes, "rows").map((note) => readNote(note, "rows")),
    left: phi(row.left),
    right: phi(row.right),
    corrected: number(row.corrected, "rows"),
    kept: number(row.retained_norm, "rows"),
  };
}

/**
 * @param {unknown} given
 * @param {string} what
 * @param {boolean} isInner whether it is a value of another note, and so has none within
 * @returns {Note}
 */
function readNote(given, what, isInner = false) {
  const note = record(given, what);
  const values = Object.entries(record(note.values, what)).map(
    /** @returns {[string, Value]} */ ([name, value]) => {
      if (typeof value === "number") return [name, number(value, what)];
      if (typeof value === "string") return [name, word(value, what)];
      if (!("code" in record(value, what))) return [name, readCounts(value, what)];
      if (isInner) throw new Problem("damaged", { what });
      return [name, readNote(value, what, true)];
    },
  );
  return { code: word(note.code, what), values: Object.fromEntries(values), text: word(note.text, what) };
}

/**
 * @param {unknown} given
 * @param {string} what
 * @returns {Counts}
 */
function readCounts(given, what) {
  const counts = Object.entries(record(given, what));
  return Object.fromEntries(counts.map(([outcome, count]) => [readOutcome(outcome, what), number(count, what)]));
}

/**
 * @param {unknown} given
 * @param {string} what
 */
function readOutcome(given, what) {
  const outcome = word(given, what);
  if (!Object.hasOwn(SIGNS, outcome)) throw new Problem("damaged", { what });
  return outcome;
}

/**
 * Return how many rows had each outcome, those that there are, in the order of SIGNS.
 * @param {Row[]} rows
 */
export function outcomes(rows) {
  return Object.keys(SIGNS)
    .map((outcome) => ({ outcome, count: rows.filter((row) => row.outcome === outcome).length }))
    .filter(({ count }) => count);
}

/**
 * Return the short name of a layer, by the number of its block if it has one.
 * @param {{ block: string, role: string }} layer
 */
export function shortLayer({ block, role }) {
  return `${shortBlock(block)} ${role}`;
}

/**
 * Return a report as text, to be sent to somebody.
 * @param {Report} report
 */
export function reportText(report) {
  const digits = (/** @type {number} */ value) => (Number.isNaN(value) ? "-" : value.toFixed(3));
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

/**
 * Return what each target layer kept, by its name.
 * @param {Report} report
 */
export function keptShares(report) {
  return new Map(report.rows.filter((row) => row.arrived && row.target).map((row) => [row.target, row.kept]));
}
