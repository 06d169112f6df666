/**
 * Owns the set of open relays: from a body on `lamina.v1.generate` to an answer, cancels, reconnections, drain.
 *
 * Invariants
 * 1. Every body that came with a reply subject gets exactly one last message; one without is counted and not run.
 * 2. The same id twice is one request: whoever asks again gets its whole answer, from any gateway.
 * 3. At most `maxOpenRequests` relays are open, and `maxOpenPerClient` of one client, those in admission included.
 * 4. A request whose client has gone, over HTTP or NATS, is cancelled, unless the client chose its id.
 * 5. A request whose client chose the id outlives its client's connection and this gateway: the client can ask any gateway for
 *    the rest. Once it is submitted, nothing is held here for a client that has gone.
 */
import { randomBytes } from 'node:crypto';
import type { BusMessage, WorkQueue } from '@lamina/bus';
import {
  encodingOf,
  FINAL_HEADER,
  type GenerateRequest,
  idSchema,
  type ParsedGenerateBody,
  parseGenerateBody,
  requestIdOf,
  SUBJECTS,
} from '@lamina/protocol';
import type { Logger, ServiceContext } from '@lamina/runtime';
import { asLaminaError, LaminaError } from '@lamina/tensor';
import { CLIENT_HEADER, clientIdOf } from './client-id.ts';
import type { GatewayMetrics } from './gateway-metrics.ts';
import { OpenRelays } from './open-relays.ts';
import { type PreparationParts, prepare } from './preparation.ts';
import { type AnswerSink, EXECUTOR_ANSWER_MS, Relay, type RelayEvents, type RelayLinks } from './relay.ts';
import type { RequestState } from './request-state.ts';
import { type IsMeant, StrayCancels } from './stray-cancels.ts';
import { type ReplyWatch, UnheardReplies } from './unheard-replies.ts';
import type { Turn, WaitingRoom } from './waiting-room.ts';

export interface GatewayParts extends PreparationParts {
  readonly links: RelayLinks;
  readonly room: Pick<WaitingRoom, 'enter' | 'retryAfterMs'>;
  readonly queue: Pick<WorkQueue, 'submittedAtMs'>;
  /**
   * Publishes one reply; `headers` is empty for all but the last. `name`: under which `handleUnheard` is called if nobody
   * listened; undefined = it is not to be called.
   */
  readonly reply: (
    subject: string,
    data: Uint8Array,
    headers: Readonly<Record<string, string>>,
    name: string | undefined,
  ) => void;
  readonly maxOpenRequests: number;
  readonly maxOpenPerClient: number;
  readonly log: Pick<Logger, 'debug'>;
  readonly complain: ServiceContext['complain'];
}

const ID_BYTES = 15;
const NO_HEADERS = {};
const FINAL_HEADERS = { [FINAL_HEADER]: 'true' };

export class Gateway {
  readonly #parts: GatewayParts;
  readonly #metrics: () => GatewayMetrics;
  readonly #open = new OpenRelays<Relay>();
  /** Of those that wait for a place in the work queue. */
  readonly #turns = new Map<Relay, Turn>();
  /** Those whose clients chose the id. */
  readonly #named = new WeakSet<Relay>();
  /** Of those, whose client has gone before the request was submitted. */
  readonly #left = new WeakSet<Relay>();
  readonly #unheard = new UnheardReplies();
  readonly #strays = new StrayCancels(EXECUTOR_ANSWER_MS, (id, isMeant) => this.#endStray(id, isMeant));
  /** Aborted when the relay closes, so that its prompt gives up its place before the tokenizer. */
  readonly #closing = new WeakMap<Relay, AbortController>();
  #onIdle: (() => void) | undefined;

  /** `metrics` is asked late, because the gauge in it reads this gateway. */
  constructor(parts: GatewayParts, metrics: () => GatewayMetrics) {
    this.#parts = parts;
    this.#metrics = metrics;
  }

  get openRequests(): number {
    return this.#open.size;
  }

