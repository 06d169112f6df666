/**
 * Owns the durable prompts that wait for a place in hand, and which of them is next.
 *
 * Invariants
 * 1. Next is the client that has been given fewest places; its prompts come in the order of the stream.
 * 2. Of a prompt only its position and its client are here, a few hundred bytes: all that LAMINA_PROMPTS takes may wait, so
 *    nobody's prompt is hidden behind another client's, however many that has.
 * 3. Each is kept from other gateways for about as long as it has to wait anyway: 5 s, and 12 ms for each that is before it.
 *    So what a gateway that dies had is offered to others in the order in which it would have had its places, and from the
 *    first 8 s on some 80 a second. To keep 10,000 takes some 500 messages a second.
 */
import type { DurablePrompt, PromptAside } from '@lamina/bus';
import { type Entry, FairQueue } from './fair-queue.ts';

export interface WaitingPrompt extends Entry {
  aside: PromptAside;
  /** Until then nobody else is offered it, by performance.now. */
  keptUntilMs: number;
}

const MIN_KEEP_MS = 5_000;
const KEEP_MS_PER_PLACE = 12;
const RENEWAL_INTERVAL_MS = 1_000;
/** What is kept for less than this part of its time is kept anew. */
const MIN_REST = 0.5;
/** So is what is kept for longer, since others before it got their places sooner, or its client has waited for fewer. */
const MAX_REST = 1.5;

const keepMsOf = (numBefore: number): number => MIN_KEEP_MS + numBefore * KEEP_MS_PER_PLACE;

export class WaitingPrompts {
  readonly #queue = new FairQueue<WaitingPrompt>();
  readonly #bySequence = new Map<number, WaitingPrompt>();
  #renewal: NodeJS.Timeout | undefined;

  get size(): number {
    return this.#bySequence.size;
  }

  add(prompt: DurablePrompt, client: string): void {
    const keepMs = keepMsOf(this.size);
    const aside = prompt.setAside(keepMs);
    const keptUntilMs = performance.now() + keepMs;
    const known = this.#bySequence.get(prompt.sequence);
    // If it was offered once more, the server hears about the later offer.
    if (known !== undefined) Object.assign(known, { aside, keptUntilMs });
    else this.addAgain({ aside, client, costTokens: 1, priority: -aside.sequence, keptUntilMs });
  }

  /** One that was next and could not be opened. */
  addAgain(entry: WaitingPrompt): void {
    const { sequence } = entry.aside;
    if (this.#bySequence.has(sequence)) return;
    this.#bySequence.set(sequence, entry);
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
    this.#queue.visit((entry, numBefore) => {
      const keepMs = keepMsOf(numBefore);
      const restMs = entry.keptUntilMs - nowMs;
      if (restMs > keepMs * MIN_REST && restMs < keepMs * MAX_REST) return;
      entry.aside.keep(keepMs);
      entry.keptUntilMs = nowMs + keepMs;
    });
  }
}
