/**
 * Owns one NATS connection and the typed ways to use it: requests, events, raw messages. What it serves is `service`.
 *
 * Invariants
 * 1. Replies and events are schema-checked; a handler that fails is reported and never throws at the connection.
 * 2. Tensors do not pass here, unless there is no native link (open-tensor-link.ts).
 */
import {
  type Endpoint,
  type EventSubject,
  errorBodySchema,
  errorOf,
  packMessage,
  parseMessage,
  unpackMessage,
} from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import {
  createInbox,
  ErrorCode,
  headers,
  type Msg,
  type NatsConnection,
  NatsError,
  type PublishOptions,
  RequestStrategy,
} from 'nats';
import { type BusEvents, type BusMessage, guarded, LazyMessage } from './bus-message.ts';
import { type BusOptions, connectToNats } from './connection.ts';
import { NO_RESPONDERS_STATUS } from './jetstream-codes.ts';
import { MicroService } from './micro-service.ts';
import { secretInboxPrefix } from './reply-guard.ts';
import { StreamPublisher } from './stream-publisher.ts';

export interface Subscription {
  unsubscribe(): void;
}

/** One instance's answer to $SRV.STATS. */
export interface InstanceStats {
  readonly id: string;
  readonly metadata: Readonly<Record<string, string>>;
  /** What its `stats` returned; unknown until a schema has accepted it. */
  readonly data: unknown;
}

function isNoResponders(message: Msg): boolean {
  return message.data.length === 0 && message.headers?.code === NO_RESPONDERS_STATUS;
}

const DRAIN_TIMEOUT_MS = 2_000;

/** What does not fit a message is refused as such: trying again would not help. */
export function tooLarge(what: string, bus: Bus, cause: unknown): LaminaError {
  const message = `${what} is larger than the ${bus.maxPayloadBytes} bytes (max_payload) that nats-server takes`;
  return new LaminaError('invalid_request', message, { cause });
}

export class Bus {
  readonly #connection: NatsConnection;
  readonly #events: BusEvents;
  readonly #inboxPrefix: string | undefined;
  readonly #user: string | undefined;
  /** What this process answers to. */
  readonly service: MicroService;

  private constructor(
    connection: NatsConnection,
    events: BusEvents,
    inboxPrefix: string | undefined,
    user: string | undefined,
  ) {
    this.#connection = connection;
    this.#events = events;
    this.#inboxPrefix = inboxPrefix;
    this.#user = user;
    this.service = new MicroService(connection, events);
  }

  /** @throws LaminaError `nats_unreachable` */
  static async connect(options: BusOptions, events: BusEvents): Promise<Bus> {
    const { access } = options;
    const user = access?.passwordFile === undefined ? undefined : access.user;
    const inboxPrefix = user === undefined ? undefined : secretInboxPrefix(user);
    return new Bus(await connectToNats(options, inboxPrefix), events, inboxPrefix, user);
  }

  /** For the JetStream parts of this package. */
  get connection(): NatsConnection {
    return this.#connection;
  }

  /** For messages of streams that are many. */
  streamPublisher(timeoutMs: number): StreamPublisher {
    return new StreamPublisher(this.#connection, this.#inboxPrefix, timeoutMs);
  }

  /** Largest message that the server takes, headers included. */
  get maxPayloadBytes(): number {
    return this.#connection.info?.max_payload ?? 1_048_576;
  }

  get isClosed(): boolean {
    return this.#connection.isClosed();
  }

  /** Resolves when the connection is closed for good. */
  get closed(): Promise<unknown> {
    return this.#connection.closed();
  }

  /** Calls back with each change of the connection: for the log. */
  onStatus(callback: (type: string, detail: string) => void): void {
    void (async () => {
      for await (const status of this.#connection.status()) callback(String(status.type), String(status.data));
    })();
  }

  /**
   * Calls an endpoint of the control plane.
   * @throws LaminaError with the code of the answer; `unavailable` when nobody answers in time; `invalid_request` when
   * the body is larger than the server takes; `protocol_violation`.
   */
  async request<Request, Reply>(
    endpoint: Endpoint<Request, Reply>,
    body: Request,
    options: { timeoutMs: number },
  ): Promise<Reply> {
    let message: Msg;
    try {
      message = await this.#connection.request(endpoint.subject, packMessage(body), { timeout: options.timeoutMs });
    } catch (cause) {
      if (cause instanceof NatsError) {
        if (cause.code === ErrorCode.MaxPayloadExceeded)
          throw tooLarge(`a request on ${endpoint.subject}`, this, cause);
        if (cause.isPermissionError()) {
          throw new LaminaError(
            'config_invalid',
            `the NATS user of this process may not publish on ${endpoint.subject}; is it of another service?`,
            { cause },
          );
        }
        throw new LaminaError('unavailable', `no ${endpoint.to} answers on ${endpoint.subject}`, {
          cause,
          diagnostics: { nats: cause.code },
        });
      }
      throw cause;
    }
    const answer = unpackMessage(message.data);
    if (typeof answer === 'object' && answer !== null && 'error' in answer) {
      throw errorOf(parseMessage(`${endpoint.subject} reply`, errorBodySchema, answer.error));
    }
    const body_ = typeof answer === 'object' && answer !== null && 'ok' in answer ? answer.ok : undefined;
    return parseMessage(`${endpoint.subject} reply`, endpoint.reply, body_);
  }

  /** Asks for a sign of life. False when nobody listens on the subject or answers in time. */
  async probe(subject: string, timeoutMs: number): Promise<boolean> {
    try {
      await this.#connection.request(subject, undefined, { timeout: timeoutMs });
      return true;
    } catch (cause) {
      if (cause instanceof NatsError && (cause.code === ErrorCode.NoResponders || cause.code === ErrorCode.Timeout))
        return false;
      throw cause;
    }
  }

  publishEvent<Body>(event: EventSubject<Body>, body: Body): void {
    this.#connection.publish(event.subject, packMessage(body));
  }

  onEvent<Body>(event: EventSubject<Body>, handler: (body: Body) => void): Subscription {
    return this.subscribe(event.subject, (message) =>
      handler(parseMessage(event.subject, event.body, unpackMessage(message.data))),
    );
  }

  /** Raw publish. The bytes must not change before the flush that follows in the same turn of the event loop. */
  publish(subject: string, data: Uint8Array, reply?: string): void {
    if (reply === undefined) this.#connection.publish(subject, data);
    else this.#connection.publish(subject, data, { reply });
  }

  /** Raw publish with headers: for answers, not for the tensor plane. */
  publishWithHeaders(
    subject: string,
    data: Uint8Array,
    entries: Readonly<Record<string, string>>,
    reply?: string,
  ): void {
    const set = headers();
    for (const [name, value] of Object.entries(entries)) set.set(name, value);
    const options: PublishOptions = { headers: set, ...(reply !== undefined && { reply }) };
    this.#connection.publish(subject, data, options);
  }

  /** Raw subscription; the callback runs as messages arrive, in order. */
  subscribe(subject: string, callback: (message: BusMessage) => void, options: { queue?: string } = {}): Subscription {
    return this.#connection.subscribe(subject, {
      ...options,
      callback: (error, message) => {
        if (error)
          this.#events.onError(
            new LaminaError('unavailable', `subscription ${subject} failed: ${error.message}`, { cause: error }),
            subject,
          );
        else guarded(this.#events, subject, () => callback(new LazyMessage(message)));
      },
    });
  }

