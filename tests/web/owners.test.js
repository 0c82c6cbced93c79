import { expect, test } from "vitest";

import { watchQueue } from "../../web/owners.js";

const [ONE, TWO] = [{}, {}]; // workflows
let shown;
let answers;

/** A front end whose prompts go to the server when the test says so. */
function opened() {
  answers = [];
  shown = ONE;
  const api = { queuePrompt: (...values) => new Promise((done, fail) => answers.push({ values, done, fail })) };
  return { api, ownerOf: watchQueue(api, () => shown) };
}

test("a prompt belongs to the workflow that was shown when it was queued, whatever is shown later", async () => {
  const { api, ownerOf } = opened();
  const asked = api.queuePrompt(0, "prompt");
  shown = TWO;
  expect(ownerOf("a")).toBe(ONE); // word of it comes before its id
  answers[0].done({ prompt_id: "a" });
  expect(await asked).toEqual({ prompt_id: "a" });
  expect(answers[0].values).toEqual([0, "prompt"]);
  expect([ownerOf("a"), ownerOf("unknown")]).toEqual([ONE, TWO]);
  expect(ownerOf("a")).toBe(ONE);
});

test("a prompt that the server refuses is an error as before, and nobody's", async () => {
  const { api, ownerOf } = opened();
  const asked = api.queuePrompt(0);
  answers[0].fail(new Error("no"));
  await expect(asked).rejects.toThrow("no");
  shown = TWO;
  expect(ownerOf("a")).toBe(TWO);
});
