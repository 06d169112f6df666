/**
 * Owns the requests of this executor: admission, steps, results, loss of KV, and their ends.
 *
 * Invariants
 * 1. What a request may do next is said by its actor; this file sends events and carries out effects.
 * 2. The result of a step counts only for requests whose KV is still the one that the step began with.
 * 3. A lease is completed after the last token message is stored; before that another executor can take over.
 * 4. Everything is driven by events; the one timer renews leases and runs only while there are some.
 */
import { ACK_WAIT_MS, type TokenStream, type WorkLease } from '@lamina/bus';
import type { ModelDescription, Tokenizer } from '@lamina/model';
import type { Logger } from '@lamina/runtime';
import { asLaminaError, type KvLayout, LaminaError } from '@lamina/tensor';
import { createActor, fromPromise } from 'xstate';
import type { KvClient, KvEvents } from './kv-client.ts';
import type { ExecutorMetrics } from './metrics.ts';
import { Answer } from './request/answer.ts';
import { type RequestEvent, requestMachine } from './request/machine.ts';
import { GenerationRequest } from './request/request.ts';
import type { Scheduler, StepEntry } from './scheduling/scheduler.ts';
import { buildStep } from './scheduling/step-builder.ts';
import type { StepDone, StepFailed } from './worker/messages.ts';
import type { WorkerPool } from './worker-pool.ts';

export interface ExecutorOptions {
  readonly description: ModelDescription;
  readonly tokenizer: Tokenizer;
  readonly scheduler: Scheduler;
  readonly tokens: TokenStream;
  readonly metrics: ExecutorMetrics;
  readonly log: Logger;
  readonly maxRunningRequests: number;
}

interface RunningStep {
  readonly entries: readonly StepEntry[];
  readonly stepId: number;
}

/** Answers to ids that were cancelled before this executor saw them; bounded. */
const MAX_REMEMBERED_CANCELS = 10_000;

export class Executor implements KvEvents {
  readonly #options: ExecutorOptions;
  readonly #requests = new Map<string, GenerationRequest>();
  readonly #steps: (RunningStep | undefined)[];
  readonly #cancelledIds = new Set<string>();
  readonly #eosTokenIds: ReadonlySet<number>;
  #kv: KvClient | undefined;
  #pool: WorkerPool | undefined;
  #blockSizeTokens = 1;
  #numArrivals = 0;
  #numSteps = 0;
  #machineMs = 0;
  #renewal: NodeJS.Timeout | undefined;
  #onRoom: (() => void) | undefined;
  #onEmpty: (() => void) | undefined;

  constructor(options: ExecutorOptions) {
    this.#options = options;
    this.#steps = Array.from({ length: options.scheduler.numWaves }, () => undefined);
    this.#eosTokenIds = new Set(options.description.eosTokenIds);
  }

  /** Call once before the first request. */
  connect(kv: KvClient, pool: WorkerPool, layout: KvLayout): void {
    this.#kv = kv;
    this.#pool = pool;
    this.#setLayout(layout);
  }

