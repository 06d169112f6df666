/**
 * Owns the end of a process whose workers compute: a thread that is ended inside ONNX Runtime aborts the whole process
 * (its binding throws when it can no longer call JavaScript), so an exit waits until every worker is outside.
 *
 * Invariants
 * 1. A worker says that it goes in before it looks whether the process ends; the process says that it ends before it looks
 *    whether somebody is in: one of the two sees the other.
 * 2. A worker that finds the process ending stays where it is.
 */

/** [0]: the process ends. [1 + worker]: that worker is inside. */
export type NativeGuardMemory = SharedArrayBuffer;

export function nativeGuardMemory(numWorkers: number): NativeGuardMemory {
  return new SharedArrayBuffer((1 + numWorkers) * Int32Array.BYTES_PER_ELEMENT);
}

/** Lets no worker in any more and waits until all are out, `timeoutMs` at most. */
export function keepWorkersOut(memory: NativeGuardMemory, timeoutMs: number): void {
  const cells = new Int32Array(memory);
  Atomics.store(cells, 0, 1);
  const deadlineMs = performance.now() + timeoutMs;
  for (let worker = 1; worker < cells.length; worker++)
    Atomics.wait(cells, worker, 1, Math.max(0, deadlineMs - performance.now()));
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
    this.#numInside++;
    Atomics.store(this.#cells, this.#cell, 1);
    if (Atomics.load(this.#cells, 0) === 1) this.#stay();
  }

  leave(): void {
    if (--this.#numInside > 0) return;
    Atomics.store(this.#cells, this.#cell, 0);
    Atomics.notify(this.#cells, this.#cell);
  }

  #stay(): void {
    Atomics.store(this.#cells, this.#cell, 0);
    Atomics.notify(this.#cells, this.#cell);
    Atomics.wait(this.#cells, 0, 1);
  }
}