  /**
   * Publishes a request and calls back with each reply, in order, until unsubscribed.
   * Calls back with undefined when nobody listens on the subject.
   */
  requestStream(subject: string, data: Uint8Array, onReply: (reply: BusMessage | undefined) => void): Subscription {
    const inbox = createInbox(this.#inboxPrefix);
    const subscription = this.#connection.subscribe(inbox, {
      callback: (error, message) => {
        if (error) return;
        guarded(this.#events, subject, () => onReply(isNoResponders(message) ? undefined : new LazyMessage(message)));
      },
    });
    this.#connection.publish(subject, data, { reply: inbox });
    return subscription;
  }

  /**
   * Calls back with the name of each message that nobody listened to. A message is named by its reply subject, which is
   * what the returned function makes of a name: tokens of a subject. Call once; the subjects are no secret of this process.
   */
  watchUnheard(onUnheard: (name: string) => void): (name: string) => string {
    // Another one than that of its requests: whoever gets such a message reads it.
    const prefix = this.#user === undefined ? createInbox() : secretInboxPrefix(this.#user);
    this.#connection.subscribe(`${prefix}.>`, {
      callback: (error, message) => {
        if (error === null && isNoResponders(message)) onUnheard(message.subject.slice(prefix.length + 1));
      },
    });
    return (name) => `${prefix}.${name}`;
  }

  /** What every instance of a service says about itself ($SRV.STATS) within `waitMs`. */
  async serviceStats(name: string, waitMs: number): Promise<InstanceStats[]> {
    const client = this.#connection.services.client({
      strategy: RequestStrategy.JitterTimer,
      jitter: waitMs / 2,
      maxWait: waitMs,
    });
    const instances: InstanceStats[] = [];
    try {
      for await (const { id, metadata, endpoints } of await client.stats(name)) {
        const data: unknown = endpoints?.find((endpoint) => endpoint.data !== undefined)?.data;
        instances.push({ id, metadata: metadata ?? {}, data });
      }
    } catch (cause) {
      if (!(cause instanceof NatsError)) throw cause;
    }
    return instances;
  }

  /** Sends a request to everyone who listens and collects what comes back within `waitMs`. */
  async requestAll(subject: string, waitMs: number): Promise<Uint8Array[]> {
    const answers: Uint8Array[] = [];
    try {
      const replies = await this.#connection.requestMany(subject, undefined, {
        strategy: RequestStrategy.JitterTimer,
        jitter: waitMs / 2,
        maxWait: waitMs,
      });
      for await (const reply of replies) answers.push(reply.data);
    } catch (cause) {
      if (!(cause instanceof NatsError)) throw cause;
    }
    return answers;
  }

  async flush(): Promise<void> {
    await this.#connection.flush();
  }

  /**
   * Sends what is buffered, then closes; a server that is away or does not answer is not waited for longer than 2 s.
   * @returns Whether all was sent.
   */
  async close(): Promise<boolean> {
    if (this.#connection.isClosed()) return true;
    let timer: NodeJS.Timeout | undefined;
    const tooLate = new Promise<boolean>((resolve) => {
      timer = setTimeout(() => resolve(false), DRAIN_TIMEOUT_MS);
    });
    try {
      return await Promise.race([this.#connection.drain().then(() => true), tooLate]);
    } finally {
      clearTimeout(timer);
      // A drain that failed leaves the connection open, and trying for ever.
      await this.#connection.close();
    }
  }
}
