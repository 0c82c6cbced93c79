import { describe, expect, test } from "vitest";

import { Problem } from "../../web/checks.js";
import {
  blockMap,
  choices,
  chosenPairs,
  countAbove,
  histogram,
  pairedCells,
  readSimilarity,
} from "../../web/similarity_data.js";
import { computed, similarity } from "./sources.js";

const ALL = { group: "", stage: "" };

describe("what is read", () => {
  test("names are block and role, kinds and stages come from them", () => {
    const model = readSimilarity(similarity());
    expect(model.targets.map(({ name }) => name)).toContain(
      "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    );
    expect(choices(model)).toEqual({ groups: ["q", "out"], stages: ["down 0", "mid"] });
    expect(model.pairs[0]).toMatchObject({ left: 0.97, right: 0.95, corrected: 0.9 });
  });

  test("the scale is that of the data", () => {
    const model = readSimilarity({ ...similarity({ value: () => -0.27 }), scale: { lowest: 0.25, step: 0.5 } });
    expect([model.kinds[0].values[0], model.least]).toEqual([0.25, 0.75]);
  });

  test("a byte is a value to half a step of 0.005, and 0 is none", () => {
    for (let value = -0.27; value <= 1; value += 0.0137) {
      const [found] = readSimilarity(similarity({ value: () => value })).kinds[0].values;
      expect(Math.abs(found - value)).toBeLessThanOrEqual(0.0025 + 1e-6);
    }
    expect(readSimilarity(similarity({ value: () => null })).kinds[0].values[0]).toBeNaN();
  });
});

describe("what cannot be read says why", () => {
  const broken = (change) => {
    const data = similarity();
    change(data);
    return () => readSimilarity(data);
  };
  test.each([
    ["nothing", () => readSimilarity(null), "damaged"],
    ["text", () => readSimilarity("{"), "damaged"],
    ["another schema", broken((data) => (data.schema = "lorax-transfer")), "unknown_schema"],
    ["another version", broken((data) => (data.schema_version = 7)), "unknown_schema"],
    ["an older version", broken((data) => (data.schema_version = 1) && delete data.scale), "old_version"],
    ["no scale", broken((data) => delete data.scale), "damaged"],
    ["no layers", () => readSimilarity(similarity({ blocks: [] })), "no_layers"],
    ["pairs cut off", broken((data) => data.pairs.pop()), "damaged"],
    ["a map cut off", broken((data) => (data.kinds[0].corrected = data.kinds[0].corrected.slice(4))), "damaged"],
    ["a map that is no base64", broken((data) => (data.kinds[0].corrected = "?")), "damaged"],
    ["no kinds", broken((data) => delete data.kinds), "damaged"],
    ["no table", broken((data) => delete data.targets), "damaged"],
    ["a layer of no block", broken((data) => (data.sources.layers[0] = [99, 0, 0])), "damaged"],
    ["a pair of no layer", broken((data) => (data.pairs[0][1] = 99)), "damaged"],
    ["NaN", broken((data) => (data.pairs[0][4] = NaN)), "damaged"],
    ["a word for a number", broken((data) => (data.pairs[0][2] = "0.9")), "damaged"],
  ])("%s", (_, read, key) => {
    expect(read).toThrow(Problem);
    expect(read).toThrow(key);
  });
});

describe("the map", () => {
  test("a cell is the mean over the kinds that both blocks have; a filter leaves one", () => {
    const model = readSimilarity(similarity({ value: (i, j, r) => (r ? 0.2 : 0.8) }));
    expect(blockMap(model, ALL).values[0]).toBeCloseTo(0.5, 2);
    expect(blockMap(model, ALL).counts[0]).toBe(2);
    expect(blockMap(model, { group: "q", stage: "" }).values[0]).toBeCloseTo(0.8, 2);
  });

  test("a stage leaves its blocks on both sides", () => {
    const map = blockMap(readSimilarity(similarity()), { group: "", stage: "mid" });
    expect([map.rows.length, map.columns.length, map.values.length]).toEqual([1, 1, 1]);
  });

  test("no value is NaN, and does not count into a mean", () => {
    const model = readSimilarity(similarity({ value: (i, j, r) => (r ? null : 0.8) }));
    expect(blockMap(model, ALL).values[0]).toBeCloseTo(0.8, 2);
    expect(blockMap(model, { group: "out", stage: "" }).values[0]).toBeNaN();
  });

  test("without the pairs there is no map, and the layers stay", () => {
    const data = similarity();
    data.kinds.forEach((kind) => (kind.corrected = null));
    const model = readSimilarity(data);
    expect(blockMap(model, ALL)).toBeNull();
    expect(chosenPairs(model, ALL)).toHaveLength(4);
  });

  test("560 x 560 blocks are a map within a tenth of a second", () => {
    const blocks = Array.from({ length: 560 }, (_, i) => `transformer.transformer_blocks.${i}`);
    const kinds = similarity({ blocks: blocks.slice(0, 1), roles: ["attn.to_q"] });
    const table = { blocks, roles: ["attn.to_q"], layers: blocks.map((_, i) => [i, 0, 0]) };
    const places = blocks.map((_, i) => i);
    const bytes = Buffer.alloc(560 * 560, 200).toString("base64");
    const model = readSimilarity({
      ...kinds,
      sources: table,
      targets: table,
      kinds: [{ kind: "transformer:attn.to_q", sources: places, targets: places, corrected: bytes }],
      pairs: places.map((i) => [i, i, 1, 1, 1]),
    });
    const start = computed();
    expect(blockMap(model, ALL).values).toHaveLength(560 * 560);
    expect(computed() - start).toBeLessThan(100);
  });
});

describe("the threshold", () => {
  const model = readSimilarity(similarity({ value: (i, j, r) => [0.2, 0.6][r] }));

  test("a layer is above only if it is more: what is equal gets no update", () => {
    expect([0.1, 0.2, 0.59, 0.6, 0.7].map((value) => countAbove(model.pairs, value))).toEqual([4, 2, 2, 0, 0]);
  });

  test("a layer without a source never, without a value always: as the transfer does", () => {
    const data = similarity();
    data.pairs[0] = [0, null, null, null, null];
    data.pairs[1] = [1, 1, null, null, null];
    expect(countAbove(readSimilarity(data).pairs, 0.95)).toBe(1);
  });

  test("a cell where blocks are paired knows how many of its layers are above", () => {
    const map = blockMap(model, ALL);
    expect(pairedCells(map, model.pairs, 0.4)).toEqual([
      { row: 0, column: 0, count: 2, above: 1 },
      { row: 1, column: 1, count: 2, above: 1 },
    ]);
  });

  test("a histogram counts every value once, the ends take what is beyond", () => {
    const counts = histogram(readSimilarity(similarity({ value: () => 0.999 })).pairs, 0, 0.9, 9);
    expect(counts).toEqual([0, 0, 0, 0, 0, 0, 0, 0, 4]);
  });
});
