/**
 * Owns the question whether a shard that owes an executor an answer is alive. Heartbeats find a silent shard too, but only
 * after a time that is long enough not to punish a busy machine; who waits for an answer wants to know now.
 *
 * Invariants
 * 1. A shard is asked once at a time, whoever suspects it.
 * 2. It is lost after two questions in a row without an answer: one may be lost with a connection that comes back, or with
 *    a moment in which this process was stalled itself.
 */
import type { Bus } from '@lamina/bus';
import { SUBJECTS } from '@lamina/protocol';
import type { KvManager } from './kv-manager.ts';

const PROBE_TIMEOUT_MS = 250;
/**
 * From one question to the next, at least: when nobody listens, that is known at once. A shard whose connection was cut makes
 * another at once, which takes some milliseconds, on a machine that is busy some tens.
 */
const MIN_INTERVAL_MS = 200;

export class Suspicions {
  readonly #bus: Pick<Bus, 'probe'>;
  readonly #manager: Pick<KvManager, 'hasShard' | 'removeShard'>;
  readonly #open = new Map<string, Promise<boolean>>();

  constructor(bus: Pick<Bus, 'probe'>, manager: Pick<KvManager, 'hasShard' | 'removeShard'>) {
    this.#bus = bus;
    this.#manager = manager;
  }

  /** Whether the shard is gone; if so it is removed. */
  isLost(shardId: string): Promise<boolean> {
    const open = this.#open.get(shardId);
    if (open !== undefined) return open;
    const asked = this.#ask(shardId).finally(() => this.#open.delete(shardId));
    this.#open.set(shardId, asked);
    return asked;
  }

  async #ask(shardId: string): Promise<boolean> {
    if (!this.#manager.hasShard(shardId)) return true;
    const subject = SUBJECTS.shardProbe(shardId);
    const askedAtMs = performance.now();
    if (await this.#bus.probe(subject, PROBE_TIMEOUT_MS)) return false;
    const pauseMs = MIN_INTERVAL_MS - (performance.now() - askedAtMs);
    if (pauseMs > 0) await new Promise((resolve) => setTimeout(resolve, pauseMs));
    if (await this.#bus.probe(subject, PROBE_TIMEOUT_MS)) return false;
    this.#manager.removeShard(shardId, 'shard does not answer');
    return true;
  }
}
