/**
 * Owns how many waves each worker staggers. Two overlap the dense stages of one with the attention of the other (the paper's
 * section 4.3); one makes half the passes over the weights and half the messages. Which gives more tokens depends on where
 * the shards run: beside the executor they take the cores that overlap is to fill. So it is measured, while it serves.
 *
 * Invariants
 * 1. Only steps of decoding requests are measured, about as many throughout: while there is a prompt in any wave nothing
 *    counts, and when the number of requests changes much the comparison is given up.
 * 2. Both numbers are measured one right after the other, in the order a b b a, so that contexts that grow, or a machine
 *    that slows down, count for both alike; medians are compared, so that a process that was stopped counts for none.
 * 3. Another number is taken only if it is better by MIN_GAIN: noise alone does not move requests about.
 * 4. A comparison costs few steps, and rests between two grow while the choice stays the same.
 */

/** Steps of all requests that one part of a comparison has, after SETTLING_STEPS in which waves form anew. */
const PART_STEPS = 12;
const SETTLING_STEPS = 3;
const MIN_GAIN = 0.02;
const FIRST_REST_STEPS = 200;
const MAX_REST_STEPS = 6_400;

/** What is tried in the parts of a comparison: the number in use and the other one. */
const PARTS = ['own', 'other', 'other', 'own'] as const;

interface Choice {
  numWaves: number;
  restSteps: number;
  /** Tokens until the next comparison. */
  tokensLeft: number;
}

interface Comparison {
  readonly choice: Choice;
  readonly other: number;
  part: number;
  isSettling: boolean;
  /** Steps of all requests that are left of this part, or until it has settled. */
  stepsLeft: number;
  /** Of the step of all requests that is going on. */
  numTokens: number;
  ms: number;
  /** Of such steps, milliseconds a token. */
  readonly tokenMs: { readonly own: number[]; readonly other: number[] };
}

export class WaveChoice {
  readonly #mostWaves: number;
  readonly #numWorkers: number;
  /** By the binary logarithm of the number of requests. */
  readonly #choices: (Choice | undefined)[] = [];
  #comparison: Comparison | undefined;
  #lastStepMs = 0;
  /** Steps since there was a prompt. */
  #numPureSteps = 0;

  /** @param mostWaves Of one worker. */
  constructor(mostWaves: number, numWorkers = 1) {
    this.#mostWaves = mostWaves;
    this.#numWorkers = numWorkers;
  }

  /** Waves of each worker for so many requests of all workers, where at most `mostUseful` are worth a pass of their own. */
  numWaves(numRequests: number, mostUseful: number): number {
    const most = Math.min(this.#mostWaves, mostUseful);
    if (most <= 1) return 1;
    const choice = this.#choices[sizeOf(numRequests)];
    const comparison = this.#comparison;
    if (comparison !== undefined && comparison.choice === choice && PARTS[comparison.part] === 'other')
      return Math.min(most, comparison.other);
    return Math.min(most, choice?.numWaves ?? most);
  }

  /** A step gave so many tokens, while so many requests of all workers were there; `isPure`: all of them decode. */
  stepDone(step: {
    readonly nowMs: number;
    readonly numTokens: number;
    readonly numRequests: number;
    readonly mostUseful: number;
    readonly isPure: boolean;
  }): void {
    const { nowMs, numTokens, numRequests, mostUseful, isPure } = step;
    const ms = nowMs - this.#lastStepMs;
    this.#lastStepMs = nowMs;
    this.#numPureSteps = isPure ? this.#numPureSteps + 1 : 0;
    const most = Math.min(this.#mostWaves, mostUseful);
    const size = sizeOf(numRequests);
    const comparison = this.#comparison;
    if (comparison !== undefined && (most <= 1 || comparison.choice !== this.#choices[size])) {
      comparison.choice.tokensLeft = comparison.choice.restSteps * numRequests;
      this.#comparison = undefined;
    }
    // Steps of other waves began while there was a prompt.
    if (most <= 1 || this.#numPureSteps <= this.#mostWaves * this.#numWorkers) return;
    const choice = this.#choices[size] ?? { numWaves: most, restSteps: FIRST_REST_STEPS, tokensLeft: 0 };
    this.#choices[size] = choice;
    if (this.#comparison !== undefined) this.#goOn(this.#comparison, ms, numTokens, numRequests);
    else {
      choice.tokensLeft -= numTokens;
      if (choice.tokensLeft <= 0) this.#comparison = begun(choice, most);
    }
  }

  #goOn(comparison: Comparison, ms: number, numTokens: number, numRequests: number): void {
    comparison.ms += ms;
    comparison.numTokens += numTokens;
    if (comparison.numTokens < numRequests) return;
    if (!comparison.isSettling) comparison.tokenMs[PARTS[comparison.part]!].push(comparison.ms / comparison.numTokens);
    comparison.ms = 0;
    comparison.numTokens = 0;
    if (--comparison.stepsLeft > 0) return;
    if (!comparison.isSettling) comparison.part++;
    comparison.isSettling = !comparison.isSettling;
    comparison.stepsLeft = comparison.isSettling ? SETTLING_STEPS : PART_STEPS;
    if (comparison.part === PARTS.length) this.#end(comparison, numRequests);
  }

  #end({ choice, other, tokenMs }: Comparison, numRequests: number): void {
    this.#comparison = undefined;
    const isBetter = median(tokenMs.own) > (1 + MIN_GAIN) * median(tokenMs.other);
    if (isBetter) choice.numWaves = other;
    choice.restSteps = isBetter ? FIRST_REST_STEPS : Math.min(2 * choice.restSteps, MAX_REST_STEPS);
    choice.tokensLeft = choice.restSteps * numRequests;
  }
}

/** The number in use against its neighbour: one fewer, or one more from one. */
function begun(choice: Choice, most: number): Comparison {
  const own = Math.min(choice.numWaves, most);
  return {
    choice,
    other: own > 1 ? own - 1 : own + 1,
    part: 0,
    isSettling: true,
    stepsLeft: SETTLING_STEPS,
    numTokens: 0,
    ms: 0,
    tokenMs: { own: [], other: [] },
  };
}

function median(values: number[]): number {
  values.sort((a, b) => a - b);
  const middle = values.length / 2;
  return (values[Math.floor(middle - 0.5)]! + values[Math.floor(middle)]!) / 2;
}

function sizeOf(numRequests: number): number {
  return 32 - Math.clz32(numRequests);
}
