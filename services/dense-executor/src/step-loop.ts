/**
 * Owns the steps: starting one on every idle wave that has something to run, and what follows from its result.
 *
 * Invariants
 * 1. The result of a step counts only for requests whose KV is still the one that the step began with.
 * 2. Everything is driven by events: a wave without work costs nothing.
 * 3. A shard that does not listen has died or connects again. Its requests are held and tried again with their KV, until it
 *    does or the kv-manager says that it is lost; asking for other blocks before that could give the same shard's.
 * 4. A step is aborted when it keeps blocks that are to be free and a good part of it is for nothing; its other requests run
 *    again with their KV. Of two steps of a wave in a row that others take part in, at most one is aborted: who submits and
 *    cancels in a loop cannot stop them.
 * 5. A step that fails here, for a reason that may be one request's own (memory for a long chunk, an exception of ONNX
 *    Runtime), ends no request that shared it: each of them runs alone once, and who fails alone ends.
 * 6. A frame that a shard or a worker refuses says nothing of the KV: its step runs again with it, and only one that is refused
 *    again and again costs more. So what one bad frame costs does not grow with the contexts of those in the step.
 */
import type { Logger } from '@lamina/runtime';
import { ERROR_CODES, type ErrorCode, LaminaError } from '@lamina/tensor';
import type { KvTables } from './kv-tables.ts';
import type { ExecutorMetrics } from './metrics.ts';
import type { GenerationRequest } from './request/request.ts';
import type { SampledToken } from './request/sampler.ts';
import type { RunningRequests } from './running-requests.ts';
import type { Scheduler, StepEntry } from './scheduling/scheduler.ts';
import { buildStep } from './scheduling/step-builder.ts';
import { NOT_WANTED, STEP_ID_STRIDE, type StepDone, type StepFailed } from './worker/messages.ts';
import type { WorkerPool } from './worker-pool.ts';

/** What is asked of the workers here. */
export type StepRunner = Pick<WorkerPool, 'run' | 'abort' | 'waveOnWorker' | 'broadcast'>;

export interface StepLoopOptions {
  readonly requests: RunningRequests;
  readonly scheduler: Scheduler;
  readonly tables: KvTables;
  readonly metrics: ExecutorMetrics;
  readonly log: Logger;
  /** A token of a request that is in `sampling`. */
  readonly onToken: (request: GenerationRequest, sampled: SampledToken) => void;
}

const HOLD_MS = 200;
/** Refusals in a row after which a step is not just run again: then it is no frame on its way that is bad. */
const MAX_REFUSALS = 3;
/** Rows without a use for which the rows of others are computed twice: more than those of a decoding request with its drafts. */
const MIN_VOID_ROWS = 32;

interface StepInFlight {
  readonly stepId: number;
  readonly entries: readonly StepEntry[];
  isAborted: boolean;
}

export class StepLoop {
  readonly #options: StepLoopOptions;
  readonly #steps: (StepInFlight | undefined)[];
  /** By wave: its last step was aborted. */
  readonly #wasAborted: boolean[];
  #pool: StepRunner | undefined;
  #nextStepId = 0;
  #hold: NodeJS.Timeout | undefined;

  constructor(options: StepLoopOptions) {
    this.#options = options;
    this.#steps = Array.from({ length: options.scheduler.numWaves }, () => undefined);
    this.#wasAborted = this.#steps.map(() => false);
  }

  connect(pool: StepRunner): void {
    this.#pool = pool;
  }

  get numInFlight(): number {
    return this.#steps.filter((step) => step !== undefined).length;
  }

