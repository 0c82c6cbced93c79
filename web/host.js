// @ts-check
/** The only file that knows ComfyUI's front end: views into nodes, and what they show into the workflow. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { forward } from "./canvas.js";
import { isOld, keep, keptOf, remember, typeIn } from "./kept.js";
import { settersOf, takersOf } from "./links.js";
import { lossView } from "./loss_view.js";
import { noticeOf } from "./notice.js";
import { keptShares, readReport } from "./report_data.js";
import { watchQueue } from "./owners.js";
import { packReport } from "./report_pack.js";
import { reportView } from "./report_view.js";
import { similarityView } from "./similarity_view.js";
import { colourSockets } from "./sockets.js";
import { textView } from "./text_view.js";
import { say, speak } from "./texts.js";

const SIMILARITY = "LoraXSimilarity";
const TRANSFER = "LoraXTransfer";
const MOVE = "LoraXMove";
const APPLY = "LoraXApply";
const TRAIN = "LoraXTrain";
const TEXT = "$$node-text-preview"; // the front end's widget for the text that a node sends while it runs
const FOLLOWED = ["threshold", "strength"]; // widgets that views of other nodes show and set

/** @import { Kept } from "./kept.js" */

/**
 * The view of a node. One that depends on other nodes follows them: their widgets (`follow`), or their reports too.
 * @typedef {object} View
 * @property {HTMLElement} element
 * @property {(text: string) => void} fail
 * @property {(data: unknown, state: unknown) => void} show
 * @property {() => void} [follow]
 * @property {() => void} [followReports]
 */

/**
 * What a node sends, the room of its view (width and height in a node that is added by hand, and the least height), what
 * the workflow file keeps of it, how the view is made, and the text for its work.
 * @typedef {object} Kind
 * @property {string} key
 * @property {[width: number, height: number, least: number]} room
 * @property {(data: any) => unknown} [pack]
 * @property {(node: HostNode) => View} attach
 * @property {string} [work]
 */

/** @type {Kind} Of a node that only says something: the text that it sends for nodes of the host too. */
const SAID = { key: "text", room: [340, 100, 60], attach: textView };
/** @type {Kind} */
const REPORTED = { key: "lorax_report", room: [460, 400, 200], pack: packReport, attach: attachReport };
/** @type {Record<string, Kind>} */
const NODES = {
  [SIMILARITY]: { key: "lorax_similarity", room: [460, 600, 240], attach: attachSimilarity, work: "comparing" },
  [TRANSFER]: REPORTED,
  [MOVE]: REPORTED,
  [TRAIN]: { key: "lorax_loss", room: [400, 190, 120], attach: lossView },
  LoraXLoader: SAID,
  LoraXBase: SAID,
  [APPLY]: SAID,
  LoraXConvert: SAID,
  LoraXSave: SAID,
};
/** @type {WeakMap<HostNode, View>} */
const views = new WeakMap();
/** @type {WeakMap<HostNode, ReturnType<typeof noticeOf>>} */
const notices = new WeakMap();
/** @type {ReturnType<typeof setTimeout> | undefined} */
let telling; // the timer of `tellSoon`
const ownerOf = watchQueue(api, shownWorkflow);
/** @type {Map<string, HTMLElement>} */
let inPlace = new Map(); // ids of a graph and a node -> the view
/** @type {unknown} */
let running; // id of the prompt that runs

/**
 * Do something with the view of a node; where that fails the view says so, and the graph goes on.
 * @param {HostNode} node
 * @param {(view: View) => void} work
 */
function withView(node, work) {
  const view = views.get(node);
  if (!view) return;
  try {
    work(view);
  } catch (error) {
    console.warn("lorax:", error);
    view.fail(say("failed", { what: error instanceof Error ? error.message : "?" }));
  }
}

/**
 * @param {HostNode} node
 * @returns {View}
 */
function attachSimilarity(node) {
  const view = similarityView({
    onState: (state) => keep(node, { state }),
    onThreshold: (value) => setAll(thresholds(node), value),
    note: () => say(thresholds(node).length ? "writes" : transfersOf(node).length ? "writes_linked" : "writes_nothing"),
  });
  function follow() {
    const widget = thresholds(node)[0];
    if (widget) view.setThreshold(widget.value);
  }
  function followReports() {
    follow();
    view.setKept(reportOf(node));
  }
  /** @type {View["show"]} */
  const show = (data, state) => {
    view.show(data, state);
    followReports();
  };
  return { ...view, show, follow, followReports };
}

/**
 * @param {HostNode} node
 * @returns {View}
 */
function attachReport(node) {
  const view = reportView({
    onState: (state) => keep(node, { state }),
    onStrength: (value) => setAll(strengths(node), value),
    strengths: () => strengths(node).map(({ value }) => value),
  });
  /** @type {View["show"]} */
  const show = (data, state) => {
    view.show(data, state);
    tellAll("followReports");
  };
  return { ...view, show, follow: view.showStrength, followReports: view.showStrength };
}

/** @param {HostNode} node */
function transfersOf(node) {
  return takersOf(node, TRANSFER, "similarity", allNodes());
}

