/**
 * Owns the way of a request through this executor: taken on, its actor with the executor's effects, its tokens, its end.
 *
 * Invariants
 * 1. A lease is completed after the last token message is stored; before that another executor can take over.
 * 2. A request that another executor had before continues after the last token that it stored: every token is sampled once.
 * 3. The one timer renews leases and runs only while there are some.
 */
import { ACK_WAIT_MS, AnswerWriter, type StoredAnswer, type TokenStream, type WorkLease } from '@lamina/bus';
import type { ModelDescription, Tokenizer } from '@lamina/model';
import { errorBodyOf, type FinishReason, PastCancels, type WorkItem } from '@lamina/protocol';
import type { Logger } from '@lamina/runtime';
import { asLaminaError, type KvLayout, LaminaError } from '@lamina/tensor';
import { createActor, fromPromise } from 'xstate';
import { type KvCalls, KvTables } from './kv-tables.ts';
import { endLostAnswer } from './lost-answer.ts';
import type { ExecutorMetrics } from './metrics.ts';
import { Answer } from './request/answer.ts';
import { requestMachine } from './request/machine.ts';
import { GenerationRequest } from './request/request.ts';
import type { SampledToken } from './request/sampler.ts';
import { RunningRequests } from './running-requests.ts';
import type { Scheduler } from './scheduling/scheduler.ts';
import { StepLoop, type StepRunner } from './step-loop.ts';

export interface ExecutorOptions {
  readonly description: ModelDescription;
  readonly tokenizer: Tokenizer;
  readonly scheduler: Scheduler;
  readonly tokens: Pick<TokenStream, 'append' | 'stored' | 'endOf' | 'isClosed'>;
  readonly metrics: ExecutorMetrics;
  readonly log: Logger;
}

const NOTHING_STORED: StoredAnswer = { tokens: [], lastSequence: 0, deliveryCount: 0 };
/** Before a request is offered again whose stored part cannot be read. */
const RELEASE_DELAY_MS = 1_000;
/** What waited for longer may have been ended by its gateway, which takes at least so long to do that. */
const MAY_HAVE_ENDED_MS = 250;

export class Executor {
  readonly requests = new RunningRequests();
  readonly tables: KvTables;
  readonly steps: StepLoop;
  readonly #options: ExecutorOptions;
  readonly #eosTokenIds: ReadonlySet<number>;
  /** Of requests that were not here. */
  readonly #cancels = new PastCancels();
  /** Leases of requests whose stored part is being read, the latest of each. */
  readonly #resuming = new Map<string, WorkLease>();
  #pool: StepRunner | undefined;
  #renewal: NodeJS.Timeout | undefined;
  #isHandingBack = false;

  constructor(options: ExecutorOptions) {
    const { scheduler, metrics, log } = options;
    const { requests } = this;
    this.#options = options;
    this.#eosTokenIds = new Set(options.description.eosTokenIds);
    this.tables = new KvTables({
      requests,
      scheduler,
      metrics,
      log,
      onRunnable: () => this.steps.pump(),
      onReleaseWaits: (request) => this.steps.abortFor(request),
      onShardLost: (shardId) => this.#pool?.broadcast({ kind: 'shardLost', shardId }),
    });
    this.steps = new StepLoop({
      requests,
      scheduler,
      tables: this.tables,
      metrics,
      log,
      onToken: (request, sampled) => this.#onToken(request, sampled),
    });
  }

  /** Call once before the first request. */
  connect(kv: KvCalls, pool: StepRunner, layout: KvLayout): void {
    this.#pool = pool;
    this.tables.connect(kv, layout);
    this.steps.connect(pool);
  }

