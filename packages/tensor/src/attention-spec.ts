/**
 * Owns what an attention shard must know of a model: head shapes and score rules, as data. No shard ever sees the model
 * itself.
 *
 * Invariants
 * 1. Two specs are the same when every field has the same value; an absent field equals only an absent one.
 */

/** Head sizes that attention shards serve: the kernels work on 8 elements at a time. */
export const HEAD_DIM_RANGE = { minimum: 8, maximum: 256, multipleOf: 8 } as const;

/**
 * How K and V are stored in a block, and q, k, v and o travel between executor and shard: what is sent is then as precise
 * as what is kept, and f16 halves both. Log-sum-exps are float32 always.
 */
export type KvDtype = 'f16' | 'f32';

export function elementBytes(dtype: KvDtype): number {
  return dtype === 'f16' ? 2 : 4;
}

/** Shape of the attention that a model asks for: head shapes are the same in every layer, the rest may differ. */
export interface AttentionSpec {
  readonly numLayers: number;
  /** Query heads; a multiple of numKvHeads. */
  readonly numHeads: number;
  readonly numKvHeads: number;
  /** Elements of one head of Q, K and V: see HEAD_DIM_RANGE. */
  readonly headDim: number;
  /** Multiplies q.k before the softmax, usually 1/sqrt(headDim). */
  readonly scale: number;
  /** Scores become softcap * tanh(score / softcap) before the mask; absent = off (Gemma 2). */
  readonly softcap?: number | undefined;
  /** [numLayers] Tokens that a query sees, itself included: keys with queryPosition - keyPosition < window; 0 = all. Absent = all in every layer. */
  readonly windowTokens?: readonly number[] | undefined;
  /** [numLayers][numHeads] Logit of a key without a value that only takes weight away; absent = none. Applied by the gather, once. */
  readonly sinkLogits?: readonly (readonly number[])[] | undefined;
  /** [numHeads] Added to a score after the soft-cap: slope * (keyPosition - queryPosition); absent = none. */
  readonly alibiSlopes?: readonly number[] | undefined;
}

/** How the cluster stores KV: the attention spec plus what the kv-manager decides. */
export interface KvLayout extends AttentionSpec {
  /** Consecutive tokens of one request in one block; a multiple of 8. */
  readonly blockSizeTokens: number;
  readonly kvDtype: KvDtype;
}

function sameNumbers(a: readonly number[] | undefined, b: readonly number[] | undefined): boolean {
  if (a === undefined || b === undefined) return a === b;
  return a.length === b.length && a.every((value, i) => value === b[i]);
}

function sameRows(
  a: readonly (readonly number[])[] | undefined,
  b: readonly (readonly number[])[] | undefined,
): boolean {
  if (a === undefined || b === undefined) return a === b;
  return a.length === b.length && a.every((row, i) => sameNumbers(row, b[i]));
}

export function sameAttentionSpec(a: AttentionSpec, b: AttentionSpec): boolean {
  return (
    a.numLayers === b.numLayers &&
    a.numHeads === b.numHeads &&
    a.numKvHeads === b.numKvHeads &&
    a.headDim === b.headDim &&
    a.scale === b.scale &&
    a.softcap === b.softcap &&
    sameNumbers(a.windowTokens, b.windowTokens) &&
    sameRows(a.sinkLogits, b.sinkLogits) &&
    sameNumbers(a.alibiSlopes, b.alibiSlopes)
  );
}

export function sameKvLayout(a: KvLayout, b: KvLayout): boolean {
  return sameAttentionSpec(a, b) && a.blockSizeTokens === b.blockSizeTokens && a.kvDtype === b.kvDtype;
}

/**
 * Tokens whose KV a request needs behind its next one, that one included: the largest window, or Infinity when some
 * layer sees all. KV that no later query can see may be given up.
 */
export function maxWindowTokens(spec: AttentionSpec): number {
  const { windowTokens } = spec;
  if (windowTokens === undefined || windowTokens.some((window) => window === 0)) return Number.POSITIVE_INFINITY;
  return Math.max(...windowTokens);
}

export function kvBytesPerToken(layout: KvLayout): number {
  return layout.numLayers * 2 * layout.numKvHeads * layout.headDim * elementBytes(layout.kvDtype);
}

/** Bytes of one block: all layers, K and V, all KV heads. */
export function blockBytes(layout: KvLayout): number {
  return layout.blockSizeTokens * kvBytesPerToken(layout);
}
