/**
 * Owns noticing that the client of an answer has gone: nats-server tells of each reply that nobody listened to.
 *
 * Invariants
 * 1. A client has gone when every reply of `GONE_AFTER_MS` or longer was unheard. One that was heard in between starts anew, so
 *    who connects again in that time keeps its request.
 * 2. It is told once, and nothing is asked of later replies.
 */
import { randomBytes } from 'node:crypto';

/** Longer than a client takes to connect again, which most try after 2 s. */
export const GONE_AFTER_MS = 5_000;

interface Watched {
  readonly onGone: () => void;
  /** Number of the last reply that was unheard, and when the first of those without a gap was. */
  lastUnheard: number;
  unheardSinceMs: number;
}

/** The replies of one answer. */
export interface ReplyWatch {
  /** Names the next reply; undefined when nothing is asked of it. */
  next(): string | undefined;
  end(): void;
}

export class UnheardReplies {
  readonly #watched = new Map<string, Watched>();

  get size(): number {
    return this.#watched.size;
  }

  /** @param onGone Its client has gone. */
  watch(onGone: () => void): ReplyWatch {
    const key = randomBytes(9).toString('base64url');
    let numReplies = 0;
    this.#watched.set(key, { onGone, lastUnheard: -1, unheardSinceMs: 0 });
    return {
      next: () => (this.#watched.has(key) ? `${key}.${numReplies++}` : undefined),
      end: () => this.#watched.delete(key),
    };
  }

  /** Nobody listened to the reply of that name. */
  unheard(name: string): void {
    const [key = '', number] = name.split('.');
    const watched = this.#watched.get(key);
    if (watched === undefined) return;
    const nowMs = performance.now();
    const reply = Number(number);
    if (watched.lastUnheard < 0 || reply !== watched.lastUnheard + 1) watched.unheardSinceMs = nowMs;
    watched.lastUnheard = reply;
    if (nowMs - watched.unheardSinceMs < GONE_AFTER_MS) return;
    this.#watched.delete(key);
    watched.onGone();
  }
}
