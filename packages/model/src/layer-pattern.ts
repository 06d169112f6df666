/**
 * Owns what differs from layer to layer: which layers have a sliding window, and which rotary table each one uses.
 *
 * Invariants
 * 1. `layer_types` of config.json wins over the architecture's own pattern.
 * 2. A window that the context cannot outgrow is no window.
 */
import type { Architecture } from './architecture.ts';
import type { RawConfig } from './raw-config.ts';
import { RopeError, type RopeFields, type RotaryTable, rotaryTable } from './rotary.ts';

const SLIDING = 'sliding_attention';
const FULL = 'full_attention';

export interface RotaryOfModel {
  readonly tables: readonly RotaryTable[];
  /** [numLayers] Index into `tables`, or null. */
  readonly ofLayer: readonly (number | null)[];
  /** Longest sequence that is served. */
  readonly contextLength: number;
}

/** [numLayers] Tokens that a query sees, itself included; 0 = all. */
export function windowTokensOf(
  raw: RawConfig,
  architecture: Architecture,
  { ofLayer, contextLength }: RotaryOfModel,
): number[] {
  const window = raw.sliding_window ?? contextLength;
  return ofLayer.map((rotary, layer) =>
    window < contextLength && isSliding(raw, architecture, layer, rotary !== null) ? window : 0,
  );
}

/** @throws RopeError */
export function rotaryOf(raw: RawConfig, architecture: Architecture, headDim: number): RotaryOfModel {
  const maxPositions = raw.max_position_embeddings;
  const layers = Array.from({ length: raw.num_hidden_layers }, (_, layer) => layer);
  if (architecture.positions !== null) {
    return { tables: [], ofLayer: layers.map(() => null), contextLength: maxPositions };
  }
  const global = ropeOf(raw, FULL);
  const type = typeOf(global, architecture);
  const tables = [table(raw, architecture, global, headDim)];
  const local = localRopeOf(raw, architecture);
  if (local !== null) tables.push(table(raw, architecture, local, headDim));
  const ofLayer = layers.map((layer) => {
    if (!hasRotary(raw, architecture, layer)) return null;
    return local !== null && isSliding(raw, architecture, layer, true) ? 1 : 0;
  });
  const stretched = (global.original_max_position_embeddings ?? maxPositions) * (global.factor ?? 1);
  const contextLength = type === 'yarn' ? Math.max(maxPositions, Math.floor(stretched)) : maxPositions;
  return { tables: withShortParts(tables), ofLayer, contextLength };
}

function table(raw: RawConfig, architecture: Architecture, rope: RopeFields, headDim: number): RotaryTable {
  const partialFactor = rope.partial_rotary_factor ?? raw.partial_rotary_factor ?? 1;
  if (!architecture.hasPartialRotary && partialFactor !== 1) {
    throw new RopeError(`partial_rotary_factor ${partialFactor} is nothing that ${raw.model_type} has`);
  }
  return rotaryTable(rope, typeOf(rope, architecture), {
    theta: rope.rope_theta ?? raw.rope_theta ?? 10_000,
    dim: Math.floor(headDim * partialFactor),
    maxPositions: raw.max_position_embeddings,
    outerOriginalPositions: raw.original_max_position_embeddings ?? null,
  });
}

/** One position id serves all tables: where one has a part for short sequences, the others repeat theirs there. */
function withShortParts(tables: readonly RotaryTable[]): readonly RotaryTable[] {
  const [numTokens, ...others] = new Set(tables.flatMap(({ short }) => (short === null ? [] : [short.numTokens])));
  if (others.length > 0) throw new RopeError('longrope of two original lengths is not supported');
  if (numTokens === undefined) return tables;
  return tables.map((own) => ({ ...own, short: own.short ?? { numTokens, frequencies: own.frequencies } }));
}

function typeOf(rope: RopeFields, architecture: Architecture): string {
  const type = rope.rope_type ?? rope.type ?? 'default';
  return architecture.ropeTypeNames[type] ?? type;
}

/** The rope fields of a kind of layer; `rope_parameters` may hold one set for each kind. */
function ropeOf(raw: RawConfig, kind: typeof FULL | typeof SLIDING): RopeFields {
  const { rope_parameters: parameters, rope_scaling: scaling } = raw;
  if (!hasKinds(raw)) return scaling ?? parameters ?? {};
  const own = parameters?.[kind] ?? {};
  if (kind === FULL) return { ...own, ...scaling };
  return { ...own, rope_theta: own.rope_theta ?? raw.rope_local_base_freq };
}

/** Rope fields of the layers with a window, where they have their own: not scaled, with a base of their own. */
function localRopeOf(raw: RawConfig, architecture: Architecture): RopeFields | null {
  if (architecture.windows === 'none') return null;
  if (hasKinds(raw)) return ropeOf(raw, SLIDING);
  const theta = raw.rope_local_base_freq ?? null;
  return theta === null ? null : { rope_theta: theta };
}

function hasKinds({ rope_parameters: parameters }: RawConfig): boolean {
  return (parameters?.[FULL] ?? parameters?.[SLIDING] ?? null) !== null;
}

function hasRotary(raw: RawConfig, architecture: Architecture, layer: number): boolean {
  if (!architecture.hasLayersWithoutRotary) return true;
  const given = raw.no_rope_layers ?? null;
  // 1 says that the layer has rotary embedding, whatever the field's name says.
  if (given !== null) return given[layer] !== 0;
  return (layer + 1) % (raw.no_rope_layer_interval ?? 4) !== 0;
}

function isSliding(raw: RawConfig, architecture: Architecture, layer: number, hasRotaryHere: boolean): boolean {
  const { windows } = architecture;
  if (windows === 'none') return false;
  if ((windows === 'late' || windows === 'without_rotary') && raw.use_sliding_window !== true) return false;
  const types = raw.layer_types ?? null;
  if (types !== null) {
    const type = types[layer];
    if (type === SLIDING || type === FULL) return type === SLIDING;
    throw new RopeError(`layer_types: layer ${layer} is '${type}', neither ${FULL} nor ${SLIDING}`);
  }
  switch (windows) {
    case 'all':
      return true;
    case 'even':
      return layer % 2 === 0;
    case 'pattern':
      return (layer + 1) % (raw.sliding_window_pattern ?? 6) !== 0;
    case 'late':
      return layer >= (raw.max_window_layers ?? 0);
    case 'without_rotary':
      return !hasRotaryHere;
  }
}
