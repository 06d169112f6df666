/**
 * Owns the memory that the stages of one wave write to.
 *
 * Invariants
 * 1. Memory is made anew only when a step has more rows than any before it: a layer allocates nothing. What ONNX Runtime
 *    returns otherwise is new memory for every stage, 6 MB a step of 16 rows of SmolLM2-135M.
 * 2. The hidden state that a stage reads is not in the memory that it writes: two take turns.
 * 3. What a stage wrote is valid until the next stage of the same wave runs; its hidden state until the one after.
 */
import { STAGED_OUTPUTS } from '@lamina/model';
import { LaminaError } from '@lamina/tensor';
import { Tensor } from 'onnxruntime-node';
import type { ModelDims } from './messages.ts';

/** Outputs of stages 0 .. numLayers - 1, float32, row-major. */
export interface LayerOutputs {
  /** [1, numTokens, hiddenSize] residual stream. */
  readonly hidden: Tensor;
  /** [numTokens, numHeads * headDim] after RoPE. */
  readonly query: Float32Array;
  /** [numTokens, numKvHeads * headDim] after RoPE. */
  readonly key: Float32Array;
  /** [numTokens, numKvHeads * headDim] */
  readonly value: Float32Array;
  /** The same as ONNX Runtime is given them. */
  readonly fetches: Readonly<Record<string, Tensor>>;
}

/** Memory that is kept while it is large enough. */
class Memory {
  #floats = new Float32Array(0);

  /** The first `numFloats` of it, not cleared. */
  take(numFloats: number): Float32Array {
    if (this.#floats.length < numFloats) this.#floats = new Float32Array(numFloats);
    return this.#floats.subarray(0, numFloats);
  }
}

export class StageOutputs {
  readonly #dims: ModelDims;
  readonly #hidden = [new Memory(), new Memory()];
  readonly #query = new Memory();
  readonly #key = new Memory();
  readonly #value = new Memory();
  readonly #logits = new Memory();
  #turns: readonly LayerOutputs[] = [];
  #numTokens = -1;
  #turn = 0;

  constructor(dims: ModelDims) {
    this.#dims = dims;
  }

  /** Call before the first stage of a step. */
  begin(numTokens: number): void {
    if (numTokens === this.#numTokens) return;
    this.#numTokens = numTokens;
    const { hiddenSize, numHeads, numKvHeads, headDim } = this.#dims;
    const rows = (memory: Memory, width: number): Tensor =>
      new Tensor('float32', memory.take(numTokens * width), [1, numTokens, width]);
    const query = rows(this.#query, numHeads * headDim);
    const key = rows(this.#key, numKvHeads * headDim);
    const value = rows(this.#value, numKvHeads * headDim);
    this.#turns = this.#hidden.map((memory) => {
      const hidden = rows(memory, hiddenSize);
      return {
        hidden,
        query: floatsOf(query),
        key: floatsOf(key),
        value: floatsOf(value),
        fetches: {
          [STAGED_OUTPUTS.hiddenOut.name]: hidden,
          [STAGED_OUTPUTS.query.name]: query,
          [STAGED_OUTPUTS.key.name]: key,
          [STAGED_OUTPUTS.value.name]: value,
        },
      };
    });
  }

  /** Where the next stage of the step writes. */
  next(): LayerOutputs {
    this.#turn ^= 1;
    return this.#turns[this.#turn]!;
  }

  /** [numRows, vocabSize] float32 */
  logits(numRows: number): Tensor {
    const { vocabSize } = this.#dims;
    return new Tensor('float32', this.#logits.take(numRows * vocabSize), [numRows, vocabSize]);
  }
}

/** The data of a float32 tensor. */
export function floatsOf(tensor: Tensor): Float32Array {
  const { data } = tensor;
  if (data instanceof Float32Array) return data;
  throw new LaminaError('internal', 'a float32 tensor has other data');
}