/**
 * Return the threshold widgets that a similarity sets: of the transfers that use it.
 * @param {HostNode} node
 */
function thresholds(node) {
  return freeWidgets(transfersOf(node), "threshold");
}

/**
 * Return the strength widgets for what a node transferred: of the nodes that apply it, or its own.
 * @param {HostNode} node
 */
function strengths(node) {
  const applying = node.type === MOVE ? [node] : takersOf(node, APPLY, "adapter", allNodes());
  return freeWidgets(applying, "strength");
}

/**
 * Return the widgets that set a value of nodes; none where a link gives it.
 * @param {HostNode[]} nodes
 * @param {string} name
 */
function freeWidgets(nodes, name) {
  const all = allNodes();
  return nodes.flatMap((node) => settersOf(node, name, all));
}

/**
 * @param {HostWidget[]} widgets
 * @param {number} value
 */
function setAll(widgets, value) {
  for (const widget of widgets) {
    widget.value = value;
    widget.callback?.(value);
  }
  app.graph.setDirtyCanvas(true, true);
}

/**
 * Return what the layers kept in the transfers that use a similarity, by the names of the target.
 * @param {HostNode} node
 */
function reportOf(node) {
  const shares = transfersOf(node).map(
    /** @returns {[string, number][]} */ (transfer) => {
      try {
        return [...keptShares(readReport(keptOf(transfer).data))];
      } catch {
        return []; // its own view says what is wrong with it
      }
    },
  );
  return new Map(shares.flat());
}

/**
 * Let all views follow what changed: a widget that others show, or more.
 * @param {"follow" | "followReports"} what
 */
function tellAll(what) {
  for (const node of allNodes()) withView(node, (view) => view[what]?.());
}

/** Return the nodes of the workflow, those in subgraphs too. */
function allNodes() {
  const root = app.rootGraph ?? app.graph;
  const graphs = [root, ...(root?.subgraphs?.values() ?? [])];
  return graphs.flatMap((graph) => graph?.nodes ?? []);
}

/** Tell once of many changes: a workflow that is loaded makes one for every link. */
function tellSoon() {
  clearTimeout(telling);
  telling = setTimeout(() => {
    putInPlace();
    tellAll("followReports");
  });
}

/** Put views where those of nodes before them still stand: Vue nodes keep them for new nodes of the same id, as after undo. */
function putInPlace() {
  const before = inPlace;
  inPlace = new Map();
  for (const node of allNodes()) {
    const element = views.get(node)?.element;
    if (!element) continue;
    const key = `${node.graph?.id} ${node.id}`;
    const old = before.get(key);
    if (old?.isConnected && !element.isConnected) old.replaceWith(element);
    inPlace.set(key, element);
  }
}

/**
 * Take away the text that the front end shows on a node that has a view, before it grows for it: the view says the same.
 * @param {{ nodeId?: unknown } | undefined} detail
 */
function withoutText(detail) {
  const node = nodeById(detail?.nodeId);
  const widget = node && views.has(node) && node.widgets?.find(({ name }) => name === TEXT);
  if (widget) node.removeWidget(widget);
}

/** @param {HostNode} node */
function showKept(node) {
  const { data, state } = keptOf(node);
  if (data !== undefined) withView(node, (view) => view.show(data, state));
  notices.get(node)?.place();
  markOld(node);
}

/**
 * Say so where a node was given other widgets or models than those of what its view shows.
 * @param {HostNode} node
 */
function markOld(node) {
  const notice = notices.get(node);
  if (!notice || notice.kind === "busy" || notice.kind === "error") return;
  const old = isOld(keptOf(node), nodeById);
  notice.set(old ? "old" : "", say("old_settings"));
}

/**
 * End what was said of runs before, in the workflow of a prompt: that nodes work, or what went wrong too.
 * @param {unknown} prompt
 * @param {(kind: string) => boolean} which
 */
function endNotices(prompt, which) {
  for (const node of ownerOf(prompt) === shownWorkflow() ? allNodes() : []) {
    const notice = notices.get(node);
    if (!notice || !which(notice.kind)) continue;
    notice.set("");
    markOld(node);
  }
}

/** The workflow that is shown. */
function shownWorkflow() {
  return app.extensionManager?.workflow?.activeWorkflow;
}

/**
 * Return a node of the workflow that a prompt came from; none while another one is shown, whose ids are the same.
 * @param {unknown} id
 * @param {unknown} prompt
 */
function nodeOf(id, prompt) {
  return ownerOf(prompt) === shownWorkflow() ? nodeById(id) : null;
}

/** @param {{ prompt_id?: unknown, nodes?: Record<string, { state: string, value: number, max: number }> }} detail */
function showWork({ prompt_id, nodes }) {
  for (const [id, { state, value, max }] of Object.entries(nodes ?? {})) {
    const node = state === "running" ? nodeOf(id, prompt_id) : null;
    const notice = node && notices.get(node);
    if (!notice) continue;
    const percent = Math.round((100 * value) / (max || 1));
    notice.set("busy", say(NODES[node.comfyClass].work ?? "working", { percent }));
  }
}

