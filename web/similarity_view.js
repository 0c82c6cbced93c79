// @ts-check
/** The similarity of two bases: a map of blocks, a threshold, and the layers with their values. */

import { bars } from "./bars.js";
import { Problem, readState } from "./checks.js";
import { keepKeys, make } from "./elements.js";
import { heatMap, legend } from "./heatmap.js";
import { shortBlock } from "./names.js";
import {
  blockMap,
  choices,
  chosenPairs,
  countAbove,
  histogram,
  isAbove,
  pairedCells,
  readSimilarity,
} from "./similarity_data.js";
import { say } from "./texts.js";
import { HIGH, LOW, STEPS, thresholdSlider } from "./threshold.js";

/** @import { Line } from "./bars.js" */
/** @import { BlockMap, Cell, Pair, PairedCell, Similarity, ViewedLayer } from "./similarity_data.js" */
/** @typedef {Line & { pair: Pair }} PairLine */
/** @typedef {{ row?: PairLine | null, cell?: Cell | null }} Pointed what is looked at */

const MANY = 1000;
const SIMILARITY_STATE = { group: "", stage: "", pinned: "", threshold: 0 }; // what the user chose

/**
 * Return the view.
 * @param {object} options
 * @param {(state: typeof SIMILARITY_STATE) => void} options.onState what the user chose changed
 * @param {(value: number) => void} options.onThreshold the user set another threshold
 * @param {(threshold: number) => string} options.note what setting the threshold does, in words
 */
