/**
 * Owns the requests that are on this executor, and sending events to their actors.
 *
 * Invariants
 * 1. What a request may do next is said by its actor; nobody else sets its phase.
 * 2. The time that state machines take is measured here, in one place.
 */
import type { RequestEvent } from './request/machine.ts';
import type { GenerationRequest } from './request/request.ts';
import { Clients } from './scheduling/clients.ts';

export class RunningRequests {
  readonly clients = new Clients();
  readonly #byId = new Map<string, GenerationRequest>();
  /** Requests that another executor began and whose stored part is being read. */
  #numArriving = 0;
  #machineMs = 0;
  #onRemoved: (() => void)[] = [];

  get size(): number {
    return this.#byId.size;
  }

  get(requestId: string): GenerationRequest | undefined {
    return this.#byId.get(requestId);
  }

  /** In the order of arrival. */
  all(): IterableIterator<GenerationRequest> {
    return this.#byId.values();
  }

  add(request: GenerationRequest): void {
    this.#byId.set(request.id, request);
  }

  remove(request: GenerationRequest): void {
    if (this.#byId.delete(request.id)) this.clients.leave(request.client, request.item.client);
    this.#wake();
  }

  /** A request that will be added later takes its place now. */
  arriving(): void {
    this.#numArriving++;
  }

  /** It was added, or will not be. */
  arrived(): void {
    this.#numArriving--;
    this.#wake();
  }

  #wake(): void {
    const waiting = this.#onRemoved;
    this.#onRemoved = [];
    for (const resolve of waiting) resolve();
  }

  /** Resolves when fewer than `limit` requests are here or about to be. */
  async below(limit: number): Promise<void> {
    while (this.#byId.size + this.#numArriving >= limit)
      await new Promise<void>((resolve) => this.#onRemoved.push(resolve));
  }

  send(request: GenerationRequest, event: RequestEvent): void {
    const startedMs = performance.now();
    request.actor?.send(event);
    this.#machineMs += performance.now() - startedMs;
  }

  /** Milliseconds spent in state machines since the last call. */
  takeMachineMs(): number {
    const machineMs = this.#machineMs;
    this.#machineMs = 0;
    return machineMs;
  }
}
