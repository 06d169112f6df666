/**
 * Owns what a cancel still means after it came: the request that it is for may arrive later, from a stream.
 *
 * Invariants
 * 1. A cancel ends what was submitted before it and nothing that is submitted later: sent in advance, it ends nothing.
 * 2. At most MAX_REMEMBERED are remembered, by ids that a request can have, for at most MAX_AGE_MS; the oldest go first.
 */
import { idSchema } from './schema.ts';

/**
 * A request may have been submitted so much later than its cancel came and is still ended: the first time is told by the
 * clock of a gateway or of nats-server, the second by the clock of whoever remembers. Clocks that are set over a network
 * differ by milliseconds, badly set ones by a part of a second.
 */
export const CLOCK_TOLERANCE_MS = 1_000;
export const MAX_REMEMBERED = 10_000;
/** No durable prompt waits for longer: its stream drops it. */
export const MAX_AGE_MS = 7 * 24 * 60 * 60 * 1000;

export class PastCancels {
  /** When the last cancel of an id came, Unix time in ms; the oldest first. */
  readonly #cameAtMs = new Map<string, number>();

  /** Remembers a cancel that comes now. False for what cannot be the id of a request. */
  add(requestId: string): boolean {
    if (!idSchema.safeParse(requestId).success) return false;
    const nowMs = Date.now();
    this.#cameAtMs.delete(requestId);
    for (const [oldest, cameAtMs] of this.#cameAtMs) {
      if (this.#cameAtMs.size < MAX_REMEMBERED && nowMs - cameAtMs < MAX_AGE_MS) break;
      this.#cameAtMs.delete(oldest);
    }
    this.#cameAtMs.set(requestId, nowMs);
    return true;
  }

  /** @param submittedAtMs Of the request, Unix time in ms. */
  hasCancelled(requestId: string, submittedAtMs: number): boolean {
    const cameAtMs = this.#cameAtMs.get(requestId);
    return cameAtMs !== undefined && submittedAtMs <= cameAtMs + CLOCK_TOLERANCE_MS;
  }
}
