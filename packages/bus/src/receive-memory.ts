/**
 * Owns the memory that a native link receives into.
 *
 * Invariants
 * 1. Memory that somebody holds is not received into again before all have let it go.
 * 2. At most MAX_FREE memories wait to be used again; they are as large as the largest message was.
 */

/** A step's messages of one request fit several times; a message of max_payload (1 MiB) makes it grow. */
const MEMORY_BYTES = 256 * 1024;
const MAX_FREE = 4;

export class ReceiveMemory {
  readonly bytes: Buffer;
  readonly #onFree: (memory: ReceiveMemory) => void;
  #numHolds = 0;

  constructor(numBytes: number, onFree: (memory: ReceiveMemory) => void) {
    this.bytes = Buffer.allocUnsafeSlow(numBytes);
    this.#onFree = onFree;
  }

  hold(): void {
    this.#numHolds++;
  }

  release(): void {
    if (--this.#numHolds === 0) this.#onFree(this);
  }

  get isHeld(): boolean {
    return this.#numHolds > 0;
  }
}

export class ReceiveMemories {
  readonly #free: ReceiveMemory[] = [];
  readonly #onFree = (memory: ReceiveMemory): void => {
    if (memory !== this.#current && this.#free.length < MAX_FREE) this.#free.push(memory);
  };
  #current: ReceiveMemory | undefined;

  /** What is received into; undefined before the first. */
  get current(): ReceiveMemory | undefined {
    return this.#current;
  }

  /** Other memory than the current one, which is free when nobody holds it. */
  next(minBytes: number): ReceiveMemory {
    const former = this.#current;
    const at = this.#free.findIndex(({ bytes }) => bytes.length >= minBytes);
    const [kept] = at < 0 ? [] : this.#free.splice(at, 1);
    this.#current = kept ?? new ReceiveMemory(Math.max(MEMORY_BYTES, minBytes + MEMORY_BYTES / 4), this.#onFree);
    // Messages have grown: what is too small for them now would only lie about.
    if (at < 0) this.#free.length = 0;
    if (former !== undefined && !former.isHeld) this.#onFree(former);
    return this.#current;
  }
}
