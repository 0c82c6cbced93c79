// @ts-check
/** A loss curve: what the training node sends, as points in a box. Nothing here knows a browser. */

import { list, number, Problem, record } from "./checks.js";

const MOST_POINTS = 10_000; // the node sends 500

/**
 * The points with a loss, in order, and how many steps there will be.
 * @typedef {{ points: { step: number, loss: number }[], total: number }} Loss
 */

/**
 * Read the losses so far: `{steps, losses, total}`.
 * @param {unknown} data
 * @returns {Loss}
 * @throws {Problem} what came is damaged or empty
 */
export function readLoss(data) {
  const given = record(data, "JSON");
  const [steps, losses] = ["steps", "losses"].map((part) => list(given[part], part, MOST_POINTS));
  if (steps.length !== losses.length) throw new Problem("damaged", { what: "losses" });
  const points = steps.map((step, i) => ({ step: number(step, "steps"), loss: number(losses[i], "losses") }));
  const known = points.filter(({ step, loss }) => !Number.isNaN(step + loss));
  const last = known.at(-1);
  if (!last) throw new Problem("waiting_loss");
  const total = number(given.total, "total");
  return { points: known, total: Math.max(Number.isNaN(total) ? 0 : total, last.step) };
}

/**
 * Return the line of points in a box of a width and height, and a running mean over a twentieth of the points.
 * @param {Loss} loss
 * @param {number} width
 * @param {number} height
 */
export function lossLines({ points, total }, width, height) {
  const losses = points.map(({ loss }) => loss);
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  const x = (/** @type {{ step: number }} */ { step }) => (step / Math.max(total, 1)) * width;
  const y = (/** @type {number} */ loss) => height - ((loss - low) / (high - low || 1)) * height;
  const reach = Math.floor(points.length / 20);
  const mean = losses.map((_, i) => {
    const near = losses.slice(Math.max(i - reach, 0), i + reach + 1);
    return near.reduce((sum, loss) => sum + loss, 0) / near.length;
  });
  const path = (/** @type {number[]} */ values) =>
    values.map((loss, i) => `${i ? "L" : "M"}${x(points[i]).toFixed(1)},${y(loss).toFixed(1)}`).join("");
  return { line: path(losses), mean: path(mean), low, high };
}