export function similarityView({ onState, onThreshold, note }) {
  const element = make("div", { class: "lorax-view lorax-similarity" });
  /** @type {Similarity | null} */
  let model = null;
  /** @type {BlockMap | null} */
  let map = null;
  /** @type {Pair[]} */
  let pairs = [];
  /** @type {Map<string, number>} */
  let kept = new Map();
  /** @type {PairLine[]} */
  let rows = [];
  /** @type {Map<number, PairedCell>} */
  let cellCounts = new Map();
  let state = { ...SIMILARITY_STATE };
  /** @type {Pointed | null} */
  let pointed = null; // what was looked at last, until the pointer leaves the view

  const title = make("div", { class: "lorax-title" });
  const message = make("div", { class: "lorax-message", role: "status" });
  const details = make("div", { class: "lorax-details", "aria-live": "polite" });
  const selects = { group: select("kind"), stage: select("stage") };
  const heat = heatMap({ onPoint: (cell) => describe(cell && { cell }), onPin: pinCell });
  const slider = thresholdSlider({ onDrag: drag });
  const layers = bars({
    columns: ["left", "right", "corrected"],
    onPoint: (/** @type {PairLine | null} */ row) => describe(row && { row }),
    onPin: (row) => pinLayer(row?.key ?? ""),
  });
  const controls = make("div", { class: "lorax-controls" }, selects.group.label, selects.stage.label);
  const list = make("div", { class: "lorax-list" }, layers.element, details);
  const parts = [title, controls, message, heat.element, legend(), slider.element, list];
  element.addEventListener("pointerleave", () => {
    pointed = null;
    describe(null);
  });

  /** @param {"kind" | "stage"} name */
  function select(name) {
    const box = make("select");
    box.addEventListener("change", () => {
      change({ [name === "kind" ? "group" : "stage"]: box.value, pinned: "" });
      filter();
    });
    keepKeys(box);
    return { box, label: make("label", {}, say(name), box) };
  }

  /**
   * @param {HTMLSelectElement} box
   * @param {string[]} values
   * @param {string} chosen
   * @param {(value: string) => string} words
   */
  function options(box, values, chosen, words) {
    box.replaceChildren(
      ...["", ...values].map((value) => make("option", { value }, value ? words(value) : say("all"))),
    );
    box.value = values.includes(chosen) ? chosen : "";
    return box.value;
  }

  /** @param {Partial<typeof SIMILARITY_STATE>} values */
  function change(values) {
    state = { ...state, ...values };
    onState(state);
  }

  function filter() {
    if (!model) return;
    map = blockMap(model, state);
    pairs = chosenPairs(model, state);
    const empty = !pairs.length || map?.values.length === 0;
    pointed = null;
    const crowd = pairs.length > MANY ? say("many_layers", { count: pairs.length }) : "";
    message.textContent = empty ? say("nothing_chosen") : map ? crowd : say("no_map");
    message.hidden = !message.textContent;
    heat.element.hidden = !map || empty;
    if (map && !empty) heat.show(map);
    slider.fill(histogram(pairs, LOW, HIGH, STEPS));
    refresh();
    show();
  }

  function refresh() {
    const above = countAbove(pairs, state.threshold);
    slider.show(state.threshold, above, pairs.length, note(state.threshold));
    if (map?.values.length) {
      const [cells, width] = [pairedCells(map, pairs, state.threshold), map.columns.length];
      cellCounts = new Map(cells.map((cell) => [cell.row * width + cell.column, cell]));
      heat.mark(cells);
    }
    rows = pairs.map((pair) => {
      const { target, left, right, corrected } = pair;
      const through = isAbove(pair, state.threshold);
      const key = target.name;
      const name = `${shortBlock(target.block)} ${target.name.slice(target.block.length + 1)}`;
      const values = { left, right, corrected, kept: kept.get(target.name) ?? NaN };
      return { key, name, title: key, mark: through ? "●" : "×", faint: !through, values, pair };
    });
    layers.show(rows, state.threshold, ["left", "right", "corrected", ...(kept.size ? ["kept"] : [])]);
  }

  /** @param {number} threshold */
  function drag(threshold) {
    change({ threshold });
    onThreshold(threshold);
    refresh();
    describe(null);
  }

  /**
   * @param {string} source
   * @param {string} target
   */
  function cellOf(source, target) {
    const cell = { row: map?.rows.indexOf(source) ?? -1, column: map?.columns.indexOf(target) ?? -1 };
    return cell.row >= 0 && cell.column >= 0 ? cell : null;
  }

  /** The cell of the two blocks that a state has pinned. */
  function pinnedCell() {
    const [source, target = ""] = state.pinned.split(" ");
    return cellOf(source, target);
  }

  /** @param {Cell | null} cell */
  function pinCell(cell) {
    const [source, target] = cell && map ? [map.rows[cell.row], map.columns[cell.column]] : [];
    change({ pinned: target === undefined ? "" : `${source} ${target}` });
    layers.pin(null);
    if (target !== undefined) layers.reveal(({ pair }) => pair.target.block === target);
    describe(null);
  }

  /** @param {string} name */
  function pinLayer(name) {
    change({ pinned: name });
    show();
  }

  /** Pin what the state says: the name of a target layer, or two blocks. */
  function show() {
    const row = rows.find(({ key }) => key === state.pinned);
    heat.pin(row ? cellOf(row.pair.source?.block ?? "", row.pair.target.block) : pinnedCell());
    layers.pin(row ? state.pinned : null);
    describe(null);
  }

  /** @param {Pointed | null} what */
  function describe(what) {
    const pinned = { row: rows.find(({ key }) => key === state.pinned), cell: pinnedCell() };
    const isPinned = !what && Boolean(pinned.row ?? pinned.cell);
    pointed = what ?? (isPinned ? null : pointed);
    const { row, cell } = isPinned ? pinned : (pointed ?? {});
    const lines = row ? ofLayer(row.pair) : cell ? ofCell(cell) : [];
    details.hidden = !lines.length;
    if (lines.length) lines[2] += ` · ${say(isPinned ? "pinned" : "pin")}`;
    details.replaceChildren(...lines.map((line) => make("div", { title: line }, line)));
  }

  /** @param {Pair} pair */
  function ofLayer({ source, target, left, right, corrected }) {
    const share = kept.get(target.name);
    const values = { left, right, corrected, ...(share === undefined ? {} : { kept: share }) };
    const words = Object.entries(values).map(
      ([key, value]) => `${say(key)} ${Number.isNaN(value) ? "–" : value.toFixed(3)}`,
    );
    return [
      source ? source.name : say("no_source"),
      `→ ${target.name}`,
      [...(source ? [source] : []), target].map(({ shape }) => shape.join(" × ")).join(" → "),
      source ? words.join(" · ") : "",
    ];
  }

  /** @param {Cell} cell */
  function ofCell({ row, column }) {
    if (!map || !model) return [];
    const { sources, targets } = model;
    const place = row * map.columns.length + column;
    const [value, count] = [map.values[place], map.counts[place]];
    const pair = cellCounts.get(place);
    const words = value <= model.least ? "lowest_of" : "mean_of";
    const sizes = (/** @type {ViewedLayer[]} */ layers, /** @type {string} */ block) => {
      const shapes = layers.filter((layer) => layer.block === block).map(({ shape }) => shape.join(" × "));
      const found = [...new Set(shapes)];
      return `${found.slice(0, 2).join(", ")}${found.length > 2 ? ", …" : ""}`;
    };
    const found = count ? say(words, { value: value.toFixed(2), count }) : say("other_size");
    return [
      map.rows[row],
      `→ ${map.columns[column]}`,
      `${sizes(sources, map.rows[row])} → ${sizes(targets, map.columns[column])}`,
      `${found} · ${pair ? say("paired", pair) : say("not_paired")}`,
    ];
  }

  /** @param {string} text */
  function fail(text) {
    model = null;
    message.textContent = text;
    message.hidden = false;
    element.replaceChildren(message);
  }

  fail(say("waiting_similarity"));
  return {
    element,
    fail,
    /**
     * Show the JSON of a similarity; where it cannot be read, say why.
     * @param {unknown} data
     * @param {unknown} [saved] the state of before
     */
    show(data, saved) {
      /** @type {Similarity} */
      let found;
      try {
        found = readSimilarity(data);
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        return fail(say(error.message, error.values));
      }
      model = found;
      state = readState(saved, { ...SIMILARITY_STATE, threshold: state.threshold });
      const offered = choices(found);
      state.group = options(selects.group.box, offered.groups, state.group, (group) => say(`group_${group}`));
      state.stage = options(selects.stage.box, offered.stages, state.stage, String);
      const rank = found.rank === null ? say("full_rank") : say("at_rank", { rank: found.rank });
      title.replaceChildren(make("b", {}, found.source), " → ", make("b", {}, found.target), ` · ${rank}`);
      title.title = title.textContent ?? "";
      element.replaceChildren(...parts);
      filter();
    },
    /**
     * Follow a threshold that was set elsewhere; what is no number sets none.
     * @param {unknown} threshold
     */
    setThreshold(threshold) {
      if (typeof threshold !== "number" || !Number.isFinite(threshold) || threshold === state.threshold) return;
      state.threshold = threshold;
      if (model) refresh();
    },
    /**
     * Take what each target layer kept of its update, from a transfer that was made.
     * @param {Map<string, number>} shares
     */
    setKept(shares) {
      kept = shares;
      if (model) refresh();
    },
  };
}
