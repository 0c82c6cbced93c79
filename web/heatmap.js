// @ts-check
/** A map of blocks against blocks: one pixel of a canvas for each cell, and what is drawn over it as SVG. */

import { EMPTY, GRADIENT, pixels } from "./colours.js";
import { draw, make } from "./elements.js";
import { axisRuns } from "./names.js";
import { say } from "./texts.js";

/** @import { BlockMap, Cell, PairedCell } from "./similarity_data.js" */

const LETTER = 5.6; // width of a letter of the axis labels, in CSS pixels
const LINE = 11; // and their height
const [DOT, MARK] = [1.7, 3]; // radius of a dot and of the other marks, in CSS pixels; less where cells are small
const FINE = 5; // cells of fewer CSS pixels have thin marks
/** @type {Record<string, [number, number]>} */
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/**
 * Return a map that can be pointed at and moved over by keyboard.
 * @param {object} options
 * @param {(cell: Cell | null) => void} options.onPoint a cell is looked at
 * @param {(cell: Cell | null) => void} options.onPin a cell is pinned, or none
 */
export function heatMap({ onPoint, onPin }) {
  const canvas = make("canvas");
  const marks = draw("g");
  const rectangles = { pinned: draw("path", { class: "lorax-pinned" }), at: draw("path", { class: "lorax-at" }) };
  const over = draw("svg", { preserveAspectRatio: "none" }, marks, rectangles.pinned, rectangles.at);
  const axes = { top: make("div", { class: "lorax-top" }), left: make("div", { class: "lorax-left" }) };
  const plot = make(
    "div",
    { class: "lorax-plot", tabindex: 0, role: "application" },
    canvas,
    over,
    axes.top,
    axes.left,
  );
  plot.setAttribute("aria-label", say("map_label"));
  const element = make("div", { class: "lorax-map" }, make("div", { class: "lorax-area" }, plot));
  const nothing = { rows: [], columns: [], values: new Float32Array(), counts: new Uint16Array() };
  /** @type {{ map: BlockMap, cells: PairedCell[], at: Cell | null, pinned: Cell | null }} */
  const shown = { map: nothing, cells: [], at: null, pinned: null };

  /** @param {Cell | null} cell */
  function outline(cell) {
    return cell ? `M${cell.column},${cell.row}h1v1h-1z` : "";
  }

  /** @param {Cell | null} cell */
  function point(cell) {
    shown.at = cell;
    rectangles.at.setAttribute("d", outline(cell));
    onPoint(cell);
  }

  /** @param {Cell | null} cell */
  function pin(cell) {
    shown.pinned = cell;
    rectangles.pinned.setAttribute("d", outline(cell));
  }

  /** @param {MouseEvent} event */
  function cellAt(event) {
    const box = plot.getBoundingClientRect();
    const { rows, columns } = shown.map;
    const [row, column] = [
      Math.floor(((event.clientY - box.top) / box.height) * rows.length),
      Math.floor(((event.clientX - box.left) / box.width) * columns.length),
    ];
    const inside = row >= 0 && column >= 0 && row < rows.length && column < columns.length;
    return inside ? { row, column } : null;
  }

  /** @param {Cell | null} cell */
  function toggle(cell) {
    const same = cell && shown.pinned && cell.row === shown.pinned.row && cell.column === shown.pinned.column;
    pin(same ? null : cell);
    onPin(shown.pinned);
  }

  plot.addEventListener("pointermove", (event) => {
    const cell = cellAt(event);
    if (cell?.row !== shown.at?.row || cell?.column !== shown.at?.column) point(cell);
  });
  plot.addEventListener("pointerleave", () => point(null));
  plot.addEventListener("click", (event) => toggle(cellAt(event)));
  plot.addEventListener("keydown", (event) => {
    const step = ARROWS[event.key];
    if (step) {
      const { row, column } = shown.at ?? shown.pinned ?? { row: -step[0], column: -step[1] };
      const [rows, columns] = [shown.map.rows.length, shown.map.columns.length];
      point({
        row: Math.min(Math.max(row + step[0], 0), rows - 1),
        column: Math.min(Math.max(column + step[1], 0), columns - 1),
      });
    } else if (event.key === "Enter" && shown.at) {
      toggle(shown.at);
    } else if (event.key === "Escape") {
      toggle(null);
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  });

  function label() {
    if (!shown.map.rows.length) return;
    writeAxis(axes.top, shown.map.columns, plot.clientWidth, "left", (run) => run.length * LETTER + 4);
    writeAxis(axes.left, shown.map.rows, plot.clientHeight, "top", () => LINE);
    drawMarks();
  }

  function drawMarks() {
    const { columns } = shown.map;
    const unit = columns.length / Math.max(plot.clientWidth, 1);
    const size = Math.min(1, Math.max(1 / unit / FINE, 0.4));
    const [dot, r] = [Math.max(0.12, DOT * unit * size), Math.max(0.2, MARK * unit * size)];
    over.classList.toggle("lorax-fine", 1 / unit < FINE);
    const paths = { all: "", some: "", none: "" };
    for (const { row, column, count, above } of shown.cells) {
      const [x, y] = [column + 0.5, row + 0.5];
      const circle = (/** @type {number} */ r) =>
        `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`;
      const cross = `M${x - r},${y - r}l${2 * r},${2 * r}M${x + r},${y - r}l${-2 * r},${2 * r}`;
      if (above === count) paths.all += circle(dot);
      else if (above) paths.some += circle(r);
      else paths.none += cross;
    }
    marks.replaceChildren(
      ...Object.entries(paths).flatMap(([name, d]) => [
        draw("path", { class: "lorax-halo", d }),
        draw("path", { class: `lorax-mark lorax-mark-${name}`, d }),
      ]),
    );
  }

  new ResizeObserver(label).observe(plot);
  return {
    element,
    /**
     * Show a map of `blockMap`.
     * @param {BlockMap} map
     */
    show(map) {
      Object.assign(shown, { map, cells: [], at: null });
      const [height, width] = [map.rows.length, map.columns.length];
      Object.assign(canvas, { width, height });
      canvas.getContext("2d")?.putImageData(new ImageData(pixels(map.values), width, height), 0, 0);
      over.setAttribute("viewBox", `0 0 ${width} ${height}`);
      plot.style.setProperty("--lorax-aspect", String(width / height));
      rectangles.at.setAttribute("d", "");
      pin(null);
      label();
    },
    /**
     * Mark the cells of `pairedCells`.
     * @param {PairedCell[]} cells
     */
    mark(cells) {
      shown.cells = cells;
      drawMarks();
    },
    pin,
  };
}

/**
 * Write the labels of one axis: long names if all have room, else short ones, else those that do not overlap.
 * @param {HTMLElement} axis
 * @param {string[]} blocks
 * @param {number} length
 * @param {"left" | "top"} side
 * @param {(text: string) => number} sizeOf
 */
function writeAxis(axis, blocks, length, side, sizeOf) {
  const runs = axisRuns(blocks).map((run) => ({
    ...run,
    start: (run.from / blocks.length) * length,
    room: ((run.to - run.from) / blocks.length) * length,
  }));
  const most = side === "top" ? 7 : Infinity; // letters that fit left of the map
  const long = runs.every(({ name, room }) => name.length <= most && sizeOf(name) <= room);
  let free = 0;
  axis.replaceChildren();
  for (const { name, short, start, room } of runs) {
    const text = long ? name : short;
    const from = Math.max(start + room / 2 - sizeOf(text) / 2, 0);
    if (from < free || from + sizeOf(text) > length + 2) continue;
    free = from + sizeOf(text);
    axis.append(make("span", { title: name, style: `${side}: ${(100 * (start + room / 2)) / length}%` }, text));
  }
}

const LEGEND = { all: "legend_above", some: "legend_some", none: "legend_below" };

/** Return the legend of the map: the scale, and what the marks mean. */
export function legend() {
  const shape = (/** @type {keyof typeof LEGEND} */ name, /** @type {string} */ d) =>
    make(
      "span",
      { class: "lorax-key" },
      draw(
        "svg",
        { viewBox: "0 0 14 14", "aria-hidden": "true" },
        draw("rect", { width: 14, height: 14, fill: "rgb(33, 145, 140)" }),
        draw("path", { class: "lorax-halo", d }),
        draw("path", { class: `lorax-mark lorax-mark-${name}`, d }),
      ),
      say(LEGEND[name]),
    );
  const circle = (/** @type {number} */ r) => `M${7 - r},7a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`;
  return make(
    "div",
    { class: "lorax-legend" },
    make("span", { class: "lorax-key" }, say("chance"), make("i", { style: `background: ${GRADIENT}` }), say("equal")),
    make("span", { class: "lorax-key" }, make("b", { style: `background: rgb(${EMPTY.join(", ")})` }), say("no_value")),
    shape("all", circle(DOT)),
    shape("some", circle(MARK)),
    shape("none", "M4,4l6,6M10,4l-6,6"),
  );
}
