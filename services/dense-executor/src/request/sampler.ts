/**
 * Owns sampling: from one row of logits to a token, by temperature, top-k, top-p and min-p (in this order).
 *
 * Invariants
 * 1. A token depends on the logits, the sampling fields, the seed and the token's index, and on nothing else: random
 *    numbers come from a counter-based generator, so other requests in the batch cannot shift them.
 * 2. Ties are broken towards the lower token id.
 * 3. Scratch memory is reused; a row without filters is not sorted, and where a filter leaves most of the vocabulary, sorting
 *    takes time in proportion to it (weight-order.ts).
 */
import { vectorOps } from '@lamina/attention-kernel';
import type { Sampling } from '@lamina/protocol';
import { WeightOrder } from './weight-order.ts';

const { argmax } = vectorOps();

/** Sampling fields of one row, plus where the row's token stands in its answer. */
export interface SamplingRow extends Sampling {
  /** Index of the token to be sampled in the answer. */
  readonly tokenIndex: number;
  /** Alternatives to report, or -1 for no log-probabilities at all. */
  readonly numLogprobs: number;
}

export interface SampledToken {
  /** -1 when the logits hold no finite maximum. */
  token: number;
  /** Natural logarithm of the token's probability at temperature 1; NaN when not asked for. */
  logprob: number;
  topLogprobs: { token: number; logprob: number }[];
}

function mix(hash: number, value: number): number {
  let mixed = Math.imul(value, 0xcc9e2d51);
  mixed = Math.imul((mixed << 15) | (mixed >>> 17), 0x1b873593);
  const next = hash ^ mixed;
  return (Math.imul((next << 13) | (next >>> 19), 5) + 0xe6546b64) | 0;
}

function finalize(hash: number): number {
  let mixed = hash;
  mixed = Math.imul(mixed ^ (mixed >>> 16), 0x85ebca6b);
  mixed = Math.imul(mixed ^ (mixed >>> 13), 0xc2b2ae35);
  return (mixed ^ (mixed >>> 16)) >>> 0;
}

/** Uniform in [0, 1) with 53 bits, a function of (seed, counter) alone (MurmurHash3 mixing). */
export function uniform(seed: number, counter: number): number {
  const seedLow = seed >>> 0;
  const seedHigh = Math.floor(seed / 4294967296) | 0;
  const base = mix(mix(mix(0x2545f491, seedLow), seedHigh), counter);
  const high = finalize(mix(base, 1)) >>> 5;
  const low = finalize(mix(base, 2)) >>> 6;
  return (high * 67108864 + low) / 9007199254740992;
}

/** exp of these, relative to the most likely token, bound the candidates that are sorted for top-p. */
const CANDIDATE_LOG_BOUNDS = [-4, -8, -16, -32, Number.NEGATIVE_INFINITY];

export class Sampler {
  readonly #weights: Float64Array;
  readonly #candidates: Uint32Array;
  readonly #order: WeightOrder;

  constructor(vocabSize: number) {
    this.#weights = new Float64Array(vocabSize);
    this.#candidates = new Uint32Array(vocabSize);
    this.#order = new WeightOrder(vocabSize);
  }

  /** @param logits [vocabSize] float32 */
  sample(logits: Float32Array, row: SamplingRow): SampledToken {
    const best = argmax(logits);
    if (best < 0) return { token: -1, logprob: Number.NaN, topLogprobs: [] };
    const maximum = logits[best]!;
    const token = row.temperature === 0 || row.topK === 1 ? best : this.#draw(logits, maximum, row);
    if (row.numLogprobs < 0) return { token, logprob: Number.NaN, topLogprobs: [] };
    return this.#withLogprobs(logits, maximum, token, row.numLogprobs);
  }

  #draw(logits: Float32Array, maximum: number, row: SamplingRow): number {
    const weights = this.#weights;
    // Of the smallest temperatures the inverse is infinite, and the weight of the most likely token would be NaN.
    const inverseTemperature = Math.min(1 / row.temperature, Number.MAX_VALUE);
    let total = 0;
    for (let token = 0; token < logits.length; token++) {
      const weight = Math.exp((logits[token]! - maximum) * inverseTemperature);
      weights[token] = weight;
      total += weight;
    }
    const point = uniform(row.seed, row.tokenIndex);
    if (row.topK === 0 && row.topP === 1 && row.minP === 0) {
      let rest = point * total;
      let last = 0;
      for (let token = 0; token < logits.length; token++) {
        const weight = weights[token]!;
        if (weight === 0) continue;
        last = token;
        rest -= weight;
        if (rest < 0) break;
      }
      return last;
    }
    const numCandidates = this.#filter(logits, total, row);
    const candidates = this.#candidates;
    let kept = 0;
    for (let i = 0; i < numCandidates; i++) kept += weights[candidates[i]!]!;
    let rest = point * kept;
    for (let i = 0; i < numCandidates; i++) {
      rest -= weights[candidates[i]!]!;
      if (rest < 0) return candidates[i]!;
    }
    return candidates[numCandidates - 1]!;
  }

  /** Leaves the tokens that pass top-k, top-p and min-p at the start of #candidates, most likely first; says how many, at least 1. */
  #filter(logits: Float32Array, total: number, row: SamplingRow): number {
    const weights = this.#weights;
    const candidates = this.#candidates;
    const wanted = row.topK > 0 ? Math.min(row.topK, weights.length) : weights.length;
    // Without top-p, min-p may thin out the candidates before they are sorted.
    const floor = row.topP === 1 ? row.minP : 0;
    let count = 0;
    for (const bound of CANDIDATE_LOG_BOUNDS) {
      const threshold = Math.max(Math.exp(bound), floor);
      let mass = 0;
      count = 0;
      for (let token = 0; token < weights.length; token++) {
        const weight = weights[token]!;
        if (weight < threshold) continue;
        candidates[count++] = token;
        mass += weight;
      }
      const isEnough = row.topK > 0 ? count >= wanted : row.topP < 1 && mass >= row.topP * total;
      if (isEnough || threshold === floor) break;
    }
    this.#order.descending(candidates.subarray(0, count), weights, logits);
    count = Math.min(count, wanted);
    if (row.topP < 1) {
      let mass = total;
      if (row.topK > 0) {
        mass = 0;
        for (let i = 0; i < count; i++) mass += weights[candidates[i]!]!;
      }
      let cumulative = 0;
      let numKept = 0;
      while (numKept < count && (numKept === 0 || cumulative < row.topP * mass))
        cumulative += weights[candidates[numKept++]!]!;
      count = numKept;
    }
    while (row.minP > 0 && count > 1 && weights[candidates[count - 1]!]! < row.minP) count--;
    return count;
  }

  #withLogprobs(logits: Float32Array, maximum: number, token: number, numLogprobs: number): SampledToken {
    let sum = 0;
    for (let other = 0; other < logits.length; other++) sum += Math.exp(logits[other]! - maximum);
    const logNormalizer = maximum + Math.log(sum);
    const top: { token: number; logprob: number }[] = [];
    if (numLogprobs > 0) {
      for (let other = 0; other < logits.length; other++) {
        const logprob = logits[other]! - logNormalizer;
        if (top.length === numLogprobs && logprob <= top[top.length - 1]!.logprob) continue;
        let at = top.length;
        while (at > 0 && top[at - 1]!.logprob < logprob) at--;
        top.splice(at, 0, { token: other, logprob });
        if (top.length > numLogprobs) top.pop();
      }
    }
    return { token, logprob: logits[token]! - logNormalizer, topLogprobs: top };
  }
}
