import { readdirSync, readFileSync } from "node:fs";
import { expect, test } from "vitest";

import { ENGLISH, say, speak } from "../../web/texts.js";

const LOCALES = new URL("../../locales/", import.meta.url);
const languages = readdirSync(LOCALES).filter((name) => name !== "en");
const places = (text) => (text.match(/\{\w+\}/g) ?? []).sort();

test.each(languages)("%s has every text, with the same places for values", (language) => {
  const texts = JSON.parse(readFileSync(new URL(`${language}/main.json`, LOCALES), "utf8")).lorax;
  expect(Object.keys(texts).sort()).toEqual(Object.keys(ENGLISH).sort());
  for (const key of Object.keys(ENGLISH)) expect([key, places(texts[key])]).toEqual([key, places(ENGLISH[key])]);
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
