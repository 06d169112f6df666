/**
 * Owns the block tables of the running requests: getting them, extending them ahead, giving them up, losing them.
 *
 * Invariants
 * 1. Blocks are given back only when no step in flight can still write to them.
 * 2. Queued requests are admitted one at a time, the most urgent first, and none while a running one waits for blocks.
 * 3. A running request that gets no more blocks makes the youngest give its own up, so the oldest can always finish.
 * 4. An answer of the kv-manager that comes after the KV was given up changes nothing and leaks nothing.
 */
import type { Logger } from '@lamina/runtime';
import { asLaminaError, type KvLayout, LaminaError } from '@lamina/tensor';
import type { KvClient, KvEvents } from './kv-client.ts';
import type { ExecutorMetrics } from './metrics.ts';
import type { GenerationRequest } from './request/request.ts';
import type { RunningRequests } from './running-requests.ts';
import type { Scheduler } from './scheduling/scheduler.ts';

export interface KvTablesOptions {
  readonly requests: RunningRequests;
  readonly scheduler: Scheduler;
  readonly metrics: ExecutorMetrics;
  readonly log: Logger;
  /** Something may be runnable now. */
  readonly onRunnable: () => void;
  /** Tells the workers, so that steps that wait for the shard fail at once. */
  readonly onShardLost: (shardId: string) => void;
}

const RETRY_EXTEND_MS = 250;

const kvLost = (): LaminaError =>
  new LaminaError('shard_lost', 'attention shards that held KV of this request went away');

export class KvTables implements KvEvents {
  readonly #options: KvTablesOptions;
  #kv: KvClient | undefined;

  constructor(options: KvTablesOptions) {
    this.#options = options;
  }

  /** Call once, when the kv-manager has given the layout. */
  connect(kv: KvClient, layout: KvLayout): void {
    this.#kv = kv;
    this.#options.scheduler.blockSizeTokens = layout.blockSizeTokens;
  }

  /** False while blocks may have been given to others: no step may start. */
  get mayWrite(): boolean {
    return this.#kv?.holdsLease === true;
  }

  get #blockSizeTokens(): number {
    return this.#options.scheduler.blockSizeTokens;
  }

  /** The effect of the machine's `allocating` state. */
  async allocate(request: GenerationRequest): Promise<void> {
    const kv = this.#kv;
    if (kv === undefined) throw new LaminaError('unavailable', 'this executor is not registered with a kv-manager yet');
    const { kvGeneration } = request;
    const numTokens = Math.min(request.tokens.length + this.#blockSizeTokens, request.maxKvTokens);
    const blockTable = await kv.allocate(request.id, numTokens, request.maxKvTokens);
    if (request.kvGeneration !== kvGeneration) {
      void kv.free(request.id);
      return;
    }
    request.blockTable = blockTable;
    request.numComputed = 0;
    // The actor enters prefill when this promise is settled.
    setImmediate(() => {
      this.admitQueued();
      this.#options.onRunnable();
    });
  }

  /** Lets the most urgent queued request try for KV. */
  admitQueued(): void {
    let first: GenerationRequest | undefined;
    for (const request of this.#options.requests.all()) {
      if (request.isStarved || request.phase === 'allocating') return;
      if (request.phase !== 'queued' || request.isReleasePending) continue;
      if (first === undefined || request.item.priority > first.item.priority) first = request;
    }
    if (first !== undefined) this.#options.requests.send(first, { type: 'ADMIT' });
  }

  /** The effect of leaving a state that holds KV; may be called when there is none. */
  release(request: GenerationRequest): void {
    request.kvGeneration++;
    request.isStarved = false;
    request.isExtending = false;
    this.#options.scheduler.remove(request);
    if (request.blockTable.length === 0) return;
    request.isReleasePending = true;
    if (!request.isInStep) this.#releaseNow(request);
  }

  #releaseNow(request: GenerationRequest): void {
    request.isReleasePending = false;
    request.blockTable = [];
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

  /** Asks for the next block before the last one is full. */
  extendAhead(request: GenerationRequest): void {
    const room = request.blockTable.length * this.#blockSizeTokens;
    const needed = Math.min(request.numComputed + this.#blockSizeTokens, request.maxKvTokens);
    if (request.isExtending || request.isStarved || room >= needed) return;
    request.isExtending = true;
    const numTokens = Math.min(Math.max(room, request.tokens.length) + this.#blockSizeTokens, request.maxKvTokens);
    void this.#extend(request, numTokens);
  }

  async #extend(request: GenerationRequest, numTokens: number): Promise<void> {
    const { kvGeneration } = request;
    try {
      const blocks = (await this.#kv?.extend(request.id, numTokens)) ?? [];
      if (request.kvGeneration !== kvGeneration) return;
      request.isExtending = false;
      request.blockTable.push(...blocks);
      this.#options.onRunnable();
    } catch (cause) {
      if (request.kvGeneration !== kvGeneration) return;
      request.isExtending = false;
      this.#onExtendRefused(request, asLaminaError(cause));
    }
  }

  #onExtendRefused(request: GenerationRequest, error: LaminaError): void {
    if (error.code === 'overloaded') {
      request.isStarved = true;
      this.#preemptYoungest(request);
    } else if (error.code === 'unavailable') {
      this.#options.log.warn({ err: error, id: request.id }, 'no answer about more blocks; trying again');
      setTimeout(() => this.#options.onRunnable(), RETRY_EXTEND_MS);
    } else this.lose(request);
  }

  #preemptYoungest(starved: GenerationRequest): void {
    let youngest = starved;
    for (const request of this.#options.requests.all()) {
      const isRunning = request.phase === 'prefill' || request.phase === 'decode';
      if (isRunning && request.arrival > youngest.arrival) youngest = request;
    }
    this.#options.metrics.preemptions.inc();
    this.#options.requests.send(youngest, { type: 'PREEMPT' });
  }

  /** The KV of a request is gone: it is computed again once no step of it is in flight. */
  lose(request: GenerationRequest): void {
    if (request.isKvLost) return;
    this.#options.metrics.recoveries.inc();
    request.isKvLost = true;
    if (!request.isInStep) this.afterStep(request);
  }

  onCapacityFreed(): void {
    for (const request of this.#options.requests.all()) {
      if (!request.isStarved) continue;
      request.isStarved = false;
      this.extendAhead(request);
    }
    this.#resume();
  }

  onShardLost(shardId: string): void {
    this.#options.onShardLost(shardId);
    for (const request of [...this.#options.requests.all()]) if (request.hasBlocksOn(shardId)) this.lose(request);
    this.#resume();
  }

  onRequestsVoid(requestIds: readonly string[]): void {
    for (const requestId of requestIds) {
      const request = this.#options.requests.get(requestId);
      if (request !== undefined && request.blockTable.length > 0) this.lose(request);
      else void this.#kv?.free(requestId);
    }
    this.#resume();
  }

  onTablesVoid(layout: KvLayout): void {
    this.#options.scheduler.blockSizeTokens = layout.blockSizeTokens;
    for (const request of [...this.#options.requests.all()]) if (request.blockTable.length > 0) this.lose(request);
    this.#resume();
  }

  onLeaseRenewed(): void {
    this.#resume();
  }

  #resume(): void {
    this.admitQueued();
    this.#options.onRunnable();
  }
}
