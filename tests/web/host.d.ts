/** What web/host.js uses of ComfyUI's front end, which has no types of its own in a checkout. */

interface HostWidget {
  name: string;
  value: unknown;
  serialize?: boolean;
  linkedWidgets?: HostWidget[];
  callback?(value: unknown): void;
}

interface HostNode {
  id: number | string;
  type: string;
  comfyClass: string;
  properties: Record<string, unknown>;
  size: number[];
  graph?: HostGraph;
  subgraph?: HostGraph;
  inputs?: { name: string; widget?: { name: string } }[];
  widgets?: HostWidget[];
  computeSize(): number[];
  setSize(size: number[]): void;
  addDOMWidget(name: string, type: string, element: HTMLElement, options: Record<string, unknown>): HostWidget;
  removeWidget(widget: HostWidget): void;
  getInputLink(slot: number): HostLink | null;
}

interface HostLink {
  id: number;
  origin_id: number | string;
  origin_slot: number;
}

declare const LiteGraph: { LGraphNode: { prototype: HostNode } };

interface HostGraph {
  id: string;
  nodes?: HostNode[];
  subgraphs?: Map<string, HostGraph>;
  outputs?: { getLinks(): HostLink[] }[];
  getNodeById(id: number | string): HostNode | null;
  setDirtyCanvas(front: boolean, back: boolean): void;
}

/** A workflow as the front end saves it, and what it remembers of one that is open. */
interface HostStateNode {
  id: number | string;
  type: string;
  properties?: Record<string, unknown>;
}

interface HostStateGraph {
  id?: string;
  nodes?: HostStateNode[];
}

interface HostState extends HostStateGraph {
  definitions?: { subgraphs?: HostStateGraph[] };
}

interface HostWorkflow {
  changeTracker?: {
    activeState?: HostState;
    undoQueue: HostState[];
    redoQueue: HostState[];
    updateModified(): void;
  };
}

type HostCanvas = {
  processMouseWheel(event: Event): void;
  processMouseDown(event: Event): void;
  processMouseMove(event: Event): void;
  processMouseUp(event: Event): void;
  default_connection_color_byType: Record<string, string>;
  constructor: { link_type_colors: Record<string, string> };
};

/** A `locales/<language>/main.json`. */
interface HostTexts {
  lorax?: Record<string, unknown> & { notes?: Record<string, string> };
}

interface HostExtension {
  name: string;
  init(): Promise<void>;
  setup(): void;
  nodeCreated(node: HostNode): void;
  afterConfigureGraph(): void;
}

declare module "*/scripts/app.js" {
  export const app: {
    graph: HostGraph;
    rootGraph?: HostGraph;
    canvas: HostCanvas;
    extensionManager?: {
      setting?: { get(name: string): string | undefined };
      workflow?: { activeWorkflow?: HostWorkflow | null };
    };
    registerExtension(extension: HostExtension): void;
  };
}

declare module "*/scripts/api.js" {
  export const api: {
    getCustomNodesI18n(): Promise<Record<string, HostTexts>>;
    queuePrompt(...values: unknown[]): Promise<{ prompt_id?: string } | undefined>;
    addEventListener(type: string, listener: (event: CustomEvent) => void): void;
  };
}
