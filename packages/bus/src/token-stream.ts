/**
 * Owns publishing and reading answers on LAMINA_TOKENS.
 *
 * Invariants
 * 1. A message's Nats-Msg-Id is `<id>.<indices of its first and last token>`, or `<id>.final` if it ends an answer without a
 *    token: publishing it twice stores it once, another grouping of the same tokens is another message, and an answer has
 *    one end even if two processes write it.
 * 2. A message that the server did not store is reported, and the caller told whether to publish it again: time does not
 *    mend a message that is too large, a permission that is missing, or a stream that was deleted.
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
import { consumerOpts, ErrorCode, headers, type JetStreamClient, millis, NatsError } from 'nats';
import { type Bus, type BusMessage, type Subscription, tooLarge } from './bus.ts';
import { isStreamMissing, lastMessage } from './stored-message.ts';

const STORE_TIMEOUT_MS = 2_000;
const READ_TIMEOUT_MS = 5_000;
const MESSAGE_TOO_LARGE_ERROR_CODE = 10054;
const WRONG_LAST_SEQUENCE_ERROR_CODE = 10071;

/** How far an answer is stored. */
export interface StoredEnd {
  /** Stream sequence of its last message. */
  readonly sequence: number;
  readonly isComplete: boolean;
  /** When that message was stored, by the server's clock, Unix time in ms. */
  readonly storedAtMs: number;
}

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

  /**
   * Publishes tokens of one answer as one message. Resolves true when the server has stored it, false when it may be
   * published again.
   * @param isFirst Stores it only if nothing of the answer is stored yet; what is there already counts as stored.
   * @throws LaminaError when it can never be stored.
   */
  async publish(tokens: readonly TokenMessage[], encoding: WireEncoding, isFirst = false): Promise<boolean> {
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
        ...(isFirst && { expect: { lastSubjectSequence: 0 } }),
      });
      return true;
    } catch (cause) {
      if (cause instanceof NatsError && cause.api_error?.err_code === WRONG_LAST_SEQUENCE_ERROR_CODE) return true;
      this.#onError(asLaminaError(cause));
      const refusal = await this.#refusalOf(cause);
      if (refusal !== undefined) throw refusal;
      return false;
    }
  }

  /** Why a message will not be stored however often it is published; undefined when it may be yet. */
  async #refusalOf(cause: unknown): Promise<LaminaError | undefined> {
    if (!(cause instanceof NatsError)) return undefined;
    if (
      cause.code === ErrorCode.MaxPayloadExceeded ||
      cause.api_error?.err_code === MESSAGE_TOO_LARGE_ERROR_CODE ||
      cause.message.includes('Maximum Payload')
    )
      return tooLarge('a message of the answer', this.#bus, cause);
    if (cause.code === ErrorCode.PermissionsViolation) {
      const user = 'the user of this service may not publish on lamina.v1.tokens.*';
      return new LaminaError('unavailable', `the answer cannot be stored: ${user}`, { cause });
    }
    // Nobody listened: the server may be starting, or the stream is gone.
    if (cause.code === ErrorCode.NoResponders && (await isStreamMissing(this.#bus, STREAMS.tokens.name))) {
      const advice = `the stream ${STREAMS.tokens.name} was deleted; restart any service to make it again`;
      return new LaminaError('unavailable', `the answer cannot be stored: ${advice}`, { cause });
    }
    return undefined;
  }

  /**
   * How far an answer is stored; undefined when nothing of it is.
   * @throws LaminaError `unavailable` when the stream cannot be read.
   */
  async endOf(requestId: string): Promise<StoredEnd | undefined> {
    const last = await lastMessage(this.#bus, STREAMS.tokens.name, SUBJECTS.tokens(requestId));
    if (last === undefined) return undefined;
    return {
      sequence: last.seq,
      isComplete: last.header?.get(FINAL_HEADER) === 'true',
      storedAtMs: last.time.getTime(),
    };
  }

  /**
   * Removes an answer, so that another can have its id.
   * @throws LaminaError `unavailable`, also while the server would take tokens of the next one for repeated ones.
   */
  async forget(requestId: string, { storedAtMs }: StoredEnd): Promise<void> {
    let windowMs: number;
    try {
      const manager = await this.#bus.connection.jetstreamManager();
      windowMs = millis((await manager.streams.info(STREAMS.tokens.name)).config.duplicate_window);
      if (storedAtMs + windowMs < Date.now()) {
        await manager.streams.purge(STREAMS.tokens.name, { filter: SUBJECTS.tokens(requestId) });
        return;
      }
    } catch (cause) {
      throw new LaminaError('unavailable', 'the stream of answers cannot be changed; is JetStream up?', { cause });
    }
    throw new LaminaError('unavailable', `the answer of "${requestId}" is younger than ${windowMs} ms`);
  }

  /**
   * The tokens of one answer that are stored, in order, each once.
   * @throws LaminaError `unavailable` when the stream cannot be read.
   */
  async stored(requestId: string): Promise<TokenMessage[]> {
    const lastSequence = (await this.endOf(requestId))?.sequence;
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
