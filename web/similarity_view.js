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

const MANY = 1000;
const SIMILARITY_STATE = { group: "", stage: "", pinned: "", threshold: 0 }; // what the user chose

/**
 * Return the view.
 * @param {(state: object) => void} onState what the user chose changed: `{group, stage, pinned, threshold}`
 * @param {(value: number) => void} onThreshold the user set another threshold
 * @param {(threshold: number) => string} note what setting the threshold does, in words
 */
export function similarityView({ onState, onThreshold, note }) {
  const element = make("div", { class: "lorax-view lorax-similarity" });
  let [model, map, pairs, kept] = [null, null, [], new Map()];
  let [rows, cellCounts] = [[], new Map()];
  let state = { ...SIMILARITY_STATE };

  const title = make("div", { class: "lorax-title" });
  const message = make("div", { class: "lorax-message", role: "status" });
  const details = make("div", { class: "lorax-details", "aria-live": "polite" });
  const selects = { group: select("kind"), stage: select("stage") };
  const heat = heatMap({ onPoint: (cell) => describe(cell && { cell }), onPin: pinCell });
  const slider = thresholdSlider({ onDrag: drag });
  const layers = bars({
    columns: ["left", "right", "corrected"],
    onPoint: (row) => describe(row && { row }),
    onPin: (row) => pinLayer(row?.key ?? ""),
  });
  const controls = make("div", { class: "lorax-controls" }, selects.group.label, selects.stage.label);
  const parts = [title, controls, message, heat.element, legend(), details, slider.element, layers.element];

  function select(name) {
    const box = make("select");
    box.addEventListener("change", () => {
      change({ [name === "kind" ? "group" : "stage"]: box.value, pinned: "" });
      filter();
    });
    keepKeys(box);
    return { box, label: make("label", {}, say(name), box) };
  }

  function options(box, values, chosen, words) {
    box.replaceChildren(
      ...["", ...values].map((value) => make("option", { value }, value ? words(value) : say("all"))),
    );
    box.value = values.includes(chosen) ? chosen : "";
    return box.value;
  }

  function change(values) {
    state = { ...state, ...values };
    onState(state);
  }

  function filter() {
    map = blockMap(model, state);
    pairs = chosenPairs(model, state);
    const empty = !pairs.length || (map && !map.values.length);
    const crowd = pairs.length > MANY ? say("many_layers", { count: pairs.length }) : "";
    message.textContent = empty ? say("nothing_chosen") : map ? crowd : say("no_map");
    message.hidden = !message.textContent;
    heat.element.hidden = !map || empty;
    if (map && !empty) heat.show(map);
    slider.fill(histogram(pairs, LOW, HIGH, STEPS));
    refresh();
    show(state.pinned);
  }

  function refresh() {
    const above = countAbove(pairs, state.threshold);
    slider.show(state.threshold, above, pairs.length, note(state.threshold));
    if (map?.values.length) {
      const cells = pairedCells(map, pairs, state.threshold);
      cellCounts = new Map(cells.map((cell) => [cell.row * map.columns.length + cell.column, cell]));
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

  function drag(threshold) {
    change({ threshold });
    onThreshold(threshold);
    refresh();
    describe(null);
  }

  function cellOf({ source, target }) {
    const cell = { row: map?.rows.indexOf(source?.block) ?? -1, column: map?.columns.indexOf(target.block) ?? -1 };
    return cell.row >= 0 && cell.column >= 0 ? cell : null;
  }

  function pinCell(cell) {
    const name = cell && `${map.rows[cell.row]} ${map.columns[cell.column]}`;
    change({ pinned: name ?? "" });
    layers.pin(null);
    if (cell) layers.reveal(({ pair }) => pair.target.block === map.columns[cell.column]);
    describe(null);
  }

  function pinLayer(name) {
    change({ pinned: name });
    show(name);
  }

  /** Pin what a state says: the name of a target layer, or two blocks. */
  function show(pinned) {
    const row = rows.find(({ key }) => key === pinned);
    const [source, target] = pinned.split(" ");
    heat.pin(map && (row ? cellOf(row.pair) : cellOf({ source: { block: source }, target: { block: target ?? "" } })));
    layers.pin(row ? pinned : null);
    describe(null);
  }

  function describe(what) {
    const pinned = state.pinned && !what;
    const row = what?.row ?? (pinned && rows.find(({ key }) => key === state.pinned));
    const [source, target] = state.pinned.split(" ");
    const cell =
      what?.cell ?? (pinned && map && target && cellOf({ source: { block: source }, target: { block: target } }));
    const lines = row ? ofLayer(row.pair) : cell ? ofCell(cell) : [say("map_hint")];
    if (pinned && (row || cell)) lines[2] += ` · ${say("pinned")}`;
    details.replaceChildren(...lines.map((line) => make("div", { title: line }, line)));
  }

  function ofLayer({ source, target, left, right, corrected }) {
    const size = ({ shape }) => shape.join(" × ");
    const share = kept.get(target.name);
    const values = { left, right, corrected, ...(share === undefined ? {} : { kept: share }) };
    const words = Object.entries(values).map(
      ([key, value]) => `${say(key)} ${Number.isNaN(value) ? "–" : value.toFixed(3)}`,
    );
    return [
      source ? source.name : say("no_source"),
      `→ ${target.name}`,
      [source, target].filter(Boolean).map(size).join(" → "),
      source ? words.join(" · ") : "",
    ];
  }

  function ofCell({ row, column }) {
    const place = row * map.columns.length + column;
    const [value, count] = [map.values[place], map.counts[place]];
    const pair = cellCounts.get(place);
    const words = value <= model.least ? "lowest_of" : "mean_of";
    const sizes = (side, block) => {
      const layers = model[side].filter((layer) => layer.block === block);
      const found = [...new Set(layers.map(({ shape }) => shape.join(" × ")))];
      return `${found.slice(0, 2).join(", ")}${found.length > 2 ? ", …" : ""}`;
    };
    const found = count ? say(words, { value: value.toFixed(2), count }) : say("other_size");
    return [
      map.rows[row],
      `→ ${map.columns[column]}`,
      `${sizes("sources", map.rows[row])} → ${sizes("targets", map.columns[column])}`,
      `${found} · ${pair ? say("paired", pair) : say("not_paired")}`,
    ];
  }

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
    /** Show the JSON of a similarity; where it cannot be read, say why. */
    show(data, saved) {
      try {
        model = readSimilarity(data);
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        return fail(say(error.message, error.values));
      }
      state = readState(saved, { ...SIMILARITY_STATE, threshold: state.threshold });
      const offered = choices(model);
      state.group = options(selects.group.box, offered.groups, state.group, (group) => say(`group_${group}`));
      state.stage = options(selects.stage.box, offered.stages, state.stage, String);
      const rank = model.rank === null ? say("full_rank") : say("at_rank", { rank: model.rank });
      title.replaceChildren(make("b", {}, model.source), " → ", make("b", {}, model.target), ` · ${rank}`);
      title.title = title.textContent;
      element.replaceChildren(...parts);
      filter();
    },
    /** Follow a threshold that was set elsewhere; what is no number sets none. */
    setThreshold(threshold) {
      if (threshold === state.threshold || !Number.isFinite(threshold)) return;
      state.threshold = threshold;
      if (model) refresh();
    },
    /** Take what each target layer kept of its update, from a transfer that was made. */
    setKept(shares) {
      kept = shares;
      if (model) refresh();
    },
  };
}
