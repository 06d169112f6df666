/**
 * Owns one worker thread that tokenizes, and the queue before it.
 *
 * Invariants
 * 1. First come, first served; the thread has at most one prompt. A waiting prompt whose request ends leaves the queue.
 * 2. The thread starts with the first prompt, or `warmUp`, and ends after `IDLE_MS` without one: an idle gateway pays nothing.
 * 3. A prompt that runs longer than its limit is refused and its thread is ended; so is one that exhausts its memory. A
 *    thread that dies otherwise fails the prompt it had. The next prompt starts a new thread.
 * 4. Every promise settles; after `close` at once.
 */
import { Worker } from 'node:worker_threads';
import { LaminaError } from '@lamina/tensor';
import type { PromptText } from './prompt-encoder.ts';
import type { FromPromptWorker, PromptWorkerOptions } from './prompt-worker-messages.ts';

export interface RequestEnd {
  /** Aborted when the request ends. */
  readonly signal?: AbortSignal | undefined;
  readonly deadlineAtMs?: number | undefined;
}

export interface PromptThreadOptions {
  readonly worker: PromptWorkerOptions;
  readonly maxWaiting: number;
  /** From the moment that the thread has the prompt. Default `defaultTimeLimitMs`. */
  readonly timeLimitMs?: ((characters: number) => number) | undefined;
  /** MiB of the thread's heap. Default 768. */
  readonly maxHeapMiB?: number | undefined;
}

interface Job {
  readonly prompt: PromptText;
  readonly characters: number;
  readonly settle: (outcome: number[] | LaminaError) => void;
}

/** From src and from dist alike, the compiled file is meant. */
const ENTRY = new URL('../dist/prompt-worker.js', import.meta.url);
const IDLE_MS = 60_000;
const START_LIMIT_MS = 60_000;
/** Text takes 1 to 4 us per character, also on busy cores; megabytes without any boundary take longer, and are refused. */
const LIMIT_BASE_MS = 5_000;
const LIMIT_PER_CHARACTER_MS = 0.01;
/** 4 MiB of letters without a boundary, the hungriest text, took 500 MiB. */
const MAX_HEAP_MIB = 768;
const MAX_TIMER_MS = 2 ** 31 - 1;

const defaultTimeLimitMs = (characters: number): number => LIMIT_BASE_MS + characters * LIMIT_PER_CHARACTER_MS;

export class PromptThread {
  readonly #options: PromptThreadOptions;
  readonly #waiting: Job[] = [];
  #running: Job | undefined;
  #worker: Worker | undefined;
  #isReady = false;
  #isClosed = false;
  /** Start limit, time limit or idle time, whichever applies. */
  #timer: NodeJS.Timeout | undefined;

  constructor(options: PromptThreadOptions) {
    this.#options = options;
  }

