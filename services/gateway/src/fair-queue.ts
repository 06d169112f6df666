/**
 * Owns the order in which waiting requests of many clients get a place (start-time fair queueing).
 *
 * Invariants
 * 1. Next is the client that has had least, counted in tokens; a client that had nothing waiting saves up no claim.
 * 2. Of one client's requests the highest priority is first, then the one that came first: priority is no claim against others.
 */

export interface Entry {
  readonly client: string;
  /** Prompt tokens and max_tokens: what it may cost. */
  readonly costTokens: number;
  readonly priority: number;
}

const MAX_REMEMBERED_CLIENTS = 10_000;

interface Line<T extends Entry> {
  readonly entries: T[];
  /** Tokens that its client had been given when its turn began, on the scale of #virtualTokens. */
  startTokens: number;
}

export class FairQueue<T extends Entry> {
  /** Clients with something waiting. */
  readonly #lines = new Map<string, Line<T>>();
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
      line = { entries: [], startTokens };
      this.#lines.set(entry.client, line);
    }
    const after = line.entries.findLastIndex(({ priority }) => priority >= entry.priority);
    line.entries.splice(after + 1, 0, entry);
    this.#size++;
  }

  shift(): T | undefined {
    let client: string | undefined;
    let next: Line<T> | undefined;
    for (const [name, line] of this.#lines)
      if (next === undefined || line.startTokens < next.startTokens) [client, next] = [name, line];
    const entry = next?.entries.shift();
    if (client === undefined || next === undefined || entry === undefined) return undefined;
    this.#virtualTokens = next.startTokens;
    next.startTokens += entry.costTokens;
    this.#servedTokens.delete(client);
    this.#servedTokens.set(client, next.startTokens);
    for (const oldest of this.#servedTokens.keys()) {
      if (this.#servedTokens.size <= MAX_REMEMBERED_CLIENTS) break;
      this.#servedTokens.delete(oldest);
    }
    this.#removed(client, next);
    return entry;
  }

  /** Takes an entry out that no longer waits. */
  remove(entry: T): void {
    const line = this.#lines.get(entry.client);
    const at = line?.entries.indexOf(entry) ?? -1;
    if (line === undefined || at < 0) return;
    line.entries.splice(at, 1);
    this.#removed(entry.client, line);
  }

  #removed(client: string, line: Line<T>): void {
    this.#size--;
    if (line.entries.length === 0) this.#lines.delete(client);
    if (this.#size > 0) return;
    this.#servedTokens.clear();
    this.#virtualTokens = 0;
  }
}
