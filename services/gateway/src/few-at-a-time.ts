/**
 * Owns running tasks a few at a time; the others wait in the order in which they came.
 *
 * Invariants
 * 1. A task that fails fails its caller alone; the next begins.
 * 2. What waits is bounded by the callers: each waits for its own.
 */
export class FewAtATime {
  readonly #max: number;
  #numRunning = 0;
  readonly #waiting: (() => void)[] = [];

  constructor(max: number) {
    this.#max = max;
  }

  async run<T>(task: () => Promise<T>): Promise<T> {
    // Who ends hands its place on, so that nobody who comes in between takes it.
    if (this.#numRunning >= this.#max) await new Promise<void>((resolve) => this.#waiting.push(resolve));
    else this.#numRunning++;
    try {
      return await task();
    } finally {
      const next = this.#waiting.shift();
      if (next === undefined) this.#numRunning--;
      else next();
    }
  }
}
