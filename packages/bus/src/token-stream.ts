/**
 * Owns publishing and reading answers on LAMINA_TOKENS.
 *
 * Invariants
 * 1. A message's Nats-Msg-Id is `<id>.<indices of its first and last token>`, or `<id>.final` if it ends an answer without a
 *    token: publishing it twice stores it once, another grouping of the same tokens is another message, and an answer has
 *    one end even if two processes write it.
 * 2. A message that the server did not store is reported, and the caller told: AnswerWriter publishes it again.
 */
import {
  decodeTokens,
  encodeTokens,
  FINAL_HEADER,
  STREAMS,
  SUBJECTS,
  type TokenMessage,
  type WireEncoding,
} from '@lamina/protocol';
import { asLaminaError, LaminaError } from '@lamina/tensor';
import { consumerOpts, headers, type JetStreamClient, NatsError } from 'nats';
import type { Bus, BusMessage, Subscription } from './bus.ts';

const STORE_TIMEOUT_MS = 2_000;
const READ_TIMEOUT_MS = 5_000;
const NO_MESSAGE_ERROR_CODE = 10037;

export class TokenStream {
  readonly #bus: Bus;
  readonly #jetstream: JetStreamClient;
  readonly #onError: (error: LaminaError) => void;

  /** Call `ensureStreams` first. */
  constructor(bus: Bus, onError: (error: LaminaError) => void) {
    this.#bus = bus;
    this.#jetstream = bus.connection.jetstream();
    this.#onError = onError;
  }

  get isClosed(): boolean {
    return this.#bus.isClosed;
  }

  /** Publishes tokens of one answer as one message. The promise settles when the server has stored it; it never rejects. */
  async publish(tokens: readonly TokenMessage[], encoding: WireEncoding): Promise<boolean> {
    const first = tokens[0];
    const last = tokens.at(-1);
    if (first === undefined || last === undefined) return true;
    const set = headers();
    if (last.finish_reason !== null) set.set(FINAL_HEADER, 'true');
    try {
      await this.#jetstream.publish(SUBJECTS.tokens(first.id), encodeTokens(tokens, encoding), {
        msgID: first.token === null ? `${first.id}.final` : `${first.id}.${first.index}-${last.index}`,
        headers: set,
        timeout: STORE_TIMEOUT_MS,
      });
      return true;
    } catch (cause) {
      this.#onError(asLaminaError(cause));
      return false;
    }
  }

  /** True while an answer with this id is kept, complete or not. */
  async has(requestId: string): Promise<boolean> {
    return (await this.#lastSequence(requestId)) !== undefined;
  }

  /** Stream sequence of the last message of an answer. */
  async #lastSequence(requestId: string): Promise<number | undefined> {
    const manager = await this.#bus.connection.jetstreamManager();
    try {
      const last = await manager.streams.getMessage(STREAMS.tokens.name, { last_by_subj: SUBJECTS.tokens(requestId) });
      return last.seq;
    } catch (cause) {
      if (cause instanceof NatsError && cause.api_error?.err_code === NO_MESSAGE_ERROR_CODE) return undefined;
      throw new LaminaError('unavailable', 'the stream of answers cannot be read; is JetStream up?', { cause });
    }
  }

  /**
   * The tokens of one answer that are stored, in order, each once.
   * @throws LaminaError `unavailable` when the stream cannot be read.
   */
  async stored(requestId: string): Promise<TokenMessage[]> {
    const lastSequence = await this.#lastSequence(requestId);
    const tokens: TokenMessage[] = [];
    if (lastSequence === undefined) return tokens;
    let timer: NodeJS.Timeout | undefined;
    let subscription: Subscription | undefined;
    try {
      await new Promise<void>((resolve, reject) => {
        const tooLate = new LaminaError('unavailable', 'the stream of answers cannot be read in time');
        timer = setTimeout(() => reject(tooLate), READ_TIMEOUT_MS);
        const take = (data: Uint8Array, _isFinal: boolean, sequence: number): void => {
          for (const token of decodeTokens(data)) if (token.index === tokens.length) tokens.push(token);
          if (sequence >= lastSequence) resolve();
        };
        this.replay(requestId, take).then((started) => {
          subscription = started;
        }, reject);
      });
    } finally {
      clearTimeout(timer);
      subscription?.unsubscribe();
    }
    return tokens;
  }

  /** Messages of one answer as they are published from now on. */
  follow(requestId: string, callback: (message: BusMessage) => void): Subscription {
    return this.#bus.subscribe(SUBJECTS.tokens(requestId), callback);
  }

  /** Messages of one answer from its first one on, then as they are published. */
  async replay(
    requestId: string,
    callback: (data: Uint8Array, isFinal: boolean, sequence: number) => void,
  ): Promise<Subscription> {
    const options = consumerOpts();
    options.orderedConsumer();
    options.deliverAll();
    options.callback((error, message) => {
      if (error) this.#onError(asLaminaError(error));
      else if (message !== null) callback(message.data, message.headers?.get(FINAL_HEADER) === 'true', message.seq);
    });
    return this.#jetstream.subscribe(SUBJECTS.tokens(requestId), options);
  }
}
