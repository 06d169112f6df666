/**
 * Owns publishing and reading answers on LAMINA_TOKENS.
 *
 * Invariants
 * 1. A message's Nats-Msg-Id is `<id>.<indices of its first and last token>`, or `<id>.final` if it ends an answer without a
 *    token: publishing it twice stores it once, another grouping of the same tokens is another message, and an answer has
 *    one end even if two processes write it.
 * 2. Who writes an answer names the last message of it that it knows (Nats-Expected-Last-Subject-Sequence): of two that write
 *    the same answer, one is refused before it stores a token twice under another grouping.
 * 3. A message that the server did not store is reported, and the caller told whether to publish it again: time does not
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
const MESSAGE_ID_HEADER = 'Nats-Msg-Id';

/** How far an answer is stored. */
export interface StoredEnd {
  /** Stream sequence of its last message. */
  readonly sequence: number;
  readonly isComplete: boolean;
  /** When that message was stored, by the server's clock, Unix time in ms. */
  readonly storedAtMs: number;
}

/** The part of an answer that is stored. */
export interface StoredAnswer {
  /** In order, each once. */
  readonly tokens: readonly TokenMessage[];
  /** Stream sequence of its last message, 0 when nothing is stored: what `append` expects next. */
  readonly lastSequence: number;
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
    if (tokens.length === 0) return true;
    return (await this.#store(tokens, encoding, isFirst ? 0 : undefined)) !== undefined;
  }

  /**
   * Publishes the next tokens of an answer as one message, unless somebody else has written to it.
   * @param lastSequence Stream sequence of the last message of the answer that the caller stored or read, 0 before any.
   * @returns The sequence to go on with; undefined when the message may be published again.
   * @throws LaminaError `duplicate_id` when the answer has messages after that one; others when it can never be stored.
   */
  async append(
    tokens: readonly TokenMessage[],
    encoding: WireEncoding,
    lastSequence: number,
  ): Promise<number | undefined> {
    const stored = await this.#store(tokens, encoding, lastSequence);
    if (stored !== 'otherwise') return stored;
    // Stored before with the confirmation lost: a server that still remembers its id says so, one that does not refuses it.
    const [first] = tokens;
    const last = await lastMessage(this.#bus, STREAMS.tokens.name, SUBJECTS.tokens(first!.id)).catch(() => null);
    if (last === null) return undefined;
    if (last?.header?.get(MESSAGE_ID_HEADER) === messageIdOf(tokens)) return last.seq;
    throw new LaminaError('duplicate_id', `request ${first!.id} was taken over: another process writes its answer`);
  }

  /** The sequence of the stored message; `otherwise` when another one is the last of the answer; undefined: try again. */
  async #store(
    tokens: readonly TokenMessage[],
    encoding: WireEncoding,
    lastSequence: number | undefined,
  ): Promise<number | 'otherwise' | undefined> {
    const set = headers();
    if (tokens.at(-1)?.finish_reason !== null) set.set(FINAL_HEADER, 'true');
    try {
      const { seq } = await this.#jetstream.publish(SUBJECTS.tokens(tokens[0]!.id), encodeTokens(tokens, encoding), {
        msgID: messageIdOf(tokens),
        headers: set,
        timeout: STORE_TIMEOUT_MS,
        ...(lastSequence !== undefined && { expect: { lastSubjectSequence: lastSequence } }),
      });
      return seq;
    } catch (cause) {
      if (cause instanceof NatsError && cause.api_error?.err_code === WRONG_LAST_SEQUENCE_ERROR_CODE)
        return 'otherwise';
      this.#onError(asLaminaError(cause));
      const refusal = await this.#refusalOf(cause);
      if (refusal !== undefined) throw refusal;
      return undefined;
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
   * What is stored of an answer.
   * @throws LaminaError `unavailable` when the stream cannot be read.
   */
  async stored(requestId: string): Promise<StoredAnswer> {
    const lastSequence = (await this.endOf(requestId))?.sequence;
    const tokens: TokenMessage[] = [];
    if (lastSequence === undefined) return { tokens, lastSequence: 0 };
    let timer: NodeJS.Timeout | undefined;
    let subscription: Subscription | undefined;
    try {
      await new Promise<void>((resolve, reject) => {
        const tooLate = new LaminaError('unavailable', 'the stream of answers cannot be read in time');
        timer = setTimeout(() => reject(tooLate), READ_TIMEOUT_MS);
        const take = (data: Uint8Array, _isFinal: boolean, sequence: number): void => {
          if (sequence <= lastSequence)
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
    return { tokens, lastSequence };
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

function messageIdOf(tokens: readonly TokenMessage[]): string {
  const first = tokens[0]!;
  return first.token === null ? `${first.id}.final` : `${first.id}.${first.index}-${tokens.at(-1)!.index}`;
}
