/**
 * Owns storing and reading answers on LAMINA_TOKENS.
 *
 * Invariants
 * 1. Who writes to an answer names the last message of it that it knows (Nats-Expected-Last-Subject-Sequence): of two that
 *    write the same answer, one is refused, so a token is stored once and an answer has one end. The server's memory of
 *    message ids is not used: it would take a token for stored that the stream has discarded since.
 * 2. A message says in TOKENS_HEADER which tokens it has. One without that header is nobody's answer and is skipped wherever
 *    an answer is read: the server and services can be made to send their replies to a subject of this stream.
 * 3. A message that the server did not store is reported, and the caller told whether to store it again: time does not
 *    mend a message that is too large, a permission that is missing, or a stream that was deleted.
 * 4. A full stream discards its oldest messages, so of an answer the beginning goes first. What is left of it is never given as
 *    the whole: it cannot be continued.
 */
import {
  DELIVERY_HEADER,
  decodeTokens,
  encodeTokens,
  FINAL_HEADER,
  STREAMS,
  SUBJECTS,
  TOKENS_HEADER,
  type TokenMessage,
  type WireEncoding,
} from '@lamina/protocol';
import { asLaminaError, LaminaError } from '@lamina/tensor';
import {
  consumerOpts,
  ErrorCode,
  headers,
  type JetStreamClient,
  type JsMsg,
  Match,
  millis,
  NatsError,
  type StoredMsg,
} from 'nats';
import { type Bus, type Subscription, tooLarge } from './bus.ts';
import type { BusMessage } from './bus-message.ts';
import { JETSTREAM_CODES } from './jetstream-codes.ts';
import { isStreamMissing, lastMessage } from './stored-message.ts';
import type { StoreOutcome, StreamPublisher } from './stream-publisher.ts';

const STORE_TIMEOUT_MS = 2_000;
/** Without a message, while an answer is read: how long all of it takes depends on its length. */
const READ_SILENCE_MS = 5_000;
const EXPECTED_SEQUENCE_HEADER = 'Nats-Expected-Last-Subject-Sequence';
/** How often foreign messages may come between looking for the end of an answer and storing behind it. */
const MAX_FOREIGN_RACES = 8;

type StoreFailure = Exclude<StoreOutcome, { readonly kind: 'stored' }>;

/** How far an answer is stored. */
export interface StoredEnd {
  /** Stream sequence of its last message. */
  readonly sequence: number;
  readonly isComplete: boolean;
  /** When that message was stored, by the server's clock, Unix time in ms. */
  readonly storedAtMs: number;
  /** Behind its last token; undefined when that message has none. */
  readonly nextIndex: number | undefined;
}

/** The part of an answer that is stored. */
export interface StoredAnswer {
  /** In order, each once. */
  readonly tokens: readonly TokenMessage[];
  /** Stream sequence of its last message, 0 when nothing is stored: what `append` expects next. */
  readonly lastSequence: number;
  /** How often the work item had been given out when the writer of that message got it, 0 when nothing is stored. */
  readonly deliveryCount: number;
}

interface LastMessage extends StoredEnd {
  readonly data: Buffer;
}

export class TokenStream {
  readonly #bus: Bus;
  readonly #jetstream: JetStreamClient;
  readonly #publisher: StreamPublisher;
  readonly #onError: (error: LaminaError) => void;

  /** Call `ensureStreams` first. */
  constructor(bus: Bus, onError: (error: LaminaError) => void) {
    this.#bus = bus;
    this.#jetstream = bus.connection.jetstream();
    this.#publisher = bus.streamPublisher(STORE_TIMEOUT_MS);
    this.#onError = onError;
  }

  get isClosed(): boolean {
    return this.#bus.isClosed;
  }

