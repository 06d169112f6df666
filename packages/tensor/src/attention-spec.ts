/**
 * Owns what an attention shard must know of a model: head shapes, as data. No shard ever sees the model itself.
 */

/** How K and V are stored in a block. The wire is always float32. */
export type KvDtype = 'f16' | 'f32';

/** Shape of the attention that a model asks for: head shapes are the same in every layer, the rest may differ. */
export interface AttentionSpec {
  readonly numLayers: number;
  /** Query heads; a multiple of numKvHeads. */
  readonly numHeads: number;
  readonly numKvHeads: number;
  /** Elements of one head of Q, K and V. */
  readonly headDim: number;
  /** Multiplies q.k before the softmax, usually 1/sqrt(headDim). */
  readonly scale: number;
  /** Scores become softcap * tanh(score / softcap) before the mask; absent = off (Gemma 2). */
  readonly softcap?: number | undefined;
  /** [numLayers] Tokens that a query sees, itself included: keys with queryPosition - keyPosition < window; 0 = all. Absent = all in every layer. */
  readonly windowTokens?: readonly number[] | undefined;
  /** [numLayers][numHeads] Logit of a key without a value that only takes weight away; absent = none. Applied by the gather, once. */
  readonly sinkLogits?: readonly (readonly number[])[] | undefined;
  /** [numHeads] Added to a score: slope * (keyPosition - queryPosition); absent = none. */
  readonly alibiSlopes?: readonly number[] | undefined;
}

/** How the cluster stores KV: the attention spec plus what the kv-manager decides. */
export interface KvLayout extends AttentionSpec {
  /** Consecutive tokens of one request in one block; a multiple of 8. */
  readonly blockSizeTokens: number;
  readonly kvDtype: KvDtype;
}

export function kvBytesPerToken(layout: KvLayout): number {
  return layout.numLayers * 2 * layout.numKvHeads * layout.headDim * (layout.kvDtype === 'f16' ? 2 : 4);
}

/** Bytes of one block: all layers, K and V, all KV heads. */
export function blockBytes(layout: KvLayout): number {
  return layout.blockSizeTokens * kvBytesPerToken(layout);
}
