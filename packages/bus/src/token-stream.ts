/**
 * Owns publishing and reading answers on LAMINA_TOKENS.
 *
 * Invariants
 * 1. A message's Nats-Msg-Id is `<id>.<index of its first token>`: publishing it twice stores it once.
 * 2. Publishing never waits for the server; an answer that the server did not store is reported.
 */
import { encodeTokens, FINAL_HEADER, STREAMS, SUBJECTS, type TokenMessage, type WireEncoding } from '@lamina/protocol';
import { asLaminaError, LaminaError } from '@lamina/tensor';
import { consumerOpts, headers, type JetStreamClient, NatsError } from 'nats';
import type { Bus, BusMessage, Subscription } from './bus.ts';

const NO_MESSAGE_ERROR_CODE = 10037;

export class TokenStream {
  readonly #bus: Bus;
  readonly #jetstream: JetStreamClient;
  readonly #onError: (error: LaminaError) => void;
  #unacknowledged = 0;

  /** Call `ensureStreams` first. */
  constructor(bus: Bus, onError: (error: LaminaError) => void) {
    this.#bus = bus;
    this.#jetstream = bus.connection.jetstream();
    this.#onError = onError;
  }

  /** Messages whose storage the server has not confirmed yet. */
  get unacknowledged(): number {
    return this.#unacknowledged;
  }

  /** Publishes tokens of one answer as one message. The promise settles when the server has stored it; it never rejects. */
  async publish(tokens: readonly TokenMessage[], encoding: WireEncoding): Promise<boolean> {
    const first = tokens[0];
    const last = tokens.at(-1);
    if (first === undefined || last === undefined) return true;
    const set = headers();
    if (last.finish_reason !== null) set.set(FINAL_HEADER, 'true');
    this.#unacknowledged++;
    try {
      await this.#jetstream.publish(SUBJECTS.tokens(first.id), encodeTokens(tokens, encoding), {
        msgID: `${first.id}.${first.index}`,
        headers: set,
      });
      return true;
    } catch (cause) {
      this.#onError(asLaminaError(cause));
      return false;
    } finally {
      this.#unacknowledged--;
    }
  }

  /** True while an answer with this id is kept, complete or not. */
  async has(requestId: string): Promise<boolean> {
    const manager = await this.#bus.connection.jetstreamManager();
    try {
      await manager.streams.getMessage(STREAMS.tokens.name, { last_by_subj: SUBJECTS.tokens(requestId) });
      return true;
    } catch (cause) {
      if (cause instanceof NatsError && cause.api_error?.err_code === NO_MESSAGE_ERROR_CODE) return false;
      throw new LaminaError('unavailable', 'the stream of answers cannot be read; is JetStream up?', { cause });
    }
  }

  /** Messages of one answer as they are published from now on. */
  follow(requestId: string, callback: (message: BusMessage) => void): Subscription {
    return this.#bus.subscribe(SUBJECTS.tokens(requestId), callback);
  }

  /** Messages of one answer from its first one on, then as they are published. */
  async replay(requestId: string, callback: (data: Uint8Array, isFinal: boolean) => void): Promise<Subscription> {
    const options = consumerOpts();
    options.orderedConsumer();
    options.deliverAll();
    options.callback((error, message) => {
      if (error) this.#onError(asLaminaError(error));
      else if (message !== null) callback(message.data, message.headers?.get(FINAL_HEADER) === 'true');
    });
    return this.#jetstream.subscribe(SUBJECTS.tokens(requestId), options);
  }
}
