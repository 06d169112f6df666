/**
 * Owns writing one answer to LAMINA_TOKENS so that it is stored whole and in order.
 *
 * Invariants
 * 1. One message is under way at a time; tokens that come meanwhile share the next one. So the stored order is the order
 *    of the tokens, and what waits is bounded by the answer.
 * 2. A message that was not confirmed is published again under the same Nats-Msg-Id, until it is or the bus is closed:
 *    a connection that was lost for a while costs time and no token.
 */
import type { TokenMessage, WireEncoding } from '@lamina/protocol';
import type { TokenStream } from './token-stream.ts';

const RETRY_MS = 250;
/** A message must not outgrow what the server takes, however long nothing could be stored. */
const MAX_TOKENS_PER_MESSAGE = 128;

export class AnswerWriter {
  readonly #stream: Pick<TokenStream, 'publish' | 'isClosed'>;
  readonly #encoding: WireEncoding;
  readonly #waiting: TokenMessage[] = [];
  #writing: Promise<boolean> | undefined;
  #isStored = true;

  constructor(stream: Pick<TokenStream, 'publish' | 'isClosed'>, encoding: WireEncoding) {
    this.#stream = stream;
    this.#encoding = encoding;
  }

  push(message: TokenMessage): void {
    this.#waiting.push(message);
    this.#writing ??= this.#write();
  }

  /** Resolves when all that was pushed is stored: true, or false when the bus was closed before. */
  async stored(): Promise<boolean> {
    return this.#writing ?? this.#isStored;
  }

  /** What can share a message: an end without a token has an id of its own. */
  #takeNext(): TokenMessage[] {
    const end = this.#waiting.findIndex((message) => message.token === null);
    return this.#waiting.splice(0, Math.min(end > 0 ? end : this.#waiting.length, MAX_TOKENS_PER_MESSAGE));
  }

  async #write(): Promise<boolean> {
    while (this.#waiting.length > 0 && this.#isStored) {
      const messages = this.#takeNext();
      this.#isStored = await this.#stream.publish(messages, this.#encoding);
      while (!this.#isStored && !this.#stream.isClosed) {
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
        this.#isStored = await this.#stream.publish(messages, this.#encoding);
      }
    }
    this.#writing = undefined;
    return this.#isStored;
  }
}
