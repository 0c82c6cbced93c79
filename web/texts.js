// @ts-check
/** The words of the views. A translation is the `lorax` part of `locales/<language>/main.json`, with the same keys. */

/** @import { Counts, Note } from "./report_data.js" */

/** @type {Record<string, string>} */
export const ENGLISH = {
  waiting_similarity: "Queue the workflow: the comparison appears here.",
  waiting_report: "Queue the workflow: what arrived appears here.",
  waiting_loss: "Queue the workflow: the loss appears here.",
  waiting_text: "Queue the workflow: what this node says appears here.",
  working: "Working: {percent} %",
  comparing: "Comparing: {percent} %",
  old_settings: "Made with other settings. Queue the workflow again.",
  unknown_schema:
    "This view cannot read {schema}, version {version}. Queue the workflow again, or use the lorax that wrote it.",
  old_version: "An older version of lorax made this. Queue the workflow again.",
  damaged: "The report is damaged ({what}). Queue the workflow again.",
  too_many: "The report has {count} {what}; this view shows at most {most}.",
  failed: "This view cannot show what came ({what}). The other nodes are not concerned.",
  no_layers: "No layer to show.",
  many_layers: "{count} layers: choose a kind or a stage to see single ones.",
  no_map: "Too many pairs for a map; the layers are below.",
  nothing_chosen: "No layer of this kind in this stage.",
  full_rank: "full rank",
  at_rank: "rank {rank}",
  kind: "kind",
  stage: "stage",
  all: "all",
  group_q: "query",
  group_k: "key",
  group_v: "value",
  group_out: "out",
  group_ff: "feed-forward",
  group_conv: "convolution",
  group_other: "other",
  map_label: "Similarity of blocks: source down, target across. Arrow keys move, Enter pins.",
  layers_label: "Layers of the target. Arrow keys move, Enter pins.",
  chance: "0 chance",
  equal: "1 equal",
  no_value: "no value",
  mean_of: "corrected {value}, mean of {count} layers",
  lowest_of: "corrected {value} or less, mean of {count} layers",
  other_size: "no value: other sizes",
  paired: "paired: {above} of {count} layers above the threshold",
  not_paired: "not paired",
  no_source: "no source layer: gets no update",
  pin: "click to pin",
  pinned: "pinned",
  threshold: "threshold",
  counted: "{above} of {count} layers would be transferred",
  writes: "Sets the threshold of LoRA-X Transfer.",
  writes_linked: "To try it out. A link gives the threshold of LoRA-X Transfer.",
  writes_nothing: "To try it out. Connect “similarity” to LoRA-X Transfer to set its threshold.",
  writes_option: "To try it out: lorax transfer --threshold {value}",
  legend_above: "paired, all above",
  legend_some: "some above",
  legend_below: "none above",
  layer: "layer",
  left: "left",
  right: "right",
  corrected: "corrected",
  kept: "kept",
  arrived: "layers arrived",
  norm_kept: "of the norm kept: {grade}",
  norm_left_out: "of the norm kept, some more is in the target already: {grade}",
  strength: "suggested strength",
  no_strength: "no suggestion: layers are missing",
  use_strength: "Use strength {strength}",
  strength_used: "Strength {strength} is set",
  outcome: "outcome",
  copy: "Copy as text",
  copied: "Copied",
  not_copied: "The browser does not allow it",
  strong: "full effect",
  fair: "noticeable effect",
  weak: "weak effect",
  nothing: "no effect",
  unknown: "of the layers whose norm is known",
  method_rank: "{method}, rank {rank}",
  step_loss: "step {step} of {total}: loss {loss}",
  loss_label: "Loss against step: {first} at the start, {last} at step {step} of {total}",
  transferred: "transferred",
  "kept unchanged": "kept unchanged",
  "below threshold": "below threshold",
  "not in source": "not in source",
  "not in target": "not in target",
  "shape mismatch": "shape mismatch",
  "place taken": "place taken",
  "not readable": "not readable",
};

let texts = ENGLISH;
/** @type {Record<string, string>} */
let notes = {}; // the sentences of notes, by their codes; English ones come with the notes

/**
 * Take translated texts; what they lack stays English.
 * @param {{ [key: string]: unknown, notes?: Record<string, string> }} [translated] texts by their keys, and notes
 */
export function speak({ notes: sentences = {}, ...words } = {}) {
  texts = /** @type {Record<string, string>} */ ({ ...ENGLISH, ...words });
  notes = sentences;
}

/**
 * Return a text, with its {names} replaced by values.
 * @param {string} key
 * @param {Record<string, unknown>} values
 */
export function say(key, values = {}) {
  return inserted(Object.hasOwn(texts, key) ? texts[key] : key, values);
}

/**
 * Return what a note of a report says.
 * @param {Note} note
 * @returns {string}
 */
export function tell({ code, values, text }) {
  if (!Object.hasOwn(notes, code)) return text;
  const words = Object.entries(values).map(([name, value]) => [name, typeof value === "object" ? inner(value) : value]);
  return inserted(notes[code], Object.fromEntries(words));
}

/** @param {Note | Counts} value another note, or how many there are of each outcome */
function inner(value) {
  if (isNote(value)) return tell(value);
  return Object.entries(value)
    .map(([outcome, count]) => `${count} ${say(outcome)}`)
    .join(", ");
}

/**
 * @param {Note | Counts} value
 * @returns {value is Note}
 */
function isNote(value) {
  return "code" in value;
}

/**
 * @param {string} text
 * @param {Record<string, unknown>} values
 */
function inserted(text, values) {
  return text.replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? ""));
}
