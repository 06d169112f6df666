/**
 * An executor with its real requests, machines, scheduler and block tables, between a kv-manager and workers that do what
 * the test says.
 */
import { fileURLToPath } from 'node:url';
import type { WorkLease } from '@lamina/bus';
import { loadTokenizer, readModel } from '@lamina/model';
import type { BlockRef, TokenMessage } from '@lamina/protocol';
import { createLogger, Registry } from '@lamina/runtime';
import { type ErrorCode, type KvLayout, LaminaError } from '@lamina/tensor';
import { Executor } from '../src/executor.ts';
import type { KvCalls } from '../src/kv-tables.ts';
import { ExecutorMetrics } from '../src/metrics.ts';
import type { GenerationRequest } from '../src/request/request.ts';
import { Scheduler } from '../src/scheduling/scheduler.ts';
import type { StepRequest } from '../src/worker/messages.ts';

const MODEL = fileURLToPath(new URL('../../../models/lamina-tiny', import.meta.url));
const tokenizer = await loadTokenizer(MODEL);
export const description = await readModel(MODEL);

export const BLOCK = 16;
export const LAYOUT: KvLayout = { ...description.attention, blockSizeTokens: BLOCK, kvDtype: 'f32' };

/** A call that waits for the test to answer it. */
export interface KvCall {
  readonly kind: 'allocate' | 'extend';
  readonly requestId: string;
  /** Blocks that the caller knows of. */
  readonly numBlocks: number;
  readonly numTokens: number;
  readonly deliveryCount: number;
  readonly vainDeliveryCount: number;
  /** Gives block number `first` and following of `shardId`. */
  give(count: number, shardId?: string, first?: number): void;
  refuse(code: ErrorCode): void;
}

/** A kv-manager that leaves every answer to the test. Frees are confirmed. */
export class ScriptedKv implements KvCalls {
  holdsLease = true;
  leaseTerm = 1;
  /** All calls in order: `allocate r`, `free r`. */
  readonly log: string[] = [];
  readonly suspected: string[] = [];
  readonly #open: KvCall[] = [];

  /** The oldest unanswered call. */
  next(): KvCall {
    const call = this.#open.shift();
    if (call === undefined) throw new Error(`nothing was asked; so far ${this.log.join(', ')}`);
    return call;
  }

  get numOpen(): number {
    return this.#open.length;
  }

  #ask(call: Omit<KvCall, 'give' | 'refuse'>): Promise<BlockRef[]> {
    this.log.push(`${call.kind} ${call.requestId}`);
    return new Promise((resolve, reject) => {
      this.#open.push({
        ...call,
        give: (count, shardId = 'a', first = 0) =>
          resolve(Array.from({ length: count }, (_, i) => ({ shardId, block: first + i }))),
        refuse: (code) => reject(new LaminaError(code, 'scripted')),
      });
    });
  }

  allocate(
    requestId: string,
    numTokens: number,
    _maxTokens: number,
    deliveryCount: number,
    vainDeliveryCount: number,
  ): Promise<BlockRef[]> {
    return this.#ask({ kind: 'allocate', requestId, numBlocks: 0, numTokens, deliveryCount, vainDeliveryCount });
  }

  extend(requestId: string, numBlocks: number, numTokens: number): Promise<BlockRef[]> {
    return this.#ask({ kind: 'extend', requestId, numBlocks, numTokens, deliveryCount: 0, vainDeliveryCount: 0 });
  }

  suspect(shardId: string): Promise<void> {
    this.suspected.push(shardId);
    return Promise.resolve();
  }

  trim(): Promise<void> {
    return Promise.resolve();
  }

  free(requestId: string): Promise<void> {
    this.log.push(`free ${requestId}`);
    return Promise.resolve();
  }
}

export interface BenchRequest {
  readonly id: string;
  readonly numPromptTokens?: number;
  /** Default: some numPromptTokens tokens. */
  readonly tokenIds?: readonly number[];
  readonly maxTokens: number;
  readonly client?: string | undefined;
  readonly priority?: number;
  readonly deliveryCount?: number;
  /** Default true. */
  readonly ignoreEos?: boolean;
  readonly deadlineAtMs?: number;
  /** Since the gateway got it; default 0. */
  readonly waitedMs?: number;
}

/** One executor of two waves. */
export class Bench {
  readonly executor: Executor;
  readonly metrics: ExecutorMetrics;
  readonly log = createLogger({ level: 'silent', service: 'dense-executor', instance: 'test' });
  /** Messages of all answers. */
  readonly messages: TokenMessage[] = [];
  readonly completed: string[] = [];
  /** Handed back. */
  readonly released: string[] = [];
  /** Another process writes to the answers. */
  isTakenOver = false;
  /** What the stream has of every answer. */
  stored: readonly TokenMessage[] = [];
  /** Of whoever stored the last of it. */
  storedDeliveryCount = 1;
  /** Why that cannot be had. */
  unreadable: LaminaError | undefined;
  /** How often the stream was asked for that. */
  numReads = 0;
  /** Steps in flight by wave. */
  readonly steps = new Map<number, StepRequest>();
  /** What the workers were told to abort. */
  readonly aborts: { wave: number; stepId: number }[] = [];