  /** One message on `lamina.v1.generate`. */
  handleGenerate(message: Pick<BusMessage, 'data' | 'reply' | 'header'>): void {
    const { reply, data } = message;
    if (reply === undefined) {
      this.#metrics().ignored.inc({ reason: 'no_reply' });
      this.#parts.log.debug('a prompt without a reply subject was ignored');
      return;
    }
    let watch: ReplyWatch | undefined;
    const sink: AnswerSink = {
      send: (_, bytes, isFinal) => {
        if (isFinal) watch?.end();
        this.#parts.reply(reply, bytes, isFinal ? FINAL_HEADERS : NO_HEADERS, watch?.next());
      },
    };
    let parsed: ParsedGenerateBody;
    let client: string;
    try {
      client = clientIdOf(message.header(CLIENT_HEADER));
      parsed = parseGenerateBody(data);
    } catch (cause) {
      const relay = this.#createRelay(requestIdOf(data) ?? createId(), encodingOf(data), sink);
      this.#fail(relay, cause);
      return;
    }
    const relay = this.open(parsed, sink, client);
    if (!relay.isClosed) watch = this.#unheard.watch(() => this.hangUp(relay));
  }

  /** Nobody listened to the reply of that name. */
  handleUnheard(name: string): void {
    this.#unheard.unheard(name);
  }

