/**
 * Owns how many prompt tokens a step may have beside decoding requests: so many that they wait at most MAX_SLOWDOWN times
 * as long for a token as without. What a token of a chunk costs grows with the context before it and differs by model and
 * machine, so it is measured, step by step.
 *
 * Invariants
 * 1. Steps count as undisturbed only when no prompt is in any wave: waves wait for each other's dense stages.
 * 2. A step is compared with undisturbed ones of about as many requests. While those or what a prompt token costs were not
 *    seen there is no limit: one that is derived from other loads could hold prompts back for ever.
 * 3. A limit is never below MIN_TOKENS: prompts go on.
 */

const MAX_SLOWDOWN = 2.5;
const MIN_TOKENS = 16;
/** Weight of the newest step. */
const DECODE_WEIGHT = 0.1;
const CHUNK_WEIGHT = 0.5;

export class ChunkLimit {
  /** Milliseconds of a step without prompts, by the binary logarithm of its rows. */
  readonly #decodeMs: (number | undefined)[] = [];
  /** Milliseconds that each prompt token adds to a step. */
  #tokenMs: number | undefined;

  observe(step: {
    readonly numDecodeTokens: number;
    readonly numPromptTokens: number;
    /** Whether other waves have prompts. */
    readonly isDisturbed: boolean;
    readonly totalMs: number;
  }): void {
    const { numDecodeTokens, numPromptTokens, isDisturbed, totalMs } = step;
    const size = sizeOf(numDecodeTokens);
    if (numPromptTokens === 0) {
      if (!isDisturbed) this.#decodeMs[size] = mixed(this.#decodeMs[size], totalMs, DECODE_WEIGHT);
      return;
    }
    const decodeMs = numDecodeTokens > 0 ? this.#decodeMs[size] : 0;
    if (decodeMs === undefined) return;
    this.#tokenMs = mixed(this.#tokenMs, Math.max(0, totalMs - decodeMs) / numPromptTokens, CHUNK_WEIGHT);
  }

  /** Most prompt tokens of a step with so many rows of decoding requests; Infinity while that is not known. */
  limit(numDecodeTokens: number): number {
    const decodeMs = this.#decodeMs[sizeOf(numDecodeTokens)];
    if (decodeMs === undefined || this.#tokenMs === undefined || this.#tokenMs === 0) return Number.POSITIVE_INFINITY;
    return Math.max(MIN_TOKENS, Math.floor(((MAX_SLOWDOWN - 1) * decodeMs) / this.#tokenMs));
  }
}

function sizeOf(numRows: number): number {
  return 32 - Math.clz32(numRows);
}

function mixed(old: number | undefined, value: number, weight: number): number {
  return old === undefined ? value : old + weight * (value - old);
}
