/**
 * Owns what the kernel tests share: an independent float64 oracle, a seeded generator of steps, and promise wrappers.
 *
 * Invariants
 * 1. The oracle keeps KV per request and position and knows nothing of blocks, slots, tiles or running maxima.
 * 2. Everything random comes from the seed.
 */
import {
  elementBytes,
  float16BitsToFloat32,
  float32ToFloat16Bits,
  type KvDtype,
  type KvLayout,
  type StepPlan,
} from '@lamina/tensor';
import { createKernel } from '../src/create-kernel.ts';
import type { AttentionKernel, KernelStep, SimdVariant } from '../src/kernel.ts';
import { loadNativeAddon } from '../src/native-addon.ts';

export class Random {
  #state: number;
  constructor(seed: number) {
    this.#state = (seed * 2654435761 + 1) >>> 0;
  }
  /** Uniform in [0, 1). */
  next(): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    let t = this.#state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  }
  integer(minimum: number, maximum: number): number {
    return minimum + Math.floor(this.next() * (maximum - minimum + 1));
  }
  floats(count: number, amplitude: number): Float32Array {
    const values = new Float32Array(count);
    for (let i = 0; i < count; i++) values[i] = (this.next() * 2 - 1) * amplitude;
    return values;
  }
}

const loaded = loadNativeAddon();
export const NATIVE_VARIANTS: readonly SimdVariant[] =
  loaded.addon === null
    ? []
    : loaded.addon
        .supportedSimd()
        .filter((name): name is SimdVariant => ['avx512', 'avx2', 'neon', 'scalar'].includes(name));
export const ALL_KINDS: readonly (SimdVariant | 'portable')[] = [...NATIVE_VARIANTS, 'portable'];

export function lanesOf(kind: SimdVariant | 'portable'): number {
  return kind === 'avx512' ? 16 : 8;
}

export function makeKernel(
  kind: SimdVariant | 'portable' | 'auto',
  layout: KvLayout,
  numBlocks: number,
  numThreads = 1,
): AttentionKernel {
  if (kind === 'portable' || kind === 'auto') return createKernel({ layout, numBlocks, numThreads, kind }).kernel;
  return createKernel({ layout, numBlocks, numThreads, kind: 'native', simd: kind }).kernel;
}

export function makeLayout(changes: Partial<KvLayout> = {}): KvLayout {
  const headDim = changes.headDim ?? 64;
  return {
    numLayers: 1,
    numHeads: 4,
    numKvHeads: 2,
    headDim,
    scale: headDim ** -0.5,
    blockSizeTokens: 16,
    kvDtype: 'f32',
    ...changes,
  };
}

/** A view of `length` bytes at an odd address. */
export function unaligned(length: number, offset = 3): Uint8Array {
  return new Uint8Array(new ArrayBuffer(length + 16), offset, length);
}

/** q, k and v as a kernel of this dtype takes them. */
export function toBytes(parts: readonly Float32Array[], offset = 1, dtype: KvDtype = 'f32'): Uint8Array {
  const elements = parts.map((part) => (dtype === 'f32' ? part : Uint16Array.from(part, float32ToFloat16Bits)));
  const bytes = unaligned(
    elements.reduce((sum, part) => sum + part.byteLength, 0),
    offset,
  );
  let at = 0;
  for (const part of elements) {
    bytes.set(new Uint8Array(part.buffer, part.byteOffset, part.byteLength), at);
    at += part.byteLength;
  }
  return bytes;
}

/** o and lse of a float32 kernel. */
export function toFloats(bytes: Uint8Array): Float32Array {
  return new Float32Array(bytes.slice().buffer);
}

/** o and lse of any kernel. */
export function outFloats(layout: KvLayout, bytes: Uint8Array): Float32Array {
  if (layout.kvDtype === 'f32') return toFloats(bytes);
  const numCells = bytes.length / (2 * layout.headDim + 4);
  const outputBytes = 2 * numCells * layout.headDim;
  const outputs = new Uint16Array(bytes.slice(0, outputBytes).buffer);
  const floats = new Float32Array(outputs.length + numCells);
  floats.set(Float32Array.from(outputs, float16BitsToFloat32));
  floats.set(toFloats(bytes.subarray(outputBytes)), outputs.length);
  return floats;
}

