// @ts-check
/** What the similarity view shows, from the JSON of `lorax/show/view.schema.json`. Nothing here knows a browser. */

import { checkSchema, item, list, number, Problem, record, word } from "./checks.js";
import { GROUP_NAMES, groupOf, stageOf } from "./names.js";

const SIMILARITY_SCHEMA = "lorax-similarity-view";
const MOST_CELLS = 2 ** 22; // of a map: 2,048 x 2,048 blocks

/** @typedef {{ name: string, block: string, stage: string, shape: number[], group: string }} ViewedLayer */

/**
 * The layers of one kind, those of the source first, and the values of all their pairs, source by source; NaN: none.
 * @typedef {{ kind: string, group: string, sides: [ViewedLayer[], ViewedLayer[]], values: Float32Array | null }} Kind
 */

/**
 * A layer of the target, what feeds it, and how similar they are.
 * @typedef {object} Pair
 * @property {ViewedLayer} target
 * @property {ViewedLayer | null} source
 * @property {number} left
 * @property {number} right
 * @property {number} corrected
 */

/**
 * Layers of both bases, the values of all pairs by kind, and for each target layer what feeds it.
 * @typedef {object} Similarity
 * @property {string} source
 * @property {string} target
 * @property {number | null} rank
 * @property {ViewedLayer[]} sources
 * @property {ViewedLayer[]} targets
 * @property {Kind[]} kinds
 * @property {Pair[]} pairs
 * @property {number} least below this a value is the lowest that is told, or less
 */

/** @typedef {{ group: string, stage: string }} Filter what is chosen; empty: all */
/** @typedef {{ rows: string[], columns: string[], values: Float32Array, counts: Uint16Array }} BlockMap */
/** @typedef {{ row: number, column: number }} Cell */
/** @typedef {Cell & { count: number, above: number }} PairedCell */

/**
 * Read a similarity.
 * @param {unknown} given
 * @returns {Similarity}
 * @throws {Problem} what came is of another version, damaged, or empty
 */
export function readSimilarity(given) {
  const data = checkSchema(given, SIMILARITY_SCHEMA);
  const shapes = list(data.shapes, "shapes").map((shape) =>
    list(shape, "shapes").map((side) => number(side, "shapes")),
  );
  const [sources, targets] = ["sources", "targets"].map((side) => readTable(data[side], shapes, side));
  const scale = record(data.scale, "scale");
  const [lowest, step] = ["lowest", "step"].map((part) => number(scale[part], "scale"));
  const kinds = list(data.kinds, "kinds").map((kind) => readKind(kind, sources, targets, { lowest, step }));
  const pairs = list(data.pairs, "pairs").map((pair) => {
    const [target, source, left, right, corrected] = list(pair, "pairs");
    return {
      target: item(targets, target, "pairs"),
      source: source === null ? null : item(sources, source, "pairs"),
      left: number(left, "pairs"),
      right: number(right, "pairs"),
      corrected: number(corrected, "pairs"),
    };
  });
  if (pairs.length !== targets.length) throw new Problem("damaged", { what: "pairs" });
  if (!pairs.length) throw new Problem("no_layers");
  for (const { kind, sides } of kinds) for (const layer of sides.flat()) layer.group = groupOf(kind);
  const [source, target] = [data.source, data.target].map((name) => word(name, "names"));
  const rank = data.rank === null ? null : number(data.rank, "rank");
  return { source, target, rank, sources, targets, kinds, pairs, least: lowest + step };
}

/**
 * @param {unknown} given
 * @param {number[][]} shapes
 * @param {string} side
 * @returns {ViewedLayer[]}
 */
function readTable(given, shapes, side) {
  const table = record(given, side);
  const [blocks, roles] = ["blocks", "roles"].map((part) => list(table[part], side).map((name) => word(name, side)));
  return list(table.layers, side).map((entry) => {
    const [block, role, shape] = list(entry, side);
    const place = item(blocks, block, side);
    const name = `${place}.${item(roles, role, side)}`;
    return { name, block: place, stage: stageOf(place), shape: item(shapes, shape, side), group: "other" };
  });
}

/**
 * @param {unknown} given
 * @param {ViewedLayer[]} sources
 * @param {ViewedLayer[]} targets
 * @param {{ lowest: number, step: number }} scale
 * @returns {Kind}
 */
function readKind(given, sources, targets, { lowest, step }) {
  const kind = record(given, "kinds");
  /** @type {[ViewedLayer[], ViewedLayer[]]} */
  const sides = [
    list(kind.sources, "kinds").map((place) => item(sources, place, "kinds")),
    list(kind.targets, "kinds").map((place) => item(targets, place, "kinds")),
  ];
  const name = word(kind.kind, "kinds");
  const group = groupOf(name);
  if (kind.corrected === null) return { kind: name, group, sides, values: null };
  let bytes = "";
  try {
    bytes = atob(String(kind.corrected));
  } catch {
    // What is no base64 has no length that fits.
  }
  if (bytes.length !== sides[0].length * sides[1].length) throw new Problem("damaged", { what: name });
  const values = new Float32Array(bytes.length);
  for (let i = 0; i < bytes.length; i++) {
    const code = bytes.charCodeAt(i);
    values[i] = code ? lowest + step * (code - 1) : NaN;
  }
  return { kind: name, group, sides, values };
}

