/**
 * Owns the portable kernel: the same results as the native one, in plain TypeScript on the event loop.
 *
 * Invariants
 * 1. One attend per macrotask, so `done` is always asynchronous and timers run between attends (not within one).
 * 2. Weights are relative to a running maximum, so nothing overflows; sums are float64, results float32.
 */
import {
  asLaminaError,
  BLOCK_FIELDS,
  elementBytes,
  floatsToHalves,
  halvesToFloats,
  type KvLayout,
  SEGMENT_FIELDS,
} from '@lamina/tensor';
import { KernelBase, type PendingAttend } from './kernel-base.ts';
import type { CheckedPlan } from './plan-check.ts';
import { PortableSlab } from './portable-slab.ts';

/** Queries that share one conversion of a block to float32. */
const TILE_QUERIES = 16;

/** One segment of a plan. */
interface Segment {
  readonly queryRowStart: number;
  readonly numQueries: number;
  readonly firstPosition: number;
  readonly blockStart: number;
  readonly numBlocks: number;
}

export class PortableKernel extends KernelBase<CheckedPlan> {
  override readonly name = 'portable';
  #slab: PortableSlab | null;
  /** K, then V, of one head of one block [blockSizeTokens, headDim]. */
  readonly #k: Float32Array;
  readonly #v: Float32Array;
  readonly #scores: Float64Array;
  /** Per (query of the tile, head of the group): running maximum, sum, unnormalized output [headDim]. */
  readonly #maximum: Float64Array;
  readonly #sum: Float64Array;
  readonly #acc: Float64Array;
  #qkv = new Float32Array(0);
  #out = new Float32Array(0);
  /** o of f16 on its way to the caller. */
  #halves = new Uint16Array(0);
  readonly #queue: PendingAttend<CheckedPlan>[] = [];

  constructor(layout: KvLayout, numBlocks: number) {
    super(layout, numBlocks);
    this.#slab = new PortableSlab(layout, numBlocks);
    const rows = TILE_QUERIES * (layout.numHeads / layout.numKvHeads);
    this.#k = new Float32Array(layout.blockSizeTokens * layout.headDim);
    this.#v = new Float32Array(layout.blockSizeTokens * layout.headDim);
    this.#scores = new Float64Array(layout.blockSizeTokens);
    this.#maximum = new Float64Array(rows);
    this.#sum = new Float64Array(rows);
    this.#acc = new Float64Array(rows * layout.headDim);
  }

  protected override makeState(checked: CheckedPlan): CheckedPlan {
    return checked;
  }

