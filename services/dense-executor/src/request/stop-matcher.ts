/**
 * Owns stop strings: text is held back while it could be the beginning of one.
 *
 * Invariants
 * 1. Text that is part of a stop string is never emitted; all text before it is.
 * 2. What is held back is shorter than the longest stop string.
 */

export interface StopMatch {
  /** Text that can be shown now. */
  readonly text: string;
  readonly isStopped: boolean;
}

export class StopMatcher {
  readonly #stops: readonly string[];
  #held = '';

  constructor(stops: readonly string[]) {
    this.#stops = stops;
  }

  push(text: string): StopMatch {
    if (this.#stops.length === 0) return { text, isStopped: false };
    const pending = this.#held + text;
    let stopAt = -1;
    for (const stop of this.#stops) {
      const at = pending.indexOf(stop);
      if (at >= 0 && (stopAt < 0 || at < stopAt)) stopAt = at;
    }
    if (stopAt >= 0) {
      this.#held = '';
      return { text: pending.slice(0, stopAt), isStopped: true };
    }
    const heldLength = this.#longestPossibleStart(pending);
    this.#held = pending.slice(pending.length - heldLength);
    return { text: pending.slice(0, pending.length - heldLength), isStopped: false };
  }

  /** What was held back, at the end of the answer. */
  finish(): string {
    const text = this.#held;
    this.#held = '';
    return text;
  }

  #longestPossibleStart(pending: string): number {
    let longest = 0;
    for (const stop of this.#stops) {
      for (let length = Math.min(stop.length - 1, pending.length); length > longest; length--) {
        if (pending.endsWith(stop.slice(0, length))) {
          longest = length;
          break;
        }
      }
    }
    return longest;
  }
}
