/**
 * Owns writing one answer to LAMINA_TOKENS so that it is stored whole and in order.
 *
 * Invariants
 * 1. One message is under way at a time; tokens that come meanwhile share the next one. So the stored order is the order
 *    of the tokens, and what waits is bounded by the answer.
 * 2. A message that was not confirmed is published again behind the same message as before, until it is or the bus is closed: a
 *    connection that was lost for a while costs time and no token, and no message is stored twice (token-stream.ts).
 * 3. A message that can never be stored ends the answer: an error takes its place, and nothing is taken after it.
 * 4. When another process has written to the answer, nothing more is published, not even an end.
 */
import { errorBodyOf, type TokenMessage, type WireEncoding } from '@lamina/protocol';
import { asLaminaError, type LaminaError } from '@lamina/tensor';
import type { TokenStream } from './token-stream.ts';

const RETRY_MS = 250;
/** A message must not outgrow what the server takes, however long nothing could be stored. */
const MAX_TOKENS_PER_MESSAGE = 128;

export class AnswerWriter {
  readonly #stream: Pick<TokenStream, 'append' | 'isClosed'>;
  readonly #encoding: WireEncoding;
  readonly #onRefused: (error: LaminaError) => void;
  readonly #waiting: TokenMessage[] = [];
  #maxTokensPerMessage = MAX_TOKENS_PER_MESSAGE;
  #writing: Promise<boolean> | undefined;
  #isStored = true;
  #isRefused = false;
  #lastSequence: number;

  /**
   * @param lastSequence Stream sequence of the last message of the answer that is stored and known here, 0 before any.
   * @param onRefused Told once that the rest of the answer is in vain: `duplicate_id` when another process writes it.
   */
  constructor(
    stream: Pick<TokenStream, 'append' | 'isClosed'>,
    encoding: WireEncoding,
    lastSequence: number,
    onRefused: (error: LaminaError) => void,
  ) {
    this.#stream = stream;
    this.#encoding = encoding;
    this.#lastSequence = lastSequence;
    this.#onRefused = onRefused;
  }

  push(message: TokenMessage): void {
    if (this.#isRefused) return;
    this.#waiting.push(message);
    // When what pushes is through: the tokens of one pass share a message, and the next pass is started before it.
    this.#writing ??= Promise.resolve().then(() => this.#write());
  }

  /** Resolves when the answer is stored as far as it was pushed, or ended by an error: false when neither could be. */
  async stored(): Promise<boolean> {
    return this.#writing ?? this.#isStored;
  }

  /** What can share a message: an end without a token has an id of its own. */
  #takeNext(): TokenMessage[] {
    const end = this.#waiting.findIndex((message) => message.token === null);
    return this.#waiting.splice(0, Math.min(end > 0 ? end : this.#waiting.length, this.#maxTokensPerMessage));
  }

  async #write(): Promise<boolean> {
    while (this.#waiting.length > 0 && this.#isStored) {
      const messages = this.#takeNext();
      try {
        this.#isStored = await this.#store(messages);
      } catch (cause) {
        this.#makeWay(messages, asLaminaError(cause));
      }
    }
    this.#writing = undefined;
    return this.#isStored;
  }

  /** @throws LaminaError when they can never be stored. */
  async #store(messages: readonly TokenMessage[]): Promise<boolean> {
    for (;;) {
      const sequence = await this.#stream.append(messages, this.#encoding, this.#lastSequence);
      if (sequence !== undefined) {
        this.#lastSequence = sequence;
        return true;
      }
      if (this.#stream.isClosed) return false;
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  /** Smaller messages where they are too large together, else the error instead of them. */
  #makeWay(messages: readonly TokenMessage[], error: LaminaError): void {
    if (error.code === 'duplicate_id') {
      this.#isRefused = true;
      this.#isStored = false;
      this.#waiting.length = 0;
      this.#onRefused(error);
      return;
    }
    const [first] = messages;
    if (first === undefined || this.#isRefused) {
      this.#isStored = false;
      return;
    }
    if (messages.length > 1 && error.code === 'invalid_request') {
      this.#maxTokensPerMessage = Math.ceil(messages.length / 2);
      this.#waiting.unshift(...messages);
      return;
    }
    this.#isRefused = true;
    const { id, index } = first;
    this.#waiting.splice(0, this.#waiting.length, {
      id,
      index,
      token: null,
      text: '',
      finish_reason: 'error',
      error: errorBodyOf(error),
    });
    this.#onRefused(error);
  }
}
