/**
 * Owns perplexity by teacher forcing: what weight formats cost in quality.
 *
 * Invariants
 * 1. Sums are float64 whatever the model computes in.
 */

export interface TeacherForced {
  /** [vocabSize] at every position of `tokenIds`. */
  logits(tokenIds: readonly number[]): Promise<Float32Array[]>;
}

/** exp of the mean negative log-likelihood of a text, read in windows of `windowTokens` that start anew. */
export async function perplexity(
  model: TeacherForced,
  tokenIds: readonly number[],
  windowTokens: number,
): Promise<number> {
  let [loss, count] = [0, 0];
  for (let start = 0; start < tokenIds.length; start += windowTokens) {
    const window = tokenIds.slice(start, start + windowTokens);
    const rows = await model.logits(window);
    for (const [i, next] of window.slice(1).entries()) {
      loss -= logProbability(rows[i]!, next);
      count += 1;
    }
  }
  return Math.exp(loss / count);
}

function logProbability(logits: Float32Array, tokenId: number): number {
  let largest = Number.NEGATIVE_INFINITY;
  for (const logit of logits) largest = Math.max(largest, logit);
  let sum = 0;
  for (const logit of logits) sum += Math.exp(logit - largest);
  return logits[tokenId]! - largest - Math.log(sum);
}
