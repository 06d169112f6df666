/**
 * Owns the attention gather: merging the partial outputs of several shards exactly.
 *
 * With partial outputs o_s (each normalized over its own keys) and log-sum-exps L_s of the scaled scores,
 * the attention over all keys is o = sum_s exp(L_s - M) o_s / sum_s exp(L_s - M), M = max_s L_s
 * (FlashAttention-2 / flash-decoding split-K; the same identity as the Lamina paper's section 4.2 merge).
 *
 * Invariants
 * 1. A shard that sees no key of a query reports L = -Infinity and its o is not read.
 * 2. Sums of exponentials are taken relative to the running maximum, so they never overflow.
 * 3. A sink is an extra key without a value: it takes weight exp(sink - M) and gives nothing. It is counted here, once
 *    per (row, head), and nowhere else: no shard knows of it.
 */

/**
 * Running state of a gather over query rows: accumulated output, maximum and sum per (row, head).
 * Reset with `begin`, fed with `add` per partial, closed with `finish`; allocates only when it must grow.
 */
export class AttentionGather {
  readonly #numHeads: number;
  readonly #headDim: number;
  #maximum = new Float32Array(0);
  #sum = new Float32Array(0);
  #output: Float32Array = new Float32Array(0);
  #numRows = 0;

  constructor(numHeads: number, headDim: number) {
    this.#numHeads = numHeads;
    this.#headDim = headDim;
  }

  /** @param output [numRows, numHeads, headDim] float32, row-major: where the merged attention is written. */
  begin(output: Float32Array, numRows: number): void {
    const cells = numRows * this.#numHeads;
    if (this.#sum.length < cells) {
      this.#maximum = new Float32Array(cells);
      this.#sum = new Float32Array(cells);
    }
    this.#maximum.fill(Number.NEGATIVE_INFINITY, 0, cells);
    this.#sum.fill(0, 0, cells);
    this.#output = output;
    this.#numRows = numRows;
    output.fill(0, 0, cells * this.#headDim);
  }

  /**
   * @param partial [rows.length, numHeads, headDim] float32: normalized outputs of one shard.
   * @param logSumExp [rows.length, numHeads] float32, natural logarithm.
   * @param rows Row of `output` that each row of `partial` belongs to.
   */
  add(partial: Float32Array, logSumExp: Float32Array, rows: Int32Array): void {
    const numHeads = this.#numHeads;
    const headDim = this.#headDim;
    const output = this.#output;
    for (let i = 0; i < rows.length; i++) {
      const cell = rows[i]! * numHeads;
      for (let head = 0; head < numHeads; head++) {
        const lse = logSumExp[i * numHeads + head]!;
        if (lse === Number.NEGATIVE_INFINITY) continue;
        const source = (i * numHeads + head) * headDim;
        const target = (cell + head) * headDim;
        const previous = this.#maximum[cell + head]!;
        if (previous === Number.NEGATIVE_INFINITY) {
          this.#maximum[cell + head] = lse;
          this.#sum[cell + head] = 1;
          for (let d = 0; d < headDim; d++) output[target + d] = partial[source + d]!;
        } else if (lse <= previous) {
          const weight = Math.exp(lse - previous);
          this.#sum[cell + head]! += weight;
          for (let d = 0; d < headDim; d++) output[target + d]! += weight * partial[source + d]!;
        } else {
          const decay = Math.exp(previous - lse);
          this.#maximum[cell + head] = lse;
          this.#sum[cell + head] = this.#sum[cell + head]! * decay + 1;
          for (let d = 0; d < headDim; d++) output[target + d] = output[target + d]! * decay + partial[source + d]!;
        }
      }
    }
  }

  /**
   * Normalizes. Returns the first row that no partial covered, or -1 if every (row, head) has seen a key.
   * @param sinkLogits [numHeads] of the layer, when it has sinks.
   */
  finish(sinkLogits?: readonly number[]): number {
    const numHeads = this.#numHeads;
    const headDim = this.#headDim;
    let uncovered = -1;
    for (let cell = 0; cell < this.#numRows * numHeads; cell++) {
      const sum = this.#sum[cell]!;
      if (sum === 0) {
        if (uncovered < 0) uncovered = Math.floor(cell / numHeads);
        continue;
      }
      // Infinity when the sink has all the weight: the output is 0 then.
      const sink = sinkLogits === undefined ? 0 : Math.exp(sinkLogits[cell % numHeads]! - this.#maximum[cell]!);
      if (sum + sink === 1) continue;
      const scale = 1 / (sum + sink);
      const target = cell * headDim;
      for (let d = 0; d < headDim; d++) this.#output[target + d]! *= scale;
    }
    return uncovered;
  }
}

/**
 * What `finish` does with sinks, for the attention of a single shard that needs no merge: o *= 1 / (1 + exp(sink - L)).
 *
 * @param output [numRows, numHeads, headDim] float32, normalized; changed in place.
 * @param logSumExp [numRows, numHeads] float32.
 * @param sinkLogits [numHeads] of the layer.
 */
export function applySinks(output: Float32Array, logSumExp: Float32Array, sinkLogits: readonly number[]): void {
  const numHeads = sinkLogits.length;
  const headDim = output.length / logSumExp.length;
  for (let cell = 0; cell < logSumExp.length; cell++) {
    const scale = 1 / (1 + Math.exp(sinkLogits[cell % numHeads]! - logSumExp[cell]!));
    for (let at = cell * headDim; at < (cell + 1) * headDim; at++) output[at]! *= scale;
  }
}
