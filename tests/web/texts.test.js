import { readFileSync } from "node:fs";
import { expect, test } from "vitest";

import { ENGLISH, say, speak } from "../../web/texts.js";

const french = JSON.parse(readFileSync(new URL("../../locales/fr/main.json", import.meta.url), "utf8")).lorax;
const places = (text) => (text.match(/\{\w+\}/g) ?? []).sort();

test("the translation has every text, with the same places for values", () => {
  expect(Object.keys(french).sort()).toEqual(Object.keys(ENGLISH).sort());
  for (const key of Object.keys(ENGLISH)) expect([key, places(french[key])]).toEqual([key, places(ENGLISH[key])]);
});

test("every text that the views say exists", () => {
  for (const file of ["similarity_view", "report_view", "loss_view", "heatmap", "bars", "threshold", "page", "host"]) {
    const source = readFileSync(new URL(`../../web/${file}.js`, import.meta.url), "utf8");
    for (const [, key] of source.matchAll(/\bsay\("(\w+)"/g)) expect(ENGLISH).toHaveProperty(key);
  }
});

test("values are put in, and what a translation lacks stays English", () => {
  speak({ at_rank: "rang {rank}" });
  expect(say("at_rank", { rank: 8 })).toBe("rang 8");
  expect(say("full_rank")).toBe(ENGLISH.full_rank);
  speak(undefined);
});
