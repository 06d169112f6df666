/**
 * Owns Lamina as a contestant: a whole cluster of real processes, asked over NATS as any client asks.
 *
 * Invariants
 * 1. Requests are generated without a pause once they run, so between windows all processes but nats-server are stopped
 *    (SIGSTOP) and compute nothing. A stop is shorter than the 10 s after which a work item would be offered again, less
 *    the 3.3 s between renewals.
 * 2. Timeouts that a stop would trip are raised; nothing else differs from what `npm start` starts.
 */
import { randomUUID } from 'node:crypto';
import { type Cluster, type ServiceSettings, startCluster } from '@lamina/cli';
import { decodeTokens, ENDPOINTS, SUBJECTS } from '@lamina/protocol';
import { natsServerOf, processEnvironment } from '@lamina/runtime';
import { readMetrics } from '../metrics.ts';
import { builtCacheOf, checkpointOf, shapeOf } from '../models.ts';
import { type Contestant, type Opened, promptOf, WARM_UP_STEPS, type WindowLimits, type Workload } from './peer.ts';

export interface LaminaOptions {
  readonly settings?: ServiceSettings;
  readonly environment?: Readonly<Record<string, string>>;
  readonly attentionShards?: number;
  /** A nats-server that runs; default: one of its own. */
  readonly natsUrl?: string;
  /** Directory of a model in place of a synthetic one. */
  readonly modelDir?: string;
}

const PAUSED = ['gateway', 'dense-executor', 'attention-shard', 'kv-manager'] as const;
const LONG_MS = '600000';
const STATUS_TIMEOUT_MS = 5_000;
/** Beyond this no token comes any more. */
const STALL_MS = 300_000;

const SETTINGS_OF_BENCHMARKS: ServiceSettings = {
  weights: 'int8',
  kvDtype: 'f16',
  kvBudgetBytes: '4g',
  // Random weights soon repeat themselves: guessed tokens would count as speed that no real text has.
  speculation: 'off',
  heartbeatTimeoutMs: LONG_MS,
  gatherTimeoutMs: LONG_MS,
  requestTimeoutMs: '30000',
  logLevel: 'warn',
};

/** A request that is being answered. */
export interface LiveRequest {
  readonly id: string;
  /** performance.now() at the arrival of each token. */
  readonly timesMs: number[];
  readonly tokens: number[];
  readonly unsubscribe: () => void;
}

export class LaminaPeer implements Contestant {
  readonly name: string = 'lamina';
  readonly #options: LaminaOptions;
  #cluster: Cluster | undefined;
  #modelName = '';
  #live: LiveRequest[] = [];
  #isPaused = false;
  #failure: Error | undefined;
  #onProgress: (() => void) | undefined;

  constructor(options: LaminaOptions = {}) {
    this.#options = options;
  }

