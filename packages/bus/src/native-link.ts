/**
 * Owns the native tensor link: logging in to nats-server, subscriptions, connecting again.
 * https://docs.nats.io/reference/reference-protocols/nats-protocol
 *
 * Invariants
 * 1. The first connection is retried for `connectTimeoutMs` and then fails with one clear error; one that was once made is
 *    remade for ever, with its subscriptions.
 * 2. What is published without a connection is lost: whoever must be heard waits for an answer and tries again.
 * 3. A connection on which nothing answers for MAX_UNANSWERED_PINGS pings is cut; one whose own thread was busy is not.
 * 4. A callback that throws is reported and changes nothing else.
 * 5. `reconnect` is told before anything that comes on the new connection.
 * 6. A connection that had lasted is remade at once: whoever waits for what was on its way waits for that alone.
 */
import { lookup } from 'node:dns/promises';
import { asLaminaError, LaminaError } from '@lamina/tensor';
import type { Subscription } from './bus.ts';
import type { BusEvents } from './bus-message.ts';
import {
  type BusOptions,
  MAX_UNANSWERED_PINGS,
  PING_INTERVAL_MS,
  RETRY_INTERVAL_MS,
  readPassword,
  refused,
  serversOf,
  unreachable,
} from './connection.ts';
import { LINE_KIND, NativeSocket, type SocketEvents } from './native-socket.ts';
import { readServerInfo, type ServerInfo } from './server-info.ts';
import type { HeldMemory, LinkMessage, LinkStatus, TensorLink } from './tensor-link.ts';

const LOGIN_TIMEOUT_MS = 5_000;
const CLOSE_TIMEOUT_MS = 2_000;
const DEFAULT_PORT = 4222;
const DEFAULT_MAX_PAYLOAD_BYTES = 1_048_576;

interface Waiter {
  readonly resolve: () => void;
  readonly reject: (error: LaminaError) => void;
}

interface NativeSubscription {
  readonly subject: string;
  readonly callback: (message: LinkMessage) => void;
  readonly handler: object | undefined;
}

/** Another address or another time may do. */
class ConnectionFailed extends Error {}

class LoginRefused extends Error {}

class TlsRequired extends Error {}

/** The one message that callbacks see, one after the other: a view of the socket's line. */
class SocketMessage implements LinkMessage {
  socket: NativeSocket | undefined;

  get #line(): NativeSocket {
    if (this.socket === undefined) throw new LaminaError('internal', 'a message of a link is read after its callback');
    return this.socket;
  }

  get subject(): string {
    return this.#line.text;
  }

  get data(): Uint8Array {
    return this.#line.payload;
  }

  get reply(): string | undefined {
    return this.#line.reply || undefined;
  }

  hold(): HeldMemory {
    return this.#line.hold();
  }
}

export class NativeLink implements TensorLink {
  readonly kind = 'native';
  readonly #options: BusOptions;
  readonly #events: BusEvents;
  readonly #subscriptions = new Map<number, NativeSubscription>();
  readonly #statusCallbacks: ((status: LinkStatus) => void)[] = [];
  readonly #message = new SocketMessage();
  readonly #flushLater = (): void => {
    this.#isFlushPlanned = false;
    if (this.#hasUnsent) this.#socket?.flush();
    this.#hasUnsent = false;
  };
  /** Logged in; undefined while there is no connection. */
  #socket: NativeSocket | undefined;
  #info: ServerInfo = { maxPayloadBytes: DEFAULT_MAX_PAYLOAD_BYTES, isTlsRequired: false, otherServers: [] };
  #lastSubscription = 0;
  /** Of PINGs, in the order they were sent. */
  #pongs: Waiter[] = [];
  #numSilentPings = 0;
  #pingTimer: NodeJS.Timeout | undefined;
  #retryTimer: NodeJS.Timeout | undefined;
  #isFlushPlanned = false;
  /** Published since the socket was last told to send. */
  #hasUnsent = false;
  #isClosed = false;
  /** performance.now() of the last login; undefined before the first. */
  #loggedInAtMs: number | undefined;

  private constructor(options: BusOptions, events: BusEvents) {
    this.#options = options;
    this.#events = events;
  }

  /**
   * Undefined when the server wants TLS.
   * @throws LaminaError `nats_unreachable`
   */
  static async connect(options: BusOptions, events: BusEvents): Promise<NativeLink | undefined> {
    const link = new NativeLink(options, events);
    const deadlineMs = performance.now() + options.connectTimeoutMs;
    for (;;) {
      try {
        await link.#connectToAny();
        return link;
      } catch (cause) {
        if (cause instanceof TlsRequired) return undefined;
        if (cause instanceof LaminaError) throw cause;
        if (cause instanceof LoginRefused) throw refused(options, cause);
        if (performance.now() > deadlineMs) throw unreachable(options.url, cause);
        await new Promise((resolve) => setTimeout(resolve, RETRY_INTERVAL_MS));
      }
    }
  }

