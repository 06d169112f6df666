/**
 * Owns the clients of a soak that misbehave or change their mind: streams that are read, cut off or cancelled, bad bodies,
 * prompts of every length, over HTTP and NATS.
 *
 * Invariants
 * 1. Every request gets an answer that fits it: a bad body is refused as bad, a good one is answered, or refused as busy.
 *    HTTP goes to a gateway that is never killed; over NATS any gateway may answer.
 * 2. A stream of replies may end with the gateway that relays it, so only while one is killed. Its client asks again under the
 *    same id, as it would outside of a soak, and must be answered.
 */
import type { Bus } from '@lamina/bus';
import { decodeTokens, SUBJECTS, type TokenMessage } from '@lamina/protocol';
import type { Random } from './random.ts';
import { sleep } from './requests.ts';

type Act = 'stream' | 'whole' | 'hang-up' | 'cancel' | 'bad HTTP body' | 'bad NATS body' | 'long prompt';
const ACTS: readonly Act[] = ['stream', 'whole', 'hang-up', 'cancel', 'bad HTTP body', 'bad NATS body', 'long prompt'];
const BAD_BODIES = ['', '{"prompt": ', '{"prompt": 5}', '{"max_tokens": 5}', '{"prompt": "a", "top_p": -1}', '[1]'];
const TIMEOUT_MS = 60_000;
/** Without another reply. */
const NATS_SILENCE_MS = 20_000;
/** A request that is sent this long after a gateway was killed may still go to it: nats-server has to notice first. */
const DYING_MS = 1_000;
const BUSY_STATUS = new Set([429, 503]);

export class Noise {
  readonly numDone = new Map<Act, number>();
  /** What was answered as it must not be; bounded. */
  readonly mistakes: string[] = [];
  /** Over NATS: streams of replies that ended with the gateway that relayed them. */
  numCutOff = 0;
  readonly #bus: Bus;
  readonly #httpUrl: string;
  readonly #gatewayKillsMs: number[] = [];
  #numCancels = 0;

  constructor(bus: Bus, httpUrl: string) {
    this.#bus = bus;
    this.#httpUrl = httpUrl;
  }

  /** A gateway is killed now. */
  noteGatewayKill(): void {
    this.#gatewayKillsMs.push(performance.now());
  }

  async run(random: Random, isOver: () => boolean): Promise<void> {
    while (!isOver()) {
      const act = random.pick(ACTS);
      try {
        await this.#do(act, random);
        this.numDone.set(act, (this.numDone.get(act) ?? 0) + 1);
      } catch (cause) {
        if (this.mistakes.length < 50) this.mistakes.push(`${act}: ${String(cause)}`);
      }
      await sleep(random.between(0, 200));
    }
  }

  async #do(act: Act, random: Random): Promise<void> {
    const good = { prompt: 'Once upon a time', max_tokens: random.between(5, 80), ignore_eos: true };
    if (act === 'stream') this.#expectFine(await this.#post({ ...good, stream: true }));
    else if (act === 'whole') this.#expectFine(await this.#post(good));
    else if (act === 'long prompt')
      this.#expectFine(await this.#post({ ...good, prompt: 'The dog ran. '.repeat(random.between(50, 200)) }));
    else if (act === 'hang-up') await this.#hangUp({ ...good, max_tokens: 600 }, random);
    else if (act === 'cancel') await this.#cancel(random);
    else if (act === 'bad HTTP body') {
      const { status, text } = await this.#post(random.pick(BAD_BODIES));
      if (status !== 400) throw new Error(`status ${status}: ${text.slice(0, 200)}`);
    } else {
      const last = await this.#generate(random.pick(BAD_BODIES.slice(0, 5)));
      if (last.error?.code !== 'invalid_request') throw new Error(JSON.stringify(last));
    }
  }

  async #post(
    body: object | string,
    signal = AbortSignal.timeout(TIMEOUT_MS),
  ): Promise<{ status: number; text: string }> {
    const reply = await fetch(`${this.#httpUrl}/v1/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: typeof body === 'string' ? body : JSON.stringify(body),
      signal,
    });
    return { status: reply.status, text: await reply.text() };
  }

  #expectFine({ status, text }: { status: number; text: string }): void {
    if (BUSY_STATUS.has(status)) return;
    const isCutShort = text.includes('"error"');
    if (status !== 200 || isCutShort) throw new Error(`status ${status}: ${text.slice(-300)}`);
  }

  async #hangUp(body: object, random: Random): Promise<void> {
    const hangUp = new AbortController();
    setTimeout(() => hangUp.abort(), random.between(0, 500));
    const reply = await this.#post({ ...body, stream: true }, hangUp.signal).catch((cause: unknown) => cause);
    if (!(reply instanceof Error) || reply.name !== 'AbortError') this.#expectFine(Object(reply));
  }

  async #cancel(random: Random): Promise<void> {
    const id = `noise-${process.pid}-${this.#numCancels++}`;
    setTimeout(() => this.#bus.publish(SUBJECTS.cancel(id), new Uint8Array()), random.between(0, 500));
    const body = { id, prompt: 'Once upon a time', max_tokens: 600, ignore_eos: true };
    const last = await this.#generate(JSON.stringify(body));
    const isEnded = last.finish_reason === 'cancelled' || last.finish_reason === 'length';
    if (!isEnded && last.error?.code !== 'overloaded' && last.error?.code !== 'unavailable')
      throw new Error(JSON.stringify(last));
  }

  /** The last message of an answer, asked for again when a gateway was killed while it was awaited. */
  async #generate(body: string): Promise<TokenMessage> {
    for (;;) {
      const askedMs = performance.now();
      const { last, heardMs } = await this.#ask(body);
      if (last !== undefined) return last;
      // Who relayed a reply after it was not the one that was killed.
      const isCutOff = this.#gatewayKillsMs.some(
        (killedMs) => killedMs > askedMs - DYING_MS && killedMs > heardMs - DYING_MS,
      );
      if (!isCutOff) throw new Error(`no answer for ${NATS_SILENCE_MS / 1_000} s although no gateway was killed`);
      this.numCutOff++;
    }
  }

  /** `last` is undefined when no reply came for the time of silence; `heardMs`: when one came last, 0 if none did. */
  #ask(body: string): Promise<{ last: TokenMessage | undefined; heardMs: number }> {
    return new Promise((resolve) => {
      let heardMs = 0;
      const end = (last: TokenMessage | undefined): void => {
        clearTimeout(silence);
        subscription.unsubscribe();
        resolve({ last, heardMs });
      };
      const silence = setTimeout(() => end(undefined), NATS_SILENCE_MS);
      const subscription = this.#bus.requestStream(SUBJECTS.generate, new TextEncoder().encode(body), (reply) => {
        if (reply === undefined) return;
        heardMs = performance.now();
        silence.refresh();
        const last = decodeTokens(reply.data).at(-1);
        if (last !== undefined && last.finish_reason !== null) end(last);
      });
    });
  }
}