  get cluster(): Cluster {
    if (this.#cluster === undefined) throw new Error('the cluster is not started');
    return this.#cluster;
  }

  /** Starts the cluster for a model; does nothing if it runs with that model. */
  async start(model: string, directory: string): Promise<Cluster> {
    if (this.#cluster !== undefined && this.#modelName === model) return this.#cluster;
    await this.dispose();
    const environment = processEnvironment();
    const modelDir = this.#options.modelDir ?? (await checkpointOf(directory, model));
    const cluster = await startCluster({
      attentionShards: this.#options.attentionShards ?? 1,
      denseExecutors: 1,
      natsPort: 0,
      ...(this.#options.natsUrl !== undefined && { natsUrl: this.#options.natsUrl }),
      httpPort: 0,
      natsServer: natsServerOf(environment),
      environment: { ...environment, ...this.#options.environment },
      settings: {
        ...SETTINGS_OF_BENCHMARKS,
        model: modelDir,
        cacheDir: builtCacheOf(directory),
        ...this.#options.settings,
      },
    });
    this.#cluster = cluster;
    this.#modelName = model;
    this.#failure = undefined;
    void cluster.failure.then((error) => this.#fail(error));
    return cluster;
  }

  async open(workload: Workload): Promise<Opened> {
    const { model, directory, numRequests, contextTokens, maxNewTokens } = workload;
    const cluster = await this.start(model, directory);
    const { vocabSize } = shapeOf(model).shape;
    const before = await readMetrics(cluster.httpUrl);
    const prompts = Array.from({ length: numRequests }, (_, i) => promptOf(i, contextTokens, vocabSize));
    const startedMs = performance.now();
    this.#live = prompts.map((prompt) => this.submit(prompt, maxNewTokens));
    await this.#until(() => this.#live.every(({ timesMs }) => timesMs.length > 0));
    const seconds = (Math.max(...this.#live.map(({ timesMs }) => timesMs[0]!)) - startedMs) / 1000;
    const held = await this.#checkHeld(
      prompts.reduce((sum, prompt) => sum + prompt.length, 0),
      before,
    );
    this.pause();
    return { promptTokensPerSecond: (numRequests * contextTokens) / seconds, held };
  }

  /** Publishes a prompt. */
  submit(tokenIds: readonly number[], maxTokens: number): LiveRequest {
    const id = randomUUID();
    const timesMs: number[] = [];
    const tokens: number[] = [];
    const body = { id, token_ids: tokenIds, max_tokens: maxTokens, temperature: 0, ignore_eos: true };
    const subscription = this.cluster.bus.requestStream(
      SUBJECTS.generate,
      new TextEncoder().encode(JSON.stringify(body)),
      (reply) => {
        const nowMs = performance.now();
        const messages = reply === undefined ? [] : decodeTokens(reply.data);
        if (reply === undefined) this.#fail(new Error('no gateway listens'));
        for (const { index, token, error, finish_reason: reason } of messages) {
          if (error !== undefined) this.#fail(new Error(`${error.code}: ${error.message}`));
          if (token !== null && index !== timesMs.length) this.#fail(new Error(`token ${index} came out of order`));
          if (token !== null) {
            timesMs.push(nowMs);
            tokens.push(token);
          }
          if (reason !== null && reason !== 'cancelled' && timesMs.length < maxTokens)
            this.#fail(new Error(`a request ended (${reason}) after ${timesMs.length} tokens`));
        }
        this.#onProgress?.();
      },
    );
    return { id, timesMs, tokens, unsubscribe: () => subscription.unsubscribe() };
  }

  get live(): readonly LiveRequest[] {
    return this.#live;
  }

  async window({ minSteps, maxSeconds }: WindowLimits): Promise<number> {
    this.resume();
    const live = this.#live;
    const resumedAt = live.map(({ timesMs }) => timesMs.length);
    await this.#until(() => live.every(({ timesMs }, i) => timesMs.length >= resumedAt[i]! + WARM_UP_STEPS));
    const deadlineMs = performance.now() + maxSeconds * 1000;
    const marks = live.map(({ timesMs }) => timesMs.length);
    await this.#until(() => {
      const steps = Math.min(...live.map(({ timesMs }, i) => timesMs.length - marks[i]!));
      return steps >= minSteps || (steps >= 2 && performance.now() > deadlineMs);
    });
    const ends = live.map(({ timesMs }) => timesMs.length);
    this.pause();
    let rate = 0;
    for (const [i, { timesMs }] of live.entries()) {
      const seconds = (timesMs[ends[i]! - 1]! - timesMs[marks[i]! - 1]!) / 1000;
      rate += (ends[i]! - marks[i]!) / seconds;
    }
    return rate;
  }

  pause(): void {
    if (!this.#isPaused) this.#signal('SIGSTOP');
    this.#isPaused = true;
  }

  resume(): void {
    if (this.#isPaused) this.#signal('SIGCONT');
    this.#isPaused = false;
  }

  /** Resolves when `isReached` holds after an arrival. @throws Error of whatever failed, or when nothing comes any more. */
  async until(isReached: () => boolean): Promise<void> {
    await this.#until(isReached);
  }

  async cancel(requests: readonly LiveRequest[]): Promise<void> {
    for (const { id, unsubscribe } of requests) {
      this.cluster.bus.publish(SUBJECTS.cancel(id), new Uint8Array(0));
      unsubscribe();
    }
    for (;;) {
      const { shards } = await this.cluster.bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: STATUS_TIMEOUT_MS });
      if (shards.every(({ usedBlocks }) => usedBlocks === 0) || this.#failure !== undefined) return;
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }

  async close(): Promise<void> {
    if (this.#cluster === undefined) return;
    this.resume();
    const live = this.#live;
    this.#live = [];
    await this.cancel(live);
  }

  async dispose(): Promise<void> {
    const cluster = this.#cluster;
    this.#cluster = undefined;
    this.#live = [];
    if (cluster === undefined) return;
    if (this.#isPaused) for (const kind of PAUSED) for (const child of cluster.processes(kind)) child.kill('SIGCONT');
    this.#isPaused = false;
    await cluster.stop();
  }

  #signal(signal: 'SIGSTOP' | 'SIGCONT'): void {
    for (const kind of PAUSED)
      for (const child of this.cluster.processes(kind)) if (child.isRunning) child.kill(signal);
  }

  #fail(error: Error): void {
    this.#failure ??= error;
    this.#onProgress?.();
  }

  #until(isReached: () => boolean): Promise<void> {
    return new Promise((resolve, reject) => {
      const end = (settle: () => void): void => {
        clearTimeout(timer);
        this.#onProgress = undefined;
        settle();
      };
      const timer = setTimeout(
        () => end(() => reject(new Error(`lamina: nothing more came in ${STALL_MS / 1000} s`))),
        STALL_MS,
      );
      this.#onProgress = () => {
        const failure = this.#failure;
        if (failure !== undefined) end(() => reject(failure));
        else if (isReached()) end(resolve);
      };
      this.#onProgress();
    });
  }

  /** The kv-manager must count blocks for every prompt token, the executor must have computed each. */
  async #checkHeld(promptTokens: number, before: Awaited<ReturnType<typeof readMetrics>>): Promise<string> {
    const { cluster } = this;
    const after = await readMetrics(cluster.httpUrl);
    const { shards, layout } = await cluster.bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: STATUS_TIMEOUT_MS });
    const series = 'lamina_prefilled_tokens_total';
    const computed = (after.get(series) ?? 0) - (before.get(series) ?? 0);
    const usedBlocks = shards.reduce((sum, shard) => sum + shard.usedBlocks, 0);
    const held = usedBlocks * (layout?.blockSizeTokens ?? 0);
    if (computed < promptTokens || held < promptTokens)
      throw new Error(`lamina computed ${computed} and holds ${held} of ${promptTokens} prompt tokens`);
    return `${computed} prompt tokens computed, blocks for ${held} held on ${shards.length} shards, KV ${layout?.kvDtype}`;
  }
}
