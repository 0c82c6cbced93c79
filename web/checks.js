// @ts-check
/** What readers of data ask of it: it lies in workflow files, which anybody may have written. Knows no browser. */

/** As many as a file may hold tensors (lorax/files/tensorfile.py); models have some thousand layers. */
export const MOST_ITEMS = 20_000;
const VERSION = 2; // of both schemas, see lorax/transfer/report.py and lorax/show/view.py
const LARGEST = 3.5e38; // beyond every float32
const MOST_CHARACTERS = 10_000; // ten times the longest name of a tensor that is read

/** @typedef {Record<string, unknown>} Data an object of which nothing is known */

/** Why there is nothing to show: the key of a text and what belongs into it. */
export class Problem extends Error {
  /**
   * @param {string} key
   * @param {Record<string, string | number>} values
   */
  constructor(key, values = {}) {
    super(key);
    this.values = values;
  }
}

/**
 * Return data that says that it is of one of some schemas, and of the version that the views read; else throw a Problem.
 * @param {unknown} data
 * @param {string[]} schemas
 * @returns {Data}
 */
export function checkSchema(data, ...schemas) {
  const { schema, schema_version, ...rest } = record(data, "JSON");
  const known = typeof schema === "string" && schemas.includes(schema);
  if (known && schema_version === VERSION) return { schema, ...rest };
  if (known && schema_version === VERSION - 1) throw new Problem("old_version");
  const [found, version] = [schema, schema_version].map((value) =>
    ["string", "number"].includes(typeof value) ? String(value).slice(0, 100) : "?",
  );
  throw new Problem("unknown_schema", { schema: found, version });
}

/**
 * Return an array, or throw a Problem that says which one is missing or has more than `most` items.
 * @param {unknown} value
 * @param {string} what
 * @returns {unknown[]}
 */
export function list(value, what, most = MOST_ITEMS) {
  if (!Array.isArray(value)) throw new Problem("damaged", { what });
  if (value.length > most) throw new Problem("too_many", { what, count: value.length, most });
  return value;
}

/**
 * Return a number, NaN where there is no value; throw a Problem for anything else.
 * @param {unknown} value
 * @param {string} what
 */
export function number(value, what) {
  if (value === null) return NaN;
  if (typeof value !== "number" || !(Math.abs(value) <= LARGEST)) throw new Problem("damaged", { what });
  return value;
}

/**
 * Return an object that is no array; throw a Problem for anything else.
 * @param {unknown} value
 * @param {string} what
 */
export function record(value, what) {
  if (typeof value !== "object" || value === null || Array.isArray(value)) throw new Problem("damaged", { what });
  return /** @type {Data} */ (value);
}

/**
 * Return a text; throw a Problem for anything else, and for one that is too long to be shown.
 * @param {unknown} value
 * @param {string} what
 */
export function word(value, what) {
  if (typeof value !== "string" || value.length > MOST_CHARACTERS) throw new Problem("damaged", { what });
  return value;
}

/**
 * Return the item at a place; throw a Problem where there is none.
 * @template T
 * @param {T[]} values
 * @param {unknown} place
 * @param {string} what
 */
export function item(values, place, what) {
  if (typeof place !== "number" || !Object.hasOwn(values, place)) throw new Problem("damaged", { what });
  return values[place];
}

/**
 * Return what a file keeps of the state of a view: the values that are of the kind of the defaults, else those.
 * @template {Record<string, string | number>} State
 * @param {unknown} kept
 * @param {State} defaults
 * @returns {State}
 */
export function readState(kept, defaults) {
  const given = /** @type {Data} */ (Object(kept));
  const values = Object.entries(defaults).map(([key, known]) => {
    const value = given[key];
    const isWord = typeof value === "string" && value.length <= MOST_CHARACTERS;
    const isNumber = typeof value === "number" && Math.abs(value) <= LARGEST;
    return [key, typeof value === typeof known && (isWord || isNumber) ? value : known];
  });
  return Object.fromEntries(values);
}
