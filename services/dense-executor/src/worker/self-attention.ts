/**
 * Owns the attention of prefill chunks to themselves, computed beside the dense stages. Of a chunk only K and V travel, and
 * q only where shards hold KV from before it: the partial from here is merged with theirs like another shard's.
 * (Prefill is bound by compute and belongs to the executor, decode by memory bandwidth and belongs to the shards: section
 * 2 of the Lamina paper.)
 *
 * Invariants
 * 1. Nothing is kept: the memory is scratch of one layer of one step.
 * 2. A chunk begins at a block of its request, and q, k, v and o are rounded as on the way to a shard and back: where a
 *    chunk is cut changes no number by more than the merge does.
 * 3. A job of a step that failed ends before its buffers are used again.
 */
import { type AttentionKernel, createKernel, type KernelStep } from '@lamina/attention-kernel';
import { type AttentionSpec, asLaminaError, attendBytes, type KvDtype, partialBytes } from '@lamina/tensor';
import type { SelfPart } from './messages.ts';
import { outOfMemory } from './step-error.ts';
import { PartialRows, packRows, toRuns, type WireElements, wireElements } from './wire-rows.ts';

const NOTHING = new Float32Array(0);

/** Layers that see equally far share scratch memory: the window is all that differs between layers. */
function scratchLayers(spec: AttentionSpec): { windows: number[]; scratchOf: number[] } {
  const windowOf = Array.from({ length: spec.numLayers }, (_, layer) => spec.windowTokens?.[layer] ?? 0);
  const windows = [...new Set(windowOf)];
  return { windows, scratchOf: windowOf.map((window) => windows.indexOf(window)) };
}

export class SelfAttention {
  /** Rows of the wave. */
  rows = new Int32Array(0);
  readonly #spec: AttentionSpec;
  readonly #numThreads: number;
  readonly #windows: readonly number[];
  readonly #scratchOf: readonly number[];
  #kernel: AttentionKernel | undefined;
  #step: KernelStep | undefined;
  #runs = new Int32Array(0);
  #qkv = new Uint8Array(new ArrayBuffer(0));
  #packed: WireElements = new Float32Array(0);
  #out = new Uint8Array(0);
  #partial: PartialRows | undefined;
  #dtype: KvDtype | undefined;
  #job: Promise<void> = Promise.resolve();

  constructor(spec: AttentionSpec, numThreads: number) {
    this.#spec = spec;
    this.#numThreads = numThreads;
    const { windows, scratchOf } = scratchLayers(spec);
    this.#windows = windows;
    this.#scratchOf = scratchOf;
  }

  /** [rows.length, numHeads, headDim] float32 */
  get output(): Float32Array {
    return this.#partial?.output ?? NOTHING;
  }

  /** [rows.length, numHeads] float32 */
  get logSumExp(): Float32Array {
    return this.#partial?.logSumExp ?? NOTHING;
  }

  /**
   * `rows` are those of the part at once; the rest when a job that a failed step left has ended.
   * @throws LaminaError `overloaded` when there is no memory, or no thread, for the chunk.
   */
  async begin(part: SelfPart): Promise<void> {
    this.rows = part.rows;
    await this.#job.catch(() => undefined);
    const kernel = await this.#kernelFor(part);
    const ended = this.#step;
    this.#step = undefined;
    if (ended !== undefined) kernel.endStep(ended);
    this.#step = kernel.beginStep(part.plan);
    this.#runs = toRuns(part.rows);
    const numRows = part.rows.length;
    const layout = { ...this.#spec, kvDtype: part.kvDtype };
    const qkvBytes = attendBytes({ numQueryRows: numRows, numKvRows: numRows }, layout);
    if (this.#qkv.length !== qkvBytes || this.#dtype !== part.kvDtype) {
      this.#dtype = part.kvDtype;
      this.#qkv = new Uint8Array(qkvBytes);
      this.#packed = wireElements(part.kvDtype, this.#qkv.buffer, 0);
      this.#out = new Uint8Array(partialBytes(numRows, layout));
      this.#partial = new PartialRows(numRows, layout, part.kvDtype);
    }
  }

  /** @param query [numTokens, numHeads * headDim] float32 of the wave; `key` and `value` [numTokens, numKvHeads * headDim]. */
  attend(layer: number, query: Float32Array, key: Float32Array, value: Float32Array): Promise<void> {
    const { numHeads, numKvHeads, headDim } = this.#spec;
    let at = packRows(this.#packed, 0, query, this.#runs, numHeads * headDim);
    at = packRows(this.#packed, at, key, this.#runs, numKvHeads * headDim);
    packRows(this.#packed, at, value, this.#runs, numKvHeads * headDim);
    this.#job = new Promise((resolve, reject) => {
      const done = (cause: Error | null): void => {
        if (cause !== null) {
          reject(asLaminaError(cause));
          return;
        }
        this.#partial?.read(this.#out);
        resolve();
      };
      this.#kernel?.attend(this.#step!, this.#scratchOf[layer]!, this.#qkv, this.#out, done);
    });
    return this.#job;
  }

  async close(): Promise<void> {
    await this.#kernel?.close();
  }

  async #kernelFor({ numBlocks, blockSizeTokens, kvDtype }: SelfPart): Promise<AttentionKernel> {
    const known = this.#kernel;
    if (
      known !== undefined &&
      known.numBlocks >= numBlocks &&
      known.layout.blockSizeTokens === blockSizeTokens &&
      known.layout.kvDtype === kvDtype
    )
      return known;
    this.#step = undefined;
    this.#kernel = undefined;
    await known?.close();
    const layout = {
      ...this.#spec,
      numLayers: this.#windows.length,
      windowTokens: this.#windows,
      sinkLogits: undefined,
      blockSizeTokens,
      kvDtype,
    };
    try {
      const { kernel } = createKernel({ layout, numBlocks, numThreads: this.#numThreads, kind: 'auto' });
      this.#kernel = kernel;
      return kernel;
    } catch (cause) {
      // The layout was taken when the executor started: it is memory or threads that are short.
      throw outOfMemory(asLaminaError(cause).message, cause);
    }
  }
}