  protected override start(attend: PendingAttend<CheckedPlan>): boolean {
    this.#queue.push(attend);
    if (this.#queue.length === 1) setImmediate(() => this.#runNext());
    return false;
  }

  protected override release(_state: CheckedPlan): void {}

  protected override free(): void {
    this.#slab = null;
  }

  #runNext(): void {
    const attend = this.#queue[0];
    if (attend === undefined) return;
    let failure: Error | null = null;
    try {
      this.#run(attend);
    } catch (error) {
      failure = asLaminaError(error);
    }
    this.#queue.shift();
    // Scheduled before done is called, so that a done that throws does not strand the rest.
    if (this.#queue.length > 0) setImmediate(() => this.#runNext());
    this.finish(attend.id, failure);
  }

  #run(attend: PendingAttend<CheckedPlan>): void {
    const slab = this.#slab;
    if (slab === null) throw new Error('the slab is gone');
    const plan = attend.checked;
    const numInputs = attend.qkv.byteLength / elementBytes(this.layout.kvDtype);
    const numCells = plan.numQueryRows * this.layout.numHeads;
    const numOutputs = numCells * this.layout.headDim;
    if (this.#qkv.length < numInputs) this.#qkv = new Float32Array(numInputs);
    if (this.#out.length < numOutputs + numCells) this.#out = new Float32Array(numOutputs + numCells);
    if (this.layout.kvDtype === 'f16') halvesToFloats(attend.qkv, numInputs, this.#qkv);
    else new Uint8Array(this.#qkv.buffer).set(attend.qkv);
    this.#storeKv(slab, plan, attend.layer);
    for (let i = 0; i < plan.segments.length; i += SEGMENT_FIELDS) {
      const segment: Segment = {
        queryRowStart: plan.segments[i]!,
        numQueries: plan.segments[i + 1]!,
        firstPosition: plan.segments[i + 2]!,
        blockStart: plan.segments[i + 3]!,
        numBlocks: plan.segments[i + 4]!,
      };
      for (let query = 0; query < segment.numQueries; query += TILE_QUERIES) {
        const numQueries = Math.min(TILE_QUERIES, segment.numQueries - query);
        for (let kvHead = 0; kvHead < this.layout.numKvHeads; kvHead++) {
          this.#attendTile(slab, plan, attend.layer, segment, query, numQueries, kvHead);
        }
      }
    }
    this.#write(attend.out, numOutputs, numCells);
  }

  /** o, then lse. */
  #write(out: Uint8Array, numOutputs: number, numCells: number): void {
    if (this.layout.kvDtype === 'f32') {
      out.set(new Uint8Array(this.#out.buffer, 0, out.byteLength));
      return;
    }
    if (this.#halves.length < numOutputs) this.#halves = new Uint16Array(numOutputs);
    floatsToHalves(this.#out, 0, numOutputs, this.#halves, 0);
    out.set(new Uint8Array(this.#halves.buffer, 0, numOutputs * 2));
    out.set(new Uint8Array(this.#out.buffer, numOutputs * 4, numCells * 4), numOutputs * 2);
  }

  #storeKv(slab: PortableSlab, plan: CheckedPlan, layer: number): void {
    const { numHeads, numKvHeads, headDim, blockSizeTokens } = this.layout;
    const kStart = plan.numQueryRows * numHeads * headDim;
    const vStart = kStart + plan.numKvRows * numKvHeads * headDim;
    for (let row = 0; row < plan.numKvRows; row++) {
      const slot = plan.kvSlots[row]!;
      const block = Math.floor(slot / blockSizeTokens);
      const offset = slot % blockSizeTokens;
      for (let kvHead = 0; kvHead < numKvHeads; kvHead++) {
        const at = (row * numKvHeads + kvHead) * headDim;
        slab.store('k', block, offset, layer, kvHead, this.#qkv, kStart + at);
        slab.store('v', block, offset, layer, kvHead, this.#qkv, vStart + at);
      }
    }
  }

  /** Queries [tileStart, tileStart + numQueries) of a segment, all query heads of one KV head. */
  #attendTile(
    slab: PortableSlab,
    plan: CheckedPlan,
    layer: number,
    segment: Segment,
    tileStart: number,
    numQueries: number,
    kvHead: number,
  ): void {
    const { numHeads, numKvHeads, headDim } = this.layout;
    const group = numHeads / numKvHeads;
    this.#maximum.fill(Number.NEGATIVE_INFINITY);
    this.#sum.fill(0);
    this.#acc.fill(0);
    const { blockSizeTokens } = this.layout;
    const windowTokens = this.layout.windowTokens?.[layer] || Number.POSITIVE_INFINITY;
    const firstPosition = segment.firstPosition + tileStart;
    const lastPosition = firstPosition + numQueries - 1;
    for (let block = segment.blockStart; block < segment.blockStart + segment.numBlocks; block++) {
      const blockPosition = plan.blocks[block * BLOCK_FIELDS + 1]!;
      if (blockPosition > lastPosition) break;
      if (blockPosition + blockSizeTokens <= firstPosition - windowTokens + 1) continue;
      const physicalBlock = plan.blocks[block * BLOCK_FIELDS]!;
      const numTokens = plan.blocks[block * BLOCK_FIELDS + 2]!;
      slab.load('k', physicalBlock, numTokens, layer, kvHead, this.#k);
      slab.load('v', physicalBlock, numTokens, layer, kvHead, this.#v);
      for (let query = 0; query < numQueries; query++) {
        const distance = firstPosition + query - blockPosition;
        const end = Math.min(numTokens, distance + 1);
        const start = Math.max(0, distance - windowTokens + 1);
        if (start >= end) continue;
        const row = segment.queryRowStart + tileStart + query;
        for (let head = 0; head < group; head++) {
          const q = (row * numHeads + kvHead * group + head) * headDim;
          const slope = this.layout.alibiSlopes?.[kvHead * group + head] ?? 0;
          this.#accumulate(query * group + head, q, start, end, slope, distance);
        }
      }
    }
    const lseStart = plan.numQueryRows * numHeads * headDim;
    for (let query = 0; query < numQueries; query++) {
      for (let head = 0; head < group; head++) {
        const state = query * group + head;
        const cell = (segment.queryRowStart + tileStart + query) * numHeads + kvHead * group + head;
        const sum = this.#sum[state]!;
        const inverse = sum === 0 ? 0 : 1 / sum;
        for (let d = 0; d < headDim; d++) this.#out[cell * headDim + d] = this.#acc[state * headDim + d]! * inverse;
        this.#out[lseStart + cell] = sum === 0 ? Number.NEGATIVE_INFINITY : this.#maximum[state]! + Math.log(sum);
      }
    }
  }

  /** One query head (at `q` in qkv) against tokens [start, end) of the loaded block, whose first lies `distance` back. */
  #accumulate(state: number, q: number, start: number, end: number, slope: number, distance: number): void {
    const { headDim, scale, softcap } = this.layout;
    const scores = this.#scores;
    const qkv = this.#qkv;
    const k = this.#k;
    const v = this.#v;
    const acc = this.#acc;
    const previous = this.#maximum[state]!;
    let maximum = previous;
    for (let token = start; token < end; token++) {
      const at = token * headDim;
      let a = 0;
      let b = 0;
      for (let d = 0; d < headDim; d += 2) {
        a += qkv[q + d]! * k[at + d]!;
        b += qkv[q + d + 1]! * k[at + d + 1]!;
      }
      let score = (a + b) * scale;
      if (softcap !== undefined) score = softcap * Math.tanh(score / softcap);
      if (slope !== 0) score += slope * (token - distance);
      scores[token] = score;
      if (score > maximum) maximum = score;
    }
    const target = state * headDim;
    if (maximum !== previous) {
      const decay = Math.exp(previous - maximum);
      this.#maximum[state] = maximum;
      this.#sum[state]! *= decay;
      for (let d = 0; d < headDim; d++) acc[target + d]! *= decay;
    }
    let sum = this.#sum[state]!;
    for (let token = start; token < end; token++) {
      const weight = Math.exp(scores[token]! - maximum);
      sum += weight;
      const at = token * headDim;
      for (let d = 0; d < headDim; d++) acc[target + d]! += weight * v[at + d]!;
    }
    this.#sum[state] = sum;
  }
}
