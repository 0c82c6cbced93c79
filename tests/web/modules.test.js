import { readdirSync, readFileSync } from "node:fs";
import { expect, test } from "vitest";

const WEB = new URL("../../web/", import.meta.url);
const files = readdirSync(WEB).filter((name) => name.endsWith(".js"));
const PAGE = "../lorax/show/page.js"; // of the page that the command line writes
const read = (name) => readFileSync(new URL(name, WEB), "utf8");
const imports = (name) => [...read(name).matchAll(/from "([^"]+)"/g)].map(([, from]) => from);

test.each(files)("%s imports files beside it; only host.js the front end", (name) => {
  for (const from of imports(name)) {
    if (name === "host.js" && from.startsWith("../../scripts/")) continue;
    expect(from).toMatch(/^\.\/\w+\.js$/);
    expect(files).toContain(from.slice(2));
  }
});

test.each(files.filter((name) => /_data|_pack|checks|names|colours|texts/.test(name)))(
  "%s knows no browser",
  (name) => {
    expect(read(name)).not.toMatch(/\b(document|window|navigator)\./);
  },
);

test.each([...files, PAGE])("%s sets no HTML and asks for nothing", (name) => {
  expect(read(name)).not.toMatch(
    /innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bfetch\(|XMLHttpRequest|https?:\/\/(?!www\.w3\.org)/,
  );
});

test.each([...files, PAGE])("%s is checked by TypeScript", (name) => {
  expect(read(name)).toMatch(/^\/\/ @ts-check\n/);
  expect(read(name)).not.toMatch(/@ts-(ignore|nocheck|expect-error)/);
});

test("no two files give a name to something at their top: lorax/show/page.py makes one module of them", () => {
  const names = [...files, PAGE]
    .filter((name) => name !== "host.js")
    .flatMap((name) => [...read(name).matchAll(/^(?:export )?(?:const|let|function|class) (\w+|[[{][\w, ]+[\]}])/gm)])
    .flatMap(([, named]) => named.match(/\w+/g));
  expect(names.length).toBeGreaterThan(80);
  expect(names.filter((name, i) => names.indexOf(name) !== i)).toEqual([]);
});

test.each(files.filter((name) => name !== "host.js"))("%s only gives names: ComfyUI loads every file", (name) => {
  const known = /^(?:import |export |const |let |function |class |async function |\/[/*]| \*|[\s)}\]]|$)/;
  expect(read(name).split("\n").filter((line) => !known.test(line))).toEqual([]);
});
