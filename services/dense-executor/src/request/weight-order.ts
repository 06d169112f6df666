/**
 * Owns the order of tokens by weight: descending, the lower id of equals first.
 *
 * Invariants
 * 1. Many tokens take time in proportion to their number, whatever their weights are: a radix sort over the 32 bits of the
 *    logits, which order as their weights do. It is stable, so equal logits stay in order of id.
 * 2. Different logits may have the same weight, as where it underflows: such a run is put in order of id afterwards. Should
 *    rounding in `exp` put a smaller logit's weight above a larger one's, that is mended too: the result is that of a
 *    comparison of weights, exactly.
 * 3. Scratch memory is made for a whole vocabulary when it is first needed, and reused.
 */

/** Below this many, comparing is as fast. */
const MIN_RADIX = 1024;
const DIGIT_BITS = 11;
const NUM_BUCKETS = 1 << DIGIT_BITS;
const DIGIT_MASK = NUM_BUCKETS - 1;
const NUM_DIGITS = 3;

interface Scratch {
  readonly tokens: Uint32Array;
  /** By token. */
  readonly keys: Uint32Array;
  readonly counts: Uint32Array;
}

export class WeightOrder {
  readonly #size: number;
  #scratch: Scratch | undefined;

  /** @param size Tokens of the vocabulary. */
  constructor(size: number) {
    this.#size = size;
  }

  /**
   * @param tokens Ascending ids; ordered in place.
   * @param weights By token, not negative and not NaN; never greater for a smaller logit but by rounding.
   * @param logits By token.
   */
  descending(tokens: Uint32Array, weights: Float64Array, logits: Float32Array): void {
    if (tokens.length < MIN_RADIX) {
      tokens.sort((a, b) => weights[b]! - weights[a]! || a - b);
      return;
    }
    this.#byLogit(tokens, logits);
    mendRuns(tokens, weights);
  }

  #byLogit(tokens: Uint32Array, logits: Float32Array): void {
    this.#scratch ??= {
      tokens: new Uint32Array(this.#size),
      keys: new Uint32Array(this.#size),
      counts: new Uint32Array(NUM_DIGITS * NUM_BUCKETS),
    };
    const { keys, counts } = this.#scratch;
    const bits = new Int32Array(logits.buffer, logits.byteOffset, logits.length);
    counts.fill(0);
    for (let i = 0; i < tokens.length; i++) {
      const token = tokens[i]!;
      const value = bits[token]!;
      // The greatest logit has the smallest key: all bits but the sign of a positive one are turned over.
      const key = (value < 0 ? value : value ^ 0x7fffffff) >>> 0;
      keys[token] = key;
      counts[key & DIGIT_MASK]!++;
      counts[NUM_BUCKETS + ((key >>> DIGIT_BITS) & DIGIT_MASK)]!++;
      counts[2 * NUM_BUCKETS + (key >>> (2 * DIGIT_BITS))]!++;
    }
    let from = tokens;
    let to = this.#scratch.tokens.subarray(0, tokens.length);
    for (let digit = 0; digit < NUM_DIGITS; digit++) {
      const starts = counts.subarray(digit * NUM_BUCKETS, (digit + 1) * NUM_BUCKETS);
      if (!countsToStarts(starts, tokens.length)) continue;
      const shift = digit * DIGIT_BITS;
      for (let i = 0; i < from.length; i++) {
        const token = from[i]!;
        to[starts[(keys[token]! >>> shift) & DIGIT_MASK]!++] = token;
      }
      [from, to] = [to, from];
    }
    if (from !== tokens) tokens.set(from);
  }
}

/** Makes the number in each bucket where the bucket starts; false when one bucket has all. */
function countsToStarts(counts: Uint32Array, total: number): boolean {
  let start = 0;
  for (let bucket = 0; bucket < NUM_BUCKETS; bucket++) {
    const count = counts[bucket]!;
    if (count === total) return false;
    counts[bucket] = start;
    start += count;
  }
  return true;
}

/** Orders tokens by weight that are in that order already but for runs of equals, and for neighbours by rounding. */
function mendRuns(tokens: Uint32Array, weights: Float64Array): void {
  let start = 0;
  let isAscending = true;
  for (let i = 1; i <= tokens.length; i++) {
    if (i < tokens.length) {
      const token = tokens[i]!;
      const weight = weights[token]!;
      const former = weights[tokens[i - 1]!]!;
      if (weight === former) {
        if (token < tokens[i - 1]!) isAscending = false;
        continue;
      }
      if (weight > former) {
        // Never seen; a comparison is right whatever it is.
        tokens.sort((a, b) => weights[b]! - weights[a]! || a - b);
        return;
      }
    }
    if (!isAscending) tokens.subarray(start, i).sort();
    start = i;
    isAscending = true;
  }
}
