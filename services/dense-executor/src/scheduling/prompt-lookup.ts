/**
 * Owns the drafts of one request: tokens that may come next, copied from where its last tokens stood before (prompt
 * lookup). A draft is only a guess. The worker samples every position as if there were none and keeps the drafted tokens
 * that agree, so the answer is the same with and without drafts, whatever the sampling.
 *
 * Invariants
 * 1. Memory is fixed: a table of last occurrences by hash; what it finds is compared with the tokens themselves.
 * 2. A draft grows while all of it is accepted and shrinks to what was; without any success the next ones are left out,
 *    twice as many each time.
 */

/** Lengths of the token sequences that are looked up, the surest first. */
const NGRAM_LENGTHS = [4, 2] as const;
const TABLE_SIZE = 1 << 14;
const FIRST_DRAFT_TOKENS = 4;
const MAX_DRAFT_TOKENS = 15;
const MAX_SKIPPED_STEPS = 64;

export class PromptLookup {
  readonly #tokens: readonly number[];
  /** By hash of an n-gram: position after its last occurrence; 0 = none. */
  readonly #followers = new Int32Array(TABLE_SIZE);
  #numIndexed = 0;
  #numDraftTokens = FIRST_DRAFT_TOKENS;
  #numFailures = 0;
  #numStepsToSkip = 0;

  /** @param tokens Prompt and generated tokens of the request; grows with it. */
  constructor(tokens: readonly number[]) {
    this.#tokens = tokens;
  }

  /** At most `limit` tokens that may follow; empty when nothing is known or drafts were of no use lately. */
  draft(limit: number): number[] {
    if (limit <= 0) return [];
    if (this.#numStepsToSkip > 0) {
      this.#numStepsToSkip--;
      return [];
    }
    this.#index();
    const tokens = this.#tokens;
    const numDraftTokens = Math.min(limit, this.#numDraftTokens);
    for (const length of NGRAM_LENGTHS) {
      const follower = this.#followers[this.#slot(tokens.length, length)]!;
      if (follower === 0 || !this.#isSame(follower, tokens.length, length)) continue;
      const draft: number[] = [];
      // Beyond the end the text goes on repeating itself.
      for (let i = 0; i < numDraftTokens; i++) draft.push(tokens[follower + i] ?? draft[follower + i - tokens.length]!);
      return draft;
    }
    return [];
  }

  /** What became of a draft. */
  verified(numDrafted: number, numAccepted: number): void {
    if (numAccepted > 0) this.#numFailures = 0;
    else this.#numStepsToSkip = Math.min(2 ** this.#numFailures++, MAX_SKIPPED_STEPS);
    this.#numDraftTokens =
      numAccepted === numDrafted ? Math.min(2 * this.#numDraftTokens, MAX_DRAFT_TOKENS) : numAccepted + 1;
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