export function outBytes(layout: KvLayout, numQueryRows: number): number {
  return numQueryRows * layout.numHeads * (elementBytes(layout.kvDtype) * layout.headDim + 4);
}

export function attend(
  kernel: AttentionKernel,
  step: KernelStep,
  layer: number,
  qkv: Uint8Array,
  out: Uint8Array,
): Promise<void> {
  return new Promise((resolve, reject) =>
    kernel.attend(step, layer, qkv, out, (error) => (error === null ? resolve() : reject(error))),
  );
}

/** A value as the kernel gets it, and as the slab gives it back. */
export function stored(layout: KvLayout, value: number): number {
  return layout.kvDtype === 'f16' ? float16BitsToFloat32(float32ToFloat16Bits(value)) : Math.fround(value);
}

/** KV of one request: position -> per layer k and v [numKvHeads, headDim], as stored. */
export type History = Map<number, { k: Float64Array; v: Float64Array }[]>;

/** Attention of the query row at `queryPosition` over the request's KV so far, straight from the definition. */
export function oracleRow(
  layout: KvLayout,
  layer: number,
  q: Float32Array,
  history: History,
  queryPosition: number,
): { o: Float64Array; lse: Float64Array } {
  const { numHeads, numKvHeads, headDim, scale, softcap, alibiSlopes } = layout;
  const windowTokens = layout.windowTokens?.[layer] || Number.POSITIVE_INFINITY;
  const o = new Float64Array(numHeads * headDim);
  const lse = new Float64Array(numHeads).fill(Number.NEGATIVE_INFINITY);
  const positions = [...history.keys()].filter(
    (position) => position <= queryPosition && queryPosition - position < windowTokens,
  );
  if (positions.length === 0) return { o, lse };
  for (let head = 0; head < numHeads; head++) {
    const kvHead = Math.floor(head / (numHeads / numKvHeads));
    const scores = positions.map((position) => {
      const { k } = history.get(position)![layer]!;
      let dot = 0;
      for (let d = 0; d < headDim; d++) dot += q[head * headDim + d]! * k[kvHead * headDim + d]!;
      const score = softcap === undefined ? dot * scale : softcap * Math.tanh((dot * scale) / softcap);
      return score + (alibiSlopes?.[head] ?? 0) * (position - queryPosition);
    });
    const top = scores.reduce((a, b) => Math.max(a, b));
    const sum = scores.reduce((total, score) => total + Math.exp(score - top), 0);
    lse[head] = top + Math.log(sum);
    positions.forEach((position, i) => {
      const { v } = history.get(position)![layer]!;
      const weight = Math.exp(scores[i]! - top) / sum;
      for (let d = 0; d < headDim; d++) o[head * headDim + d]! += weight * v[kvHead * headDim + d]!;
    });
  }
  return { o, lse };
}

export interface Comparison {
  /** Largest |got - want| over outputs, relative to the largest |v| (1 here), besides the rounding to float16. */
  readonly output: number;
  /** Largest |got - want| over log-sum-exps, relative to max(1, |want|). */
  readonly lse: number;
}

export function compareRow(
  got: Float32Array,
  row: number,
  numRows: number,
  layout: KvLayout,
  want: { o: Float64Array; lse: Float64Array },
): Comparison {
  const { numHeads, headDim } = layout;
  let output = 0;
  let lse = 0;
  for (let i = 0; i < numHeads * headDim; i++) {
    const expected = want.o[i]!;
    // Half of the distance to the next float16, relative and of the subnormal ones.
    const rounding = layout.kvDtype === 'f16' ? Math.abs(expected) * 2 ** -11 + 2 ** -25 : 0;
    const error = Math.max(0, Math.abs(got[row * numHeads * headDim + i]! - expected) - rounding);
    if (!(error <= output)) output = error;
  }
  for (let head = 0; head < numHeads; head++) {
    const value = got[numRows * numHeads * headDim + row * numHeads + head]!;
    const expected = want.lse[head]!;
    if (value === expected) continue;
    const error = Math.abs(value - expected) / Math.max(1, Math.abs(expected));
    if (!(error <= lse)) lse = error;
  }
  return { output, lse };
}

export function emptyPlan(changes: Partial<StepPlan> = {}): StepPlan {
  return {
    numQueryRows: 0,
    numKvRows: 0,
    segments: new Int32Array(0),
    blocks: new Int32Array(0),
    kvSlots: new Int32Array(0),
    ...changes,
  };
}
