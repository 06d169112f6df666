/**
 * Owns what a contestant is: it is given prompts, holds them as KV, and generates when it is told to.
 *
 * Invariants
 * 1. Between two calls a contestant computes nothing.
 * 2. Every prompt is different random tokens; nobody can share a prefix.
 * 3. A contestant proves its work: `open` and `window` throw when it holds fewer tokens than it was given or counted.
 */
import { randomIntegers } from '../statistics.ts';

export interface Workload {
  /** A name of SYNTHETIC_SHAPES. */
  readonly model: string;
  readonly numRequests: number;
  /** Tokens of each prompt. */
  readonly contextTokens: number;
  /** Tokens that each request may have to generate in all windows together. */
  readonly maxNewTokens: number;
  readonly threads: number;
  /** Directory of models. */
  readonly directory: string;
}

export interface WindowLimits {
  /** Steps of every request that are timed. */
  readonly minSteps: number;
  /** The window ends sooner after so long. A paused cluster keeps its work items for some 6 s. */
  readonly maxSeconds: number;
}

export interface Opened {
  /** From the first prompt given to the first token of the last request; null where prompts are not computed. */
  readonly promptTokensPerSecond: number | null;
  /** What was found to be held, in words. */
  readonly held: string;
}

export interface Contestant {
  readonly name: string;
  /** Loads the model if it is not loaded, and computes the prompts. */
  open(workload: Workload): Promise<Opened>;
  /** Generates for every request at once. @returns tokens per second of all requests together, steps to warm up excluded. */
  window(limits: WindowLimits): Promise<number>;
  /** Gives the requests up; the model stays loaded. */
  close(): Promise<void>;
  /** Ends it. */
  dispose(): Promise<void>;
}

/** Steps of a window before time is taken: caches are warm again and the batch is complete. */
export const WARM_UP_STEPS = 2;

/** Tokens of prompt number `index`; special tokens are last in synthetic vocabularies. */
export function promptOf(index: number, numTokens: number, vocabSize: number): number[] {
  return randomIntegers(7919 * (index + 1), numTokens, vocabSize - 300).map((token) => token + 256);
}
