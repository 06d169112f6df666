/**
 * Owns the drafts of one request: tokens that may come next, copied from where its last tokens stood before (prompt
 * lookup). A draft is only a guess. The worker samples every position as if there were none and keeps the drafted tokens
 * that agree, so the answer is the same with and without drafts, whatever the sampling.
 *
 * Invariants
 * 1. Memory is fixed: a table of last occurrences by hash; what it finds is compared with the tokens themselves.
 * 2. A draft is as long as it makes steps faster: a further token is drafted while what it may add to the tokens of the
 *    step, in proportion, is more than what its row adds to the time. How often drafts are right is counted per request,
 *    by how many tokens before the guess agree; old counts fade.
 * 3. Where no draft pays, every PROBE_INTERVAL-th step has one of one token: the text may begin to repeat itself later.
 */

/** Lengths of the token sequences that are looked up, the surest first. */
const NGRAM_LENGTHS = [4, 3, 2, 1] as const;
const MAX_NGRAM_LENGTH = NGRAM_LENGTHS[0];
const TABLE_SIZE = 1 << 15;
const MAX_DRAFT_TOKENS = 15;
/** What a row adds to a step, in steps of one row. */
const ROW_COST = 0.05;
/** How often a guess is right while little is known, by the number of tokens before it that agree: 1, 2, 3, 4 or more. */
const FIRST_RATES = [0.3, 0.45, 0.55, 0.6] as const;
/** As many guesses as FIRST_RATES count for. */
const FIRST_WEIGHT = 2;
/** What is left of older counts after each guess. */
const FADING = 0.9;
const PROBE_INTERVAL = 16;

export class PromptLookup {
  readonly #tokens: readonly number[];
  /** By hash of an n-gram: position after its last occurrence; 0 = none. */
  readonly #followers = new Int32Array(TABLE_SIZE);
  #numIndexed = 0;
  /** By agreeing tokens - 1. */
  readonly #numRight = FIRST_RATES.map((rate) => rate * FIRST_WEIGHT);
  readonly #numGuessed = FIRST_RATES.map(() => FIRST_WEIGHT);
  /** Agreeing tokens before the first token of the last draft. */
  #numAgreeing: number = MAX_NGRAM_LENGTH;
  #numPausedSteps = 0;

  /** @param tokens Prompt and generated tokens of the request; grows with it. */
  constructor(tokens: readonly number[]) {
    this.#tokens = tokens;
  }

  /**
   * At most `limit` tokens that may follow; empty when nothing is known or a draft does not pay.
   * @param numOtherRows Rows of other requests in the step, each a token: the more there are, the less a draft adds.
   */
  draft(limit: number, numOtherRows = 0): number[] {
    if (limit <= 0) return [];
    this.#index();
    const tokens = this.#tokens;
    for (const length of NGRAM_LENGTHS) {
      const follower = this.#followers[this.#slot(tokens.length, length)]!;
      if (follower === 0 || !this.#isSame(follower, tokens.length, length)) continue;
      let numDraftTokens = this.#numPaying(length, Math.min(limit, MAX_DRAFT_TOKENS), numOtherRows);
      if (numDraftTokens === 0) {
        if (++this.#numPausedSteps < PROBE_INTERVAL) return [];
        numDraftTokens = 1;
      }
      this.#numPausedSteps = 0;
      this.#numAgreeing = length;
      const draft: number[] = [];
      // Beyond the end the text goes on repeating itself.
      for (let i = 0; i < numDraftTokens; i++) draft.push(tokens[follower + i] ?? draft[follower + i - tokens.length]!);
      return draft;
    }
    return [];
  }

  /** What became of the last draft. */
  verified(numDrafted: number, numAccepted: number): void {
    // What follows a wrong guess was not verified.
    for (let i = 0; i < numDrafted && i <= numAccepted; i++) {
      const kind = kindOf(this.#numAgreeing + i);
      this.#numRight[kind] = FADING * this.#numRight[kind]! + (i < numAccepted ? 1 : 0);
      this.#numGuessed[kind] = FADING * this.#numGuessed[kind]! + 1;
    }
  }

  /** Length of a draft after `numAgreeing` agreeing tokens with which the step gives most tokens per time. */
  #numPaying(numAgreeing: number, limit: number, numOtherRows: number): number {
    let numTokens = 1 + numOtherRows;
    let cost = 1 + ROW_COST * numOtherRows;
    let probability = 1;
    for (let length = 0; length < limit; length++) {
      const kind = kindOf(numAgreeing + length);
      // A guess counts only if those before it were right too.
      probability *= this.#numRight[kind]! / this.#numGuessed[kind]!;
      if (probability * cost <= ROW_COST * numTokens) return length;
      numTokens += probability;
      cost += ROW_COST;
    }
    return limit;
  }

  /** Enters the n-grams that a token has followed since the last call. */
  #index(): void {
    for (; this.#numIndexed < this.#tokens.length; this.#numIndexed++) {
      for (const length of NGRAM_LENGTHS) {
        if (this.#numIndexed >= length) this.#followers[this.#slot(this.#numIndexed, length)] = this.#numIndexed;
      }
    }
  }

  /** Where the `length` tokens before position `end` belong in the table. */
  #slot(end: number, length: number): number {
    let hash = length;
    for (let i = end - length; i < end; i++) hash = Math.imul(hash ^ (this.#tokens[i] ?? -1), 0x9e3779b1);
    return (hash >>> 16) & (TABLE_SIZE - 1);
  }

  #isSame(end: number, otherEnd: number, length: number): boolean {
    for (let i = 1; i <= length; i++) if (this.#tokens[end - i] !== this.#tokens[otherEnd - i]) return false;
    return true;
  }
}

function kindOf(numAgreeing: number): number {
  return Math.min(numAgreeing, MAX_NGRAM_LENGTH) - 1;
}