/** @param {{ prompt_id?: unknown, node_id?: unknown, exception_message?: unknown }} detail */
function showError({ prompt_id, node_id, exception_message }) {
  const node = nodeOf(node_id, prompt_id);
  const notice = node && notices.get(node);
  if (!notice) return;
  notice.set("error", String(exception_message).trim());
}

/**
 * Show what a node sent, and keep it, in the workflow that it belongs to.
 * @param {Record<"prompt_id" | "node" | "display_node", unknown> & { output?: Record<string, unknown[]> | null }} detail
 */
function showResult({ prompt_id, node, display_node, output }) {
  const id = String(display_node ?? node);
  const workflow = ownerOf(prompt_id);
  const shown = nodeOf(id, prompt_id);
  const type = shown ? shown.comfyClass : typeIn(workflow?.changeTracker?.activeState, id);
  if (!type || !Object.hasOwn(NODES, type)) return;
  const view = NODES[type];
  const data = output?.[view.key]?.[0];
  if (data === undefined) return;
  const take = () => {
    const kept = { data: view.pack ? view.pack(data) : data, inputs: output?.lorax_inputs?.[0] };
    if (shown) showNew(shown, kept);
    remember(workflow, id, type, kept);
  };
  if (shown) withView(shown, take);
  else take();
}

/**
 * @param {HostNode} node
 * @param {Kept} kept
 */
function showNew(node, kept) {
  notices.get(node)?.set("");
  keep(node, kept);
  showKept(node);
}

/** @param {HostNode} node */
function attach(node) {
  const { room, attach: make } = NODES[node.comfyClass];
  const view = make(node);
  const notice = noticeOf(view.element);
  views.set(node, view);
  notices.set(node, notice);
  const [width, height, least] = room;
  view.element.style.minHeight = `${least}px`; // for Vue nodes
  const widget = node.addDOMWidget("lorax_view", "lorax_view", view.element, {
    serialize: false,
    hideOnZoom: false,
    hideInPanel: true, // there is one element, and the side panel would take it out of the node
    getMinHeight: () => least,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false;
  const [fits, all] = node.computeSize();
  node.setSize([Math.max(width, fits), all - least + height]); // a workflow sets the size that it saved after this
  for (const one of node.widgets ?? []) chain(one, "callback", () => markOld(node));
  chain(node, "onConfigure", () => showKept(node));
  chain(node, "onConnectionsChange", tellSoon);
  forward(view.element, () => app.canvas);
}

/**
 * Let something be done after a method of the host.
 * @param {any} object a node or a widget, whose methods are set from outside
 * @param {string} name
 * @param {(...values: any[]) => void} then
 */
function chain(object, name, then) {
  const before = object[name];
  object[name] = function (/** @type {unknown[]} */ ...values) {
    const result = before?.apply(this, values);
    then(...values);
    return result;
  };
}

/**
 * Return a node by the id that the server gives it: `5`, or `3:5` inside of a subgraph.
 * @param {unknown} id
 */
function nodeById(id) {
  /** @type {HostGraph | undefined} */
  let graph = app.rootGraph ?? app.graph;
  /** @type {HostNode | null | undefined} */
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part)) ?? graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node;
}

app.registerExtension({
  name: "lorax.views",
  async init() {
    const style = Object.assign(document.createElement("link"), { rel: "stylesheet" });
    style.href = new URL("./view.css", import.meta.url).href;
    document.head.append(style);
    const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
    /** @type {Record<string, HostTexts>} */
    const texts = await api.getCustomNodesI18n().catch(() => ({})); // without them it is English
    speak(texts[language]?.lorax);
  },
  nodeCreated(node) {
    if (!(node.comfyClass in NODES)) return;
    attach(node);
    for (const widget of node.widgets ?? []) {
      if (FOLLOWED.includes(widget.name)) chain(widget, "callback", () => tellAll("follow"));
    }
  },
  afterConfigureGraph() {
    tellAll("followReports");
    tellSoon();
  },
  setup() {
    colourSockets(app.canvas);
    api.addEventListener("execution_start", ({ detail }) => {
      running = detail.prompt_id;
      endNotices(running, (kind) => kind !== "");
    });
    api.addEventListener("progress_state", ({ detail }) => showWork(detail));
    api.addEventListener("executed", ({ detail }) => showResult(detail));
    api.addEventListener("progress_text", ({ detail }) => queueMicrotask(() => withoutText(detail)));
    api.addEventListener("execution_error", ({ detail }) => showError(detail));
    for (const type of ["execution_error", "execution_interrupted", "execution_success"]) {
      api.addEventListener(type, ({ detail }) => endNotices(detail.prompt_id, (kind) => kind === "busy"));
    }
    api.addEventListener("lorax.loss", ({ detail }) => {
      const node = nodeOf(detail.node, running);
      if (!node || !views.has(node)) return;
      keep(node, { data: { steps: detail.steps, losses: detail.losses, total: detail.total } });
      showKept(node);
    });
    api.addEventListener("graphChanged", () => {
      putInPlace();
      allNodes().forEach(markOld);
      tellAll("follow"); // a widget that it follows may stand on a subgraph
    });
  },
});