  /** @throws LaminaError what the encoder throws, `overloaded`, `deadline_exceeded`, `unavailable` */
  encode(prompt: PromptText, characters: number, { signal, deadlineAtMs }: RequestEnd): Promise<number[]> {
    return new Promise((resolve, reject) => {
      const { maxWaiting } = this.#options;
      if (this.#isClosed) throw new LaminaError('unavailable', 'the gateway shuts down; retry later');
      if (signal?.aborted === true) throw requestEnded();
      if (this.#waiting.length >= maxWaiting) {
        throw new LaminaError('overloaded', `${maxWaiting} long prompts wait to be tokenized already; retry later`);
      }
      let deadline: NodeJS.Timeout | undefined;
      const job: Job = {
        prompt,
        characters,
        settle: (outcome) => {
          clearTimeout(deadline);
          signal?.removeEventListener('abort', onAbort);
          if (Array.isArray(outcome)) resolve(outcome);
          else reject(outcome);
        },
      };
      const leave = (error: LaminaError): void => {
        const place = this.#waiting.indexOf(job);
        if (place >= 0) this.#waiting.splice(place, 1);
        job.settle(error);
      };
      const onAbort = (): void => leave(requestEnded());
      signal?.addEventListener('abort', onAbort, { once: true });
      if (deadlineAtMs !== undefined) {
        const remainingMs = Math.min(Math.max(0, deadlineAtMs - Date.now()), MAX_TIMER_MS);
        const error = new LaminaError('deadline_exceeded', 'deadline_ms passed before the prompt was tokenized');
        deadline = setTimeout(leave, remainingMs, error);
      }
      this.#waiting.push(job);
      this.#advance();
    });
  }

  /** Starts the thread if it does not run, so that the next prompt need not wait for that. */
  warmUp(): void {
    if (!this.#isClosed) this.#worker ??= this.#startWorker();
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    this.#rejectAll(new LaminaError('unavailable', 'the gateway shuts down; retry later'));
    await this.#endWorker();
  }

  #advance(): void {
    const next = this.#waiting[0];
    if (this.#running !== undefined) return;
    if (next === undefined) {
      this.#setTimer(IDLE_MS, () => void this.#endWorker());
      return;
    }
    this.#worker ??= this.#startWorker();
    if (!this.#isReady) return;
    this.#waiting.shift();
    this.#running = next;
    const limitMs = (this.#options.timeLimitMs ?? defaultTimeLimitMs)(next.characters);
    this.#setTimer(limitMs, () => {
      const problem = `the prompt took longer than ${Math.ceil(limitMs / 1000)} s to tokenize`;
      this.#lose(
        new LaminaError('invalid_request', `${problem}; shorten it, or break up its longest runs of one kind`),
      );
    });
    this.#worker.postMessage(next.prompt);
  }

  #startWorker(): Worker {
    const { worker: workerData, maxHeapMiB } = this.#options;
    const resourceLimits = { maxOldGenerationSizeMb: maxHeapMiB ?? MAX_HEAP_MIB };
    const worker = new Worker(ENTRY, { workerData, resourceLimits });
    worker.on('message', (message: FromPromptWorker) => {
      if (this.#worker === worker) this.#receive(message);
    });
    worker.on('error', (cause) => {
      if (this.#worker === worker) this.#lose(errorOfDeath(cause));
    });
    worker.on('exit', () => {
      if (this.#worker === worker) this.#lose(errorOfDeath('it ended'));
    });
    this.#setTimer(START_LIMIT_MS, () => this.#lose(errorOfDeath('it did not start')));
    return worker;
  }

  #receive(message: FromPromptWorker): void {
    if (message.kind === 'ready') {
      this.#isReady = true;
    } else {
      const job = this.#running;
      this.#running = undefined;
      if (message.kind === 'encoded') job?.settle(Array.from(message.tokenIds));
      else job?.settle(new LaminaError(message.code, message.message, { diagnostics: message.diagnostics }));
    }
    this.#advance();
  }

  /** Gives the thread up. A thread that could not even start fails every prompt that waits for it. */
  #lose(error: LaminaError): void {
    if (this.#isReady) this.#running?.settle(error);
    else this.#rejectAll(error);
    this.#running = undefined;
    void this.#endWorker();
    this.#advance();
  }

  #rejectAll(error: LaminaError): void {
    this.#running?.settle(error);
    this.#running = undefined;
    for (const job of this.#waiting.splice(0)) job.settle(error);
  }

  async #endWorker(): Promise<void> {
    clearTimeout(this.#timer);
    const worker = this.#worker;
    this.#worker = undefined;
    this.#isReady = false;
    await worker?.terminate();
  }

  #setTimer(delayMs: number, run: () => void): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(run, delayMs);
  }
}

function requestEnded(): LaminaError {
  return new LaminaError('unavailable', 'the request ended before its prompt was tokenized');
}

function errorOfDeath(cause: unknown): LaminaError {
  if (cause instanceof Error && 'code' in cause && cause.code === 'ERR_WORKER_OUT_OF_MEMORY') {
    return new LaminaError('invalid_request', 'the prompt takes too much memory to tokenize; shorten it', { cause });
  }
  const reason = cause instanceof Error ? cause.message : String(cause);
  return new LaminaError('unavailable', `the thread that tokenizes prompts was lost (${reason}); retry`, { cause });
}