  /** Takes a request on. */
  admit(lease: WorkLease): void {
    const { requests } = this;
    const { item } = lease;
    const known = requests.get(item.id);
    if (known !== undefined) {
      // The queue offered it again because renewals were late; it never stopped running here.
      known.lease = lease;
      return;
    }
    // A cancel that comes from here on is for this item, whatever the clock of its gateway says.
    const submittedAtMs = Math.min(item.submittedAtMs, Date.now());
    const isResuming = this.#resuming.has(item.id);
    const mayBeStored =
      lease.deliveryCount > 1 ||
      item.isContinued === true ||
      this.#cancels.hasCancelled(item.id, submittedAtMs) ||
      Date.now() - item.submittedAtMs > MAY_HAVE_ENDED_MS;
    if (isResuming || mayBeStored) this.#resuming.set(item.id, lease);
    if (isResuming) return;
    if (this.#resuming.has(item.id)) void this.#resume(lease, submittedAtMs);
    else this.#begin(lease, NOTHING_STORED, submittedAtMs);
  }

  /** Takes up what another executor began, or drops what was ended while it waited. */
  async #resume(lease: WorkLease, submittedAtMs: number): Promise<void> {
    const { tokens, log } = this.#options;
    const { id } = lease.item;
    this.requests.arriving();
    const current = (): WorkLease => this.#resuming.get(id) ?? lease;
    const renewal = setInterval(() => current().renew(), ACK_WAIT_MS / 3);
    try {
      const stored = await tokens.stored(id);
      if (lease.deliveryCount > 1 || stored.tokens.length > 0)
        log.info({ id, deliveryCount: lease.deliveryCount, storedTokens: stored.tokens.length }, 'taking a request up');
      const last = stored.tokens.at(-1);
      if (last !== undefined && last.finish_reason !== null) current().complete();
      else if (this.requests.get(id) === undefined) this.#begin(current(), stored, submittedAtMs);
    } catch (cause) {
      await this.#endOrHandBack(lease.item, asLaminaError(cause), current);
    } finally {
      clearInterval(renewal);
      this.#resuming.delete(id);
      this.requests.arrived();
    }
  }