/**
 * Return what the filters offer: the groups and the stages that there are, in order.
 * @param {Similarity} model
 */
export function choices(model) {
  const layers = [...model.sources, ...model.targets];
  return {
    groups: GROUP_NAMES.filter((group) => layers.some((layer) => layer.group === group)),
    stages: [...new Set(layers.map((layer) => layer.stage))],
  };
}

/**
 * @param {ViewedLayer} layer
 * @param {Filter} filter
 */
function chosen(layer, { group, stage }) {
  return (!group || layer.group === group) && (!stage || layer.stage === stage);
}

/**
 * Return the pairs whose target layer passes the filter.
 * @param {Similarity} model
 * @param {Filter} filter
 */
export function chosenPairs(model, filter) {
  return model.pairs.filter(({ target }) => chosen(target, filter));
}

/**
 * Return the map of blocks: for each source block and target block the mean over the kinds of layer that both have.
 * @param {Similarity} model
 * @param {Filter} filter
 * @returns {BlockMap | null} `rows` and `columns` (names of blocks), `values` and `counts` (row by row), or null where no
 *   pairs were kept or the map would be too large
 */
export function blockMap(model, filter) {
  if (model.kinds.some(({ values }) => values === null)) return null;
  const names = [model.sources, model.targets].map((layers) => [
    ...new Set(layers.filter((layer) => chosen(layer, filter)).map(({ block }) => block)),
  ]);
  const [rows, columns] = names;
  if (rows.length * columns.length > MOST_CELLS) return null;
  const [rowOf, columnOf] = names.map((blocks) => new Map(blocks.map((block, i) => [block, i])));
  const values = new Float32Array(rows.length * columns.length);
  const counts = new Uint16Array(values.length);
  for (const { group, sides, values: pairs } of model.kinds) {
    if (pairs === null || (filter.group && group !== filter.group)) continue;
    sides[0].forEach((source, i) => {
      const row = rowOf.get(source.block);
      if (row === undefined) return;
      sides[1].forEach((target, j) => {
        const column = columnOf.get(target.block);
        const value = pairs[i * sides[1].length + j];
        if (column === undefined || Number.isNaN(value)) return;
        values[row * columns.length + column] += value;
        counts[row * columns.length + column] += 1;
      });
    });
  }
  values.forEach((sum, i) => (values[i] = counts[i] ? sum / counts[i] : NaN));
  return { rows, columns, values, counts };
}

/**
 * Whether a layer gets its update: it is fed, and its similarity is not at or below the threshold (NaN is not).
 * @param {Pair} pair
 * @param {number} threshold
 */
export function isAbove(pair, threshold) {
  return pair.source !== null && !(pair.corrected <= threshold);
}

/**
 * Return how many of some pairs would be transferred.
 * @param {Pair[]} pairs
 * @param {number} threshold
 */
export function countAbove(pairs, threshold) {
  return pairs.filter((pair) => isAbove(pair, threshold)).length;
}

/**
 * Return the cells of a map where a block feeds a block: how many layers, and how many of them are above.
 * @param {BlockMap} map
 * @param {Pair[]} pairs
 * @param {number} threshold
 */
export function pairedCells(map, pairs, threshold) {
  const [rowOf, columnOf] = [map.rows, map.columns].map((blocks) => new Map(blocks.map((block, i) => [block, i])));
  /** @type {Map<number, PairedCell>} */
  const cells = new Map();
  for (const pair of pairs) {
    const row = pair.source && rowOf.get(pair.source.block);
    const column = columnOf.get(pair.target.block);
    if (typeof row !== "number" || column === undefined) continue;
    const key = row * map.columns.length + column;
    const cell = cells.get(key) ?? { row, column, count: 0, above: 0 };
    cell.count += 1;
    cell.above += isAbove(pair, threshold) ? 1 : 0;
    cells.set(key, cell);
  }
  return [...cells.values()];
}

/**
 * Return how many pairs have a corrected similarity in each of `count` steps from `low` to `high`, ends and beyond.
 * @param {Pair[]} pairs
 * @param {number} low
 * @param {number} high
 * @param {number} count
 * @returns {number[]}
 */
export function histogram(pairs, low, high, count) {
  const bins = new Array(count).fill(0);
  for (const { corrected } of pairs) {
    if (Number.isNaN(corrected)) continue;
    bins[Math.min(Math.max(Math.floor(((corrected - low) / (high - low)) * count), 0), count - 1)] += 1;
  }
  return bins;
}
