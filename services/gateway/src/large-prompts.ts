/**
 * Owns what is remembered of durable prompts that need more KV than there is: each comes back every few seconds, maybe for days.
 *
 * Invariants
 * 1. What is remembered is small, whatever the prompt is; of more than MAX_REMEMBERED the oldest are forgotten, which costs
 *    tokenizing them once more.
 * 2. A prompt of a new LAMINA_PROMPTS is not taken for the one that had its sequence before.
 */
import type { DurablePrompt } from '@lamina/bus';
import type { PromptTerms } from './read-prompt.ts';

const MAX_REMEMBERED = 10_000;

export interface LargePrompt extends PromptTerms {
  readonly storedAtMs: number;
  /** Of prompt and answer, at least. */
  readonly neededTokens: number;
}

type Position = Pick<DurablePrompt, 'sequence' | 'storedAtMs'>;

export class LargePrompts {
  readonly #bySequence = new Map<number, LargePrompt>();

  of({ sequence, storedAtMs }: Position): LargePrompt | undefined {
    const large = this.#bySequence.get(sequence);
    return large?.storedAtMs === storedAtMs ? large : undefined;
  }

  add({ sequence, storedAtMs }: Position, { id, deadlineAtMs }: PromptTerms, neededTokens: number): void {
    this.#bySequence.set(sequence, { id, deadlineAtMs, storedAtMs, neededTokens });
    if (this.#bySequence.size <= MAX_REMEMBERED) return;
    const [oldest] = this.#bySequence.keys();
    if (oldest !== undefined) this.#bySequence.delete(oldest);
  }

  delete({ sequence }: Pick<Position, 'sequence'>): void {
    this.#bySequence.delete(sequence);
  }
}
