import { expect, test } from "vitest";

import { colour, EMPTY, pixels } from "../../web/colours.js";

// CIE lightness of sRGB.
function lightness([r, g, b]) {
  const linear = [r, g, b].map((part) =>
    part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4,
  );
  const y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  return 116 * Math.cbrt(y) - 16;
}

test("the scale rises in lightness, so that it reads without colour", () => {
  const steps = Array.from({ length: 101 }, (_, i) => lightness(colour(i / 100)));
  steps.slice(1).forEach((value, i) => expect(value).toBeGreaterThan(steps[i]));
});

test("beyond the scale its ends, no value the grey that is not on it", () => {
  expect(colour(-3)).toEqual(colour(0));
  expect(colour(1.5)).toEqual(colour(1));
  expect([...pixels(new Float32Array([NaN]))]).toEqual([...EMPTY, 255]);
});
