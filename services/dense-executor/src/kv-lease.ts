/**
 * Owns until when this executor may write KV, shared by the main thread and the workers.
 *
 * Invariants
 * 1. The time is that of the last answered heartbeat's sending plus the kv-manager's time-out: before it, the kv-manager
 *    gives none of this executor's blocks to others. A process that was stopped finds it over when it goes on.
 * 2. The clock is the system's monotonic one, which all threads share.
 */

const nowMs = (): number => Number(process.hrtime.bigint()) / 1e6;

export class KvLease {
  /** [1] End of the lease in milliseconds of the monotonic clock. */
  readonly shared: SharedArrayBuffer;
  readonly #endMs: Float64Array;

  constructor(shared: SharedArrayBuffer = new SharedArrayBuffer(8)) {
    this.shared = shared;
    this.#endMs = new Float64Array(shared);
  }

  get isHeld(): boolean {
    return nowMs() < this.#endMs[0]!;
  }

  /** Now, to be given to `renew` when the heartbeat that is sent now is answered. */
  mark(): number {
    return nowMs();
  }

  renew(markMs: number, timeoutMs: number): void {
    this.#endMs[0] = markMs + timeoutMs;
  }
}
