/**
 * Owns the step plan: which queries see which blocks and where new K and V go, and how many bytes of tensors follow from it.
 *
 * Invariants
 * 1. The plan names everything that the per-layer messages of its step need; those carry tensors only.
 * 2. A plan is not trusted: its indices into KV memory are checked by the kernel, which knows it.
 */
import { elementBytes, type KvLayout } from './attention-spec.ts';

/** queryRowStart, numQueries, firstPosition, blockStart, numBlocks. */
export const SEGMENT_FIELDS = 5;
/** physicalBlock, firstPosition, numTokens. */
export const BLOCK_FIELDS = 3;

/** The same for all layers of a step. Never mutated by who gets it. */
export interface StepPlan {
  readonly numQueryRows: number;
  readonly numKvRows: number;
  /**
   * [numSegments, SEGMENT_FIELDS] int32: queryRowStart, numQueries, firstPosition (absolute position of the first query; the
   * rest are consecutive), blockStart, numBlocks (range in `blocks`). One segment per request. A query row that belongs to no
   * segment sees no key.
   */
  readonly segments: Int32Array;
  /**
   * [numBlockRefs, BLOCK_FIELDS] int32: physicalBlock, firstPosition (absolute position of the block's first token, a multiple
   * of blockSizeTokens), numTokens (valid tokens in the block after this step's append). Ordered by firstPosition inside a
   * segment; positions may have holes, because a request's other blocks live on other shards.
   */
  readonly blocks: Int32Array;
  /** [numKvRows] int32: physicalBlock * blockSizeTokens + offset, where row i of k and v is stored before attention runs. */
  readonly kvSlots: Int32Array;
}

/** What the sizes of tensors on the wire depend on. */
export type TensorLayout = Pick<KvLayout, 'numHeads' | 'numKvHeads' | 'headDim' | 'kvDtype'>;

/** Bytes of q, k and v of one layer: [numQueryRows, numHeads, headDim], then k and v [numKvRows, numKvHeads, headDim], kvDtype. */
export function attendBytes(
  { numQueryRows, numKvRows }: Pick<StepPlan, 'numQueryRows' | 'numKvRows'>,
  { numHeads, numKvHeads, headDim, kvDtype }: TensorLayout,
): number {
  return elementBytes(kvDtype) * headDim * (numQueryRows * numHeads + 2 * numKvRows * numKvHeads);
}

/** Bytes of one layer's reply: o [numQueryRows, numHeads, headDim] kvDtype, then lse [numQueryRows, numHeads] float32. */
export function partialBytes(numQueryRows: number, { numHeads, headDim, kvDtype }: TensorLayout): number {
  return numQueryRows * numHeads * (elementBytes(kvDtype) * headDim + 4);
}
