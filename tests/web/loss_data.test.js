import { expect, test } from "vitest";

import { lossLines, readLoss } from "../../web/loss_data.js";

test("a curve runs from the first step to the last, high above low", () => {
  const loss = readLoss({ steps: [0, 50, 100], losses: [1, 0.5, 0], total: 200 });
  expect(lossLines(loss, 100, 10).line).toBe("M0.0,0.0L25.0,5.0L50.0,10.0");
});

test("a loss that is no number is left out", () => {
  expect(readLoss({ steps: [0, 1], losses: [null, 0.5], total: 2 }).points).toEqual([{ step: 1, loss: 0.5 }]);
});

test("one point and a flat line stay inside of the box", () => {
  for (const losses of [[0.5], [0.5, 0.5]]) {
    const { line } = lossLines(readLoss({ steps: losses.map((_, i) => i), losses, total: 2 }), 100, 10);
    expect(line).not.toMatch(/NaN|Infinity/);
  }
});

test.each([
  ["nothing", null, "damaged"],
  ["cut off", { steps: [1, 2], losses: [0.1], total: 2 }, "damaged"],
  ["words", { steps: [1], losses: ["x"], total: 2 }, "damaged"],
  ["no point yet", { steps: [], losses: [], total: 2 }, "waiting_loss"],
])("%s says why", (_, data, key) => expect(() => readLoss(data)).toThrow(key));
