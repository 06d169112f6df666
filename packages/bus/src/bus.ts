/**
 * Owns one NATS connection and the typed ways to use it: requests, events, raw messages, micro service.
 *
 * Invariants
 * 1. Every control message is schema-checked by its receiver; a failure is answered, counted and never thrown at the connection.
 * 2. Replies are `{ok: ...}` or `{error: {code, message, retryAfterMs?}}`, so an error survives the hop.
 * 3. A caller of an endpoint or of $SRV is not answered on a subject of Lamina or of the server (`reply-guard.ts`).
 * 4. Tensors do not pass here, unless there is no native link (open-tensor-link.ts).
 */
import {
  type Endpoint,
  type EventSubject,
  errorBodyOf,
  errorBodySchema,
  errorOf,
  packMessage,
  parseMessage,
  SUBJECTS,
  unpackMessage,
} from '@lamina/protocol';
import { asLaminaError, LaminaError } from '@lamina/tensor';
import {
  createInbox,
  ErrorCode,
  headers,
  type Msg,
  type NatsConnection,
  NatsError,
  type PublishOptions,
  RequestStrategy,
  type Service,
} from 'nats';
import { type BusOptions, connectToNats } from './connection.ts';
import { NO_RESPONDERS_STATUS } from './jetstream-codes.ts';
import { guardDiscovery, isForbiddenReply, secretInboxPrefix } from './reply-guard.ts';
import { StreamPublisher } from './stream-publisher.ts';

/**
 * One received message. `data` is a view at any byte alignment. nats.js never writes to a received chunk again (Node
 * reads each into new memory, a message split over chunks is copied out), so the view stays unchanged while it is held;
 * it keeps its whole chunk alive.
 */
export interface BusMessage {
  readonly subject: string;
  readonly data: Uint8Array;
  /** Subject to answer to, or undefined. */
  readonly reply: string | undefined;
  header(name: string): string | undefined;
}

export interface Subscription {
  unsubscribe(): void;
}

export interface ServiceDescription {
  /** $SRV name, one of SERVICE_NAMES. */
  readonly name: string;
  readonly version: string;
  readonly description: string;
  readonly metadata: Record<string, string>;
  /** `data` of every endpoint in the answer to $SRV.STATS. */
  readonly stats: () => unknown;
}

/** One instance's answer to $SRV.STATS. */
export interface InstanceStats {
  readonly id: string;
  readonly metadata: Readonly<Record<string, string>>;
  /** What its `stats` returned; unknown until a schema has accepted it. */
  readonly data: unknown;
}

export interface BusEvents {
  /** A handler failed or a message was malformed: for the log and the error counter. */
  readonly onError: (error: LaminaError, subject: string) => void;
}

function isNoResponders(message: Msg): boolean {
  return message.data.length === 0 && message.headers?.code === NO_RESPONDERS_STATUS;
}

const DRAIN_TIMEOUT_MS = 2_000;

/** Fields are decoded when they are read. */
class LazyMessage implements BusMessage {
  readonly #message: Msg;

  constructor(message: Msg) {
    this.#message = message;
  }

  get subject(): string {
    return this.#message.subject;
  }

  get data(): Uint8Array {
    return this.#message.data;
  }

  get reply(): string | undefined {
    return this.#message.reply || undefined;
  }

  header(name: string): string | undefined {
    return this.#message.headers?.get(name) || undefined;
  }
}

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
  #service: Service | undefined;

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
    guardDiscovery(connection, (message) => this.#mayAnswer(message));
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

  /** Announces this process as a NATS micro service: $SRV.PING, INFO and STATS. Endpoints are added with `serve`. */
  async announce(description: ServiceDescription): Promise<void> {
    this.#service = await this.#connection.services.add({
      name: description.name,
      version: description.version,
      description: description.description,
      metadata: description.metadata,
      statsHandler: () => Promise.resolve(description.stats()),
    });
    // $SRV.STATS carries `data` per endpoint only, so a service that serves nothing else needs one to be seen.
    this.#service.addEndpoint('status', {
      subject: SUBJECTS.status(this.instanceId),
      handler: (error, message) => {
        if (error === null && this.#mayAnswer(message)) message.respond(packMessage(description.stats()));
      },
    });
  }

  /** The id under which this process answers $SRV.PING. */
  get instanceId(): string {
    return this.#service?.info().id ?? '';
  }

  /** Serves an endpoint of the control plane as an endpoint of the announced micro service. Call `announce` first. */
  serve<Request, Reply>(endpoint: Endpoint<Request, Reply>, handler: (body: Request) => Reply | Promise<Reply>): void {
    if (this.#service === undefined)
      throw new LaminaError('internal', 'announce the service before it serves endpoints');
    const name = endpoint.subject.replaceAll('.', '-');
    this.#service.addEndpoint(name, {
      subject: endpoint.subject,
      handler: (error, message) => {
        if (error || !this.#mayAnswer(message)) return;
        this.#answer(endpoint, handler, message).catch((cause: unknown) =>
          this.#events.onError(asLaminaError(cause), endpoint.subject),
        );
      },
    });
  }

  async #answer<Request, Reply>(
    endpoint: Endpoint<Request, Reply>,
    handler: (body: Request) => Reply | Promise<Reply>,
    message: Msg,
  ): Promise<void> {
    try {
      const body = parseMessage(endpoint.subject, endpoint.request, unpackMessage(message.data));
      message.respond(packMessage({ ok: await handler(body) }));
    } catch (cause) {
      const error = asLaminaError(cause);
      if (error.code === 'internal' || error.code === 'protocol_violation')
        this.#events.onError(error, endpoint.subject);
      message.respond(packMessage({ error: errorBodyOf(error) }));
    }
  }

  /** Stops taking requests: every endpoint and $SRV answer ends, the connection and other subscriptions stay. */
  async withdraw(): Promise<void> {
    await this.#service?.stop();
  }

  /** Adds an endpoint that takes raw messages, in the queue group of the service. */
  serveRaw(name: string, subject: string, queue: string, handler: (message: BusMessage) => void): void {
    if (this.#service === undefined)
      throw new LaminaError('internal', 'announce the service before it serves endpoints');
    this.#service.addEndpoint(name, {
      subject,
      queue,
      handler: (error, message) => {
        if (error === null && this.#mayAnswer(message)) this.#guard(subject, () => handler(new LazyMessage(message)));
      },
    });
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
        else this.#guard(subject, () => callback(new LazyMessage(message)));
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
        this.#guard(subject, () => onReply(isNoResponders(message) ? undefined : new LazyMessage(message)));
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

  #mayAnswer({ subject, reply }: Msg): boolean {
    if (!isForbiddenReply(reply)) return true;
    this.#events.onError(
      new LaminaError('protocol_violation', `a request asks to be answered on "${reply?.slice(0, 80)}"; use an inbox`),
      subject,
    );
    return false;
  }

  #guard(subject: string, run: () => void): void {
    try {
      run();
    } catch (cause) {
      this.#events.onError(asLaminaError(cause), subject);
    }
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
