import { expect, test } from "vitest";

import { isOld, keptOf, remember, typeIn, withKept } from "../../web/kept.js";

const node = (id, type, rest = {}) => ({ id, type, properties: {}, ...rest });
const STATE = {
  nodes: [node(1, "LoraXTransfer"), node(2, "inner"), node("7", "LoraXLoader", { properties: { lorax: { state: 5 } } })],
  definitions: { subgraphs: [{ id: "inner", nodes: [node(1, "LoraXApply")] }], other: 1 },
};
const frozen = (value) => {
  Object.values(value).forEach((part) => typeof part === "object" && part && frozen(part));
  return Object.freeze(value);
};
frozen(STATE);

test("a state gets what a node keeps, and is not changed itself", () => {
  const found = withKept(STATE, "7", "LoraXLoader", { data: "said" });
  expect(found.nodes[2].properties.lorax).toEqual({ state: 5, data: "said" });
  expect(found.nodes[0]).toBe(STATE.nodes[0]);
});

test("a node inside of a subgraph is found by the server's id", () => {
  expect(typeIn(STATE, "2:1")).toBe("LoraXApply");
  const found = withKept(STATE, "2:1", "LoraXApply", { data: 1 });
  expect(found.definitions.subgraphs[0].nodes[0].properties.lorax).toEqual({ data: 1 });
  expect(found.definitions.other).toBe(1);
  expect(found.nodes).toBe(STATE.nodes);
});

test.each([["9"], ["2:9"], ["1:1"], ["2:1:1"], [""], ["undefined"]])("no node %s: the state stays", (id) => {
  expect(typeIn(STATE, id)).toBe(undefined);
  expect(withKept(STATE, id, "LoraXApply", { data: 1 })).toBe(STATE);
});

test("a node of another type under the same id keeps what it has", () => {
  expect(withKept(STATE, "1", "LoraXApply", { data: 1 })).toBe(STATE);
});

test("all states of a workflow remember a result, and the front end is told", () => {
  let told = 0;
  const tracker = { activeState: STATE, undoQueue: [STATE, STATE], redoQueue: [{ nodes: [] }], updateModified: () => told++ };
  remember({ changeTracker: tracker }, "1", "LoraXTransfer", { data: 1 });
  for (const state of [tracker.activeState, ...tracker.undoQueue]) expect(keptOf(state.nodes[0]).data).toBe(1);
  expect([tracker.redoQueue, told]).toEqual([[{ nodes: [] }], 1]);
  for (const nothing of [null, undefined, {}, { changeTracker: {} }]) remember(nothing, "1", "LoraXApply", {});
});

const widget = (name, value, linkedWidgets) => ({ name, value, linkedWidgets });
const NODES = {
  1: { comfyClass: "LoraXTransfer", widgets: [widget("rank", 8), widget("strength", 1), widget("seed", 5, [widget("control", "randomize")])] },
  2: { comfyClass: "LoraXLoader", widgets: [widget("lora_name", "a.safetensors")] },
};
const old = (inputs) => isOld({ inputs }, (id) => NODES[id]);

test("what was computed from other widgets is old", () => {
  const entry = (class_type, inputs) => ({ class_type, inputs });
  expect(old({ 1: entry("LoraXTransfer", { rank: 8, seed: 4, gone: 1 }) })).toBe(false);
  expect(old({ 1: entry("LoraXTransfer", { rank: 9 }) })).toBe(true);
  expect(old({ 1: entry("LoraXTransfer", { strength: 9 }) })).toBe(false);
  expect(old({ 2: entry("LoraXLoader", { lora_name: "b.safetensors" }) })).toBe(true);
  expect(old({ 2: entry("LoraLoader", { lora_name: "b.safetensors" }), 3: entry("X", { a: 1 }) })).toBe(false);
});

test.each([undefined, null, 5, "text", [], [[]], { 1: null }, { 1: { class_type: "LoraXTransfer", inputs: null } }])(
  "inputs as anybody may have written them: %j",
  (inputs) => expect(old(inputs)).toBe(false),
);