  /**
   * Starts answering a request into `sink`. The one entrance for every protocol that a gateway speaks.
   * @param id Under which the cluster knows it, where that is not what the client calls it.
   */
  open({ request, encoding }: ParsedGenerateBody, sink: AnswerSink, client: string, id?: string): Relay {
    const relay = this.#createRelay(id ?? request.id ?? createId(), encoding, sink);
    if (request.id !== undefined) this.#named.add(relay);
    if (this.#enter(relay, client))
      this.#start(relay, request, encoding, client)
        .catch((cause: unknown) => this.#fail(relay, cause))
        .finally(() => this.#left.has(relay) && this.unfollow(relay));
    return relay;
  }

  /** Sends the answer of a request that is known already into `sink`, from its start. */
  follow(id: string, sink: AnswerSink, client: string): Relay {
    const relay = this.#createRelay(id, 'json', sink);
    this.#named.add(relay);
    if (this.#enter(relay, client)) void relay.attach();
    return relay;
  }

  /** Who read the answer of a request that is somebody's has gone. */
  unfollow(relay: Relay): void {
    const wasCancelling = relay.stop();
    this.#leave(relay);
    if (wasCancelling && !this.#open.has(relay.id)) this.#endStrayLater(relay.id);
  }

  /** The client has gone: nobody wants the rest, unless it was named: then that goes on, and may be asked for again. */
  hangUp(relay: Relay): void {
    if (relay.isClosed) return;
    if (!this.#named.has(relay)) this.requestCancel(relay.id);
    else if (relay.isOpen) this.unfollow(relay);
    else this.#left.add(relay);
  }

  /** Cancels a request wherever it is, as a message on its cancel subject does. */
  requestCancel(requestId: string): void {
    this.#parts.links.publishCancel(requestId);
  }

  async stateOf(requestId: string): Promise<RequestState> {
    if (this.#open.has(requestId)) return 'working';
    return this.#parts.links.locate(requestId);
  }

  #enter(relay: Relay, client: string): boolean {
    const { maxOpenRequests, maxOpenPerClient } = this.#parts;
    if (this.#open.size >= maxOpenRequests)
      this.#fail(relay, this.#overloaded(`this gateway answers ${maxOpenRequests} requests already`));
    else if (this.#open.numOf(client) >= maxOpenPerClient)
      this.#fail(relay, this.#overloaded(`the client "${client}" has ${maxOpenPerClient} requests open already`));
    else {
      this.#open.add(relay, client);
      return true;
    }
    return false;
  }

  #overloaded(reason: string): LaminaError {
    const { retryAfterMs } = this.#parts.room;
    return new LaminaError('overloaded', `${reason}; retry later`, { retryAfterMs });
  }

  #leave(relay: Relay): void {
    if (!this.#open.delete(relay)) return;
    this.#turns.get(relay)?.withdraw();
    this.#turns.delete(relay);
    if (this.#open.size === 0) this.#onIdle?.();
  }

  /** One message on `lamina.v1.cancel.<id>`. */
  handleCancel(subject: string): void {
    const id = idSchema.safeParse(subject.slice(subject.lastIndexOf('.') + 1));
    if (id.success) for (const relay of this.#open.of(id.data)) relay.cancel();
    else this.#metrics().ignored.inc({ reason: 'bad_cancel_id' });
  }

  /** The same message at one gateway of all: sees to a request that nobody waits for and no executor may have. */
  handleStrayCancel(subject: string): void {
    const id = idSchema.safeParse(subject.slice(subject.lastIndexOf('.') + 1));
    if (id.success && !this.#open.has(id.data)) this.#endStrayLater(id.data);
  }

  #endStrayLater(id: string): void {
    if (!this.#strays.add(id)) this.#metrics().ignored.inc({ reason: 'too_many_cancels' });
  }

  async #endStray(id: string, isMeant: IsMeant): Promise<void> {
    try {
      if ((await this.#parts.links.locate(id)) !== 'working') return;
      const submittedAtMs = await this.#parts.queue.submittedAtMs(id);
      if (submittedAtMs === undefined || !isMeant(submittedAtMs)) return;
      await new Promise<void>((resolve, reject) => {
        const sink: AnswerSink = { send: (_, __, isFinal) => isFinal && resolve() };
        const relay = this.#createRelay(id, 'json', sink);
        this.#open.add(relay, undefined);
        relay.attach().then(() => relay.cancel(), reject);
      });
    } catch (cause) {
      this.#parts.complain(cause, SUBJECTS.cancel(id));
    }
  }

  /** Messages may have been lost while the connection was down. */
  handleReconnect(): void {
    for (const relay of this.#open.all()) void relay.reconnected();
  }

  /** Waits for the open relays; what is still open after `graceMs` is answered as unavailable, and runs on if it was named. */
  async drain(graceMs: number): Promise<void> {
    this.#strays.stop();
    if (this.#open.size === 0) return;
    let timer: NodeJS.Timeout | undefined;
    const idle = new Promise<void>((resolve) => {
      this.#onIdle = resolve;
    });
    const grace = new Promise<void>((resolve) => {
      timer = setTimeout(resolve, graceMs);
    });
    await Promise.race([idle, grace]);
    clearTimeout(timer);
    for (const relay of this.#open.all()) {
      const isNamed = this.#named.has(relay);
      if (!isNamed) this.#parts.links.publishCancel(relay.id);
      const advice = isNamed ? 'ask another with the same id for the rest' : 'retry later';
      this.#fail(relay, new LaminaError('unavailable', `the gateway shuts down; ${advice}`));
    }
  }

  async #start(
    relay: Relay,
    request: GenerateRequest,
    encoding: ParsedGenerateBody['encoding'],
    client: string,
  ): Promise<void> {
    const receivedAtMs = Date.now();
    const state = request.id === undefined ? 'unknown' : await this.#parts.links.locate(relay.id);
    if (state === 'working' || state === 'ended') return this.#left.has(relay) ? undefined : relay.attach();
    const isContinued = state === 'cut';
    const closing = new AbortController();
    this.#closing.set(relay, closing);
    const origin = { id: relay.id, encoding, client, receivedAtMs, isContinued, signal: closing.signal };
    const item = await prepare(this.#parts, request, origin);
    relay.admitted(item);
    if (relay.isClosed) return;
    const turn = this.#parts.room.enter(item, client);
    this.#turns.set(relay, turn);
    const place = await turn.place;
    this.#turns.delete(relay);
    if (place === undefined) return;
    try {
      await relay.submit(item, this.#named.has(relay));
    } finally {
      place.release();
    }
  }

  #createRelay(id: string, encoding: ParsedGenerateBody['encoding'], sink: AnswerSink): Relay {
    const metrics = this.#metrics();
    const startedAt = performance.now();
    let lastTokensAt: number | undefined;
    const events: RelayEvents = {
      onTokens: (count) => {
        const now = performance.now();
        if (lastTokensAt === undefined) metrics.timeToFirstTokenSeconds.observe((now - startedAt) / 1000);
        else metrics.interTokenSeconds.observe((now - lastTokensAt) / 1000 / count);
        lastTokensAt = now;
        metrics.tokens.inc(count);
      },
      onRepair: () => metrics.repairs.inc(),
      onClosed: (relay, outcome) => {
        this.#closing.get(relay)?.abort();
        metrics.requests.inc({ outcome });
        this.#leave(relay);
      },
    };
    return new Relay(id, encoding, sink, this.#parts.links, events);
  }

  #fail(relay: Relay, cause: unknown): void {
    const error = asLaminaError(cause);
    if (error.code === 'internal') this.#parts.complain(error, SUBJECTS.tokens(relay.id));
    relay.fail(error);
  }
}

/** A new id of a request, safe as a subject token. */
export function createId(): string {
  return randomBytes(ID_BYTES).toString('base64url');
}
