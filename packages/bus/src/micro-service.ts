/**
 * Owns this process as a NATS micro service: its answers to $SRV and its endpoints.
 * https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-32.md
 *
 * Invariants
 * 1. A request is schema-checked before its handler sees it; a failure is answered, counted and never thrown at the connection.
 * 2. Replies are `{ok: ...}` or `{error: {code, message, retryAfterMs?}}`, so an error survives the hop.
 * 3. A caller of an endpoint or of $SRV is not answered on a subject of Lamina or of the server (`reply-guard.ts`).
 */
import { type Endpoint, errorBodyOf, packMessage, parseMessage, SUBJECTS, unpackMessage } from '@lamina/protocol';
import { asLaminaError, LaminaError } from '@lamina/tensor';
import type { Msg, NatsConnection, Service } from 'nats';
import { type BusEvents, type BusMessage, guarded, LazyMessage } from './bus-message.ts';
import { guardDiscovery, isForbiddenReply } from './reply-guard.ts';

export interface ServiceDescription {
  /** $SRV name, one of SERVICE_NAMES. */
  readonly name: string;
  readonly version: string;
  readonly description: string;
  readonly metadata: Record<string, string>;
  /** `data` of every endpoint in the answer to $SRV.STATS. */
  readonly stats: () => unknown;
}

export class MicroService {
  readonly #connection: NatsConnection;
  readonly #events: BusEvents;
  #service: Service | undefined;

  constructor(connection: NatsConnection, events: BusEvents) {
    this.#connection = connection;
    this.#events = events;
    guardDiscovery(connection, (message) => this.#mayAnswer(message));
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
        if (error === null && this.#mayAnswer(message))
          guarded(this.#events, subject, () => handler(new LazyMessage(message)));
      },
    });
  }

  #mayAnswer({ subject, reply }: Msg): boolean {
    if (!isForbiddenReply(reply)) return true;
    this.#events.onError(
      new LaminaError('protocol_violation', `a request asks to be answered on "${reply?.slice(0, 80)}"; use an inbox`),
      subject,
    );
    return false;
  }
}
