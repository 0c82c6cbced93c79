// @ts-check
/** What a workflow keeps of a view: in a property of the node, and in the states that the front end remembers. */

export const KEPT = "lorax"; // the property; it holds a `Kept`
const WITHOUT_EFFECT = ["strength", "cache"]; // widgets that change nothing of what views show

/**
 * What a view shows, what the user chose in it, and the part of the prompt that it was computed from.
 * @typedef {{ data?: unknown, state?: unknown, inputs?: unknown }} Kept
 */

/**
 * Return what a node keeps, whatever its author put there.
 * @param {HostNode} node
 * @returns {Kept}
 */
export function keptOf(node) {
  const { data, state, inputs } = /** @type {Kept} */ (node.properties[KEPT] ?? {});
  return { data, state, inputs };
}

/**
 * @param {HostNode} node
 * @param {Kept} values
 */
export function keep(node, values) {
  node.properties[KEPT] = { ...keptOf(node), ...values };
}

/**
 * Put the result of a node into all states that the front end remembers of a workflow, so that undo, redo, and coming
 * back from another workflow find it. A result is no step of the user, and makes none for undo.
 * @param {HostWorkflow | null | undefined} workflow
 * @param {string} id of the node, as the server gives it
 * @param {string} type of the node
 * @param {Kept} values
 */
export function remember(workflow, id, type, values) {
  const tracker = workflow?.changeTracker;
  if (!tracker?.activeState) return;
  const put = (/** @type {HostState} */ state) => withKept(state, id, type, values);
  tracker.activeState = put(tracker.activeState);
  tracker.undoQueue = tracker.undoQueue.map(put);
  tracker.redoQueue = tracker.redoQueue.map(put);
  tracker.updateModified();
}

/**
 * Return a state of a workflow in which a node keeps other values; the state itself stays as it is.
 * @param {HostState} state
 * @param {string} id
 * @param {string} type of the node; one of another type keeps what it has
 * @param {Kept} values
 * @returns {HostState}
 */
export function withKept(state, id, type, values) {
  const { graph, node } = placeIn(state, id);
  if (!graph || !node || node.type !== type) return state;
  const kept = /** @type {Kept} */ (node.properties?.[KEPT] ?? {});
  const changed = { ...node, properties: { ...node.properties, [KEPT]: { ...kept, ...values } } };
  const nodes = graph.nodes?.map((one) => (one === node ? changed : one));
  if (graph === state) return { ...state, nodes };
  const subgraphs = state.definitions?.subgraphs?.map((one) => (one === graph ? { ...one, nodes } : one));
  return { ...state, definitions: { ...state.definitions, subgraphs } };
}

/**
 * Return the type of a node in a state of a workflow.
 * @param {HostState | undefined} state
 * @param {string} id
 */
export function typeIn(state, id) {
  return state && placeIn(state, id).node?.type;
}

/**
 * Return a node in a state of a workflow, and the graph that it is in.
 * @param {HostState} state
 * @param {string} id `5`, or `3:5` inside of a subgraph
 */
function placeIn(state, id) {
  /** @type {HostStateGraph | undefined} */
  let graph;
  /** @type {HostStateNode | undefined} */
  let node;
  for (const part of id.split(":")) {
    const kind = node?.type;
    graph = kind ? state.definitions?.subgraphs?.find((subgraph) => subgraph.id === kind) : state;
    node = graph?.nodes?.find((one) => String(one.id) === part);
    if (!node) break;
  }
  return { graph, node };
}

/**
 * Whether a result was computed from other widgets than there are now: of its node, or files that nodes before it load.
 * @param {Kept} kept
 * @param {(id: string) => HostNode | null | undefined} nodeById
 */
export function isOld({ inputs: prompt }, nodeById) {
  return Object.entries(prompt ?? {}).some(([id, entry]) => {
    const node = nodeById(id);
    if (!node || node.comfyClass !== entry?.class_type) return false;
    return Object.entries(entry.inputs ?? {}).some(([name, value]) => {
      const widget = node.widgets?.find((one) => one.name === name);
      // A seed has linked widgets: the host itself changes it after each run.
      const counts = widget && !WITHOUT_EFFECT.includes(name) && !widget.linkedWidgets?.length;
      return counts && widget.value !== value;
    });
  });
}
