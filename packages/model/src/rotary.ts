/**
 * Owns rotary embedding: from the rope fields of config.json to frequencies, and from those to tables of cos and sin.
 *
 * Invariants
 * 1. Frequencies and factors are those of Hugging Face transformers (modeling_rope_utils.py), in float64.
 * 2. A position's row depends on nothing but the position, so one table serves every request of a wave. Where the
 *    frequencies depend on the length of the sequence (longrope), the table has a second part for short sequences, and
 *    who feeds position ids says by an offset which part a sequence uses.
 * 3. A rope type that is not known is rejected by name; `dynamic` is plain up to the original length, and no longer
 *    sequence is served (contextLength), because keys in a cache cannot follow a base that changes with every token.
 */
import { z } from 'zod';

/** Tables of one kind of layer. */
export interface RotaryTable {
  /** Elements at the start of each head that are rotated, in pairs (i, i + dim / 2). */
  readonly dim: number;
  /** Angle per position, [dim / 2]. */
  readonly frequencies: readonly number[];
  /** Multiplies cos and sin. */
  readonly attentionFactor: number;
  /** Sequences of at most `numTokens` tokens have other frequencies; null: all have the same. */
  readonly short: { readonly numTokens: number; readonly frequencies: readonly number[] } | null;
}

const factors = z.array(z.number().positive());

/** One of `rope_scaling` and `rope_parameters`. */
export const ropeSchema = z.looseObject({
  rope_type: z.string().nullish(),
  type: z.string().nullish(),
  rope_theta: z.number().positive().nullish(),
  partial_rotary_factor: z.number().positive().max(1).nullish(),
  factor: z.number().positive().nullish(),
  original_max_position_embeddings: z.int().positive().nullish(),
  attention_factor: z.number().positive().nullish(),
  low_freq_factor: z.number().positive().nullish(),
  high_freq_factor: z.number().positive().nullish(),
  beta_fast: z.number().positive().nullish(),
  beta_slow: z.number().positive().nullish(),
  mscale: z.number().nullish(),
  mscale_all_dim: z.number().nullish(),
  truncate: z.boolean().nullish(),
  short_factor: factors.nullish(),
  long_factor: factors.nullish(),
});

export type RopeFields = z.infer<typeof ropeSchema>;

/** What a rope type computes its frequencies from. */
interface RopeInput {
  readonly rope: RopeFields;
  /** Plain frequencies. */
  readonly plain: readonly number[];
  readonly dim: number;
  readonly theta: number;
  readonly maxPositions: number;
  /** Trained length, before scaling. */
  readonly originalPositions: number;
  /** `original_max_position_embeddings` stands beside the rope fields, not in them (Phi-3). */
  readonly hasOuterOriginal: boolean;
}

type RopeResult = Pick<RotaryTable, 'frequencies' | 'attentionFactor' | 'short'>;

/** Thrown for a field that is missing or wrong; the caller knows the file. */
export class RopeError extends Error {
  override name = 'RopeError';
}

const ROPE_TYPES: ReadonlyMap<string, (input: RopeInput) => RopeResult> = new Map([
  ['default', ({ plain }) => scaled(plain)],
  ['dynamic', ({ plain }) => scaled(plain)],
  ['linear', (input) => scaled(input.plain.map((frequency) => frequency / required(input, 'factor')))],
  ['llama3', llama3],
  ['yarn', yarn],
  ['longrope', longrope],
]);

/** @throws RopeError */
export function rotaryTable(
  rope: RopeFields,
  type: string,
  given: { theta: number; dim: number; maxPositions: number; outerOriginalPositions: number | null },
): RotaryTable {
  const { theta, dim, maxPositions, outerOriginalPositions } = given;
  const compute = ROPE_TYPES.get(type);
  if (compute === undefined) {
    throw new RopeError(`rope type '${type}' is not supported; these are: ${[...ROPE_TYPES.keys()].join(', ')}`);
  }
  if (dim < 2 || dim % 2 !== 0) throw new RopeError(`rotary embedding of ${dim} elements of a head, it needs pairs`);
  const half = dim / 2;
  const plain = Array.from({ length: half }, (_, i) => theta ** (-i / half));
  const originalPositions = outerOriginalPositions ?? rope.original_max_position_embeddings ?? maxPositions;
  const hasOuterOriginal = outerOriginalPositions !== null;
  return { dim, ...compute({ rope, plain, dim, theta, maxPositions, originalPositions, hasOuterOriginal }) };
}

