/**
 * Owns the rate of requests per client: a bucket that fills steadily and holds the requests of one minute.
 *
 * Invariants
 * 1. At most MAX_CLIENTS buckets are kept; the one that was used longest ago goes first, and comes back full.
 */
import { LaminaError } from '@lamina/tensor';

const MAX_CLIENTS = 10_000;
const MINUTE_MS = 60_000;

export class RateLimit {
  readonly #perMinute: number;
  readonly #what: string;
  readonly #now: () => number;
  readonly #buckets = new Map<string, { tokens: number; filledAtMs: number }>();

  /**
   * @param perMinute 0 = unlimited.
   * @param what Is counted, as a refusal calls it.
   */
  constructor(perMinute: number, what: string, now: () => number = () => performance.now()) {
    this.#perMinute = perMinute;
    this.#what = what;
    this.#now = now;
  }

  /** @throws LaminaError `overloaded` with the time after which one more is allowed. */
  take(client: string): void {
    if (this.#perMinute === 0) return;
    const nowMs = this.#now();
    const bucket = this.#buckets.get(client) ?? { tokens: this.#perMinute, filledAtMs: nowMs };
    const perMs = this.#perMinute / MINUTE_MS;
    bucket.tokens = Math.min(this.#perMinute, bucket.tokens + (nowMs - bucket.filledAtMs) * perMs);
    bucket.filledAtMs = nowMs;
    this.#buckets.delete(client);
    this.#buckets.set(client, bucket);
    for (const oldest of this.#buckets.keys()) {
      if (this.#buckets.size <= MAX_CLIENTS) break;
      this.#buckets.delete(oldest);
    }
    if (bucket.tokens < 1) {
      throw new LaminaError('overloaded', `more than ${this.#perMinute} ${this.#what} a minute of "${client}"`, {
        retryAfterMs: Math.ceil((1 - bucket.tokens) / perMs),
      });
    }
    bucket.tokens -= 1;
  }
}
