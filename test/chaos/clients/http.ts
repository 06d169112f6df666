/**
 * Owns the HTTP client: an event stream under an id of its own (`Idempotency-Key`), taken up behind the last event that it has
 * (`Last-Event-ID`) when the connection breaks, at whichever gateway runs.
 *
 * Invariants
 * 1. Only a fault that takes a gateway allows that a connection is refused, breaks or falls silent; nothing allows a gap.
 * 2. 429 and 503 are obeyed: the client waits for the time in Retry-After and asks again. Any other status ends it.
 * 3. Who has events comes back with the same body, or reads the events of the request, in turns.
 */
import { type ServerEvent, serverEvents } from '../../server-events.ts';
import { bodyOf, sleep } from '../requests.ts';
import {
  type Asked,
  type Client,
  type Cuts,
  DEFAULT_RETRY_AFTER_MS,
  RETRY_MS,
  silenceMsOf,
  waitAfter,
} from './client.ts';
import { Received } from './received.ts';

const BUSY_STATUS = new Set([429, 503]);
const DONE = '[DONE]';

export class HttpClient implements Client {
  readonly kind = 'HTTP';
  readonly #urls: () => readonly string[];
  readonly #mayBreak: boolean;

  /** @param urls Of the gateways that run. */
  constructor(urls: () => readonly string[], cuts: Cuts) {
    this.#urls = urls;
    this.#mayBreak = cuts === 'gateways';
  }

  async answer(asked: Asked): Promise<Received> {
    const received = new Received();
    while (!asked.signal.aborted && !received.isOver) await sleep(await this.#connect(asked, received));
    return received;
  }

  /** Takes what one connection gives. Resolves with the time to wait before another, in ms. */
  async #connect({ id, request, number, signal }: Asked, received: Received): Promise<number> {
    const urls = this.#urls();
    const url = urls[(Math.floor(number / 2) + received.numConnections) % urls.length];
    const isReading = received.nextIndex > 0 && (number + received.numConnections) % 2 === 0;
    received.connect(received.nextIndex);
    if (url === undefined) return this.#broke('no gateway runs', received);
    const silenceMs = silenceMsOf(this.#mayBreak);
    const silence = new AbortController();
    const timer = setTimeout(() => silence.abort(new Error(`no event for ${silenceMs} ms`)), silenceMs);
    const headers = received.nextIndex > 0 ? { 'Last-Event-ID': String(received.nextIndex - 1) } : {};
    const either = AbortSignal.any([signal, silence.signal]);
    try {
      const response = isReading
        ? await fetch(`${url}/v1/requests/${id}/events`, { headers, signal: either })
        : await fetch(`${url}/v1/completions`, {
            method: 'POST',
            headers: { ...headers, 'Content-Type': 'application/json', 'Idempotency-Key': id },
            body: JSON.stringify({ ...bodyOf(request), stream: true }),
            signal: either,
          });
      if (response.status !== 200) return await refused(response, received);
      for await (const event of serverEvents(response)) {
        timer.refresh();
        if (event.data === DONE) return 0;
        const waitMs = takeEvent(event, received);
        if (waitMs !== undefined) return waitMs;
      }
      received.mistakes.push(`an event stream ended without ${DONE}`);
      return 0;
    } catch (cause) {
      const isExpected = signal.aborted || received.finishReason !== undefined;
      return isExpected ? 0 : this.#broke(reasonOf(cause), received);
    } finally {
      clearTimeout(timer);
    }
  }

  #broke(how: string, received: Received): number {
    if (!this.#mayBreak) received.mistakes.push(how);
    return RETRY_MS;
  }
}

/** Returns the time to wait before the client comes back, if the stream is of no more use. */
function takeEvent({ id, data }: ServerEvent, received: Received): number | undefined {
  const body = Object(JSON.parse(data));
  if (body.error !== undefined) return waitAfter(body.error, received);
  // The one route sends OpenAI's shape, the other our own.
  const { text, token, finish_reason } = body.choices?.[0] ?? body;
  if (!received.take(Number(id), token === null ? undefined : { token, text }, finish_reason))
    received.mistakes.push(`event ${id} came where another was due`);
  return received.mistakes.length > 0 ? 0 : undefined;
}

async function refused(response: Response, received: Received): Promise<number> {
  const body = await response.text();
  if (!BUSY_STATUS.has(response.status)) received.mistakes.push(`${response.status}: ${body.slice(0, 300)}`);
  const seconds = Number(response.headers.get('Retry-After') ?? Number.NaN);
  return Number.isFinite(seconds) ? seconds * 1_000 : DEFAULT_RETRY_AFTER_MS;
}

const reasonOf = (cause: unknown): string =>
  cause instanceof Error ? `${cause.message} ${String(cause.cause ?? '')}` : String(cause);
