import { readdirSync, readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";

import { ENGLISH, say, speak, tell } from "../../web/texts.js";

const PAGE = "../lorax/show/page";
const LOCALES = new URL("../../locales/", import.meta.url);
const languages = readdirSync(LOCALES).filter((name) => name !== "en");
const places = (text) => (text.match(/\{\w+\}/g) ?? []).sort();

test.each(languages)("%s has every text, with the same places for values", (language) => {
  const texts = JSON.parse(readFileSync(new URL(`${language}/main.json`, LOCALES), "utf8")).lorax;
  delete texts.notes; // tests/test_notes.py
  expect(Object.keys(texts).sort()).toEqual(Object.keys(ENGLISH).sort());
  for (const key of Object.keys(ENGLISH)) expect([key, places(texts[key])]).toEqual([key, places(ENGLISH[key])]);
});

test("every text that the views say exists", () => {
  for (const file of ["similarity_view", "report_view", "loss_view", "text_view", "notice", "heatmap", "bars", "threshold", "host", PAGE]) {
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

describe("a note", () => {
  const advice = { code: "try_method", values: {}, text: "another method" };
  const weak = { code: "weak", values: { percent: 30, advice }, text: "only 30%; try another method" };
  const missing = { code: "missing", values: { outcomes: { "below threshold": 2 } }, text: "2 below threshold" };

  test("is said in the language of the views, with notes and outcomes inside of it", () => {
    const notes = { weak: "seuls {percent} % ; {advice}", try_method: "la méthode", missing: "perdues : {outcomes}" };
    speak({ notes, "below threshold": "sous le seuil" });
    expect(tell(weak)).toBe("seuls 30 % ; la méthode");
    expect(tell(missing)).toBe("perdues : 2 sous le seuil");
    speak(undefined);
  });

  test("of a code that the language lacks is in the English of the report", () => {
    speak({ notes: { try_method: "la méthode" } });
    expect(tell(weak)).toBe(weak.text);
    expect(tell({ code: "toString", values: {}, text: "as it is" })).toBe("as it is");
    speak(undefined);
  });
});