  constructor(kv: KvCalls, speculation: 'auto' | 'off' = 'off') {
    this.metrics = new ExecutorMetrics(new Registry(), { running: () => 0, waves: () => 0 });
    this.executor = new Executor({
      description,
      tokenizer,
      scheduler: new Scheduler({ maxBatchedTokens: 512, prefillChunkTokens: 256, speculation }, 2, 2),
      tokens: {
        isClosed: false,
        stored: () => {
          this.numReads++;
          if (this.unreadable !== undefined) return Promise.reject(this.unreadable);
          return Promise.resolve({
            tokens: this.stored,
            lastSequence: this.stored.length,
            deliveryCount: this.stored.length === 0 ? 0 : this.storedDeliveryCount,
          });
        },
        endOf: () => {
          const last = this.stored.at(-1);
          if (last === undefined) return Promise.resolve(undefined);
          const isComplete = last.finish_reason !== null;
          const nextIndex = last.token === null ? undefined : last.index + 1;
          return Promise.resolve({ sequence: this.stored.length, isComplete, storedAtMs: 0, nextIndex });
        },
        append: (tokens, _encoding, lastSequence) => {
          if (this.isTakenOver) return Promise.reject(new LaminaError('duplicate_id', 'scripted'));
          this.messages.push(...tokens);
          return Promise.resolve(lastSequence + 1);
        },
      },
      metrics: this.metrics,
      log: this.log,
    });
    const pool = {
      run: (wave: number, step: StepRequest) => void this.steps.set(wave, step),
      abort: (wave: number, stepId: number) => void this.aborts.push({ wave, stepId }),
      waveOnWorker: (wave: number) => wave,
      broadcast: () => undefined,
    };
    this.executor.connect(kv, pool, LAYOUT);
  }

  admit({
    id,
    numPromptTokens = 1,
    tokenIds,
    maxTokens,
    client,
    priority = 0,
    deliveryCount = 1,
    ignoreEos = true,
    deadlineAtMs,
    waitedMs = 0,
  }: BenchRequest): void {
    const lease: WorkLease = {
      item: {
        id,
        model: description.modelId,
        tokenIds: [...(tokenIds ?? Array.from({ length: numPromptTokens }, (_, i) => 5 + i))],
        maxTokens,
        sampling: { temperature: 0, topP: 1, topK: 0, minP: 0, seed: 1 },
        stop: [],
        logprobs: null,
        ignoreEos,
        priority,
        deadlineAtMs: deadlineAtMs ?? null,
        encoding: 'json',
        client,
        submittedAtMs: Date.now() - waitedMs,
      },
      deliveryCount,
      renew: () => undefined,
      complete: () => this.completed.push(id),
      release: () => this.released.push(id),
    };
    this.executor.admit(lease);
  }

  request(id: string): GenerationRequest {
    const request = this.executor.requests.get(id);
    if (request === undefined) throw new Error(`no request ${id}`);
    return request;
  }

  /** Ends the step that a wave has in flight with these tokens. */
  finish(wave: number, tokens?: readonly number[]): void {
    const step = this.steps.get(wave);
    if (step === undefined) throw new Error(`wave ${wave} is idle`);
    this.steps.delete(wave);
    const count = step.sampledRows.length;
    this.executor.steps.onStepDone(wave, {
      kind: 'stepDone',
      waveIndex: step.waveIndex,
      stepId: step.stepId,
      tokens: tokens === undefined ? new Int32Array(count).fill(100) : Int32Array.from(tokens),
      logprobs: new Float64Array(count).fill(Number.NaN),
      topLogprobs: null,
      timings: { denseMs: 0, waitMs: 0, codecMs: 0, sampleMs: 0, totalMs: 0 },
    });
  }

  failStep(wave: number, code: ErrorCode, shardIds: readonly string[], isRefusal = false): void {
    const { waveIndex, stepId } = this.steps.get(wave)!;
    this.steps.delete(wave);
    const why = { code, message: 'scripted', shardIds, isRefusal };
    this.executor.steps.onStepFailed(wave, { kind: 'stepFailed', waveIndex, stepId, ...why });
  }
}

/** Lets promises and what follows from them run. */
export async function settle(): Promise<void> {
  for (let turn = 0; turn < 4; turn++) await new Promise((resolve) => setImmediate(resolve));
}
