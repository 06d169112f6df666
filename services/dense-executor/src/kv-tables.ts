/**
 * Owns the block tables of the running requests: getting them, extending them ahead, giving them up, losing them.
 *
 * Invariants
 * 1. Blocks are given back only when no step in flight can still write to them.
 * 2. Queued requests are admitted one at a time, in turn (kv-turns.ts), and none while a running one waits for blocks. One that
 *    does not fit is tried again: it is not passed by smaller ones whose turn comes later.
 * 3. A running request that gets no more blocks makes the one whose turn was last give its own up (kv-turns.ts), so the first
 *    can always finish.
 * 4. Where every layer has a window, blocks that no later token can see are given back before more are asked for, so a
 *    request holds at most its window, one step and the two blocks at the ends.
 * 5. After one was preempted, queued requests are let in again only when a running one has ended or there is room for all
 *    that they can grow to: else they would take the room that they gave up, and compute the same prompt again and again.
 * 6. Whoever was refused asks again now and then: an event that is lost delays it, and no more.
 * 7. An answer of the kv-manager that comes after the KV was given up changes nothing and leaks nothing.
 */
import type { Logger } from '@lamina/runtime';
import { asLaminaError, type KvLayout, LaminaError, maxWindowTokens } from '@lamina/tensor';
import type { KvClient, KvEvents } from './kv-client.ts';
import type { ExecutorMetrics } from './metrics.ts';
import { type GenerationRequest, NO_TURN } from './request/request.ts';
import type { RunningRequests } from './running-requests.ts';
import { isSooner, isWaiting, leastUrgent, takeTurnOf } from './scheduling/kv-turns.ts';
import type { Scheduler } from './scheduling/scheduler.ts';

export interface KvTablesOptions {
  readonly requests: RunningRequests;
  readonly scheduler: Scheduler;
  readonly metrics: ExecutorMetrics;
  readonly log: Logger;
  /** Something may be runnable now. */
  readonly onRunnable: () => void;
  /** The blocks of a request are kept by the step in flight, and by nothing else. */
  readonly onReleaseWaits: (request: GenerationRequest) => void;
  /** Tells the workers, so that steps that wait for the shard fail at once. */
  readonly onShardLost: (shardId: string) => void;
}

/** What is asked of the kv-manager here. */
export type KvCalls = Pick<KvClient, 'allocate' | 'extend' | 'trim' | 'free' | 'suspect' | 'holdsLease' | 'leaseTerm'>;

const RETRY_MS = 1_000;
/** A step that keeps blocks for so long after its request ended may wait for a shard that died. */
const STEP_OVERDUE_MS = 10;

const kvLost = (): LaminaError =>
  new LaminaError('shard_lost', 'attention shards that held KV of this request went away');

export class KvTables implements KvEvents {
  readonly #options: KvTablesOptions;
  #kv: KvCalls | undefined;
  /** Queued requests wait until fewer running ones than this hold KV. */
  #admitBelow = Number.POSITIVE_INFINITY;
  /** Free blocks of the cluster, when it last said so. */
  #numFreeBlocks = 0;
  /** Counts capacityFreed events: one that came while a request was asking must not be missed. */
  #numCapacityEvents = 0;
  #retry: NodeJS.Timeout | undefined;

  constructor(options: KvTablesOptions) {
    this.#options = options;
  }

  /** Call once, when the kv-manager has given the layout. */
  connect(kv: KvCalls, layout: KvLayout): void {
    this.#kv = kv;
    this.#adopt(layout);
  }

