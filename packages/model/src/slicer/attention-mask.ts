/**
 * Owns reading what a mask or bias means: which keys a query sees, and ALiBi slopes.
 *
 * Invariants
 * 1. Every element is checked against what was read: a mask that is no causal one, with or without a sliding window,
 *    and a bias that is no linear one, are refused.
 */
import type { Sample } from './samples.ts';

export interface MaskFacts {
  /** Tokens that a query sees, itself included; 0 = all before it. */
  readonly windowTokens: number;
  /** [numHeads]; undefined if nothing is added to what is seen. */
  readonly alibiSlopes: readonly number[] | undefined;
}

/** What is added to the score of query `i` and key `j`; -Infinity (or next to it) hides the key. */
export type BiasAt = (head: number, i: number, j: number) => number;

/** Masks hide with -1e4 (old exports), the least float16, the least float32 or -Infinity. */
const HIDDEN_BELOW = -9999;
const SLOPE_TOLERANCE = 2e-3;

/**
 * @param isCausal The operator itself hides the keys after the query.
 * @throws Error that says what is not supported.
 */
export function readMask(biasAt: BiasAt, numHeads: number, { tokens, past }: Sample, isCausal: boolean): MaskFacts {
  const sees = (head: number, i: number, j: number): boolean =>
    !(isCausal && j > past + i) && biasAt(head, i, j) > HIDDEN_BELOW;
  const firstSeen = Array.from({ length: tokens }, (_, i) => {
    let j = 0;
    while (j < past + i && !sees(0, i, j)) j++;
    return j;
  });
  const windowTokens =
    firstSeen[0] === 0 && firstSeen.every((first) => first === 0) ? 0 : past - (firstSeen[0] ?? 0) + 1;
  const slopes = Array.from({ length: numHeads }, (_, head) =>
    past > 0 ? biasAt(head, 0, past) - biasAt(head, 0, past - 1) : 0,
  );
  for (let head = 0; head < numHeads; head++) {
    for (let i = 0; i < tokens; i++) {
      const position = past + i;
      for (let j = 0; j < past + tokens; j++) {
        const isSeen = j <= position && (windowTokens === 0 || position - j < windowTokens);
        if (sees(head, i, j) !== isSeen)
          throw new TypeError('its mask is not causal, with or without a sliding window');
        if (!isSeen) continue;
        const expected = slopes[head]! * (j - position);
        const difference = biasAt(head, i, j) - biasAt(head, i, position);
        if (Math.abs(difference - expected) > SLOPE_TOLERANCE * (1 + Math.abs(expected))) {
          throw new TypeError('it adds a bias to the scores that is not linear in the distance (ALiBi)');
        }
      }
    }
  }
  return { windowTokens, alibiSlopes: slopes.some((slope) => slope !== 0) ? slopes : undefined };
}

/** Reads elements of a mask [.., T, total], broadcast over heads; a Boolean one hides where it is false. */
export function biasOf(numbers: Float64Array, dims: readonly number[], isBoolean: boolean): BiasAt {
  const [rows = 1, columns = 1] = dims.slice(-2);
  const heads = dims.length > 2 ? (dims.at(-3) ?? 1) : 1;
  return (head, i, j) => {
    const at = ((heads === 1 ? 0 : head) * rows + (rows === 1 ? 0 : i)) * columns + (columns === 1 ? 0 : j);
    const value = numbers[at] ?? 0;
    return isBoolean ? (value === 0 ? Number.NEGATIVE_INFINITY : 0) : value;
  };
}
