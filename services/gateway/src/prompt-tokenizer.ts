/**
 * Owns where a prompt is tokenized: a short one on the event loop, a long one on a worker thread.
 *
 * Invariants
 * 1. No prompt holds the event loop up longer than `INLINE_CHARACTERS` take.
 * 2. Huge prompts have a thread of their own: they never delay a middle-sized one. Cutting them up instead would be
 *    exact for some tokenizers only, and a second thread costs nothing while there is no huge prompt.
 * 3. What waits is bounded: 256 middle-sized and 16 huge prompts, each some 64 MiB at most.
 */
import { charactersOf, type EncodePrompt, type PromptText } from './prompt-encoder.ts';
import { PromptThread, type PromptThreadOptions, type RequestEnd } from './prompt-thread.ts';

/**
 * Measured by `node services/gateway/test/prompt-tokenizer-bench.mjs` on two busy cores (medians): 1,024 characters take
 * 0.9 ms inline and 2.2 ms on a thread, 2,048 take 2.1 and 5.7, 4,096 take 5.4 and 3.8. Below the crossover a thread
 * would only make the prompt later, and the event loop is held up for some 2 ms at most.
 */
export const INLINE_CHARACTERS = 2_048;
/** A quarter of a second or so: what one middle-sized prompt may have to wait for another. */
const HUGE_CHARACTERS = 256 * 1024;
const MAX_WAITING_MIDDLE = 256;
const MAX_WAITING_HUGE = 16;
const WARM_AFTER_PROMPTS = 2;

export class PromptTokenizer {
  readonly #encodeInline: EncodePrompt;
  readonly #middle: PromptThread;
  readonly #huge: PromptThread;
  #numInline = 0;

  constructor(encodeInline: EncodePrompt, options: Omit<PromptThreadOptions, 'maxWaiting'>) {
    this.#encodeInline = encodeInline;
    this.#middle = new PromptThread({ ...options, maxWaiting: MAX_WAITING_MIDDLE });
    this.#huge = new PromptThread({ ...options, maxWaiting: MAX_WAITING_HUGE });
  }

  /** @throws LaminaError what the encoder throws, `overloaded`, `deadline_exceeded`, `unavailable` */
  async encode(prompt: PromptText, end: RequestEnd = {}): Promise<number[]> {
    const characters = charactersOf(prompt);
    if (characters <= INLINE_CHARACTERS) {
      // A gateway that is in use: the first long prompt need not wait for a thread to start.
      if (++this.#numInline === WARM_AFTER_PROMPTS) this.#middle.warmUp();
      return this.#encodeInline(prompt);
    }
    const thread = characters <= HUGE_CHARACTERS ? this.#middle : this.#huge;
    return thread.encode(prompt, characters, end);
  }

  /** Ends the threads; what waits or runs is refused as unavailable. */
  async close(): Promise<void> {
    await Promise.all([this.#middle.close(), this.#huge.close()]);
  }
}