  #adopt(layout: KvLayout): void {
    const { scheduler } = this.#options;
    scheduler.blockSizeTokens = layout.blockSizeTokens;
    scheduler.kvDtype = layout.kvDtype;
    scheduler.windowTokens = maxWindowTokens(layout);
  }

  /** What a step that is formed now carries; undefined while blocks may have been given to others: none may start. */
  get leaseTerm(): number | undefined {
    return this.#kv?.holdsLease === true ? this.#kv.leaseTerm : undefined;
  }

  get #blockSizeTokens(): number {
    return this.#options.scheduler.blockSizeTokens;
  }

  /** Most tokens that a request needs room for at a time. */
  #maxHeldTokens(request: GenerationRequest): number {
    const { windowTokens, maxStepTokens, blockSizeTokens } = this.#options.scheduler;
    return Math.min(request.maxKvTokens, windowTokens + maxStepTokens + 2 * blockSizeTokens);
  }

  /** The effect of the machine's `allocating` state. */
  async allocate(request: GenerationRequest): Promise<void> {
    const kv = this.#kv;
    if (kv === undefined) throw new LaminaError('unavailable', 'this executor is not registered with a kv-manager yet');
    const { kvGeneration } = request;
    const maxHeldTokens = this.#maxHeldTokens(request);
    const numTokens = Math.min(request.tokens.length + this.#blockSizeTokens, maxHeldTokens);
    const numEvents = this.#numCapacityEvents;
    const { deliveryCount } = request.lease;
    const asked = kv.allocate(request.id, numTokens, maxHeldTokens, deliveryCount, request.vainDeliveryCount);
    const blockTable = await asked.catch((cause: unknown) => {
      // It may have been done although no answer came.
      if (asLaminaError(cause).code === 'unavailable') void kv.free(request.id);
      if (asLaminaError(cause).retryable) this.#retryLater(numEvents);
      throw cause;
    });
    if (request.kvGeneration !== kvGeneration) {
      void kv.free(request.id);
      return;
    }
    if (request.kvTurn === NO_TURN) request.kvTurn = request.client.takeKvTurn();
    request.blockTable = blockTable;
    request.numTrimmedBlocks = 0;
    request.numComputed = 0;
    // The actor enters prefill when this promise is settled.
    setImmediate(() => {
      this.admitQueued();
      this.#options.onRunnable();
    });
  }

  /** Lets the queued request whose turn it is try for KV. */
  admitQueued(): void {
    let first: GenerationRequest | undefined;
    let numHolding = 0;
    for (const request of this.#options.requests.all()) {
      if (request.isStarved || request.phase === 'allocating') return;
      if (request.holdsKv) numHolding++;
      if (!isWaiting(request)) continue;
      if (first === undefined || isSooner(request, first)) first = request;
    }
    if (first === undefined) return;
    first = takeTurnOf(first, this.#options.requests);
    const fits = this.#numFreeBlocks * this.#blockSizeTokens >= this.#maxHeldTokens(first);
    if (numHolding > 0 && numHolding >= this.#admitBelow && !fits) return;
    this.#admitBelow = Number.POSITIVE_INFINITY;
    this.#options.requests.send(first, { type: 'ADMIT' });
  }

  /** The effect of leaving a state that holds KV; may be called when there is none. */
  release(request: GenerationRequest): void {
    request.kvGeneration++;
    request.numRefusals = 0;
    request.isStarved = false;
    request.isExtending = false;
    request.isKvLost = false;
    this.#options.scheduler.remove(request);
    if (request.numTableBlocks === 0) return;
    request.isReleasePending = true;
    if (!request.isInStep) this.#releaseNow(request);
    else {
      this.#options.onReleaseWaits(request);
      setTimeout(() => this.#hastenRelease(request), STEP_OVERDUE_MS).unref();
    }
  }

  /** Has the shards asked now, not when they are late: if one is dead, the step fails and the others' blocks are free. */
  #hastenRelease(request: GenerationRequest): void {
    if (!request.isReleasePending) return;
    for (const shardId of new Set(request.blockTable.map((block) => block.shardId))) this.suspect(shardId);
  }

  #releaseNow(request: GenerationRequest): void {
    request.isReleasePending = false;
    request.blockTable = [];
    request.numTrimmedBlocks = 0;
    request.numComputed = 0;
    void this.#kv?.free(request.id);
  }

  /** Carries out what had to wait for the end of a step. */
  afterStep(request: GenerationRequest): void {
    if (request.isReleasePending) this.#releaseNow(request);
    if (!request.isKvLost) return;
    request.isKvLost = false;
    this.#options.requests.send(request, { type: 'KV_LOST', error: kvLost() });
  }

  /**
   * Gives back the blocks behind every window. Right also while a step is in flight: that one begins at numComputed, so
   * its plan does not name them.
   */
  #trimBehind(request: GenerationRequest): void {
    const numUnseenTokens = request.numComputed - this.#options.scheduler.windowTokens + 1;
    const numFreedBlocks = Math.min(Math.floor(numUnseenTokens / this.#blockSizeTokens), request.numTableBlocks);
    if (numFreedBlocks <= request.numTrimmedBlocks || request.isKvLost || request.isReleasePending) return;
    request.blockTable.splice(0, numFreedBlocks - request.numTrimmedBlocks);
    request.numTrimmedBlocks = numFreedBlocks;
    void this.#kv?.trim(request.id, numFreedBlocks);
  }

  /** Asks for the room of the next step, and for the next block before the last one is full. */
  extendAhead(request: GenerationRequest): void {
    this.#trimBehind(request);
    const { blockSizeTokens, maxStepTokens } = this.#options.scheduler;
    const { numComputed, maxKvTokens } = request;
    const room = request.numTableBlocks * blockSizeTokens;
    const numNextTokens = Math.min(request.tokens.length - numComputed, maxStepTokens);
    const needed = Math.min(numComputed + Math.max(numNextTokens, blockSizeTokens), maxKvTokens);
    if (request.isExtending || request.isStarved || room >= needed) return;
    request.isExtending = true;
    const numWanted = Math.max(room, request.tokens.length) + blockSizeTokens;
    const numAtMost = request.numTrimmedBlocks * blockSizeTokens + this.#maxHeldTokens(request);
    void this.#extend(request, Math.min(numWanted, numAtMost, maxKvTokens));
  }

  async #extend(request: GenerationRequest, numTokens: number): Promise<void> {
    const { kvGeneration } = request;
    const numEvents = this.#numCapacityEvents;
    try {
      const blocks = (await this.#kv?.extend(request.id, request.numTableBlocks, numTokens)) ?? [];
      if (request.kvGeneration !== kvGeneration) return;
      request.isExtending = false;
      request.blockTable.push(...blocks);
      if (blocks.length > 0) this.#options.onRunnable();
    } catch (cause) {
      if (request.kvGeneration !== kvGeneration) return;
      request.isExtending = false;
      this.#onExtendRefused(request, asLaminaError(cause), numEvents);
    }
  }

  #onExtendRefused(request: GenerationRequest, error: LaminaError, numEvents: number): void {
    if (error.code === 'overloaded') {
      request.isStarved = true;
      this.#retryLater(numEvents);
      this.#preemptFor(request);
    } else if (error.code === 'unavailable') {
      this.#options.log.warn({ err: error, id: request.id }, 'no answer about more blocks; trying again');
      this.#retryLater(numEvents);
    } else if (error.code === 'duplicate_id') this.#options.requests.send(request, { type: 'TAKEN_OVER' });
    else this.lose(request);
  }

  #preemptFor(starved: GenerationRequest): void {
    const { requests, metrics } = this.#options;
    let numHolding = 0;
    for (const request of requests.all()) if (request.holdsKv) numHolding++;
    this.#admitBelow = numHolding - 1;
    metrics.preemptions.inc();
    requests.send(leastUrgent(starved, requests), { type: 'PREEMPT' });
  }

  /** The KV of a request is gone: it is computed again once no step of it is in flight. */
  lose(request: GenerationRequest): void {
    if (request.isKvLost || request.isReleasePending) return;
    this.#options.metrics.recoveries.inc();
    request.isKvLost = true;
    if (!request.isInStep) this.afterStep(request);
  }

  /** Asks again soon; at once if capacity became free since `numEvents` was read, before the refusal arrived. */
  #retryLater(numEvents: number): void {
    if (numEvents !== this.#numCapacityEvents) setImmediate(() => this.#resume());
    this.#retry ??= setTimeout(() => {
      this.#retry = undefined;
      this.#resume();
    }, RETRY_MS).unref();
  }

  onCapacityFreed(numFreeBlocks: number): void {
    this.#numFreeBlocks = numFreeBlocks;
    this.#numCapacityEvents++;
    this.#resume();
  }

  #feedStarved(): void {
    for (const request of this.#options.requests.all()) {
      if (!request.isStarved) continue;
      request.isStarved = false;
      this.extendAhead(request);
    }
  }

  /** A shard owes an answer, or nobody listens there. */
  suspect(shardId: string): void {
    void this.#kv?.suspect(shardId);
  }

  onShardLost(shardId: string): void {
    this.#options.onShardLost(shardId);
    for (const request of [...this.#options.requests.all()]) if (request.hasBlocksOn(shardId)) this.lose(request);
    this.#resume();
  }

  onRequestsVoid(requestIds: readonly string[]): void {
    for (const requestId of requestIds) {
      const request = this.#options.requests.get(requestId);
      // Without a table here, a free or an allocate that gives the void one up is on its way.
      if (request === undefined) void this.#kv?.free(requestId);
      else if (request.numTableBlocks > 0) this.lose(request);
    }
    this.#resume();
  }

  onRequestsTakenOver(requestIds: readonly string[]): void {
    for (const requestId of requestIds) {
      const request = this.#options.requests.get(requestId);
      if (request === undefined) void this.#kv?.free(requestId);
      else if (request.numTableBlocks > 0) this.#options.requests.send(request, { type: 'TAKEN_OVER' });
    }
    this.#resume();
  }

  onTablesVoid(layout: KvLayout): void {
    this.#adopt(layout);
    for (const request of [...this.#options.requests.all()]) if (request.numTableBlocks > 0) this.lose(request);
    this.#resume();
  }

  onLeaseRenewed(): void {
    this.#resume();
  }

  #resume(): void {
    this.#feedStarved();
    this.admitQueued();
    this.#options.onRunnable();
  }
}
