/**
 * Owns reading what is stored of an answer, tokens that were stored twice included, while nats-server comes and goes.
 *
 * Invariants
 * 1. What could not be read just now is asked for again, as long as anybody waits for the answer at all.
 */
import { type Bus, type Subscription, TokenStream } from '@lamina/bus';
import { decodeTokens, type TokenMessage } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import { sleep } from './requests.ts';

const RETRY_MS = 100;
const READ_ATTEMPT_MS = 5_000;

export class StoredAnswers {
  readonly #stream: TokenStream;

  constructor(bus: Bus) {
    this.#stream = new TokenStream(bus, () => undefined);
  }

  /** Messages of an answer as they are heard. */
  follow(id: string, onToken: (message: TokenMessage) => void): Subscription {
    return this.#stream.follow(id, ({ data }) => decodeTokens(data).forEach(onToken));
  }

  /** Whether the whole answer is known to be stored. */
  async has(id: string): Promise<boolean> {
    const end = await this.#stream.endOf(id).catch(() => undefined);
    return end?.isComplete === true;
  }

  /** Everything that is stored; nothing when `isGivenUp`. */
  async read(id: string, deadlineMs: number, isGivenUp: () => boolean): Promise<TokenMessage[]> {
    for (;;) {
      try {
        return await this.#readOnce(id);
      } catch (cause) {
        const mayRetry = cause instanceof LaminaError && cause.retryable && performance.now() < deadlineMs;
        if (isGivenUp()) return [];
        if (!mayRetry) throw cause;
        await sleep(RETRY_MS);
      }
    }
  }

  async #readOnce(id: string): Promise<TokenMessage[]> {
    const end = await this.#stream.endOf(id);
    const tokens: TokenMessage[] = [];
    if (end === undefined) return tokens;
    const unreadable = (cause?: unknown): LaminaError =>
      new LaminaError('unavailable', `the answer of ${id} cannot be read`, { cause });
    let timer: NodeJS.Timeout | undefined;
    let replay: Promise<Subscription> | undefined;
    try {
      await new Promise<void>((resolve, reject) => {
        timer = setTimeout(() => reject(unreadable()), READ_ATTEMPT_MS);
        const take = (message: Uint8Array, _isFinal: boolean, sequence: number): void => {
          if (sequence <= end.sequence) tokens.push(...decodeTokens(message));
          if (sequence >= end.sequence) resolve();
        };
        replay = this.#stream.replay(id, take);
        replay.catch((cause: unknown) => reject(unreadable(cause)));
      });
    } finally {
      clearTimeout(timer);
      // It may begin only now.
      void replay?.then(
        (subscription) => subscription.unsubscribe(),
        () => undefined,
      );
    }
    return tokens;
  }
}
