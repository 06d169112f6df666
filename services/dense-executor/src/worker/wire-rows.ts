/**
 * Owns how rows of a wave become the tensors of a message, and a partial becomes float32 again: rows that follow each other
 * are copied together, and converted on the way when tensors travel as float16 (KvDtype).
 *
 * Invariants
 * 1. A row is copied once each way, whatever the dtype.
 */
import { vectorOps } from '@lamina/attention-kernel';
import type { KvDtype } from '@lamina/tensor';

const { toHalves, toFloats } = vectorOps();

/** Consecutive rows of the wave that go to consecutive rows of a message: start, length pairs. */
export function toRuns(rows: Int32Array): Int32Array<ArrayBuffer> {
  const runs: number[] = [];
  for (let i = 0; i < rows.length; i++) {
    if (i > 0 && rows[i] === rows[i - 1]! + 1) runs[runs.length - 1]!++;
    else runs.push(rows[i]!, 1);
  }
  return Int32Array.from(runs);
}

/** Elements of a message: float16 bits or float32. */
export type WireElements = Uint16Array | Float32Array;

export function wireElements(dtype: KvDtype, buffer: ArrayBuffer, byteOffset: number): WireElements {
  return dtype === 'f16' ? new Uint16Array(buffer, byteOffset) : new Float32Array(buffer, byteOffset);
}

/** Copies rows of `source` [numTokens, width] to `target` from element `at` on. Returns the element after the last one. */
export function packRows(
  target: WireElements,
  at: number,
  source: Float32Array,
  runs: Int32Array,
  width: number,
): number {
  let next = at;
  for (let i = 0; i < runs.length; i += 2) {
    const start = runs[i]! * width;
    const length = runs[i + 1]! * width;
    if (target instanceof Uint16Array) toHalves(source, start, length, target, next);
    else target.set(start === 0 && length === source.length ? source : source.subarray(start, start + length), next);
    next += length;
  }
  return next;
}

/** A partial as the gather reads it. */
export class PartialRows {
  /** [numRows, numHeads, headDim] float32, normalized over the keys that were seen. */
  readonly output: Float32Array;
  /** [numRows, numHeads] float32 */
  readonly logSumExp: Float32Array;
  readonly #isHalf: boolean;
  readonly #bytes: Uint8Array;

  constructor(numRows: number, { numHeads, headDim }: { numHeads: number; headDim: number }, dtype: KvDtype) {
    const numOutputs = numRows * numHeads * headDim;
    const floats = new Float32Array(numOutputs + numRows * numHeads);
    this.output = floats.subarray(0, numOutputs);
    this.logSumExp = floats.subarray(numOutputs);
    this.#isHalf = dtype === 'f16';
    this.#bytes = new Uint8Array(floats.buffer);
  }

  /** @param body o [numRows, numHeads, headDim] of the dtype, then lse [numRows, numHeads] float32, at any alignment. */
  read(body: Uint8Array): void {
    if (!this.#isHalf) {
      this.#bytes.set(body);
      return;
    }
    const numOutputs = this.output.length;
    toFloats(body, numOutputs, this.output);
    this.#bytes.set(body.subarray(2 * numOutputs), 4 * numOutputs);
  }
}
