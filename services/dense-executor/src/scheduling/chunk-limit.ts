/**
 * Owns how many prompt tokens a step may have beside decoding requests: so many that they wait at most MAX_SLOWDOWN times
 * as long for a token as without. What a token of a chunk costs grows with the context before it and differs by model and
 * machine, so it is measured, step by step.
 *
 * Invariants
 * 1. Steps count as undisturbed only when no prompt is in any wave: waves wait for each other's dense stages.
 * 2. Until both are measured, the limit is the given maximum. It is never below MIN_TOKENS: prompts go on.
 */

const MAX_SLOWDOWN = 2.5;
const MIN_TOKENS = 16;
/** Weight of the newest step. */
const DECODE_WEIGHT = 0.1;
const CHUNK_WEIGHT = 0.5;

export class ChunkLimit {
  /** Milliseconds of a step without prompts, and what each prompt token adds to it. */
  #decodeMs: number | undefined;
  #tokenMs: number | undefined;

  observe(step: {
    readonly numDecodeTokens: number;
    readonly numPromptTokens: number;
    /** Whether other waves have prompts. */
    readonly isDisturbed: boolean;
    readonly totalMs: number;
  }): void {
    const { numDecodeTokens, numPromptTokens, isDisturbed, totalMs } = step;
    if (numPromptTokens === 0) {
      if (numDecodeTokens > 0 && !isDisturbed) this.#decodeMs = mixed(this.#decodeMs, totalMs, DECODE_WEIGHT);
    } else if (this.#decodeMs !== undefined) {
      const decodeMs = numDecodeTokens > 0 ? this.#decodeMs : 0;
      const tokenMs = Math.max(0, totalMs - decodeMs) / numPromptTokens;
      this.#tokenMs = mixed(this.#tokenMs, tokenMs, CHUNK_WEIGHT);
    }
  }

  /** Most prompt tokens of a step beside decoding requests. */
  limit(maxTokens: number): number {
    if (this.#decodeMs === undefined || this.#tokenMs === undefined || this.#tokenMs === 0) return maxTokens;
    const numTokens = Math.floor(((MAX_SLOWDOWN - 1) * this.#decodeMs) / this.#tokenMs);
    return Math.min(maxTokens, Math.max(MIN_TOKENS, numTokens));
  }
}

function mixed(old: number | undefined, value: number, weight: number): number {
  return old === undefined ? value : old + weight * (value - old);
}
