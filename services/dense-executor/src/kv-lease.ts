/**
 * Owns until when this executor may write KV, shared by the main thread and the workers.
 *
 * Invariants
 * 1. The time is that of the last answered heartbeat's sending plus the kv-manager's time-out: before it, the kv-manager
 *    gives none of this executor's blocks to others. A process that was stopped finds it over when it goes on.
 * 2. A lease that is had again after it was over is another term: a step that was formed in the former one names blocks
 *    that may be others' by now, so it never writes again. The new term begins before the new time is known to anybody.
 * 3. The clock is the system's monotonic one, which all threads share.
 */

const nowNs = (): bigint => process.hrtime.bigint();
const END = 0;
const TERM = 1;

export class KvLease {
  /** [2] int64: end in nanoseconds of the monotonic clock, number of the term. */
  readonly shared: SharedArrayBuffer;
  readonly #words: BigInt64Array;

  constructor(shared: SharedArrayBuffer = new SharedArrayBuffer(16)) {
    this.shared = shared;
    this.#words = new BigInt64Array(shared);
  }

  get isHeld(): boolean {
    return nowNs() < Atomics.load(this.#words, END);
  }

  /** What a step that is formed now is valid for. */
  get term(): number {
    return Number(Atomics.load(this.#words, TERM));
  }

  /** Whether a step that was formed in `term` may write now. */
  allows(term: number): boolean {
    return this.isHeld && this.term === term;
  }

  /** Now, to be given to `renew` when the heartbeat that is sent now is answered. */
  mark(): bigint {
    return nowNs();
  }

  /** The tables of the term until now are void: nothing may be written until the next `renew`. */
  end(): void {
    Atomics.add(this.#words, TERM, 1n);
    Atomics.store(this.#words, END, 0n);
  }

  renew(markNs: bigint, timeoutMs: number): void {
    if (!this.isHeld) Atomics.add(this.#words, TERM, 1n);
    Atomics.store(this.#words, END, markNs + BigInt(timeoutMs) * 1_000_000n);
  }
}
