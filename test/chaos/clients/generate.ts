/**
 * Owns the client of `lamina.v1.generate` that has chosen its id. When the replies stop, it asks again under the same id, or
 * reads `lamina.v1.tokens.<id>`; both give the answer from its first token.
 *
 * Invariants
 * 1. Only a fault that takes what is under way on NATS allows a gap, a silence, or that nobody listens.
 * 2. After an error that may be retried it asks again; any other ends it.
 */
import { type Bus, type Subscription, TokenStream } from '@lamina/bus';
import { decodeTokens, SUBJECTS } from '@lamina/protocol';
import { bodyOf, sleep } from '../requests.ts';
import { type Asked, type Client, type Cuts, RETRY_MS, silenceMsOf, waitAfter } from './client.ts';
import { Received } from './received.ts';

/** Starts a stream of replies; `onData` gets undefined when nobody listens. */
type Source = (onData: (data: Uint8Array | undefined) => void) => Subscription | Promise<Subscription>;

export class GenerateClient implements Client {
  readonly kind = 'generate';
  readonly #bus: Bus;
  readonly #stream: TokenStream;
  readonly #mayBreak: boolean;

  constructor(bus: Bus, cuts: Cuts) {
    this.#bus = bus;
    this.#stream = new TokenStream(bus, () => undefined);
    this.#mayBreak = cuts !== 'nothing';
  }

  async answer({ id, request, number, signal }: Asked): Promise<Received> {
    const body = new TextEncoder().encode(JSON.stringify({ id, ...bodyOf(request) }));
    const ask: Source = (onData) => this.#bus.requestStream(SUBJECTS.generate, body, (reply) => onData(reply?.data));
    const read: Source = (onData) => this.#stream.replay(id, onData);
    const received = new Received();
    while (!signal.aborted && !received.isOver) {
      // Who has a token knows that the request was taken, and may read.
      const isReading = received.nextIndex > 0 && (number + received.numConnections) % 2 === 0;
      await sleep(await this.#listen(isReading ? read : ask, received, signal));
    }
    return received;
  }

  /** Takes what one stream of replies gives. Resolves with the time to wait before another, in ms. */
  async #listen(source: Source, received: Received, signal: AbortSignal): Promise<number> {
    const silenceMs = silenceMsOf(this.#mayBreak);
    received.connect(0);
    let timer: NodeJS.Timeout | undefined;
    let subscription: Promise<Subscription> | undefined;
    let onAbort = (): void => undefined;
    try {
      return await new Promise<number>((resolve) => {
        let isOpen = true;
        const end = (waitMs: number): void => {
          isOpen = false;
          resolve(waitMs);
        };
        onAbort = () => end(0);
        signal.addEventListener('abort', onAbort);
        timer = setTimeout(() => end(this.#broke(`no reply for ${silenceMs} ms`, received)), silenceMs);
        subscription = Promise.resolve(
          source((data) => {
            if (!isOpen) return;
            timer?.refresh();
            const waitMs =
              data === undefined ? this.#broke('no gateway listens', received) : this.#take(data, received);
            if (waitMs !== undefined) end(waitMs);
          }),
        );
        subscription.catch((cause: unknown) => {
          if (isOpen) end(this.#broke(`the answer cannot be read: ${String(cause)}`, received));
        });
      });
    } finally {
      clearTimeout(timer);
      signal.removeEventListener('abort', onAbort);
      // It may begin only now.
      void subscription?.then(
        (started) => started.unsubscribe(),
        () => undefined,
      );
    }
  }

  /** Returns the time to wait before another stream, if this one is of no more use. */
  #take(data: Uint8Array, received: Received): number | undefined {
    for (const { index, token, text, finish_reason, error } of decodeTokens(data)) {
      if (error !== undefined) return waitAfter(error, received);
      if (!received.take(index, token === null ? undefined : { token, text }, finish_reason))
        return this.#broke(`token ${index} came where another was due`, received);
    }
    return received.isOver ? 0 : undefined;
  }

  #broke(how: string, received: Received): number {
    if (!this.#mayBreak) received.mistakes.push(how);
    return RETRY_MS;
  }
}
