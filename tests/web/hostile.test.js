/** Data and states as a workflow file may hold them, whoever wrote it: read, or refused with words; never an exception. */

import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";

import { MOST_ITEMS, Problem, readState } from "../../web/checks.js";
import { lossLines, readLoss } from "../../web/loss_data.js";
import { axisRuns, shortBlock } from "../../web/names.js";
import { keptShares, outcomes, readReport, reportText, shortLayer } from "../../web/report_data.js";
import { packReport } from "../../web/report_pack.js";
import { blockMap, choices, chosenPairs, histogram, pairedCells, readSimilarity } from "../../web/similarity_data.js";
import { say, speak, tell } from "../../web/texts.js";
import { computed, report, similarity } from "./sources.js";

const FRENCH = JSON.parse(readFileSync(new URL("../../locales/fr/main.json", import.meta.url), "utf8")).lorax;
speak(FRENCH); // so that notes are put together

const ALL = { group: "", stage: "" };
const NO_TEXT = { toString: 1, valueOf: 1 }; // String() of it throws
const VALUES = [null, true, 5, -1, 0.5, 1e308, "", "toString", "__proto__", "x".repeat(1e5), [], [[[]]], {}, NO_TEXT];

/** Show all that the views show of a similarity, but for the elements. */
function showSimilarity(data) {
  const model = readSimilarity(data);
  const { stages, groups } = choices(model);
  for (const filter of [ALL, { group: groups[0], stage: stages[0] }]) {
    const [map, pairs] = [blockMap(model, filter), chosenPairs(model, filter)];
    if (map) [axisRuns(map.rows), pairedCells(map, pairs, 0)].join();
    histogram(pairs, -0.25, 0.99, 62);
  }
  say("at_rank", { rank: model.rank });
  return model.targets.map(({ block, shape }) => `${shortBlock(block)} ${shape.join(" × ")}`);
}

function showReport(data) {
  const read = readReport(data);
  read.rows.map((row) => [shortLayer(row), say("method_rank", row), say(row.outcome), row.left.toFixed(3)]);
  for (const note of [...read.warnings, ...read.rows.flatMap(({ notes }) => notes)]) {
    expect(tell(note)).not.toMatch(/\[object|undefined/);
  }
  return [outcomes(read.rows), keptShares(read), reportText(read), read.strength.toFixed(2)];
}

function showLoss(data) {
  const lines = lossLines(readLoss(data), 300, 110);
  for (const path of [lines.line, lines.mean]) expect(path).not.toMatch(/NaN|Infinity/);
  return lines.high.toPrecision(3);
}

const KINDS = [
  ["similarity", showSimilarity, similarity],
  ["report", showReport, report],
  ["packed report", showReport, () => packReport(report())],
  ["loss", showLoss, () => ({ steps: [1, 2, 5], losses: [0.5, null, 0.1], total: 9 })],
];

/** Return the ways to every value within a value. */
function ways(value, way = []) {
  if (typeof value !== "object" || value === null) return [way];
  return [way, ...Object.entries(value).flatMap(([key, inner]) => ways(inner, [...way, key]))];
}

function changed(value, [key, ...way], other) {
  if (key === undefined) return other;
  const copy = Array.isArray(value) ? [...value] : { ...value };
  copy[key] = changed(copy[key], way, other);
  return copy;
}

test.each(KINDS)("every value of a %s may be anything", (_, show, make) => {
  show(make());
  let refused = 0;
  for (const way of ways(make())) {
    for (const value of VALUES) {
      try {
        show(changed(make(), way, value));
      } catch (error) {
        if (!(error instanceof Problem))
          throw new Error(`${way.join(".")} = ${JSON.stringify(value)}`, { cause: error });
        expect(say(error.message, error.values)).not.toMatch(/\{\w+\}|\[object|undefined/);
        refused += 1;
      }
    }
  }
  expect(refused).toBeGreaterThan(50);
});

test("an outcome is one of ours, not what every object has", () => {
  for (const outcome of ["toString", "constructor", "__proto__"]) {
    expect(() => readReport({ ...report(), rows: [{ source: "x", outcome }], layers: 1 })).toThrow("damaged");
  }
});

describe("what is too much", () => {
  const blocks = Array.from({ length: 3000 }, (_, i) => `transformer.blocks.${i}`);
  const table = { blocks, roles: ["to_q"], layers: blocks.map((_, i) => [i, 0, 0]) };
  const places = blocks.map((_, i) => i);
  const wide = {
    ...similarity(),
    sources: table,
    targets: table,
    kinds: [{ kind: "transformer:to_q", sources: [0], targets: [0], corrected: btoa("x") }],
    pairs: places.map((i) => [i, i, 1, 1, 1]),
  };

  test("more blocks than a canvas shows give no map, and all layers", () => {
    const model = readSimilarity(wide);
    expect(blockMap(model, ALL)).toBeNull();
    expect(chosenPairs(model, ALL)).toHaveLength(3000);
  });

  test.each([
    ["60,000 blocks", () => readSimilarity(changed(wide, ["sources", "blocks"], new Array(60_000).fill("x")))],
    ["60,000 pairs", () => readSimilarity({ ...wide, pairs: new Array(60_000).fill([0, 0, 1, 1, 1]) })],
    ["60,000 rows", () => readReport(report(new Array(60_000).fill("transferred")))],
    [
      "500,000 points",
      () => readLoss({ steps: new Array(500_000).fill(1), losses: new Array(500_000).fill(1), total: 1 }),
    ],
  ])("%s are refused", (_, read) => {
    const start = computed();
    expect(read).toThrow("too_many");
    expect(computed() - start).toBeLessThan(500);
  });

  test("names at their longest do not take time by the square", () => {
    const start = computed();
    for (const piece of ["1.", "a", "f", "down_blocks.1.", "attn.1.transformer_blocks.", "_q", "mid_block.x."]) {
      const name = `unet.${piece.repeat(10_000 / piece.length)}`.slice(0, 10_000);
      const data = report(["transferred"]);
      expect(showReport(changed(data, ["rows", 0, "block"], name))).toBeTruthy();
      expect(showReport(changed(data, ["rows", 0, "role"], name))).toBeTruthy();
      expect(showSimilarity(changed(similarity(), ["targets", "blocks", 0], name))).toBeTruthy();
      expect(showSimilarity(changed(similarity(), ["kinds", 0, "kind"], name))).toBeTruthy();
    }
    expect(computed() - start).toBeLessThan(5000);
  });

  test("as many layers as a file may hold are shown", () => {
    const rows = new Array(MOST_ITEMS).fill("transferred");
    expect(readReport(report(rows)).arrived).toBe(MOST_ITEMS);
  });
});

describe("a state", () => {
  const NOTHING = { pinned: "", threshold: 0 };

  test("is what was kept", () => {
    expect(readState({ pinned: "a b", threshold: -0.5 }, NOTHING)).toEqual({ pinned: "a b", threshold: -0.5 });
  });

  test.each(VALUES.map((value) => [value]))("is never of another kind: %j", (value) => {
    for (const kept of [value, { pinned: value, threshold: value }]) {
      const { pinned, threshold, ...rest } = readState(kept, NOTHING);
      expect([typeof pinned, Number.isFinite(threshold), rest]).toEqual(["string", true, {}]);
    }
  });
});
