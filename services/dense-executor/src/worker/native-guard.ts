/**
 * Owns the end of a process whose workers compute: a thread that is ended inside ONNX Runtime aborts the whole process
 * (its binding throws when it can no longer call JavaScript), so an exit waits until every worker is outside.
 *
 * Invariants
 * 1. A worker says that it goes in before it looks whether the process ends; the process says that it ends before it looks
 *    whether somebody is in: one of the two sees the other.
 * 2. A worker that finds the process ending stays where it is.
 * 3. A worker that loads the library or its model is waited for, minutes if it must be: the process cannot end before anyway,
 *    because Node waits for its threads, and a load is one native call. One whose thread has ended is outside.
 */

/** [0]: the process ends. [1 + worker]: where that worker is. */
export type NativeGuardMemory = SharedArrayBuffer;

const OUTSIDE = 0;
const INSIDE = 1;
const LOADING = 2;
/** Longer than any load; an exit must not wait for ever. */
const MAX_LOADING_MS = 300_000;

export function nativeGuardMemory(numWorkers: number): NativeGuardMemory {
  return new SharedArrayBuffer((1 + numWorkers) * Int32Array.BYTES_PER_ELEMENT);
}

/** The worker's thread has ended, wherever it was. */
export function workerEnded(memory: NativeGuardMemory, workerIndex: number): void {
  Atomics.store(new Int32Array(memory), 1 + workerIndex, OUTSIDE);
}

/** Lets no worker in any more and waits until all are out: `timeoutMs` at most for what is no load. */
export function keepWorkersOut(memory: NativeGuardMemory, timeoutMs: number): void {
  const cells = new Int32Array(memory);
  Atomics.store(cells, 0, 1);
  for (let worker = 1; worker < cells.length; worker++) Atomics.wait(cells, worker, LOADING, MAX_LOADING_MS);
  const deadlineMs = performance.now() + timeoutMs;
  for (let worker = 1; worker < cells.length; worker++)
    Atomics.wait(cells, worker, INSIDE, Math.max(0, deadlineMs - performance.now()));
}

/** A worker's side. */
export class NativeGuard {
  readonly #cells: Int32Array<SharedArrayBuffer>;
  readonly #cell: number;
  /** Calls that are under way: those of all waves of this thread. */
  #numInside = 0;

  constructor(memory: NativeGuardMemory, workerIndex: number) {
    this.#cells = new Int32Array(memory);
    this.#cell = 1 + workerIndex;
  }

  enter(): void {
    this.#goIn(INSIDE);
  }

  /** As `enter`, for the load of the library or of a model; nothing else is inside meanwhile. */
  enterLoading(): void {
    this.#goIn(LOADING);
  }

  #goIn(where: number): void {
    this.#numInside++;
    Atomics.store(this.#cells, this.#cell, where);
    if (Atomics.load(this.#cells, 0) === 1) this.#stay();
  }

  leave(): void {
    if (--this.#numInside > 0) return;
    Atomics.store(this.#cells, this.#cell, OUTSIDE);
    Atomics.notify(this.#cells, this.#cell);
  }

  #stay(): void {
    Atomics.store(this.#cells, this.#cell, OUTSIDE);
    Atomics.notify(this.#cells, this.#cell);
    Atomics.wait(this.#cells, 0, 1);
  }
}
