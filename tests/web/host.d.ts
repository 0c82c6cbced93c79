/** What web/host.js uses of ComfyUI's front end, which has no types of its own in a checkout. */

interface HostWidget {
  name: string;
  value: unknown;
  serialize?: boolean;
  linkedWidgets?: HostWidget[];
  callback?(value: unknown): void;
}

interface HostNode {
  type: string;
  comfyClass: string;
  properties: Record<string, unknown>;
  size: number[];
  graph?: HostGraph;
  subgraph?: HostGraph;
  inputs?: { widget?: { name: string }; link: number | null }[];
  outputs?: { links?: number[] | null }[];
  widgets?: HostWidget[];
  computeSize(): number[];
  setSize(size: number[]): void;
  addDOMWidget(name: string, type: string, element: HTMLElement, options: Record<string, unknown>): HostWidget;
  removeWidget(widget: HostWidget): void;
}

interface HostGraph {
  nodes?: HostNode[];
  links?: Record<number, { target_id: number }>;
  subgraphs?: Map<string, HostGraph>;
  getLink?(id: number): { target_id: number } | undefined;
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

type HostCanvas = Record<
  "processMouseWheel" | "processMouseDown" | "processMouseMove" | "processMouseUp",
  (event: Event) => void
>;

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
