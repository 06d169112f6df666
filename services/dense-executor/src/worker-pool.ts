/**
 * Owns the worker threads of the executor and the numbering of their waves.
 *
 * Invariants
 * 1. Wave w of the executor is wave w % wavesPerWorker of worker floor(w / wavesPerWorker).
 * 2. Every worker has an origin id of its own, at random, which it keeps until it is given another.
 * 3. A worker that dies ends the executor: its session and connection cannot be replaced within a step.
 * 4. An exit of the process, whatever the reason, finds every worker outside of ONNX Runtime.
 */
import { randomBytes } from 'node:crypto';
import { Worker } from 'node:worker_threads';
import { LaminaError } from '@lamina/tensor';
import type { FromWorker, StepDone, StepFailed, StepRequest, ToWorker, WorkerOptions } from './worker/messages.ts';
import { keepWorkersOut, type NativeGuardMemory, nativeGuardMemory, workerEnded } from './worker/native-guard.ts';

export interface WorkerPoolOptions {
  readonly numWorkers: number;
  readonly wavesPerWorker: number;
  readonly executorId: string;
  readonly worker: Omit<WorkerOptions, 'workerId' | 'workerIndex' | 'nativeGuard' | 'originId' | 'numWaves'>;
}

export interface WorkerPoolEvents {
  onStepDone(wave: number, result: StepDone): void;
  onStepFailed(wave: number, result: StepFailed): void;
  onComplaint(error: LaminaError): void;
  onLate(shardIds: readonly string[]): void;
  /** A worker's tensors do not travel as they were meant to. */
  onLinkFallback(reason: string): void;
  /** A worker died or could not start. */
  onDeath(error: LaminaError): void;
}

/** An exit waits so long for the layer that a worker computes. */
const EXIT_WAIT_MS = 500;

export class WorkerPool {
  readonly #options: WorkerPoolOptions;
  readonly #events: WorkerPoolEvents;
  readonly #workers: Worker[] = [];
  readonly #nativeGuard: NativeGuardMemory;
  readonly #originIds: number[] = [];
  #isStopping = false;

  private constructor(options: WorkerPoolOptions, events: WorkerPoolEvents) {
    this.#options = options;
    this.#events = events;
    const nativeGuard = nativeGuardMemory(options.numWorkers);
    this.#nativeGuard = nativeGuard;
    process.once('exit', () => keepWorkersOut(nativeGuard, EXIT_WAIT_MS));
  }

  /** Starts all workers and waits until every session is loaded. */
  static async start(options: WorkerPoolOptions, events: WorkerPoolEvents): Promise<WorkerPool> {
    const pool = new WorkerPool(options, events);
    await Promise.all(Array.from({ length: options.numWorkers }, (_, index) => pool.#startWorker(index)));
    return pool;
  }

  get numWaves(): number {
    return this.#options.numWorkers * this.#options.wavesPerWorker;
  }

  /** One per worker. */
  get originIds(): readonly number[] {
    return this.#originIds;
  }

  /** Gives every worker another origin id, under which the steps run from now on are; those in flight fail. */
  renewOrigins(): void {
    for (const [index, worker] of this.#workers.entries()) {
      const originId = randomOriginId();
      this.#originIds[index] = originId;
      const message: ToWorker = { kind: 'origin', originId };
      worker.postMessage(message);
    }
  }

  #startWorker(index: number): Promise<void> {
    const { wavesPerWorker, executorId, worker: shared } = this.#options;
    const originId = randomOriginId();
    this.#originIds[index] = originId;
    const workerData: WorkerOptions = {
      ...shared,
      workerId: `${executorId}-${index}`,
      workerIndex: index,
      nativeGuard: this.#nativeGuard,
      originId,
      numWaves: wavesPerWorker,
    };
    const worker = new Worker(new URL('./worker/entry.js', import.meta.url), { workerData });
    this.#workers.push(worker);
    return new Promise((resolve, reject) => {
      const die = (error: LaminaError): void => {
        reject(error);
        if (!this.#isStopping) this.#events.onDeath(error);
      };
      worker.on('error', (cause) => die(toLaminaError(cause)));
      worker.on('exit', () => {
        workerEnded(this.#nativeGuard, index);
        die(new LaminaError('internal', 'a worker thread ended'));
      });
      worker.on('message', (message: FromWorker) => {
        if (message.kind === 'ready') {
          if (message.linkFallbackReason !== null) this.#events.onLinkFallback(message.linkFallbackReason);
          resolve();
        } else if (message.kind === 'complaint')
          this.#events.onComplaint(new LaminaError(message.code, message.message));
        else if (message.kind === 'late') this.#events.onLate(message.shardIds);
        else if (message.kind === 'stepDone')
          this.#events.onStepDone(index * wavesPerWorker + message.waveIndex, message);
        else this.#events.onStepFailed(index * wavesPerWorker + message.waveIndex, message);
      });
    });
  }

  /** Runs a step on the wave; `step.waveIndex` must be `waveOnWorker(wave)`. */
  run(wave: number, step: StepRequest, transfer: ArrayBuffer[]): void {
    this.#workers[Math.floor(wave / this.#options.wavesPerWorker)]!.postMessage(step, transfer);
  }

  /** The step of the wave fails soon, or is done if it was about to be. */
  abort(wave: number, stepId: number): void {
    const message: ToWorker = { kind: 'abort', waveIndex: this.waveOnWorker(wave), stepId };
    this.#workers[Math.floor(wave / this.#options.wavesPerWorker)]!.postMessage(message);
  }

  waveOnWorker(wave: number): number {
    return wave % this.#options.wavesPerWorker;
  }

  broadcast(message: ToWorker): void {
    for (const worker of this.#workers) worker.postMessage(message);
  }

  async stop(): Promise<void> {
    this.#isStopping = true;
    const ended = this.#workers.map((worker) => new Promise((resolve) => worker.once('exit', resolve)));
    this.broadcast({ kind: 'stop' });
    const timer = setTimeout(() => this.#workers.forEach((worker) => void worker.terminate()), 2_000);
    await Promise.all(ended);
    clearTimeout(timer);
  }
}

const randomOriginId = (): number => randomBytes(4).readUInt32LE();

/** An error that crossed the thread boundary has lost its class but not its code. */
function toLaminaError(cause: unknown): LaminaError {
  if (
    cause instanceof Error &&
    'code' in cause &&
    (cause.code === 'model_invalid' || cause.code === 'nats_unreachable')
  ) {
    return new LaminaError(cause.code, cause.message, { cause });
  }
  return new LaminaError(
    'internal',
    `a worker thread died: ${cause instanceof Error ? cause.message : String(cause)}`,
    { cause },
  );
}
