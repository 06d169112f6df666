/**
 * Owns comparing a distributed answer with the uncut graph's, token by token.
 *
 * Invariants
 * 1. Tokens are compared up to the first that differs: what follows continues another text.
 * 2. Two tokens are a tie if the uncut graph itself gives them log-probabilities closer than the tolerance of what it
 *    computes with.
 * 3. A log-probability that is missing or no number is an infinite difference, never a small one.
 */
import type { Activations } from '@lamina/model';
import type { GreedyResult } from '@lamina/testkit';

/**
 * What rounding explains, in log-probability. float32: another order of additions, measured below 1e-4. float16: the
 * published operator rounds what it attends to, and a logit of 16 has steps of 0.016. int8: a value next to a rounding
 * boundary of 8 bits may go either way; measured up to 0.3. A wrong model is far above.
 */
export const LOGPROB_TOLERANCE: Readonly<Record<Activations, number>> = { float32: 1e-3, float16: 0.1, int8: 0.5 };

export interface DistributedToken {
  readonly token: number;
  readonly logprob: number;
  readonly top: readonly { readonly token: number; readonly logprob: number }[];
}

export interface FirstDifference {
  /** Of the token in the answer, from 0. */
  readonly index: number;
  readonly expected: number;
  /** null: the answer ended. */
  readonly actual: number | null;
  readonly isTie: boolean;
}

export interface Comparison {
  readonly text: string;
  readonly promptTokens: number;
  readonly comparedTokens: number;
  /** Of the tokens and their alternatives, up to and with the first differing token. */
  readonly worstLogprobDifference: number;
  readonly difference: FirstDifference | null;
}

export function comparePrompt(
  text: string,
  promptTokens: number,
  expected: GreedyResult,
  actual: readonly DistributedToken[],
  tolerance: number,
): Comparison {
  let worst = 0;
  for (const [index, expectedToken] of expected.tokenIds.entries()) {
    const step = actual[index];
    const logits = expected.logits[index];
    const ended = { index, expected: expectedToken, actual: null, isTie: false };
    if (step === undefined || logits === undefined) {
      return { text, promptTokens, comparedTokens: index, worstLogprobDifference: worst, difference: ended };
    }
    const logprobOf = logprobs(logits);
    for (const { token, logprob } of [step, ...step.top]) {
      const distance = Math.abs(logprob - logprobOf(token));
      worst = Math.max(worst, Number.isNaN(distance) ? Number.POSITIVE_INFINITY : distance);
    }
    if (step.token === expectedToken) continue;
    const isTie = Math.abs(logprobOf(step.token) - logprobOf(expectedToken)) < tolerance;
    const difference = { index, expected: expectedToken, actual: step.token, isTie };
    return { text, promptTokens, comparedTokens: index, worstLogprobDifference: worst, difference };
  }
  const comparedTokens = expected.tokenIds.length;
  return { text, promptTokens, comparedTokens, worstLogprobDifference: worst, difference: null };
}

/** log softmax of one row, by token. */
function logprobs(logits: Float32Array): (token: number) => number {
  const maximum = logits.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  const logSum = maximum + Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit - maximum), 0));
  return (token) => (logits[token] ?? Number.NaN) - logSum;
}
