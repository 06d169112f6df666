/**
 * Owns the durable prompts that wait for a place in hand, and which of them is next.
 *
 * Invariants
 * 1. Next is the client that has been given fewest places; its prompts come in the order of the stream.
 * 2. Of a prompt only its position and its client are here, a few hundred bytes: all that LAMINA_PROMPTS takes may wait, so
 *    nobody's prompt is hidden behind another client's, however many that has.
 * 3. What waits is kept from other gateways with at most 200 messages a second: the more wait, the longer each is kept. So
 *    one that dies holds n prompts up for 5 s or n * 10 ms, whichever is longer.
 */
import type { DurablePrompt, PromptAside } from '@lamina/bus';
import { type Entry, FairQueue } from './fair-queue.ts';

export interface WaitingPrompt extends Entry {
  aside: PromptAside;
  /** When it is to be kept for longer, by performance.now. */
  renewAtMs: number;
}

const MIN_KEEP_MS = 5_000;
const KEEP_MS_PER_WAITING = 10;
const RENEWAL_INTERVAL_MS = 1_000;

export class WaitingPrompts {
  readonly #queue = new FairQueue<WaitingPrompt>();
  readonly #bySequence = new Map<number, WaitingPrompt>();
  #renewal: NodeJS.Timeout | undefined;

  get size(): number {
    return this.#bySequence.size;
  }

  get #keepMs(): number {
    return Math.max(MIN_KEEP_MS, this.size * KEEP_MS_PER_WAITING);
  }

  add(prompt: DurablePrompt, client: string): void {
    const keepMs = this.#keepMs;
    const aside = prompt.setAside(keepMs);
    const known = this.#bySequence.get(prompt.sequence);
    if (known === undefined) this.addAgain(aside, client);
    // It was offered once more: the server hears about the later offer.
    else known.aside = aside;
  }

  /** One that was next and could not be opened. */
  addAgain(aside: PromptAside, client: string): void {
    const renewAtMs = performance.now() + this.#keepMs / 2;
    const entry = { aside, client, costTokens: 1, priority: -aside.sequence, renewAtMs };
    this.#bySequence.set(aside.sequence, entry);
    this.#queue.push(entry);
    this.#renewal ??= setInterval(() => this.#renew(), RENEWAL_INTERVAL_MS);
  }

  next(): WaitingPrompt | undefined {
    const entry = this.#queue.shift();
    if (entry === undefined) return undefined;
    this.#bySequence.delete(entry.aside.sequence);
    if (this.size === 0) this.#rest();
    return entry;
  }

  /** Hands all back. */
  putBack(): void {
    for (let entry = this.next(); entry !== undefined; entry = this.next()) entry.aside.putBack();
  }

  #rest(): void {
    clearInterval(this.#renewal);
    this.#renewal = undefined;
  }

  #renew(): void {
    const nowMs = performance.now();
    const keepMs = this.#keepMs;
    for (const entry of this.#bySequence.values()) {
      if (entry.renewAtMs > nowMs) continue;
      entry.aside.keep(keepMs);
      entry.renewAtMs = nowMs + keepMs / 2;
    }
  }
}
