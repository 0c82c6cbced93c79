// @ts-check
/** Nine points of matplotlib's viridis: even in lightness, and readable for colour-blind people. */
const VIRIDIS = [
  [68, 1, 84],
  [72, 40, 120],
  [62, 74, 137],
  [49, 104, 142],
  [38, 130, 142],
  [31, 158, 137],
  [53, 183, 121],
  [144, 215, 67],
  [253, 231, 37],
];
/** Where there is no value: a grey that is not on the scale. */
export const EMPTY = [150, 150, 150];

/**
 * Return the colour [red, green, blue] of a value: viridis from 0 to 1, grey for NaN.
 * @param {number} value
 */
export function colour(value) {
  if (Number.isNaN(value)) return EMPTY;
  const place = Math.min(Math.max(value, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return VIRIDIS[low].map((part, i) => Math.round(part + (VIRIDIS[low + 1][i] - part) * (place - low)));
}

/**
 * Return the pixels of a map, four bytes a value, for an ImageData.
 * @param {Float32Array} values
 */
export function pixels(values) {
  const table = Array.from({ length: 256 }, (_, i) => colour(i / 255));
  const found = new Uint8ClampedArray(values.length * 4);
  values.forEach((value, i) => {
    const rgb = Number.isNaN(value) ? EMPTY : table[Math.round(Math.min(Math.max(value, 0), 1) * 255)];
    found.set(rgb, i * 4);
    found[i * 4 + 3] = 255;
  });
  return found;
}

/** The scale as a CSS gradient, from 0 to 1. */
export const GRADIENT = `linear-gradient(to right, ${VIRIDIS.map((rgb) => `rgb(${rgb.join(", ")})`).join(", ")})`;