  /**
   * Stores the next tokens of an answer as one message, unless somebody else has written to it.
   * @param lastSequence Stream sequence of the last message of the answer that the caller stored or read, 0 before any.
   * @param deliveryCount Of the caller's work item, which says afterwards who got further.
   * @returns The sequence to go on with; undefined when the message may be stored again.
   * @throws LaminaError `duplicate_id` when the answer has messages after that one; others when it can never be stored.
   */
  async append(
    tokens: readonly TokenMessage[],
    encoding: WireEncoding,
    lastSequence: number,
    deliveryCount = 1,
  ): Promise<number | undefined> {
    const { id } = tokens[0]!;
    let expected = lastSequence;
    for (let race = 0; race < MAX_FOREIGN_RACES; race++) {
      const stored = await this.#store(tokens, encoding, expected, deliveryCount);
      if (stored !== 'otherwise') return stored;
      let last: StoredMsg | undefined;
      let end: LastMessage | undefined;
      try {
        last = await lastMessage(this.#bus, STREAMS.tokens.name, SUBJECTS.tokens(id));
        end = await this.#endUpTo(id, last);
      } catch {
        return undefined;
      }
      // Stored before, with the confirmation lost.
      if (last !== undefined && end?.data.equals(encodeTokens(tokens, encoding))) return last.seq;
      if (last === undefined || (end?.sequence ?? 0) > lastSequence)
        throw new LaminaError('duplicate_id', `request ${id} was taken over: another process writes its answer`);
      expected = last.seq;
    }
    return undefined;
  }

  /** The sequence of the stored message; `otherwise` when another one is the last of the answer; undefined: try again. */
  async #store(
    tokens: readonly TokenMessage[],
    encoding: WireEncoding,
    lastSequence: number,
    deliveryCount: number,
  ): Promise<number | 'otherwise' | undefined> {
    const set = headers();
    set.append(TOKENS_HEADER, namesOf(tokens), Match.Exact);
    set.append(EXPECTED_SEQUENCE_HEADER, String(lastSequence), Match.Exact);
    if (tokens.at(-1)?.finish_reason !== null) set.append(FINAL_HEADER, 'true', Match.Exact);
    if (deliveryCount > 1) set.append(DELIVERY_HEADER, String(deliveryCount), Match.Exact);
    const outcome = await this.#publisher.publish(SUBJECTS.tokens(tokens[0]!.id), encodeTokens(tokens, encoding), set);
    if (outcome.kind === 'stored') return outcome.sequence;
    if (outcome.kind === 'refused' && outcome.refusal.errCode === JETSTREAM_CODES.wrongLastSequence) return 'otherwise';
    this.#onError(failureOf(outcome));
    const refusal = await this.#refusalOf(outcome);
    if (refusal !== undefined) throw refusal;
    return undefined;
  }

