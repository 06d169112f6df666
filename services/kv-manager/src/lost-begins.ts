/**
 * Owns how often an executor was lost that had begun a request: one that ends every executor which begins it is given up.
 *
 * Invariants
 * 1. Only a begin counts (the executor had a block table of the request) that ended in silence: an executor that leaves has
 *    handed its requests back, and one that never got blocks for it has computed nothing of it.
 * 2. What was lost before something of the answer was stored does not count.
 * 3. The number of requests is bounded; the one that was counted longest ago is forgotten, and so are all with this process.
 */
import { LaminaError } from '@lamina/tensor';

const MAX_LOST_BEGINS = 10;
const MAX_REQUESTS = 4096;

export class LostBegins {
  /** By request id; counted last comes last. */
  readonly #counts = new Map<string, number>();

  /** An executor that had tables of these requests fell silent. */
  add(requestIds: Iterable<string>): void {
    for (const requestId of requestIds) {
      const count = this.#counts.get(requestId) ?? 0;
      this.#counts.delete(requestId);
      this.#counts.set(requestId, count + 1);
    }
    for (const oldest of this.#counts.keys()) {
      if (this.#counts.size <= MAX_REQUESTS) return;
      this.#counts.delete(oldest);
    }
  }

  /**
   * @param vainDeliveryCount How often the request was offered since something of its answer was stored, this time included.
   * @throws LaminaError `internal` when the request is given up.
   */
  check(requestId: string, vainDeliveryCount: number): void {
    const count = Math.min(this.#counts.get(requestId) ?? 0, vainDeliveryCount - 1);
    if (count >= MAX_LOST_BEGINS)
      throw new LaminaError(
        'internal',
        `given up: ${count} dense-executors in a row that had begun the request were lost and stored nothing of its answer`,
      );
    if (count <= 0) this.#counts.delete(requestId);
    else if (this.#counts.has(requestId)) this.#counts.set(requestId, count);
  }
}
