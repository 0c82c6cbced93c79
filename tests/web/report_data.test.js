import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";

import { keptShares, outcomes, readReport, reportText, shortLayer, SIGNS } from "../../web/report_data.js";
import { packReport } from "../../web/report_pack.js";
import { Problem } from "../../web/checks.js";
import { ENGLISH } from "../../web/texts.js";
import { report } from "./sources.js";

test("a report comes back from the workflow file as it was, numbers to four digits", () => {
  const [plain, packed] = [readReport(report()), readReport(JSON.parse(JSON.stringify(packReport(report()))))];
  expect(packed.rows[0].corrected).toBeCloseTo(plain.rows[0].corrected, 4);
  const rounded = plain.rows.map((row) => ({
    ...row,
    corrected: Number.isNaN(row.corrected) ? NaN : Math.round(row.corrected * 1e4) / 1e4,
  }));
  expect(packed).toEqual({ ...plain, rows: rounded });
});

test("packing takes a third of the size", () => {
  const big = report(new Array(560).fill("transferred"));
  expect(JSON.stringify(packReport(big)).length).toBeLessThan(JSON.stringify(big).length / 3);
});

const nested = (inner = 1) => ({ code: "weak", values: { inner }, text: "" });

/** What workflow files of version 1 hold. */
const OLD = {
  schema: "lorax-transfer-packed",
  schema_version: 1,
  adapter: "style",
  source: "a",
  target: "b",
  method: "auto",
  rank: 320,
  threshold: 0,
  layers: 1,
  arrived: 1,
  retained_energy: 0.9,
  suggested_strength: 1,
  summary: "1 of 1 layers arrived",
  warnings: [],
  words: ["transferred", "orthogonal", ""],
  rows: [["unet.mid_block.attentions.0.proj_in", 0, 0, 1, 0, 0.9, 0.9, 0.8, 0.9, 2]],
  unused: {},
  unused_count: 0,
};

describe("what cannot be read says why", () => {
  test.each([
    ["nothing", null, "damaged"],
    ["another version", { ...report(), schema_version: 7 }, "unknown_schema"],
    ["an older version", { ...report(), schema_version: 1 }, "old_version"],
    ["an older version, packed", OLD, "old_version"],
    ["an older version, packed and cut off", { ...OLD, words: undefined, rows: [[]] }, "old_version"],
    ["another version, packed", { ...packReport(report()), schema_version: 7 }, "unknown_schema"],
    ["another schema", { schema: "lorax-assignment", schema_version: 1 }, "unknown_schema"],
    ["rows cut off", { ...report(), rows: report().rows.slice(1) }, "damaged"],
    ["no rows", { ...report(), rows: undefined }, "damaged"],
    ["no layers", { ...report([]), layers: 0 }, "no_layers"],
    ["NaN", { ...report(), retained_norm: NaN }, "damaged"],
    ["an outcome of the future", { ...report(), rows: [{ source: "x", outcome: "lost" }], layers: 1 }, "damaged"],
    ["a grade of the future", { ...report(), grade: "great" }, "damaged"],
    ["more layers than there are", { ...report(), arrived: 9 }, "damaged"],
    ["notes in notes in notes", { ...report(), warnings: [nested(nested(nested()))] }, "damaged"],
    ["packed, words cut off", { ...packReport(report()), words: [] }, "damaged"],
    ["packed, without rows", { ...packReport(report()), rows: null }, "damaged"],
  ])("%s", (_, data, key) => {
    expect(() => readReport(data)).toThrow(Problem);
    expect(() => readReport(data)).toThrow(key);
  });
});

test("the text has a line for every row and says why", () => {
  const lines = reportText(readReport(report())).split("\n");
  expect(lines).toHaveLength(7 + 3);
  expect(lines[0]).toBe("style: a -> b");
  expect(lines[3]).toBe("warning: weak effect: only 30%; try the method copy");
  expect(lines.at(-1)).toContain("not in target");
});

test("layers and those that arrived are as the report counts them: several rows may be of one layer", () => {
  const found = readReport({ ...report(["transferred", "transferred", "not readable"]), layers: 2, arrived: 1 });
  expect([found.arrived, found.layers, found.rows.length]).toEqual([1, 2, 3]);
});

test("the grade is the report's, whatever norm was kept", () => {
  const found = readReport({ ...report(["transferred"]), retained_norm: 0.3, grade: "strong", left_out: true });
  expect([found.kept, found.grade, found.leftOut]).toEqual([0.3, "strong", true]);
});

test("the words of a report are those of its schema, and each has a text", () => {
  const file = new URL("../../lorax/transfer/report.schema.json", import.meta.url);
  const { outcome, transfer } = JSON.parse(readFileSync(file, "utf8")).$defs;
  expect(Object.keys(SIGNS)).toEqual(outcome.enum);
  for (const grade of transfer.properties.grade.enum) expect(readReport({ ...report(), grade }).grade).toBe(grade);
  for (const key of [...outcome.enum, ...transfer.properties.grade.enum]) expect(ENGLISH).toHaveProperty([key]);
});

test("outcomes are counted in a fixed order", () => {
  const rows = readReport(report(["not in target", "transferred", "not in target"])).rows;
  expect(outcomes(rows)).toEqual([
    { outcome: "transferred", count: 1 },
    { outcome: "not in target", count: 2 },
  ]);
});

test("only what arrived has a share", () => {
  expect([...keptShares(readReport(report())).values()]).toEqual([0.3]);
});

test.each([
  ["unet.down_blocks.1.attentions.0.transformer_blocks.3", "attn1.to_out.0", "down 1 0.3 attn1.to_out.0"],
  ["transformer.transformer_blocks.12", "attn.to_q", "transformer_blocks 12 attn.to_q"],
  ["unet", "conv_in", "unet conv_in"],
])("%s.%s is short %s", (block, role, short) => expect(shortLayer({ block, role })).toBe(short));
