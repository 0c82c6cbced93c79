// @ts-check
/** What a view leaves to the canvas below it. */

const SCROLLS = "[data-capture-wheel], .lorax-view";

/**
 * Let the canvas have what is meant for it: the wheel where nothing scrolls, and the middle button.
 * @param {HTMLElement} element
 * @param {() => HostCanvas} canvas
 */
export function forward(element, canvas) {
  element.addEventListener("wheel", (event) => {
    let list = closest(event, SCROLLS);
    while (list && list.scrollHeight <= list.clientHeight) list = list.parentElement?.closest(SCROLLS) ?? null;
    if (list && !event.ctrlKey) {
      event.stopPropagation();
    } else {
      event.preventDefault();
      event.stopPropagation();
      canvas().processMouseWheel(event);
    }
  });
  /** @type {["pointerdown" | "pointermove" | "pointerup", "processMouseDown" | "processMouseMove" | "processMouseUp"][]} */
  const moves = [
    ["pointerdown", "processMouseDown"],
    ["pointermove", "processMouseMove"],
    ["pointerup", "processMouseUp"],
  ];
  for (const [type, method] of moves) {
    element.addEventListener(type, (event) => {
      const middle = event.button === 1 || (event.buttons & 4) === 4;
      if (middle) canvas()[method](event);
      if (closest(event, "input, select, button, [tabindex]")) event.stopPropagation();
    });
  }
}

/**
 * @param {Event} event
 * @param {string} selector
 */
function closest({ target }, selector) {
  return target instanceof Element ? target.closest(selector) : null;
}
