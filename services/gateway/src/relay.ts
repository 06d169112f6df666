/**
 * Owns one client's view of a request between its admission and its last token: work item in, tokens out, cancel,
 * deadline. A request that is known already is not submitted: its answer is read from the start.
 *
 * Invariants
 * 1. Tokens are followed before the work item is submitted, and none is relayed before the queue has taken the item.
 * 2. The sink gets every token exactly once and in order, and exactly one last message, whatever is lost or redelivered.
 * 3. After a gap, or where two have written, it reads the stream from the answer's start (answer-source.ts); what was relayed
 *    already is dropped. Where the stream has other tokens than were relayed last, the client is told so.
 * 4. An answer has one end, whoever writes it. The gateway writes one for a request without tokens, or that its executor
 *    does not end although it was asked several times, and only behind the last message that it knows: where the
 *    executor has stored more, the stream refuses the gateway, else the executor.
 * 5. Once closed, it holds no subscription and no timer.
 * 6. The client gets its own encoding, whatever the one who asked first had wanted.
 */
import {
  decodeTokens,
  encodeTokens,
  storedEncodingOf,
  type TokenMessage,
  type WireEncoding,
  type WorkItem,
} from '@lamina/protocol';
import { asLaminaError, LaminaError } from '@lamina/tensor';
import { cancelledEnd, deadlineExceeded, failedEnd } from './answer-end.ts';
import { type AnswerLinks, AnswerSource, type Origin } from './answer-source.ts';
import type { RequestState } from './request-state.ts';

/** Where the answer goes: the inbox of a NATS client, or an HTTP reply. Must not throw. */
export interface AnswerSink {
  /** `bytes` are `messages` in the request's encoding, valid only during the call. */
  send(messages: readonly TokenMessage[], bytes: Uint8Array, isFinal: boolean): void;
}

/** What a relay needs of the bus. */
export interface RelayLinks extends AnswerLinks {
  readonly tokens: AnswerLinks['tokens'] & {
    append(tokens: readonly TokenMessage[], encoding: WireEncoding, lastSequence: number): Promise<number | undefined>;
  };
  readonly queue: { submit(item: WorkItem): Promise<unknown> };
  /** What is known of a request, wherever it may be. */
  readonly locate: (requestId: string) => Promise<RequestState>;
  /** Tells the executors, wherever the request may be. */
  readonly publishCancel: (requestId: string) => void;
}

export interface RelayEvents {
  readonly onTokens: (count: number) => void;
  readonly onRepair: () => void;
  /** `outcome`: the finish reason, or the error code. */
  readonly onClosed: (relay: Relay, outcome: string) => void;
}

/** How long an executor has to answer a cancel or a deadline before the gateway does. */
export const EXECUTOR_ANSWER_MS = 300;
const CANCEL_RETRY_MS = 1_000;
/** An executor that has not ended a request after so many tries is taken for dead. */
const MAX_CANCEL_ATTEMPTS = 3;
const MAX_TIMER_MS = 2 ** 31 - 1;

type Phase = 'admitting' | 'submitting' | 'open' | 'closed';

export class Relay {
  readonly id: string;
  readonly #encoding: WireEncoding;
  readonly #sink: AnswerSink;
  readonly #links: RelayLinks;
  readonly #events: RelayEvents;
  readonly #timers = new Set<NodeJS.Timeout>();
  readonly #source: AnswerSource;
  #phase: Phase = 'admitting';
  #nextIndex = 0;
  /** The messages that were relayed last: what two wrote at the same time may be relayed before the stream has refused it. */
  #relayed: readonly TokenMessage[] = [];
  #promptTokens = 0;
  #isCancelling = false;

  constructor(id: string, encoding: WireEncoding, sink: AnswerSink, links: RelayLinks, events: RelayEvents) {
    this.id = id;
    this.#encoding = encoding;
    this.#sink = sink;
    this.#links = links;
    this.#events = events;
    this.#source = new AnswerSource(id, links, this);
  }

  /** Index of the token that is relayed next. */
  get nextIndex(): number {
    return this.#nextIndex;
  }

  get isClosed(): boolean {
    return this.#phase === 'closed';
  }

  /** The request is submitted, and its answer is relayed as it comes. */
  get isOpen(): boolean {
    return this.#phase === 'open';
  }