  /** Starts a step on every idle wave that has something to run. */
  pump(): void {
    const { scheduler, tables, metrics } = this.#options;
    const pool = this.#pool;
    const { leaseTerm } = tables;
    if (pool === undefined || leaseTerm === undefined) return;
    for (let wave = 0; wave < this.#steps.length; wave++) {
      if (this.#steps[wave] !== undefined) continue;
      const startedMs = performance.now();
      const entries = scheduler.formStep(wave);
      if (entries.length > 0) {
        const stepId = this.#nextStepId;
        this.#nextStepId = (stepId + STEP_ID_STRIDE) >>> 0;
        const { step, transfer } = buildStep(entries, scheduler, pool.waveOnWorker(wave), stepId, leaseTerm);
        this.#steps[wave] = { stepId, entries, isAborted: false };
        for (const { request } of entries) request.isInStep = true;
        pool.run(wave, step, transfer);
        metrics.observe('schedule', performance.now() - startedMs);
      }
      for (const request of scheduler.requestsOf(wave)) tables.extendAhead(request);
    }
  }

  /** Ends the step that keeps the blocks of a request which has no use for it, if that pays. */
  abortFor(request: GenerationRequest): void {
    const wave = this.#steps.findIndex((step) => step?.entries.some((entry) => entry.request === request));
    const step = this.#steps[wave];
    if (step === undefined || step.isAborted) return;
    let numVoidRows = 0;
    let numRows = 0;
    for (const { request: other, kvGeneration, numTokens } of step.entries) {
      numRows += numTokens;
      if (other.kvGeneration !== kvGeneration) numVoidRows += numTokens;
    }
    const isForNothing = numVoidRows === numRows;
    if (!isForNothing && (numVoidRows < MIN_VOID_ROWS || this.#wasAborted[wave])) return;
    step.isAborted = true;
    this.#pool?.abort(wave, step.stepId);
  }

  onStepDone(wave: number, result: StepDone): void {
    const { requests, metrics, scheduler } = this.#options;
    const { entries } = this.#endStep(wave);
    if (entries.length === 1) entries[0]!.request.runsAlone = false;
    scheduler.stepTook(entries, result.timings.totalMs);
    let row = 0;
    let numGiven = 0;
    for (const entry of entries) {
      const { request, numTokens, draft } = entry;
      const numComputed = entry.start + numTokens - draft.length;
      const isSampled = numComputed === request.tokens.length;
      if (entry.kvGeneration === request.kvGeneration) {
        request.numComputed = numComputed;
        request.numRefusals = 0;
        if (request.phase === 'prefill') metrics.prefilledTokens.inc(numTokens);
        if (!isSampled) requests.send(request, { type: 'CHUNK_READY' });
        else if (draft.length === 0) this.#onSampled(request, result, row);
        else numGiven += this.#onVerified(request, draft, result, row);
        if (isSampled) numGiven++;
      }
      if (isSampled) row += 1 + draft.length;
    }
    scheduler.stepGave(numGiven, performance.now());
    this.#settle(entries);
    metrics.observeStep(result.timings);
    metrics.observe('machine', requests.takeMachineMs());
  }

  /**
   * Tokens of one pass: each is the sampled one, and the next row counts while that is the drafted one.
   * @returns how many drafted tokens were right.
   */
  #onVerified(request: GenerationRequest, draft: readonly number[], result: StepDone, row: number): number {
    const { kvGeneration } = request;
    const { metrics } = this.#options;
    let numAccepted = 0;
    this.#onSampled(request, result, row);
    while (numAccepted < draft.length && result.tokens[row + numAccepted + 1] !== NOT_WANTED) {
      // The token before may have ended the request, or sent it back to the queue.
      if (request.kvGeneration !== kvGeneration || request.phase !== 'decode') break;
      numAccepted++;
      request.numComputed++;
      this.#onSampled(request, result, row + numAccepted);
    }
    request.lookup?.verified(draft.length, numAccepted);
    metrics.draftedTokens.inc(draft.length);
    metrics.acceptedTokens.inc(numAccepted);
    return numAccepted;
  }

  #onSampled(request: GenerationRequest, result: StepDone, row: number): void {
    const { requests, scheduler, metrics, onToken } = this.#options;
    requests.send(request, { type: 'LOGITS_READY' });
    const token = result.tokens[row]!;
    if (token < 0) {
      const error = new LaminaError('numeric_error', 'the model produced NaN or infinite logits for this request');
      requests.send(request, { type: 'FAIL', error });
      return;
    }
    request.tokens.push(token);
    metrics.generatedTokens.inc();
    onToken(request, { token, logprob: result.logprobs[row]!, topLogprobs: result.topLogprobs?.[row] ?? [] });
    // Longer than short: the rotary table is another one, so what is cached is computed anew with it.
    const wasShort = request.tokens.length - 1 === scheduler.shortSequences?.numTokens;
    if (wasShort && request.phase === 'decode') requests.send(request, { type: 'PREEMPT' });
  }

  onStepFailed(wave: number, result: StepFailed): void {
    const { requests, tables, metrics, log } = this.#options;
    const { entries, isAborted } = this.#endStep(wave);
    const { code, message, shardIds, isRefusal } = result;
    if (isAborted && shardIds.length === 0 && ERROR_CODES[code].retryable) metrics.abortedSteps.inc();
    else {
      metrics.failedSteps.inc({ code });
      log.warn({ code, reason: message, shardIds, numRequests: entries.length }, 'a step failed');
    }
    for (const { request, kvGeneration } of entries) {
      if (kvGeneration !== request.kvGeneration) continue;
      // A failure that is no shard's leaves the KV as it was: the same tokens run again.
      if (shardIds.length === 0 && isPassing(code)) continue;
      if (shardIds.length === 0 && entries.length > 1) request.runsAlone = true;
      else if (shardIds.length === 0) requests.send(request, { type: 'FAIL', error: new LaminaError(code, message) });
      else if (!shardIds.some((shardId) => request.hasBlocksOn(shardId))) continue;
      else if (isRefusal && ++request.numRefusals <= MAX_REFUSALS) continue;
      else if (code === 'unavailable') this.#holdBack(request, shardIds);
      else tables.lose(request);
    }
    this.#settle(entries);
  }

  #holdBack(held: GenerationRequest, shardIds: readonly string[]): void {
    for (const shardId of shardIds) this.#options.tables.suspect(shardId);
    held.isHeldBack = true;
    this.#hold ??= setTimeout(() => {
      this.#hold = undefined;
      for (const request of this.#options.requests.all()) request.isHeldBack = false;
      this.pump();
    }, HOLD_MS).unref();
  }

  #endStep(wave: number): StepInFlight {
    const step = this.#steps[wave];
    if (step === undefined) throw new LaminaError('internal', `wave ${wave} ended a step that was not begun`);
    this.#steps[wave] = undefined;
    this.#wasAborted[wave] = step.isAborted;
    for (const { request } of step.entries) request.isInStep = false;
    return step;
  }

  #settle(entries: readonly StepEntry[]): void {
    const { tables } = this.#options;
    for (const { request } of entries) tables.afterStep(request);
    tables.admitQueued();
    this.pump();
  }
}

/** Whether the same step may succeed at once: memory that is short may stay so. */
const isPassing = (code: ErrorCode): boolean => ERROR_CODES[code].retryable && code !== 'overloaded';