  #setLayout(layout: KvLayout): void {
    this.#blockSizeTokens = layout.blockSizeTokens;
    this.#options.scheduler.blockSizeTokens = layout.blockSizeTokens;
  }

  get numRequests(): number {
    return this.#requests.size;
  }

  get numWavesInFlight(): number {
    return this.#steps.filter((step) => step !== undefined).length;
  }

  /** Resolves when another request can be taken. */
  async room(): Promise<void> {
    if (this.#requests.size < this.#options.maxRunningRequests) return;
    await new Promise<void>((resolve) => {
      this.#onRoom = resolve;
    });
  }

  /** Resolves when no request is left. */
  async empty(): Promise<void> {
    if (this.#requests.size === 0) return;
    await new Promise<void>((resolve) => {
      this.#onEmpty = resolve;
    });
  }

  /** Takes a request on. */
  admit(lease: WorkLease): void {
    const { item } = lease;
    const known = this.#requests.get(item.id);
    if (known !== undefined) {
      // The queue offered it again because renewals were late; it never stopped running here.
      known.lease = lease;
      return;
    }
    const { tokenizer, description, log } = this.#options;
    const answer = new Answer({ tokenizer, eosTokenIds: this.#eosTokenIds, item });
    const request = new GenerationRequest(item, lease, answer, this.#numArrivals++);
    this.#requests.set(item.id, request);
    this.#renewal ??= setInterval(() => this.#renewLeases(), ACK_WAIT_MS / 3);
    log.debug({ id: item.id, promptTokens: item.tokenIds.length, maxTokens: item.maxTokens }, 'admitted');
    const deadlineMs = item.deadlineAtMs === null ? null : Math.max(0, item.deadlineAtMs - Date.now());
    request.actor = createActor(this.#machineFor(request), { input: { requestId: item.id, deadlineMs } });
    request.actor.start();
    if (item.model !== description.modelId) {
      this.#send(request, {
        type: 'FAIL',
        error: new LaminaError('unknown_model', `this executor serves "${description.modelId}", not "${item.model}"`),
      });
    } else if (this.#cancelledIds.delete(item.id)) this.#send(request, { type: 'CANCEL' });
    else this.#admitQueued();
  }

  /** The request machine with this executor's effects. */
  #machineFor(request: GenerationRequest): typeof requestMachine {
    return requestMachine.provide({
      actors: { allocateKv: fromPromise(() => this.#allocate(request)) },
      actions: {
        enter: (_, { phase }) => {
          request.phase = phase;
          if (phase === 'prefill') this.#options.scheduler.add(request);
          if (phase === 'queued' || phase === 'allocating') this.#options.scheduler.remove(request);
        },
        releaseKv: () => this.#release(request),
        emitCancelled: () => this.#end(request, 'cancelled', null),
        emitFailed: ({ context }) => this.#end(request, 'error', context.error),
      },
    });
  }

  #send(request: GenerationRequest, event: RequestEvent): void {
    const startedMs = performance.now();
    request.actor?.send(event);
    this.#machineMs += performance.now() - startedMs;
  }

  // --- KV ---

  async #allocate(request: GenerationRequest): Promise<void> {
    const ahead = request.tokens.length + this.#blockSizeTokens;
    const blocks = await this.#kv!.allocate(
      request.id,
      Math.min(ahead, Math.max(request.tokens.length, request.maxKvTokens)),
      Math.max(request.tokens.length, request.maxKvTokens),
    );
    request.blockTable = blocks;
    request.numComputed = 0;
    // The actor enters prefill after this promise; the next admission and step follow that.
    setImmediate(() => {
      this.#admitQueued();
      this.pump();
    });
  }

  /** Lets the most urgent queued request try for KV, unless a running one waits for blocks. */
  #admitQueued(): void {
    let first: GenerationRequest | undefined;
    for (const request of this.#requests.values()) {
      if (request.isStarved) return;
      if (request.phase === 'allocating') return;
      if (request.phase !== 'queued' || request.isReleasePending) continue;
      if (
        first === undefined ||
        request.item.priority > first.item.priority ||
        (request.item.priority === first.item.priority && request.arrival < first.arrival)
      )
        first = request;
    }
    if (first !== undefined) this.#send(first, { type: 'ADMIT' });
  }

  #release(request: GenerationRequest): void {
    request.kvGeneration++;
    request.isStarved = false;
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

  /** Asks for the next block before the last one is full. */
  #extendAhead(request: GenerationRequest): void {
    const room = request.blockTable.length * this.#blockSizeTokens;
    if (request.isExtending || room >= Math.min(request.numComputed + this.#blockSizeTokens, request.maxKvTokens))
      return;
    request.isExtending = true;
    void this.#extend(
      request,
      Math.min(Math.max(room, request.tokens.length) + this.#blockSizeTokens, request.maxKvTokens),
      request.kvGeneration,
    );
  }

  async #extend(request: GenerationRequest, numTokens: number, kvGeneration: number): Promise<void> {
    try {
      const blocks = await this.#kv!.extend(request.id, numTokens);
      if (request.kvGeneration !== kvGeneration) return;
      request.blockTable.push(...blocks);
      request.isStarved = false;
      request.isExtending = false;
      this.pump();
    } catch (cause) {
      request.isExtending = false;
      if (request.kvGeneration === kvGeneration) this.#onExtendRefused(request, asLaminaError(cause));
    }
  }

  #onExtendRefused(request: GenerationRequest, error: LaminaError): void {
    if (error.code === 'invalid_request') {
      this.#loseKv(request, error);
    } else if (error.code === 'overloaded') {
      request.isStarved = true;
      this.#preemptYoungest(request);
    } else {
      this.#options.log.warn({ err: error, id: request.id }, 'no answer about more blocks; trying again');
      setTimeout(() => this.pump(), 250);
    }
  }

  /** The youngest request gives up its KV and goes back to the queue, so that the oldest can always finish. */
  #preemptYoungest(starved: GenerationRequest): void {
    let youngest = starved;
    for (const request of this.#requests.values()) {
      if ((request.phase === 'prefill' || request.phase === 'decode') && request.arrival > youngest.arrival)
        youngest = request;
    }
    this.#options.metrics.preemptions.inc();
    this.#send(youngest, { type: 'PREEMPT' });
  }

  onCapacityFreed(): void {
    for (const request of this.#requests.values()) {
      if (!request.isStarved) continue;
      request.isStarved = false;
      this.#extendAhead(request);
    }
    this.#admitQueued();
    this.pump();
  }

  onShardLost(shardId: string): void {
    this.#pool?.broadcast({ kind: 'shardLost', shardId });
    const error = new LaminaError('shard_lost', 'attention shards that held KV of this request went away');
    for (const request of [...this.#requests.values()]) {
      if (request.hasBlocksOn(shardId)) this.#loseKv(request, error);
    }
    this.pump();
  }

  onTablesVoid(layout: KvLayout): void {
    this.#setLayout(layout);
    const error = new LaminaError('shard_lost', 'the kv-manager was replaced and the KV of this request is gone');
    for (const request of [...this.#requests.values()]) {
      if (request.blockTable.length > 0) this.#loseKv(request, error);
    }
    this.#admitQueued();
    this.pump();
  }

  onRequestsVoid(requestIds: readonly string[]): void {
    const error = new LaminaError('shard_lost', 'attention shards that held KV of this request went away');
    for (const requestId of requestIds) {
      const request = this.#requests.get(requestId);
      if (request !== undefined && request.blockTable.length > 0) this.#loseKv(request, error);
      else void this.#kv?.free(requestId);
    }
    this.pump();
  }

  onLeaseRenewed(): void {
    this.#admitQueued();
    this.pump();
  }

  #loseKv(request: GenerationRequest, error: LaminaError): void {
    if (request.isKvLost) return;
    this.#options.metrics.recoveries.inc();
    if (request.isInStep) request.isKvLost = true;
    else this.#send(request, { type: 'KV_LOST', error });
  }

  // --- Steps ---

  /** Starts a step on every idle wave that has something to run. */
  pump(): void {
    const pool = this.#pool;
    if (pool === undefined || this.#kv?.holdsLease !== true) return;
    for (let wave = 0; wave < this.#steps.length; wave++) {
      if (this.#steps[wave] !== undefined) continue;
      const startedMs = performance.now();
      const entries = this.#options.scheduler.formStep(wave);
      if (entries.length === 0) continue;
      const stepId = this.#numSteps++ >>> 0;
      const { step, transfer } = buildStep(entries, this.#blockSizeTokens, pool.waveOnWorker(wave), stepId);
      this.#steps[wave] = { entries, stepId };
      for (const { request } of entries) request.isInStep = true;
      pool.run(wave, step, transfer);
      this.#options.metrics.observe('schedule', performance.now() - startedMs);
      for (const { request } of entries) this.#extendAhead(request);
    }
  }

  onStepDone(wave: number, result: StepDone): void {
    const step = this.#finishStep(wave);
    const { metrics } = this.#options;
    let sampled = 0;
    for (const { request, start, numTokens, kvGeneration } of step.entries) {
      const isSampled = start + numTokens === request.tokens.length;
      const isStale = kvGeneration !== request.kvGeneration;
      if (!isStale) {
        request.numComputed = start + numTokens;
        if (request.phase === 'prefill') metrics.prefilledTokens.inc(numTokens);
        if (isSampled) this.#onSampled(request, result, sampled);
        else this.#send(request, { type: 'CHUNK_READY' });
      }
      if (isSampled) sampled++;
    }
    this.#settleEntries(step.entries);
    metrics.observeStep(result.timings);
    metrics.observe('machine', this.#machineMs);
    this.#machineMs = 0;
    this.pump();
  }

  #onSampled(request: GenerationRequest, result: StepDone, row: number): void {
    this.#send(request, { type: 'LOGITS_READY' });
    const token = result.tokens[row]!;
    if (token < 0) {
      this.#send(request, {
        type: 'FAIL',
        error: new LaminaError('numeric_error', 'the model produced NaN or infinite logits for this request'),
      });
      return;
    }
    request.tokens.push(token);
    this.#options.metrics.generatedTokens.inc();
    const message = request.answer.push({
      token,
      logprob: result.logprobs[row]!,
      topLogprobs: result.topLogprobs?.[row] ?? [],
    });
    const stored = this.#options.tokens.publish([message], request.item.encoding);
    if (message.finish_reason === null) {
      this.#send(request, { type: 'TOKEN_SAMPLED' });
      return;
    }
    this.#send(request, { type: 'FINISHED' });
    void this.#forget(request, message.finish_reason, stored);
  }

  onStepFailed(wave: number, result: StepFailed): void {
    const step = this.#finishStep(wave);
    const { metrics, log } = this.#options;
    metrics.failedSteps.inc({ code: result.code });
    log.warn(
      { code: result.code, reason: result.message, shardIds: result.shardIds, requests: step.entries.length },
      'a step failed',
    );
    const error = new LaminaError(
      result.shardIds.length > 0 ? 'shard_lost' : result.code,
      result.shardIds.length > 0 ? 'attention shards that held KV of this request failed' : result.message,
    );
    for (const { request, kvGeneration } of step.entries) {
      if (kvGeneration !== request.kvGeneration || request.isKvLost) continue;
      if (result.shardIds.length === 0) this.#send(request, { type: 'FAIL', error });
      else if (result.shardIds.some((shardId) => request.hasBlocksOn(shardId))) {
        request.isKvLost = true;
      }
    }
    this.#settleEntries(step.entries);
    this.pump();
  }

  #finishStep(wave: number): RunningStep {
    const step = this.#steps[wave];
    if (step === undefined) throw new LaminaError('internal', `wave ${wave} finished a step that was not begun`);
    this.#steps[wave] = undefined;
    for (const { request } of step.entries) request.isInStep = false;
    return step;
  }

  /** Carries out what had to wait for the end of the step. */
  #settleEntries(entries: readonly StepEntry[]): void {
    for (const { request } of entries) {
      if (request.isReleasePending) this.#releaseNow(request);
      if (request.isKvLost) {
        request.isKvLost = false;
        this.#send(request, {
          type: 'KV_LOST',
          error: new LaminaError('shard_lost', 'attention shards that held KV of this request went away'),
        });
      }
    }
    this.#admitQueued();
  }

  // --- Ends ---

  /** Stops a request wherever it is; ids that are not here are remembered in case they come. */
  cancel(requestId: string): void {
    const request = this.#requests.get(requestId);
    if (request !== undefined) {
      this.#send(request, { type: 'CANCEL' });
      return;
    }
    if (this.#cancelledIds.size >= MAX_REMEMBERED_CANCELS) {
      for (const oldest of this.#cancelledIds) {
        this.#cancelledIds.delete(oldest);
        break;
      }
    }
    this.#cancelledIds.add(requestId);
  }

  #end(request: GenerationRequest, reason: 'cancelled' | 'error', error: LaminaError | null): void {
    if (error !== null) this.#options.log.info({ err: error, id: request.id }, 'request failed');
    const failure = error === null ? undefined : asLaminaError(error);
    const message = request.answer.end(
      reason,
      failure === undefined ? undefined : { code: failure.code, message: failure.message },
    );
    void this.#forget(request, reason, this.#options.tokens.publish([message], request.item.encoding));
  }

  async #forget(request: GenerationRequest, finishReason: string, stored: Promise<boolean>): Promise<void> {
    this.#options.metrics.requests.inc({ finish_reason: finishReason });
    this.#options.scheduler.remove(request);
    if (await stored) request.lease.complete();
    this.#requests.delete(request.id);
    if (this.#requests.size === 0) {
      clearInterval(this.#renewal);
      this.#renewal = undefined;
      this.#onEmpty?.();
    }
    this.#onRoom?.();
    this.#onRoom = undefined;
    this.#admitQueued();
    this.pump();
  }

  #renewLeases(): void {
    for (const request of this.#requests.values()) request.lease.renew();
  }

  /** Hands every unfinished request back to the queue. */
  releaseAll(): void {
    for (const request of this.#requests.values()) request.lease.release();
    clearInterval(this.#renewal);
  }
}
