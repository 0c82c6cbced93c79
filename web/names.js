// @ts-check
/** What the name of a block or a layer says: its stage, its kind, a short form. Names are those of diffusers. */

/** @type {[string, RegExp][]} */
const GROUPS = [
  ["q", /(^|[._])(to_|add_)?q(_proj|_lin)?$/],
  ["k", /(^|[._])(to_|add_)?k(_proj|_lin)?$/],
  ["v", /(^|[._])(to_|add_)?v(_proj|_lin)?$/],
  ["out", /(^|[._])((to_|out_|to_add_)?out(_proj)?|o(ut(put)?)?_proj|o)$/],
  ["ff", /(^|[._])(ff\w*|ffn|mlp|feed_forward|proj_mlp)([._]|$)|(^|\.)(fc[12]|w[123o0]|wi_[01])$/i],
  ["conv", /conv|downsample|upsample/],
];

/** The groups that a filter offers, in this order. */
export const GROUP_NAMES = [...GROUPS.map(([name]) => name), "other"];

/**
 * Return the group of a kind of layer (`unet:attn1.to_q` is `q`): one of GROUP_NAMES.
 * @param {string} kind
 */
export function groupOf(kind) {
  const path = kind.slice(kind.indexOf(":") + 1);
  if (path.includes("qkv")) return "other"; // several in one weight
  return GROUPS.find(([, pattern]) => pattern.test(path))?.[0] ?? "other";
}

/**
 * Return the stage of a block: `down 1`, `mid`, `up 0` of a U-Net, else the name of its run of blocks.
 * @param {string} block
 */
export function stageOf(block) {
  const [component, ...path] = block.split(".");
  if (component !== "unet" && component !== "transformer") return component;
  const level = /^(down|up)_blocks$/.exec(path[0] ?? "");
  if (level) return `${level[1]} ${path[1]}`;
  if (path[0] === "mid_block") return "mid";
  return path.filter((part) => !/^\d+$/.test(part)).join(".") || component;
}

/**
 * Return a short form of a block: its stage and the numbers within it, `down 1 0.0`.
 * @param {string} block
 */
export function shortBlock(block) {
  const stage = stageOf(block);
  const parts = block.split(".").slice(/^(down|up) /.test(stage) ? 3 : 1);
  const numbers = parts.filter((part) => /^\d+$/.test(part)).join(".");
  return numbers ? `${stage} ${numbers}` : stage;
}

/**
 * Return the labels of an axis: runs of blocks of one stage, as shares of the whole, with a long and a short name.
 * @param {string[]} blocks in order
 */
export function axisRuns(blocks) {
  /** @type {{name: string, short: string, from: number, to: number}[]} */
  const runs = [];
  blocks.forEach((block, i) => {
    const [name, last] = [stageOf(block), runs.at(-1)];
    if (last?.name === name) last.to = i + 1;
    else runs.push({ name, short: shorten(name), from: i, to: i + 1 });
  });
  return runs;
}

/** @param {string} stage */
function shorten(stage) {
  return stage
    .split(/[ ._]/)
    .map((word) => (/^\d+$/.test(word) ? word : (word[0] ?? "").toUpperCase()))
    .join("");
}
