// @ts-check
/** The colours of our sockets and their links. A palette of the user that names them goes before. */

import { make } from "./elements.js";

/** @type {Record<string, string>} */
const COLOURS = { LORAX_ADAPTER: "#2db5ad", LORAX_BASE: "#8c9eff", LORAX_SIMILARITY: "#b5de2b" };

/**
 * Colour them in both canvases.
 * @param {HostCanvas} canvas
 */
export function colourSockets(canvas) {
  for (const colours of [canvas.default_connection_color_byType, canvas.constructor.link_type_colors]) {
    for (const [type, colour] of Object.entries(COLOURS)) holdColour(colours, type, colour);
  }
  const rules = Object.entries(COLOURS).map(([type, colour]) => `--color-datatype-${type}: ${colour};`);
  document.head.append(make("style", {}, `:root { ${rules.join(" ")} }`));
}

/**
 * Keep the colour of a type: each change of the palette empties those that the palette does not name.
 * @param {Record<string, string>} colours
 * @param {string} type
 * @param {string} colour
 */
function holdColour(colours, type, colour) {
  let given = colours[type];
  Object.defineProperty(colours, type, {
    enumerable: true,
    get: () => given || colour,
    set: (value) => (given = value),
  });
}
