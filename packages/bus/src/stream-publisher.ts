/**
 * Owns publishing messages to a stream and hearing whether they are stored. nats.js does that by a request for each, with a timer,
 * an error made in advance and a subject of its own; of an executor's tokens there are hundreds a second.
 *
 * Invariants
 * 1. One subscription hears all confirmations; a message costs a publish and an entry of a map. One timer, while any is waited for,
 *    sees to those that are late.
 * 2. Every message has one outcome, at the latest `timeoutMs` and one tick after it was published.
 */
import {
  createInbox,
  ErrorCode,
  type Msg,
  type MsgHdrs,
  type NatsConnection,
  NatsError,
  type Subscription,
} from 'nats';
import { NO_RESPONDERS_STATUS } from './jetstream-codes.ts';

const TICK_MS = 250;

/** What the server says of a message that it did not store (JSApiErr). */
export interface StreamRefusal {
  readonly code: number;
  readonly errCode: number;
  readonly description: string;
}

/** `unheard`: nobody listens on the subject. `late`: nobody has said anything in time. `failed`: it was not even sent. */
export type StoreOutcome =
  | { readonly kind: 'stored'; readonly sequence: number }
  | { readonly kind: 'refused'; readonly refusal: StreamRefusal }
  | { readonly kind: 'unheard' }
  | { readonly kind: 'late' }
  | { readonly kind: 'forbidden' }
  | { readonly kind: 'failed'; readonly cause: unknown };

interface Waiting {
  readonly subject: string;
  readonly deadlineMs: number;
  readonly settle: (outcome: StoreOutcome) => void;
}

export class StreamPublisher {
  readonly #connection: NatsConnection;
  readonly #timeoutMs: number;
  readonly #inbox: string;
  readonly #waiting = new Map<number, Waiting>();
  #subscription: Subscription | undefined;
  #numPublished = 0;
  #timer: NodeJS.Timeout | undefined;

  constructor(connection: NatsConnection, inboxPrefix: string | undefined, timeoutMs: number) {
    this.#connection = connection;
    this.#timeoutMs = timeoutMs;
    this.#inbox = `${createInbox(inboxPrefix)}.`;
  }

  publish(subject: string, data: Uint8Array, headers: MsgHdrs): Promise<StoreOutcome> {
    const number = this.#numPublished++;
    return new Promise((settle) => {
      try {
        this.#subscription ??= this.#listen();
        this.#connection.publish(subject, data, { reply: this.#inbox + number.toString(36), headers });
      } catch (cause) {
        settle({ kind: 'failed', cause });
        return;
      }
      this.#waiting.set(number, { subject, deadlineMs: performance.now() + this.#timeoutMs, settle });
      this.#timer ??= setInterval(() => this.#settleLate(), TICK_MS);
    });
  }

  #listen(): Subscription {
    void this.#hearRefusals();
    return this.#connection.subscribe(`${this.#inbox}*`, {
      callback: (error, message) => {
        if (error !== null) return;
        const number = Number.parseInt(message.subject.slice(this.#inbox.length), 36);
        this.#settle(number, outcomeOf(message));
      },
    });
  }

  /** A server that does not let us publish says so of the subject, not of the message. */
  async #hearRefusals(): Promise<void> {
    for await (const { permissionContext } of this.#connection.status()) {
      if (permissionContext?.operation !== 'publish') continue;
      for (const [number, { subject }] of this.#waiting)
        if (subject === permissionContext.subject) this.#settle(number, { kind: 'forbidden' });
    }
  }

  #settle(number: number, outcome: StoreOutcome): void {
    const waiting = this.#waiting.get(number);
    if (waiting === undefined) return;
    this.#waiting.delete(number);
    if (this.#waiting.size === 0) {
      clearInterval(this.#timer);
      this.#timer = undefined;
    }
    waiting.settle(outcome);
  }

  #settleLate(): void {
    const nowMs = performance.now();
    const isClosed = this.#connection.isClosed();
    // In the order in which they were published.
    for (const [number, { deadlineMs }] of this.#waiting) {
      if (deadlineMs > nowMs && !isClosed) return;
      this.#settle(number, { kind: 'late' });
    }
  }
}

function outcomeOf(message: Msg): StoreOutcome {
  if (message.headers?.code === NO_RESPONDERS_STATUS) return { kind: 'unheard' };
  try {
    const { seq, error } = message.json<{
      seq?: number;
      error?: { code: number; err_code: number; description: string };
    }>();
    if (error !== undefined) {
      const { code, err_code: errCode, description } = error;
      return { kind: 'refused', refusal: { code, errCode, description } };
    }
    if (typeof seq === 'number' && seq > 0) return { kind: 'stored', sequence: seq };
    return { kind: 'failed', cause: new NatsError('a confirmation without a sequence', ErrorCode.JetStreamInvalidAck) };
  } catch (cause) {
    return { kind: 'failed', cause };
  }
}
