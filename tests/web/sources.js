/** A similarity as lorax/show/view.py writes it, made by hand: values are numbers or null, row by row. */
export function similarity({
  blocks = ["unet.down_blocks.0.attentions.0.transformer_blocks.0", "unet.mid_block.attentions.0.transformer_blocks.0"],
  roles = ["attn1.to_q", "attn1.to_out.0"],
  value = (i, j) => (i === j ? 0.9 : 0.1),
} = {}) {
  const layers = blocks.flatMap((_, b) => roles.map((_, r) => [b, r, 0]));
  const table = { blocks, roles, layers };
  const kinds = roles.map((role, r) => {
    const places = blocks.map((_, b) => b * roles.length + r);
    const codes = blocks.flatMap((_, i) => blocks.map((_, j) => code(value(i, j, r))));
    return {
      kind: `unet:${role.replace(/\.\d+$/, "")}`,
      sources: places,
      targets: places,
      corrected: btoa(String.fromCharCode(...codes)),
    };
  });
  const pairs = layers.map(([b, r], place) => [place, place, 0.97, 0.95, value(b, b, r)]);
  return {
    schema: "lorax-similarity-view",
    schema_version: 2,
    source: "a",
    target: "b",
    rank: null,
    matching: "auto",
    scale: { lowest: -0.27, step: 0.005 },
    shapes: [[320, 320]],
    sources: table,
    targets: table,
    kinds,
    pairs,
  };
}

/** A value as one byte: 0 is none, b is -0.27 + 0.005 (b - 1). */
function code(value) {
  return value === null ? 0 : Math.round((value + 0.27) / 0.005) + 1;
}

const NOTE = {
  code: "adapter_size",
  values: { adapter: "(4, 4)", source: "(8, 4)" },
  text: "adapter (4, 4), source …",
};
const ADVICE = { code: "try_method", values: {}, text: "the method copy" };
const WEAK = {
  code: "weak",
  values: { percent: 30, advice: ADVICE },
  text: "weak effect: only 30%; try the method copy",
};
const MISSING = {
  code: "missing",
  values: { missing: 2, layers: 3, outcomes: { "below threshold": 1, "not in target": 1 } },
  text: "2 of 3 layers get no update: 1 below threshold, 1 not in target",
};

/** A transfer report with rows of some outcomes. */
export function report(outcomes = ["transferred", "below threshold", "not in target"]) {
  const rows = outcomes.map((outcome, i) => {
    const [block, role] = [`unet.down_blocks.0.attentions.${i}.transformer_blocks.0`, "attn1.to_q"];
    const source = `${block}.${role}`;
    const [through, gone] = [outcome === "transferred", outcome === "not in target"];
    const score = { phi: 0.98, chance: 0.5, corrected: 0.96 };
    return {
      source,
      block,
      role,
      target: gone ? "" : source,
      outcome,
      method: gone ? "" : "project",
      rank: through ? 100 : 0,
      left: gone ? null : score,
      right: gone ? null : score,
      corrected: gone ? null : 0.123456789,
      retained_norm: through ? 0.3 : 0,
      source_norm: 1,
      target_norm: through ? 0.3 : 0,
      notes: through ? [] : [NOTE],
    };
  });
  const counts = {};
  for (const outcome of outcomes) counts[outcome] = (counts[outcome] ?? 0) + 1;
  return {
    schema: "lorax-transfer",
    schema_version: 2,
    adapter: "style",
    source: "a",
    target: "b",
    method: "auto",
    rank: 320,
    threshold: 0.2,
    assignment: { pairs: {} },
    layers: rows.length,
    arrived: counts.transferred ?? 0,
    outcomes: counts,
    retained_norm: 0.3,
    left_out: false,
    grade: "weak",
    suggested_strength: 3.33,
    most_strength: 4,
    summary: "1 of 3 layers arrived",
    warnings: [WEAK, MISSING],
    rows,
    unused: {},
  };
}

/** The time that this process has computed, in milliseconds: the machine may be busy with something else. */
export function computed() {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
}
