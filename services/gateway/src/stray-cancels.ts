/**
 * Owns cancels of requests that nobody waits for at this gateway: when no executor has ended such a request after a while, it is
 * ended here.
 *
 * Invariants
 * 1. A request is seen to once at a time, however often it is cancelled: to look for it is to read streams.
 * 2. At most `MAX_WAITING` wait and `MAX_AT_A_TIME` are seen to. A cancel beyond that is refused: it may be sent again.
 * 3. However long a cancel waits here, it ends what was submitted before it, not what has come under its id since
 *    (past-cancels.ts); of several the last counts.
 */
import { PastCancels } from '@lamina/protocol';

export const MAX_WAITING = 1_024;
export const MAX_AT_A_TIME = 64;

/** Whether a request that was submitted then, Unix time in ms, is the one that was cancelled. */
export type IsMeant = (submittedAtMs: number) => boolean;

export class StrayCancels {
  readonly #delayMs: number;
  readonly #end: (requestId: string, isMeant: IsMeant) => Promise<void>;
  readonly #cancels = new PastCancels();
  /** Every request that waits or is seen to. */
  readonly #ids = new Set<string>();
  readonly #timers = new Set<NodeJS.Timeout>();
  readonly #due: string[] = [];
  #numRunning = 0;
  #isStopped = false;

  /** @param end Ends a request that is meant, unless it has ended; resolves when nothing is left to do, and never rejects. */
  constructor(delayMs: number, end: (requestId: string, isMeant: IsMeant) => Promise<void>) {
    this.#delayMs = delayMs;
    this.#end = end;
  }

  /** False when it cannot be seen to: too many are. */
  add(requestId: string): boolean {
    const isKnown = this.#ids.has(requestId);
    if (!isKnown && (this.#isStopped || this.#ids.size >= MAX_WAITING + MAX_AT_A_TIME)) return false;
    this.#cancels.add(requestId);
    if (isKnown) return true;
    this.#ids.add(requestId);
    const timer = setTimeout(() => {
      this.#timers.delete(timer);
      this.#due.push(requestId);
      this.#runNext();
    }, this.#delayMs);
    this.#timers.add(timer);
    return true;
  }

  /** Forgets those that wait. */
  stop(): void {
    this.#isStopped = true;
    for (const timer of this.#timers) clearTimeout(timer);
    this.#timers.clear();
    this.#due.length = 0;
  }

  #runNext(): void {
    if (this.#numRunning >= MAX_AT_A_TIME) return;
    const requestId = this.#due.shift();
    if (requestId === undefined) return;
    this.#numRunning++;
    const isMeant = (submittedAtMs: number): boolean => this.#cancels.hasCancelled(requestId, submittedAtMs);
    void this.#end(requestId, isMeant).then(() => {
      this.#numRunning--;
      this.#ids.delete(requestId);
      this.#runNext();
    });
  }
}