  /** Why a message will not be stored however often it is published; undefined when it may be yet. */
  async #refusalOf(outcome: StoreFailure): Promise<LaminaError | undefined> {
    const cause = outcome.kind === 'failed' ? outcome.cause : outcome;
    if (
      (outcome.kind === 'refused' && outcome.refusal.errCode === JETSTREAM_CODES.messageTooLarge) ||
      (cause instanceof NatsError && cause.code === ErrorCode.MaxPayloadExceeded)
    )
      return tooLarge('a message of the answer', this.#bus, cause);
    if (outcome.kind === 'forbidden') {
      const user = 'the user of this service may not publish on lamina.v1.tokens.*';
      return new LaminaError('unavailable', `the answer cannot be stored: ${user}`);
    }
    // Nobody listened: the server may be starting, or the stream is gone.
    if (outcome.kind === 'unheard' && (await isStreamMissing(this.#bus, STREAMS.tokens.name))) {
      const advice = `the stream ${STREAMS.tokens.name} was deleted; restart any service to make it again`;
      return new LaminaError('unavailable', `the answer cannot be stored: ${advice}`);
    }
    return undefined;
  }

  /**
   * How far an answer is stored; undefined when nothing of it is.
   * @throws LaminaError `unavailable` when the stream cannot be read.
   */
  async endOf(requestId: string): Promise<StoredEnd | undefined> {
    return this.#endUpTo(requestId, await lastMessage(this.#bus, STREAMS.tokens.name, SUBJECTS.tokens(requestId)));
  }

  /** The end of an answer, given the last message on its subject, whoever sent that. */
  async #endUpTo(requestId: string, last: StoredMsg | undefined): Promise<LastMessage | undefined> {
    if (last === undefined) return undefined;
    const { seq: sequence, header, data, time } = last;
    const names = header?.get(TOKENS_HEADER);
    if (names) {
      const isComplete = header.get(FINAL_HEADER) === 'true';
      const nextIndex = nextIndexOf(names);
      return { sequence, isComplete, storedAtMs: time.getTime(), nextIndex, data: Buffer.from(data) };
    }
    let end: LastMessage | undefined;
    await this.#readUpTo(requestId, last.seq, (message) => {
      end = {
        sequence: message.seq,
        isComplete: message.headers?.get(FINAL_HEADER) === 'true',
        storedAtMs: millis(message.info.timestampNanos),
        nextIndex: nextIndexOf(message.headers?.get(TOKENS_HEADER)),
        data: Buffer.from(message.data),
      };
    });
    return end;
  }

  /**
   * What is stored of an answer, from its first token on.
   * @throws LaminaError `unavailable` when the stream cannot be read, `unknown_request` when it has a part of the answer and no
   * longer what comes before that.
   */
  async stored(requestId: string): Promise<StoredAnswer> {
    const lastSequence = (await this.endOf(requestId))?.sequence;
    const tokens: TokenMessage[] = [];
    let deliveryCount = 0;
    if (lastSequence === undefined) return { tokens, lastSequence: 0, deliveryCount };
    await this.#readUpTo(requestId, lastSequence, ({ data, headers: set }) => {
      deliveryCount = Number(set?.get(DELIVERY_HEADER) || 1);
      for (const token of decodeTokens(data)) {
        if (token.index > tokens.length) {
          const advice = 'send the request again under another id';
          throw new LaminaError('unknown_request', `the beginning of the answer is no longer kept; ${advice}`);
        }
        if (token.index === tokens.length) tokens.push(token);
      }
    });
    return { tokens, lastSequence, deliveryCount };
  }

  /**
   * Messages of one answer as they are published from now on.
   * @param onDoubt Told instead of a message that was not written behind the one before: of two writers, the stream has taken
   * one, and says which.
   */
  follow(requestId: string, callback: (message: BusMessage) => void, onDoubt?: () => void): Subscription {
    let expected = -1;
    return this.#bus.subscribe(SUBJECTS.tokens(requestId), (message) => {
      if (message.header(TOKENS_HEADER) === undefined) return;
      const sequence = Number(message.header(EXPECTED_SEQUENCE_HEADER));
      if (sequence <= expected) {
        onDoubt?.();
        return;
      }
      expected = sequence;
      callback(message);
    });
  }

  /** Messages of one answer from its first one on, then as they are stored. */
  async replay(
    requestId: string,
    callback: (data: Uint8Array, isFinal: boolean, sequence: number) => void,
  ): Promise<Subscription> {
    return this.#replayAll(requestId, (message) => {
      if (isOfAnswer(message)) callback(message.data, message.headers?.get(FINAL_HEADER) === 'true', message.seq);
    });
  }

  /**
   * Reads the messages of an answer from its first one on, as they arrive.
   * @param lastSequence Of the last one to read, as `endOf` tells it.
   * @param take Returns whether it wants more.
   * @throws LaminaError `unavailable` when the stream cannot be read.
   */
  read(requestId: string, lastSequence: number, take: (data: Uint8Array, sequence: number) => boolean): Promise<void> {
    return this.#readUpTo(requestId, lastSequence, ({ data, seq }) => take(data, seq));
  }

  /** Reads the messages of an answer, up to the one of `lastSequence` on its subject, or until `take` returns false. */
  async #readUpTo(requestId: string, lastSequence: number, take: (message: JsMsg) => unknown): Promise<void> {
    let timer: NodeJS.Timeout | undefined;
    let started: Promise<Subscription> | undefined;
    let isDone = false;
    try {
      await new Promise<void>((resolve, reject) => {
        const tooLate = new LaminaError('unavailable', 'the stream of answers cannot be read in time');
        timer = setTimeout(() => reject(tooLate), READ_SILENCE_MS);
        const failed = (cause: unknown): void =>
          reject(new LaminaError('unavailable', 'the stream of answers cannot be read; is JetStream up?', { cause }));
        const receive = (message: JsMsg): void => {
          if (isDone) return;
          timer?.refresh();
          try {
            const isWanted = message.seq <= lastSequence && isOfAnswer(message);
            isDone = (isWanted && take(message) === false) || message.seq >= lastSequence;
            if (isDone) resolve();
          } catch (cause) {
            isDone = true;
            reject(asLaminaError(cause));
          }
        };
        started = this.#replayAll(requestId, receive);
        started.catch(failed);
      });
    } finally {
      isDone = true;
      clearTimeout(timer);
      // A short answer is read before the server has confirmed its consumer.
      started?.then(
        (subscription) => subscription.unsubscribe(),
        () => undefined,
      );
    }
  }

  async #replayAll(requestId: string, callback: (message: JsMsg) => void): Promise<Subscription> {
    const options = consumerOpts();
    options.orderedConsumer();
    // Or the server is asked first which stream has the subject.
    options.bindStream(STREAMS.tokens.name);
    options.deliverAll();
    options.callback((error, message) => {
      if (error) this.#onError(asLaminaError(error));
      else if (message !== null) callback(message);
    });
    return this.#jetstream.subscribe(SUBJECTS.tokens(requestId), options);
  }
}

function isOfAnswer({ headers: set }: JsMsg): boolean {
  return Boolean(set?.get(TOKENS_HEADER));
}

/** What TOKENS_HEADER says of a message. */
function namesOf(tokens: readonly TokenMessage[]): string {
  const first = tokens[0]!;
  return first.token === null ? 'end' : `${first.index}-${tokens.at(-1)!.index}`;
}

function failureOf(outcome: StoreFailure): LaminaError {
  if (outcome.kind === 'failed') return asLaminaError(outcome.cause);
  const diagnostics = outcome.kind === 'refused' ? { nats: outcome.refusal } : { nats: outcome.kind };
  return new LaminaError('unavailable', 'a message of an answer was not stored', { diagnostics });
}

/** Behind the last token of a message, by its TOKENS_HEADER. */
function nextIndexOf(names: string | undefined): number | undefined {
  const last = /^\d+-(\d+)$/.exec(names ?? '')?.[1];
  return last === undefined ? undefined : Number(last) + 1;
}