  /** The item waits for a place in the queue: its deadline counts from here on. */
  admitted(item: WorkItem): void {
    if (this.#phase !== 'admitting') return;
    this.#promptTokens = item.tokenIds.length;
    if (item.deadlineAtMs === null) return;
    const remainingMs = Math.max(0, item.deadlineAtMs - Date.now());
    this.#after(remainingMs, async () => {
      if (this.#phase === 'admitting') this.fail(deadlineExceeded());
      else this.#after(EXECUTOR_ANSWER_MS, () => this.#giveUp('deadline_exceeded'));
    });
  }

  /** Reads the answer to a request that was submitted before. */
  async attach(): Promise<void> {
    if (this.isClosed) return;
    this.#phase = 'open';
    if (this.#isCancelling) this.#after(EXECUTOR_ANSWER_MS, () => this.#giveUp('cancelled'));
    await this.#source.catchUp();
  }

  /**
   * Puts the admitted item into the queue. Never rejects: what goes wrong is the client's answer.
   * @param isNamed Whether its client can ask for the answer again.
   */
  async submit(item: WorkItem, isNamed = false): Promise<void> {
    if (this.#phase !== 'admitting') return;
    this.#phase = 'submitting';
    this.#source.listen();
    try {
      await this.#links.queue.submit(item);
    } catch (cause) {
      const error = asLaminaError(cause);
      if (error.code === 'duplicate_id') return this.#join(error);
      // The queue may have taken it although it did not say so: then who named it finds it running when they ask again.
      if (error.code === 'unavailable' && !isNamed) this.#links.publishCancel(this.id);
      this.fail(error);
      return;
    }
    if (this.isClosed) return;
    if (item.isContinued === true) return this.attach();
    this.#phase = 'open';
    if (this.#isCancelling) this.#after(EXECUTOR_ANSWER_MS, () => this.#giveUp('cancelled'));
    void this.#source.open();
  }

  /** Somebody else has submitted a request with this id: it is the same one. */
  async #join(duplicate: LaminaError): Promise<void> {
    try {
      const state = await this.#links.locate(this.id);
      if (state === 'working' || state === 'ended') await this.attach();
      else this.fail(duplicate);
    } catch (cause) {
      this.fail(asLaminaError(cause));
    }
  }

  /** Somebody published on the cancel subject, which executors hear as well. */
  cancel(): void {
    if (this.#isCancelling || this.isClosed) return;
    this.#isCancelling = true;
    if (this.#phase === 'admitting') this.#deliver([this.#endOf('cancelled')]);
    if (this.#phase === 'open') this.#after(EXECUTOR_ANSWER_MS, () => this.#giveUp('cancelled'));
  }

  /** Ends the request with an error that is not written to the stream. */
  fail(error: LaminaError): void {
    this.#deliver([failedEnd(this.id, this.#nextIndex, error)]);
  }

  /** Nobody reads any more: it holds nothing from here on. Returns whether it was to see to a cancel. */
  stop(): boolean {
    const wasCancelling = this.#isCancelling && !this.isClosed;
    this.#close();
    return wasCancelling;
  }

  /** The connection was down: messages may have been missed. */
  async reconnected(): Promise<void> {
    if (this.#phase !== 'open') return this.#source.fallBehind();
    this.#events.onRepair();
    await this.#source.startOver();
  }

  /** Reads the answer from the stream, because messages were missed. */
  async #repair(): Promise<void> {
    this.#events.onRepair();
    await this.#source.catchUp();
  }

  /** Takes what its source has: called by that alone. */
  receive(data: Uint8Array, origin: Origin): void {
    if (this.isClosed) return;
    let fresh: TokenMessage[];
    let received: number;
    let original: TokenMessage | undefined;
    let isOther: boolean;
    try {
      const messages = decodeTokens(data);
      received = messages.length;
      original = messages[0];
      fresh = messages.filter((message) => message.index >= this.#nextIndex);
      checkMessages(messages, this.id);
      isOther = messages.some((message) => this.#isOther(message));
      const end = messages.at(-1);
      if (fresh.length === 0 && end !== undefined && end.finish_reason !== null) {
        // Its writer knew of fewer tokens than were relayed: only if the stream took it, it is the end.
        if (origin === 'heard') return void this.#repair();
        fresh = [{ ...end, index: this.#nextIndex, token: null, text: '' }];
      }
    } catch (cause) {
      this.#links.publishCancel(this.id);
      this.fail(new LaminaError('protocol_violation', 'the answer is malformed; see the log', { cause }));
      return;
    }
    if (isOther) {
      if (origin === 'heard') return void this.#source.doubt();
      const problem = 'two executors wrote the answer at once, and the tokens sent last are not those that are kept';
      this.fail(new LaminaError('unavailable', `${problem}; ask for it again with the same id`));
      return;
    }
    const first = fresh[0];
    if (first === undefined) return;
    if (first.index > this.#nextIndex) {
      if (origin === 'heard') void this.#repair();
      else if (origin === 'first' || fresh.at(-1)?.finish_reason !== null)
        this.fail(
          new LaminaError(
            'unknown_request',
            'the beginning of the answer is no longer kept; send it again under another id',
          ),
        );
      return;
    }
    const isWhole = fresh.length === received && first === original;
    this.#deliver(fresh, isWhole && storedEncodingOf(data) === this.#encoding ? data : undefined);
  }

  /** Whether another token was relayed in its place. */
  #isOther({ index, token }: TokenMessage): boolean {
    const relayed = this.#relayed[index - (this.#relayed[0]?.index ?? 0)];
    return relayed !== undefined && relayed.token !== null && token !== null && relayed.token !== token;
  }

  /** Sends messages that start at the expected index; closes with the last one. */
  #deliver(messages: readonly TokenMessage[], bytes = encodeTokens(messages, this.#encoding)): void {
    const last = messages.at(-1);
    if (this.isClosed || last === undefined) return;
    const isFinal = last.finish_reason !== null;
    const count = messages.filter((message) => message.token !== null).length;
    this.#nextIndex = last.index + 1;
    this.#relayed = messages;
    if (isFinal) this.#close();
    this.#sink.send(messages, bytes, isFinal);
    if (count > 0) this.#events.onTokens(count);
    if (isFinal) this.#events.onClosed(this, last.error?.code ?? last.finish_reason ?? 'stop');
  }

  /**
   * Ends a request that no executor has, or that its executor does not end: after a cancel, or past its deadline.
   * @param attempt Counts the times that the executors were asked in vain.
   */
  async #giveUp(reason: 'cancelled' | 'deadline_exceeded', attempt = 0): Promise<void> {
    const isUnheard = attempt >= MAX_CANCEL_ATTEMPTS;
    if (this.#nextIndex === 0 || isUnheard) {
      const end = this.#endOf(reason);
      // Only reading tells sequences; by the last attempt that was done.
      const stored = await this.#links.tokens
        .append([end], this.#encoding, this.#nextIndex === 0 ? 0 : this.#source.lastSequence)
        .catch((cause: unknown) => (asLaminaError(cause).code === 'duplicate_id' ? 'taken' : undefined));
      if (this.isClosed) return;
      // A stream that fails must not keep the client.
      if (typeof stored === 'number' || (stored === undefined && isUnheard)) {
        this.#deliver([end]);
        this.#links.publishCancel(this.id);
        return;
      }
    }
    this.#links.publishCancel(this.id);
    void this.#repair();
    this.#after(CANCEL_RETRY_MS, () => this.#giveUp(reason, attempt + 1));
  }

  #endOf(reason: 'cancelled' | 'deadline_exceeded'): TokenMessage {
    const completionTokens = this.#nextIndex;
    if (reason === 'deadline_exceeded') return failedEnd(this.id, completionTokens, deadlineExceeded());
    return cancelledEnd(this.id, { promptTokens: this.#promptTokens, completionTokens });
  }

  #after(delayMs: number, run: () => Promise<void>): void {
    if (this.isClosed) return;
    const timer = setTimeout(
      () => {
        this.#timers.delete(timer);
        if (!this.isClosed) void run();
      },
      Math.min(delayMs, MAX_TIMER_MS),
    );
    this.#timers.add(timer);
  }

  #close(): void {
    this.#phase = 'closed';
    this.#source.stop();
    for (const timer of this.#timers) clearTimeout(timer);
    this.#timers.clear();
  }
}

function checkMessages(messages: readonly TokenMessage[], requestId: string): void {
  messages.forEach((message, position) => {
    if (message.id !== requestId || message.index !== messages[0]!.index + position) {
      throw new LaminaError('protocol_violation', `token ${message.index} of ${message.id} is out of place`);
    }
  });
}
