/**
 * Owns what is made of repeated measurements.
 *
 * Invariants
 * 1. Ours and the peer's are taken in pairs, one after the other; a ratio is the median of the ratios of the pairs, so
 *    what slows the whole machine down for a while does not count for or against anyone.
 */

/** One round: ours, then the peer's, in the unit of the row. */
export interface Pair {
  readonly ours: number;
  readonly peer: number;
}

/** @throws RangeError when there are no values. */
export function median(values: readonly number[]): number {
  return quantile(values, 0.5);
}

/** Linear between the two nearest values. @throws RangeError when there are no values. */
export function quantile(values: readonly number[], q: number): number {
  if (values.length === 0) throw new RangeError('nothing was measured');
  const sorted = values.toSorted((a, b) => a - b);
  const at = (sorted.length - 1) * q;
  const low = sorted[Math.floor(at)]!;
  return low + (sorted[Math.ceil(at)]! - low) * (at - Math.floor(at));
}

/** Largest less smallest, over the median. */
export function spread(values: readonly number[]): number {
  return (Math.max(...values) - Math.min(...values)) / median(values);
}

/** A seeded sequence of integers in [0, below): the same prompts in every run. */
export function randomIntegers(seed: number, count: number, below: number): number[] {
  let state = seed >>> 0;
  return Array.from({ length: count }, () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let word = Math.imul(state ^ (state >>> 15), state | 1);
    word ^= word + Math.imul(word ^ (word >>> 7), word | 61);
    return ((word ^ (word >>> 14)) >>> 0) % below;
  });
}
