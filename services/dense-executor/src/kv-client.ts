/**
 * Owns what the executor asks the kv-manager: heartbeats, block tables, and the events it hears.
 *
 * Invariants
 * 1. The kv-manager is asked at admission and ahead of block boundaries, never inside a layer.
 * 2. While no heartbeat has been answered for the kv-manager's time-out, `holdsLease` is false: the blocks may have been
 *    given to others, so no layer is dispatched that would write to them; nor, later, one of a step from before.
 * 3. Registered anew after it was lost, the executor takes other origin ids, and holds no lease until the kv-manager knows
 *    them: what it sent under the former ones is refused by the shards, and what it sends can be.
 * 4. Calls leave in the order in which they are made: a table that is freed and allocated again is never mixed up.
 */
import type { Bus } from '@lamina/bus';
import { type BlockRef, ENDPOINTS, EVENTS } from '@lamina/protocol';
import type { Logger } from '@lamina/runtime';
import { type AttentionSpec, asLaminaError, type KvLayout, sameKvLayout } from '@lamina/tensor';
import type { KvLease } from './kv-lease.ts';

export interface KvEvents {
  /** Every block table is void: the kv-manager is a new one, or stores KV otherwise. */
  onTablesVoid(layout: KvLayout): void;
  /** The tables of these requests are void: a shard of theirs was lost. */
  onRequestsVoid(requestIds: readonly string[]): void;
  /** Another executor has these requests now. */
  onRequestsTakenOver(requestIds: readonly string[]): void;
  onShardLost(shardId: string): void;
  onCapacityFreed(numFreeBlocks: number): void;
  /** The kv-manager answers after a silence in which no step was to be started. */
  onLeaseRenewed(): void;
}

/** The origin ids of the workers. */
export interface Origins {
  readonly originIds: readonly number[];
  /** Gives every worker another one; what it has in flight fails. */
  renewOrigins(): void;
}

export interface KvClientOptions {
  readonly bus: Pick<Bus, 'request' | 'onEvent'>;
  readonly executorId: string;
  readonly modelId: string;
  readonly spec: AttentionSpec;
  readonly requestTimeoutMs: number;
  readonly lease: KvLease;
  readonly origins: Origins;
  readonly log: Logger;
  /** The kv-manager refuses this executor for good. */
  readonly fail: (cause: unknown) => void;
}

const RETRY_INTERVAL_MS = 250;
const MIN_HEARTBEAT_TIMEOUT_MS = 500;
const LEAVE_TIMEOUT_MS = 1_000;
const SUSPICION_INTERVAL_MS = 250;

export class KvClient {
  readonly #options: KvClientOptions;
  readonly #events: KvEvents;
  #managerEpoch: string | undefined;
  #registration: number | undefined;
  #layout: KvLayout | undefined;
  #timer: NodeJS.Timeout | undefined;
  #isStopped = false;
  #isManagerSilent = false;
  /** Frees that were not confirmed; asked again with the next heartbeat. */
  readonly #unconfirmedFrees = new Set<string>();
  /** Shards that the kv-manager was asked about lately. */
  readonly #suspected = new Set<string>();
  /** Requests that were allocated for and not freed since. */
  readonly #held = new Set<string>();
  #intervalMs = RETRY_INTERVAL_MS;

  constructor(options: KvClientOptions, events: KvEvents) {
    this.#options = options;
    this.#events = events;
    options.bus.onEvent(EVENTS.shardLost, ({ shardId }) => events.onShardLost(shardId));
    options.bus.onEvent(EVENTS.capacityFreed, ({ freeBlocks }) => events.onCapacityFreed(freeBlocks));
  }

  /** True while the kv-manager certainly keeps this executor's tables. */
  get holdsLease(): boolean {
    return this.#options.lease.isHeld;
  }

  get leaseTerm(): number {
    return this.#options.lease.term;
  }