/** Rows first..first + count - 1 of cos or sin, [rows, dim / 2]: the context's positions, then those of short sequences. */
export function rotaryValues(
  table: RotaryTable,
  kind: 'cos' | 'sin',
  contextLength: number,
  first: number,
  count: number,
): Float32Array {
  const half = table.dim / 2;
  const values = new Float32Array(count * half);
  for (let row = 0; row < count; row++) {
    const isShort = first + row >= contextLength;
    const position = isShort ? first + row - contextLength : first + row;
    const frequencies = isShort && table.short !== null ? table.short.frequencies : table.frequencies;
    for (let i = 0; i < half; i++) {
      const angle = position * (frequencies[i] ?? 0);
      values[row * half + i] = (kind === 'cos' ? Math.cos(angle) : Math.sin(angle)) * table.attentionFactor;
    }
  }
  return values;
}

export function numRotaryRows(table: RotaryTable, contextLength: number): number {
  return contextLength + (table.short?.numTokens ?? 0);
}

function scaled(frequencies: readonly number[], attentionFactor = 1): RopeResult {
  return { frequencies, attentionFactor, short: null };
}

function required(input: RopeInput, field: 'factor' | 'low_freq_factor' | 'high_freq_factor'): number {
  const value = input.rope[field] ?? null;
  if (value === null) throw new RopeError(`the rope fields have no ${field}`);
  return value;
}

/** Long waves are slowed down, short ones left, those between interpolated. */
function llama3(input: RopeInput): RopeResult {
  const factor = required(input, 'factor');
  const low = required(input, 'low_freq_factor');
  const high = required(input, 'high_freq_factor');
  return scaled(
    input.plain.map((frequency) => {
      const turns = (input.originalPositions * frequency) / (2 * Math.PI);
      if (turns < low) return frequency / factor;
      if (turns > high) return frequency;
      const smooth = (turns - low) / (high - low);
      return ((1 - smooth) * frequency) / factor + smooth * frequency;
    }),
  );
}

/** Interpolated where a pair makes few turns over the trained length, extrapolated where it makes many. */
function yarn(input: RopeInput): RopeResult {
  const { rope, plain, dim, theta, maxPositions, originalPositions } = input;
  const factor = rope.factor ?? maxPositions / originalPositions;
  const pairOfTurns = (turns: number): number =>
    (dim * Math.log(originalPositions / (turns * 2 * Math.PI))) / (2 * Math.log(theta));
  const round = rope.truncate !== false;
  const fast = pairOfTurns(rope.beta_fast ?? 32);
  const slow = pairOfTurns(rope.beta_slow ?? 1);
  const first = Math.max(round ? Math.floor(fast) : fast, 0);
  const last = Math.min(round ? Math.ceil(slow) : slow, dim - 1);
  const width = first === last ? 0.001 : last - first;
  const frequencies = plain.map((frequency, i) => {
    const interpolated = Math.min(Math.max((i - first) / width, 0), 1);
    return (frequency / factor) * interpolated + frequency * (1 - interpolated);
  });
  const attention = (mscale: number): number => (factor <= 1 ? 1 : 0.1 * mscale * Math.log(factor) + 1);
  const { mscale, mscale_all_dim: mscaleAllDim } = rope;
  const byScales = mscale && mscaleAllDim ? attention(mscale) / attention(mscaleAllDim) : attention(1);
  return scaled(frequencies, rope.attention_factor ?? byScales);
}

/** A factor for each pair: one list for sequences within the trained length, one for longer ones. */
function longrope({ rope, plain, maxPositions, originalPositions, hasOuterOriginal }: RopeInput): RopeResult {
  const ratio = maxPositions / originalPositions;
  const factor = hasOuterOriginal ? ratio : (rope.factor ?? ratio);
  const byLength = factor <= 1 ? 1 : Math.sqrt(1 + Math.log(factor) / Math.log(originalPositions));
  const divided = (field: 'short_factor' | 'long_factor'): number[] => {
    const divisors = rope[field] ?? [];
    if (divisors.length !== plain.length) {
      throw new RopeError(`${field} has ${divisors.length} values, not ${plain.length}, one for each rotated pair`);
    }
    return plain.map((frequency, i) => frequency / (divisors[i] ?? 1));
  };
  const [short, long] = [divided('short_factor'), divided('long_factor')];
  const attentionFactor = rope.attention_factor ?? byLength;
  if (maxPositions <= originalPositions) return scaled(short, attentionFactor);
  return { frequencies: long, attentionFactor, short: { numTokens: originalPositions, frequencies: short } };
}
