/**
 * Owns the order in which waiting requests of many clients get a place (start-time fair queueing).
 *
 * Invariants
 * 1. Next is the client that has had least, counted in tokens; a client that had nothing waiting saves up no claim.
 * 2. Of one client's requests the highest priority is first, then the one that came first: priority is no claim against others.
 * 3. Whoever is next is found in the logarithm of how many clients wait: a client may give itself any number of names.
 */
import { LeastFirst, type Placed } from './least-first.ts';

export interface Entry {
  readonly client: string;
  /** Prompt tokens and max_tokens: what it may cost. */
  readonly costTokens: number;
  readonly priority: number;
}

/** As many that were served last, and at most twice as many. */
const MIN_REMEMBERED_CLIENTS = 10_000;

/** So many are taken before those that wait are moved up: that costs time with each that waits. */
const MAX_TAKEN = 256;

/** What one client has waiting. */
class Line<T extends Entry> implements Placed {
  readonly client: string;
  /** Counts lines: of two that have had the same, the one that waits longer is first. */
  readonly number: number;
  /** Tokens that its client had been given when its turn began, on the scale of #virtualTokens. */
  startTokens: number;
  place = -1;
  readonly #entries: T[] = [];
  #numTaken = 0;

  constructor(client: string, number: number, startTokens: number) {
    this.client = client;
    this.number = number;
    this.startTokens = startTokens;
  }

  get size(): number {
    return this.#entries.length - this.#numTaken;
  }

  at(turn: number): T | undefined {
    return this.#entries[this.#numTaken + turn];
  }

  push(entry: T): void {
    const after = this.#entries.findLastIndex(({ priority }) => priority >= entry.priority);
    this.#entries.splice(Math.max(after + 1, this.#numTaken), 0, entry);
  }

  shift(): T | undefined {
    const entry = this.at(0);
    if (entry !== undefined) this.#numTaken++;
    if (this.#numTaken === MAX_TAKEN) this.#entries.splice(0, this.#numTaken);
    this.#numTaken %= MAX_TAKEN;
    return entry;
  }

  /** Whether it was there. */
  remove(entry: T): boolean {
    const at = this.#entries.indexOf(entry, this.#numTaken);
    if (at >= 0) this.#entries.splice(at, 1);
    return at >= 0;
  }
}

export class FairQueue<T extends Entry> {
  /** Clients with something waiting. */
  readonly #lines = new Map<string, Line<T>>();
  readonly #byTokens = new LeastFirst<Line<T>>(
    (one, other) =>
      one.startTokens < other.startTokens || (one.startTokens === other.startTokens && one.number < other.number),
  );
  #numLines = 0;
  /** Where clients stood that had something waiting a moment ago; kept while anything waits. */
  readonly #servedTokens = new Map<string, number>();
  #virtualTokens = 0;
  #size = 0;

  get size(): number {
    return this.#size;
  }

  push(entry: T): void {
    let line = this.#lines.get(entry.client);
    if (line === undefined) {
      const startTokens = Math.max(this.#virtualTokens, this.#servedTokens.get(entry.client) ?? 0);
      line = new Line(entry.client, this.#numLines++, startTokens);
      this.#lines.set(entry.client, line);
      this.#byTokens.add(line);
    }
    line.push(entry);
    this.#size++;
  }

  shift(): T | undefined {
    const next = this.#byTokens.least;
    const entry = next?.shift();
    if (next === undefined || entry === undefined) return undefined;
    this.#virtualTokens = next.startTokens;
    next.startTokens += entry.costTokens;
    this.#byTokens.moved(next);
    this.#remember(next);
    this.#removed(next);
    return entry;
  }

  /** Takes an entry out that no longer waits. */
  remove(entry: T): void {
    const line = this.#lines.get(entry.client);
    if (line?.remove(entry)) this.#removed(line);
  }

  /** Visits all, each with the number of those that get a place before it if none comes and all cost the same. */
  visit(see: (entry: T, numBefore: number) => void): void {
    let lines = [...this.#lines.values()];
    let numBefore = 0;
    for (let turn = 0; lines.length > 0; turn++) {
      for (const line of lines) {
        const entry = line.at(turn);
        if (entry !== undefined) see(entry, numBefore++);
      }
      lines = lines.filter(({ size }) => size > turn + 1);
    }
  }

  #remember({ client, startTokens }: Line<T>): void {
    this.#servedTokens.delete(client);
    this.#servedTokens.set(client, startTokens);
    // Many at once: to find the first key of a map takes longer the more were deleted before it.
    if (this.#servedTokens.size < 2 * MIN_REMEMBERED_CLIENTS) return;
    for (const oldest of this.#servedTokens.keys()) {
      this.#servedTokens.delete(oldest);
      if (this.#servedTokens.size <= MIN_REMEMBERED_CLIENTS) return;
    }
  }

  #removed(line: Line<T>): void {
    this.#size--;
    if (line.size === 0) {
      this.#lines.delete(line.client);
      this.#byTokens.remove(line);
    }
    if (this.#size > 0) return;
    this.#servedTokens.clear();
    this.#virtualTokens = 0;
  }
}