  /** Registers, waiting for a kv-manager as long as it takes. */
  async register(): Promise<KvLayout> {
    for (;;) {
      await this.#heartbeat();
      if (this.#layout !== undefined) return this.#layout;
      await new Promise((resolve) => setTimeout(resolve, RETRY_INTERVAL_MS));
    }
  }

  async #heartbeat(): Promise<void> {
    const { bus, executorId, modelId, spec, lease, origins, log, fail } = this.#options;
    const timeoutMs = Math.max(MIN_HEARTBEAT_TIMEOUT_MS, this.#intervalMs);
    let intervalMs = RETRY_INTERVAL_MS;
    const markNs = lease.mark();
    try {
      const body = { executorId, modelId, spec, originIds: [...origins.originIds] };
      const reply = await bus.request(ENDPOINTS.executorHeartbeat, body, { timeoutMs });
      intervalMs = reply.heartbeatIntervalMs;
      this.#intervalMs = intervalMs;
      const wasSilent = this.#isManagerSilent;
      if (wasSilent) log.info('the kv-manager answers again');
      this.#isManagerSilent = false;
      const isChanged =
        this.#layout !== undefined &&
        (this.#registration !== reply.registration ||
          this.#managerEpoch !== reply.managerEpoch ||
          !sameKvLayout(this.#layout, reply.layout));
      this.#managerEpoch = reply.managerEpoch;
      this.#registration = reply.registration;
      this.#layout = reply.layout;
      if (isChanged) {
        lease.end();
        origins.renewOrigins();
        this.#events.onTablesVoid(reply.layout);
        // The next heartbeat names the new origins, and its answer is the lease.
        intervalMs = 0;
      } else {
        const hadLease = this.holdsLease;
        lease.renew(markNs, reply.heartbeatTimeoutMs);
        if (reply.voidRequestIds.length > 0) this.#events.onRequestsVoid(reply.voidRequestIds);
        if (reply.takenOverRequestIds.length > 0) this.#events.onRequestsTakenOver(reply.takenOverRequestIds);
        if (!hadLease || wasSilent) this.#events.onLeaseRenewed();
      }
      for (const requestId of [...this.#unconfirmedFrees]) void this.free(requestId);
    } catch (cause) {
      const error = asLaminaError(cause);
      if (error.code === 'invalid_request') fail(error);
      if (!this.#isManagerSilent && !this.#isStopped) log.warn({ err: error }, 'no kv-manager answers; trying on');
      this.#isManagerSilent = true;
    }
    clearTimeout(this.#timer);
    if (!this.#isStopped) this.#timer = setTimeout(() => void this.#heartbeat(), intervalMs);
  }

  /**
   * @throws LaminaError `kv_capacity_exceeded`, `overloaded`, `unavailable`, `duplicate_id` when another executor has it,
   * `internal` when it has cost too many executors already.
   */
  async allocate(
    requestId: string,
    numTokens: number,
    maxTokens: number,
    deliveryCount: number,
    vainDeliveryCount: number,
  ): Promise<BlockRef[]> {
    const { bus, executorId, requestTimeoutMs } = this.#options;
    // Allocating gives a former table up, so a free that is still open would hit the new one.
    this.#unconfirmedFrees.delete(requestId);
    this.#held.add(requestId);
    try {
      const body = { requestId, executorId, numTokens, maxTokens, deliveryCount, vainDeliveryCount };
      return (await bus.request(ENDPOINTS.allocate, body, { timeoutMs: requestTimeoutMs })).blocks;
    } catch (cause) {
      this.#held.delete(requestId);
      throw cause;
    }
  }

  /**
   * Blocks after the first `numBlocks`, so that the table has room for `numTokens`. Asking twice is safe.
   * @throws LaminaError `overloaded`, `unavailable`, `duplicate_id`; `invalid_request` when the table is gone.
   */
  async extend(requestId: string, numBlocks: number, numTokens: number): Promise<BlockRef[]> {
    const { bus, executorId, requestTimeoutMs } = this.#options;
    const reply = await bus.request(
      ENDPOINTS.extend,
      { requestId, executorId, numBlocks, numTokens },
      { timeoutMs: requestTimeoutMs },
    );
    return reply.blocks;
  }

  /**
   * Gives back the first `numFreedBlocks` blocks that the table ever had, those of earlier calls included: a call that is
   * lost is made good by the next one.
   */
  async trim(requestId: string, numFreedBlocks: number): Promise<void> {
    const { bus, executorId, requestTimeoutMs, log } = this.#options;
    try {
      await bus.request(ENDPOINTS.trim, { requestId, executorId, numFreedBlocks }, { timeoutMs: requestTimeoutMs });
    } catch (cause) {
      log.warn({ err: asLaminaError(cause), requestId }, 'the kv-manager did not confirm a trim');
    }
  }

  /** Frees a table. A call that is not confirmed is repeated with the next heartbeat. */
  async free(requestId: string): Promise<void> {
    const { bus, executorId, requestTimeoutMs, log } = this.#options;
    this.#unconfirmedFrees.delete(requestId);
    this.#held.delete(requestId);
    try {
      await bus.request(ENDPOINTS.free, { requestId, executorId }, { timeoutMs: requestTimeoutMs });
    } catch (cause) {
      log.warn({ err: asLaminaError(cause), requestId }, 'the kv-manager did not confirm a free');
      if (!this.#held.has(requestId)) this.#unconfirmedFrees.add(requestId);
    }
  }

  /** Has the kv-manager ask a shard that owes an answer; while it does, and shortly after, asking again does nothing. */
  async suspect(shardId: string): Promise<void> {
    const { bus, requestTimeoutMs, log } = this.#options;
    if (this.#suspected.has(shardId)) return;
    this.#suspected.add(shardId);
    try {
      const { isLost } = await bus.request(ENDPOINTS.suspectShard, { shardId }, { timeoutMs: requestTimeoutMs });
      if (isLost) this.#events.onShardLost(shardId);
    } catch (cause) {
      log.debug({ err: asLaminaError(cause), shardId }, 'the kv-manager does not say whether a shard is lost');
    }
    setTimeout(() => this.#suspected.delete(shardId), SUSPICION_INTERVAL_MS).unref();
  }

  /** Says goodbye, so that nothing waits for the time-out. */
  async stop(): Promise<void> {
    const { bus, executorId, log } = this.#options;
    this.#isStopped = true;
    clearTimeout(this.#timer);
    try {
      await bus.request(ENDPOINTS.executorLeave, { executorId }, { timeoutMs: LEAVE_TIMEOUT_MS });
    } catch (cause) {
      log.debug({ err: asLaminaError(cause) }, 'could not say goodbye');
    }
  }
}