  get maxPayloadBytes(): number {
    return this.#info.maxPayloadBytes;
  }

  get isClosed(): boolean {
    return this.#isClosed;
  }

  publish(subject: string, data: Uint8Array, reply = ''): void {
    if (this.#socket === undefined) return;
    this.#socket.publish(subject, reply, data);
    this.#hasUnsent = true;
    if (this.#isFlushPlanned) return;
    this.#isFlushPlanned = true;
    queueMicrotask(this.#flushLater);
  }

  subscribe(subject: string, callback: (message: LinkMessage) => void, handler?: object): Subscription {
    const id = ++this.#lastSubscription;
    const subscription = { subject, callback, handler };
    this.#subscriptions.set(id, subscription);
    if (this.#socket !== undefined) subscribeOn(this.#socket, id, subscription);
    return {
      unsubscribe: () => {
        if (!this.#subscriptions.delete(id)) return;
        this.#socket?.detach(id);
        this.#socket?.write(`UNSUB ${id}\r\n`);
      },
    };
  }

  receive(timeoutUs: number, spinUs: number): boolean {
    const socket = this.#socket;
    if (socket === undefined) return false;
    this.#hasUnsent = false;
    return socket.wait(timeoutUs, spinUs) > 0;
  }

  onStatus(callback: (status: LinkStatus) => void): void {
    this.#statusCallbacks.push(callback);
  }

  flush(): Promise<void> {
    const socket = this.#socket;
    if (socket === undefined) return Promise.reject(connectionLost());
    return new Promise((resolve, reject) => {
      this.#pongs.push({ resolve, reject });
      socket.write('PING\r\n');
    });
  }

  async close(): Promise<boolean> {
    if (this.#isClosed) return true;
    let timer: NodeJS.Timeout | undefined;
    const tooLate = new Promise<boolean>((resolve) => {
      timer = setTimeout(() => resolve(false), CLOSE_TIMEOUT_MS);
    });
    const isSent = await Promise.race([
      this.flush().then(
        () => true,
        () => false,
      ),
      tooLate,
    ]);
    clearTimeout(timer);
    clearTimeout(this.#retryTimer);
    this.#isClosed = true;
    this.#socket?.close();
    return isSent;
  }

  /** Tries each server once. Throws the failure of the last one. */
  async #connectToAny(): Promise<void> {
    let failure: unknown;
    for (const server of new Set([...serversOf(this.#options.url), ...this.#info.otherServers])) {
      try {
        await this.#connectTo(new URL(server.includes('://') ? server : `nats://${server}`));
        return;
      } catch (cause) {
        // One that refuses us, or that we cannot log in to, is of more interest than one that is away.
        if (failure === undefined || failure instanceof ConnectionFailed) failure = cause;
      }
    }
    throw failure;
  }

  /** Tries each address of the server. Throws the failure of the last one. */
  async #connectTo(server: URL): Promise<void> {
    const addresses = await lookup(server.hostname.replace(/^\[|\]$/g, ''), { all: true });
    let failure: unknown;
    for (const { address } of addresses) {
      try {
        await this.#logIn(address, server);
        return;
      } catch (cause) {
        failure = cause;
        if (!(cause instanceof ConnectionFailed)) break;
      }
    }
    throw failure;
  }

  #logIn(address: string, server: URL): Promise<void> {
    return new Promise((resolve, reject) => {
      let isLoginSent = false;
      let isLoggedIn = false;
      const onInfo = (): void => {
        this.#learn(socket);
        if (isLoginSent) return;
        isLoginSent = true;
        if (this.#info.isTlsRequired) giveUp(new TlsRequired());
        else socket.write(this.#loginLines(server));
      };
      const onLine = (): void => {
        const { kind } = socket;
        if (isLoggedIn) this.#onLine(socket);
        else if (kind === LINE_KIND.info) {
          try {
            onInfo();
          } catch (cause) {
            giveUp(asLaminaError(cause));
          }
        } else if (kind === LINE_KIND.error) {
          const said = socket.text.trim();
          giveUp(/auth/i.test(said) ? new LoginRefused(said) : new ConnectionFailed(said));
        } else if (kind === LINE_KIND.pong) {
          isLoggedIn = true;
          clearTimeout(timer);
          this.#begin(socket);
          resolve();
        }
      };
      const onEnd = (reason: string): void => {
        clearTimeout(timer);
        if (isLoggedIn) this.#onEnd();
        else reject(new ConnectionFailed(reason));
      };
      const giveUp = (failure: Error): void => {
        reject(failure);
        socket.close();
      };
      const port = Number(server.port || DEFAULT_PORT);
      // Nothing is called before it is there: it throws, or says later what became of it.
      const socket = connectSocket(address, port, { onLine, onEnd });
      const timer = setTimeout(() => giveUp(new ConnectionFailed('no answer in time')), LOGIN_TIMEOUT_MS);
    });
  }

  /** @throws LaminaError `config_invalid` when the password cannot be read. */
  #loginLines({ username, password }: URL): string {
    const { access, name } = this.#options;
    const login =
      access?.passwordFile !== undefined
        ? { user: access.user, pass: readPassword(access.passwordFile, access.user) }
        : username !== '' && { user: decodeURIComponent(username), pass: decodeURIComponent(password) };
    const options = {
      verbose: false,
      pedantic: false,
      lang: 'lamina',
      version: '1',
      protocol: 1,
      headers: true,
      no_responders: true,
      name,
      ...login,
    };
    return `CONNECT ${JSON.stringify(options)}\r\nPING\r\n`;
  }

  #begin(socket: NativeSocket): void {
    this.#socket = socket;
    this.#numSilentPings = 0;
    for (const [id, subscription] of this.#subscriptions) subscribeOn(socket, id, subscription);
    this.#pingTimer = setInterval(() => this.#ping(socket), PING_INTERVAL_MS);
    const isFirst = this.#loggedInAtMs === undefined;
    this.#loggedInAtMs = performance.now();
    if (this.#isClosed) socket.close();
    else if (!isFirst) this.#tell('reconnect');
  }

  #ping(socket: NativeSocket): void {
    if (++this.#numSilentPings > MAX_UNANSWERED_PINGS) {
      socket.close();
      return;
    }
    const onPong = (): void => {
      this.#numSilentPings = 0;
    };
    this.#pongs.push({ resolve: onPong, reject: () => undefined });
    socket.write('PING\r\n');
  }

  #onLine(socket: NativeSocket): void {
    if (socket.kind === LINE_KIND.message) this.#onMessage(socket);
    else if (socket.kind === LINE_KIND.pong) this.#pongs.shift()?.resolve();
    else if (socket.kind === LINE_KIND.info) this.#learn(socket);
    else if (socket.kind === LINE_KIND.error)
      this.#events.onError(new LaminaError('unavailable', `nats-server says${socket.text}`), '');
  }

  #learn(socket: NativeSocket): void {
    this.#info = readServerInfo(socket.text, this.#info);
    socket.maxPayloadBytes = this.#info.maxPayloadBytes;
  }

  #onMessage(socket: NativeSocket): void {
    const subscription = this.#subscriptions.get(socket.subscription);
    if (subscription === undefined) return;
    const message = this.#message;
    message.socket = socket;
    try {
      subscription.callback(message);
    } catch (cause) {
      this.#events.onError(asLaminaError(cause), subscription.subject);
    }
    message.socket = undefined;
  }

  #onEnd(): void {
    clearInterval(this.#pingTimer);
    this.#socket = undefined;
    const pongs = this.#pongs;
    this.#pongs = [];
    for (const { reject } of pongs) reject(connectionLost());
    if (this.#isClosed) return;
    this.#tell('disconnect');
    // One that did not last so long may be cut again by the server: it is not asked more often than by retries.
    const hasLasted = performance.now() - (this.#loggedInAtMs ?? 0) >= RETRY_INTERVAL_MS;
    this.#planRetry(hasLasted ? 0 : retryDelayMs());
  }

  #planRetry(delayMs: number, isFirst = true): void {
    this.#retryTimer = setTimeout(() => {
      this.#connectToAny().catch((cause: unknown) => {
        if (this.#isClosed) return;
        if (isFirst && !(cause instanceof ConnectionFailed)) this.#complain(cause);
        // A server that restarts with other passwords refuses us until our file has ours.
        this.#planRetry(retryDelayMs(), false);
      });
    }, delayMs);
  }

  #complain(cause: unknown): void {
    const what = cause instanceof TlsRequired ? 'nats-server wants TLS now' : asLaminaError(cause).message;
    this.#events.onError(new LaminaError('unavailable', `tensors cannot be connected again: ${what}`, { cause }), '');
  }

  #tell(status: LinkStatus): void {
    for (const callback of this.#statusCallbacks) callback(status);
  }
}

const retryDelayMs = (): number => RETRY_INTERVAL_MS * (1 + Math.random());

/** @throws ConnectionFailed */
function connectSocket(address: string, port: number, events: SocketEvents): NativeSocket {
  try {
    return new NativeSocket(address, port, events);
  } catch (cause) {
    throw new ConnectionFailed(cause instanceof Error ? cause.message : String(cause));
  }
}

function subscribeOn(socket: NativeSocket, id: number, { subject, handler }: NativeSubscription): void {
  if (handler !== undefined) socket.attach(id, handler);
  socket.write(`SUB ${subject} ${id}\r\n`);
}

function connectionLost(): LaminaError {
  return new LaminaError('unavailable', 'the connection to nats-server was lost');
}
