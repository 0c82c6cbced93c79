// @ts-check
/** What feeds what in a workflow: through reroutes, into subgraphs and out of them. */

const SUBGRAPH_INPUT = -10; // where links begin, within a subgraph, that come from its inputs

/**
 * Return the nodes of a type that take, at an input, what a node gives.
 * @param {HostNode} node
 * @param {string} type
 * @param {string} input
 * @param {HostNode[]} nodes all of the workflow
 */
export function takersOf(node, type, input, nodes) {
  return nodes.filter((taker) => {
    const slot = taker.type === type ? taker.inputs?.findIndex(({ name }) => name === input) : undefined;
    return slot !== undefined && slot >= 0 && giversOf(taker, slot, nodes).includes(node);
  });
}

/**
 * Return the nodes that give what an input takes. Within a subgraph that is used twice there may be two.
 * @param {HostNode} node
 * @param {number} slot
 * @param {HostNode[]} nodes all of the workflow
 * @returns {HostNode[]}
 */
function giversOf(node, slot, nodes) {
  /** @type {Set<string>} */
  const seen = new Set(); // reroutes may go round

  /**
   * @param {HostNode} node
   * @param {number} slot
   * @returns {HostNode[]}
   */
  function ofInput(node, slot) {
    const link = linkInto(node, slot);
    return link && node.graph ? ofLink(link, node.graph) : [];
  }

  /**
   * @param {HostLink} link
   * @param {HostGraph} graph
   * @returns {HostNode[]}
   */
  function ofLink(link, graph) {
    const key = `${graph.id} ${link.id}`;
    if (seen.has(key)) return [];
    seen.add(key);
    if (Number(link.origin_id) === SUBGRAPH_INPUT) {
      return usesOf(graph, nodes).flatMap((use) => ofInput(use, link.origin_slot));
    }
    const giver = graph.getNodeById(link.origin_id);
    if (giver?.type === "Reroute") return ofInput(giver, 0);
    if (!giver?.subgraph) return giver ? [giver] : [];
    const inner = giver.subgraph.outputs?.[link.origin_slot]?.getLinks()[0];
    return inner ? ofLink(inner, giver.subgraph) : [];
  }

  return ofInput(node, slot);
}

/**
 * Return the widgets that set a value of a node: its own, or, where that is an input of the subgraph around it, those of
 * the nodes that stand for the subgraph; none where a link gives the value.
 * @param {HostNode} node
 * @param {string} name
 * @param {HostNode[]} nodes all of the workflow
 * @returns {HostWidget[]}
 */
export function settersOf(node, name, nodes) {
  const slot = node.inputs?.findIndex(({ widget }) => widget?.name === name) ?? -1;
  const link = slot < 0 ? null : linkInto(node, slot);
  if (!link) return node.widgets?.filter((widget) => widget.name === name) ?? [];
  if (Number(link.origin_id) !== SUBGRAPH_INPUT) return [];
  return usesOf(node.graph, nodes).flatMap((use) => {
    const promoted = use.inputs?.[link.origin_slot]?.widget?.name;
    return promoted === undefined ? [] : settersOf(use, promoted, nodes);
  });
}

/**
 * Return the nodes that stand for a subgraph.
 * @param {HostGraph | undefined} graph
 * @param {HostNode[]} nodes
 */
function usesOf(graph, nodes) {
  return nodes.filter(({ subgraph }) => subgraph && subgraph === graph);
}

/**
 * Return the link into an input. Asked itself, a node that stands for a subgraph tells of its outputs instead.
 * @param {HostNode} node
 * @param {number} slot
 */
function linkInto(node, slot) {
  return LiteGraph.LGraphNode.prototype.getInputLink.call(node, slot);
}
