// @ts-check
/** A report as a workflow file keeps it: in a quarter of its size. */

import { item, list, word } from "./checks.js";

/** @import { Data } from "./checks.js" */
/** @import { Note } from "./report_data.js" */

export const REPORT_SCHEMA = "lorax-transfer";
export const PACKED = "lorax-transfer-packed";

/**
 * The JSON of a report, as the node sends it.
 * @typedef {Data & { rows: PlainRow[] }} PlainReport
 * @typedef {Record<"source" | "block" | "role" | "target" | "outcome" | "method", string>
 *   & Record<"rank" | "corrected" | "retained_norm", number | null>
 *   & Record<"left" | "right", { phi: number | null } | null>
 *   & { notes: Note[] }} PlainRow
 */

/**
 * Return a report packed: rows as arrays, what repeats once.
 * @param {PlainReport} report
 */
export function packReport(report) {
  /** @type {Map<string, number>} */
  const places = new Map(); // what repeats, as JSON -> its place
  const place = (/** @type {unknown} */ value) => {
    const key = JSON.stringify(value);
    const found = places.get(key) ?? places.size;
    places.set(key, found);
    return found;
  };
  const round = (/** @type {number | null | undefined} */ value) =>
    typeof value === "number" ? Math.round(value * 1e4) / 1e4 : null;
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

/**
 * Return a packed report as it was.
 * @param {Data} report
 * @returns {Data}
 */
export function unpackReport({ words, rows, ...rest }) {
  const said = (/** @type {unknown} */ place) => item(list(words, "words"), place, "words");
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

/** @param {{ block: string, role: string }} layer */
function nameOf({ block, role }) {
  return `${block}.${role}`;
}
