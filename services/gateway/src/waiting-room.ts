/**
 * Owns which request goes into the work queue next. The queue itself is first come, first served and holds no more than a
 * few items that nobody works on; the others wait here, where priorities and fairness between clients can hold.
 *
 * Invariants
 * 1. A request is let in only while fewer than `maxWaitingWork` items wait for an executor, as far as one gateway can
 *    know: several gateways may exceed it by what they let in at the same moment.
 * 2. The queue is asked only while requests come or wait, once for many of them.
 * 3. Who waits is bounded by whoever lets them in here: the gateway's open requests, the durable prompts in hand.
 */
import type { WorkItem } from '@lamina/protocol';
import { asLaminaError, type LaminaError } from '@lamina/tensor';
import { type Entry, FairQueue } from './fair-queue.ts';

export interface Place {
  /** The request is in the queue, or will not be. */
  release(): void;
}

export interface Turn {
  /** Resolves with a place in the queue, or undefined after `withdraw`. Rejects when the queue cannot be asked. */
  readonly place: Promise<Place | undefined>;
  withdraw(): void;
}

interface Waiter extends Entry {
  readonly settle: (outcome: Place | undefined | LaminaError) => void;
}

const POLL_MS = 25;
/** How long a count of the queue is believed. */
const COUNT_MAX_AGE_MS = 100;
const MIN_RETRY_AFTER_MS = 1_000;
const MAX_RETRY_AFTER_MS = 60_000;

export class WaitingRoom {
  readonly #countWaiting: () => Promise<number>;
  readonly #maxWaitingWork: number;
  readonly #queue = new FairQueue<Waiter>();
  /** Let in, and not yet counted by the queue. */
  #numEntering = 0;
  #room = 0;
  #countedAtMs = Number.NEGATIVE_INFINITY;
  #isPumping = false;
  /** Mean time between two that were let in while others waited. */
  #intervalMs = 0;
  #lastAtMs: number | undefined;

  /** `countWaiting`: items in the work queue that wait for an executor. */
  constructor(countWaiting: () => Promise<number>, maxWaitingWork: number) {
    this.#countWaiting = countWaiting;
    this.#maxWaitingWork = maxWaitingWork;
  }

  get size(): number {
    return this.#queue.size;
  }

  /** How long those who wait now will keep the queue busy, as far as the past tells. */
  get retryAfterMs(): number {
    const busyMs = this.#queue.size * this.#intervalMs;
    return Math.round(Math.min(MAX_RETRY_AFTER_MS, Math.max(MIN_RETRY_AFTER_MS, busyMs)));
  }

  enter({ tokenIds, maxTokens, priority }: WorkItem, client: string): Turn {
    let settle: Waiter['settle'] = () => undefined;
    const place = new Promise<Place | undefined>((resolve, reject) => {
      settle = (outcome) => (outcome instanceof Error ? reject(outcome) : resolve(outcome));
    });
    const waiter: Waiter = { client, costTokens: tokenIds.length + maxTokens, priority, settle };
    this.#queue.push(waiter);
    this.#letIn();
    void this.#pump();
    return {
      place,
      withdraw: () => {
        this.#queue.remove(waiter);
        settle(undefined);
      },
    };
  }

  /** Waits for a place and submits; for requests that nobody can withdraw. */
  async through<T>(item: WorkItem, client: string, submit: (item: WorkItem) => Promise<T>): Promise<T> {
    const place = await this.enter(item, client).place;
    try {
      return await submit(item);
    } finally {
      place?.release();
    }
  }

  async #pump(): Promise<void> {
    if (this.#isPumping) return;
    this.#isPumping = true;
    while (this.#queue.size > 0) {
      try {
        const numWaiting = await this.#countWaiting();
        this.#room = this.#maxWaitingWork - numWaiting - this.#numEntering;
        this.#countedAtMs = performance.now();
        this.#letIn();
      } catch (cause) {
        const error = asLaminaError(cause);
        for (let waiter = this.#queue.shift(); waiter !== undefined; waiter = this.#queue.shift()) waiter.settle(error);
      }
      if (this.#queue.size > 0) await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
    this.#isPumping = false;
    this.#lastAtMs = undefined;
  }

  #letIn(): void {
    const nowMs = performance.now();
    if (nowMs - this.#countedAtMs > COUNT_MAX_AGE_MS) return;
    while (this.#room > 0) {
      const waiter = this.#queue.shift();
      if (waiter === undefined) return;
      this.#room--;
      this.#numEntering++;
      this.#measure(nowMs);
      waiter.settle({ release: () => this.#numEntering-- });
    }
  }

  #measure(nowMs: number): void {
    if (this.#lastAtMs !== undefined) this.#intervalMs += (nowMs - this.#lastAtMs - this.#intervalMs) / 16;
    this.#lastAtMs = nowMs;
  }
}