  /** Sees to a request whose stored part gave `error` instead of tokens. */
  async #endOrHandBack(item: WorkItem, error: LaminaError, current: () => WorkLease): Promise<void> {
    const { tokens, metrics, log } = this.#options;
    const { id } = item;
    try {
      if (error.retryable) throw error;
      log.info({ err: error, id }, 'request failed: its answer cannot be continued');
      if (!(await endLostAnswer(tokens, item, error))) return;
      metrics.requests.inc({ finish_reason: 'error' });
      current().complete();
    } catch (cause) {
      log.warn(
        { err: asLaminaError(cause), id },
        'the stored part of an answer cannot be read; handing the request back',
      );
      current().release(RELEASE_DELAY_MS);
    }
  }

  #begin(lease: WorkLease, stored: StoredAnswer, submittedAtMs: number): void {
    const { requests } = this;
    const { item } = lease;
    const { tokenizer, log } = this.#options;
    const answer = new Answer({ tokenizer, eosTokenIds: this.#eosTokenIds, item });
    const { tokens } = this.#options;
    const stream: ConstructorParameters<typeof AnswerWriter>[0] = {
      append: (messages, encoding, lastSequence) =>
        tokens.append(messages, encoding, lastSequence, request.lease.deliveryCount),
      get isClosed() {
        return tokens.isClosed;
      },
    };
    const writer = new AnswerWriter(stream, item.encoding, stored.lastSequence, (error) => {
      if (error.code === 'duplicate_id') {
        this.requests.send(request, { type: 'TAKEN_OVER' });
        return;
      }
      log.error({ err: error, id: item.id }, 'an answer cannot be stored');
      this.requests.send(request, { type: 'FAIL', error });
    });
    const request: GenerationRequest = new GenerationRequest(
      item,
      lease,
      answer,
      writer,
      requests.clients.enter(item.client),
      stored,
    );
    let finishReason: FinishReason | null = null;
    for (const { token } of stored.tokens) {
      // All of them are taken up, whichever ends it.
      const reason = token === null ? null : answer.resume(token);
      finishReason ??= reason;
    }
    requests.add(request);
    this.#renewal ??= setInterval(() => this.#renewLeases(), ACK_WAIT_MS / 3);
    log.debug({ id: item.id, promptTokens: item.tokenIds.length, maxTokens: item.maxTokens }, 'admitted');
    const deadlineMs = item.deadlineAtMs === null ? null : Math.max(0, item.deadlineAtMs - Date.now());
    request.actor = createActor(this.#machineFor(request), { input: { requestId: item.id, deadlineMs } });
    request.actor.start();
    const problem = this.#problemWith(item);
    if (finishReason !== null) this.#finishStored(request, finishReason);
    else if (problem !== undefined) requests.send(request, { type: 'FAIL', error: problem });
    else if (this.#cancels.hasCancelled(item.id, submittedAtMs)) requests.send(request, { type: 'CANCEL' });
    else this.tables.admitQueued();
  }

  /** What the gateway should have refused; checked again, since one bad token id would fail every request of its wave. */
  #problemWith({ model, tokenIds, maxTokens }: WorkItem): LaminaError | undefined {
    const { modelId, vocabSize, contextLength } = this.#options.description;
    if (model !== modelId) return new LaminaError('unknown_model', `this executor serves "${modelId}", not "${model}"`);
    if (tokenIds.length + maxTokens > contextLength) {
      return new LaminaError('context_length_exceeded', `the context of ${modelId} is ${contextLength} tokens`);
    }
    const foreign = tokenIds.find((token) => token >= vocabSize);
    return foreign === undefined
      ? undefined
      : new LaminaError('invalid_request', `token id ${foreign} is not in the vocabulary of ${vocabSize}`);
  }

  /** The request machine with this executor's effects. */
  #machineFor(request: GenerationRequest): typeof requestMachine {
    const { scheduler } = this.#options;
    return requestMachine.provide({
      actors: { allocateKv: fromPromise(() => this.tables.allocate(request)) },
      actions: {
        enter: (_, { phase }) => {
          request.phase = phase;
          if (phase === 'prefill') scheduler.add(request);
          if (phase === 'handedOver') this.#drop(request);
        },
        releaseKv: () => this.tables.release(request),
        emitCancelled: () => this.#endWithoutToken(request, 'cancelled', null),
        emitFailed: ({ context }) => this.#endWithoutToken(request, 'error', context.error),
      },
    });
  }

  #onToken(request: GenerationRequest, sampled: SampledToken): void {
    const message = request.answer.push(sampled);
    request.writer.push(message);
    const finishReason = message.finish_reason;
    if (finishReason === null) {
      this.requests.send(request, { type: 'TOKEN_SAMPLED' });
      return;
    }
    this.requests.send(request, { type: 'FINISHED' });
    void this.#forget(request, finishReason);
  }

  /** The rest of an answer may be asked for with another max_tokens or stop: what is stored is enough then. */
  #finishStored(request: GenerationRequest, finishReason: FinishReason): void {
    request.writer.push(request.answer.end(finishReason));
    this.requests.send(request, { type: 'FINISHED' });
    void this.#forget(request, finishReason);
  }

  #endWithoutToken(request: GenerationRequest, reason: 'cancelled' | 'error', error: LaminaError | null): void {
    if (error !== null) this.#options.log.info({ err: error, id: request.id }, 'request failed');
    const body = error === null ? undefined : errorBodyOf(error);
    request.writer.push(request.answer.end(reason, body));
    void this.#forget(request, reason);
  }

  async #forget(request: GenerationRequest, finishReason: string): Promise<void> {
    this.#options.metrics.requests.inc({ finish_reason: finishReason });
    if (await request.writer.stored()) request.lease.complete();
    this.#remove(request);
  }

  #remove(request: GenerationRequest): void {
    this.requests.remove(request);
    if (this.requests.size === 0) {
      clearInterval(this.#renewal);
      this.#renewal = undefined;
    }
    this.tables.admitQueued();
    this.steps.pump();
  }

  /** Stops a request wherever it is: also one that was submitted before and has not come here yet. */
  cancel(requestId: string): void {
    const request = this.requests.get(requestId);
    if (request !== undefined) {
      this.requests.send(request, { type: 'CANCEL' });
      return;
    }
    if (!this.#cancels.add(requestId)) this.#options.metrics.ignored.inc({ reason: 'bad_cancel_id' });
  }

  /** Forgets a request that another executor has now, or will have; its lease is not ours to complete. */
  #drop(request: GenerationRequest): void {
    const { log } = this.#options;
    const { id } = request;
    if (this.#isHandingBack) log.info({ id }, 'the request goes back to the queue: this executor stops');
    else log.warn({ id }, 'another executor has the request from now on');
    this.#remove(request);
  }

  #renewLeases(): void {
    for (const request of this.requests.all()) request.lease.renew();
  }

  /** Hands every unfinished request back to the queue: first its tokens end, so that another goes on after the last one. */
  async handBack(): Promise<void> {
    this.#isHandingBack = true;
    const handing = [...this.requests.all()].map(async (request) => {
      const { phase, writer, lease } = request;
      const isEnding = phase === 'finished' || phase === 'cancelled' || phase === 'failed';
      if (!isEnding) this.requests.send(request, { type: 'TAKEN_OVER' });
      if ((await writer.stored()) && !isEnding) lease.release();
    });
    await Promise.all(handing);
  }
}
