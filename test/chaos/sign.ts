/** Owns the signs by which a cluster shows that it has noticed a fault: when the first of them came. */
export class Sign {
  readonly #startedMs = performance.now();
  readonly #seen: Promise<number>;
  readonly #stop: () => void;

  /** @param watch Calls back when the sign is seen; returns how to stop watching. */
  constructor(watch: (see: () => void) => (() => void) | undefined) {
    let see = (): void => undefined;
    this.#seen = new Promise((resolve) => {
      see = () => resolve(performance.now() - this.#startedMs);
    });
    const stop = watch(see);
    this.#stop = () => stop?.();
  }

  /** Milliseconds from the start of the watch to the first sign; undefined if there is none within `timeoutMs` from now. */
  async within(timeoutMs: number): Promise<number | undefined> {
    let timer: NodeJS.Timeout | undefined;
    const tooLate = new Promise<undefined>((resolve) => {
      timer = setTimeout(() => resolve(undefined), timeoutMs);
    });
    try {
      return await Promise.race([this.#seen, tooLate]);
    } finally {
      clearTimeout(timer);
      this.#stop();
    }
  }
}
