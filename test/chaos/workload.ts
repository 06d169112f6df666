/**
 * Owns the load of a chaos run: requests that are asked in several ways, followed to their end, and compared with the same
 * requests' undisturbed answers.
 *
 * Invariants
 * 1. Requests take turns with the kinds of client.
 * 2. A run leaves no client behind: when one fails, or the run is given up, the others end too before it settles.
 * 3. An answer is judged by what is stored and by what its client got (`verdict.ts`).
 */
import { type Bus, ensureStreams } from '@lamina/bus';
import { STREAMS, type TokenMessage } from '@lamina/protocol';
import type { Client } from './clients/client.ts';
import { DurableClient } from './clients/durable.ts';
import type { AnswerToken } from './clients/received.ts';
import { type ChaosRequest, sleep } from './requests.ts';
import { StoredAnswers } from './stored-answers.ts';
import { type Answered, compare } from './verdict.ts';

/** Tokens of each request. */
export type Answers = readonly (readonly AnswerToken[])[];

/** What became of the requests of one scenario, compared with the undisturbed answers. */
export interface Outcome {
  readonly requests: number;
  readonly lost: number;
  readonly doubled: number;
  readonly wrong: number;
}

const POLL_MS = 50;
const STREAM_POLL_MS = 2_000;
/** After the time of the answer itself. */
const READ_TIMEOUT_MS = 15_000;
/** An answer that takes longer counts as lost. */
const ANSWER_TIMEOUT_MS = 120_000;
const RESUME_TIMEOUT_MS = 30_000;

export class Workload {
  readonly #bus: Bus;
  readonly #stored: StoredAnswers;
  readonly #requests: readonly ChaosRequest[];
  readonly #expected: Answers;
  readonly #clients: readonly Client[];
  /** Requests that have a token and no end yet. */
  readonly #running = new Set<string>();
  /** Waits for the next token of every request that runs at a moment. */
  readonly #watches = new Set<{ startedMs: number; pending: Set<string>; delaysMs: number[] }>();
  readonly #givenUp = new AbortController();

  private constructor(bus: Bus, requests: readonly ChaosRequest[], expected: Answers, clients: readonly Client[]) {
    this.#bus = bus;
    this.#stored = new StoredAnswers(bus);
    this.#requests = requests;
    this.#expected = expected;
    this.#clients = clients;
  }

  /**
   * @param bus An ordinary client's connection.
   * @param expected What `learn` returned, on whatever cluster.
   * @param clients Requests take turns with them; default: durable prompts only.
   */
  static async create(
    bus: Bus,
    requests: readonly ChaosRequest[],
    expected: Answers = [],
    clients: readonly Client[] = [new DurableClient(bus)],
  ): Promise<Workload> {
    await ensureStreams(bus);
    return new Workload(bus, requests, expected, clients);
  }

  get numRunning(): number {
    return this.#running.size;
  }

  get #isGivenUp(): boolean {
    return this.#givenUp.signal.aborted;
  }

  /** Runs all requests undisturbed: their tokens are the truth. */
  async learn(concurrency: number): Promise<Answers> {
    const answers = await this.#answerAll('calm', concurrency, this.#requests.length, () => true);
    return answers.map(({ stored }, index) => {
      const last = stored.at(-1);
      if (stored.length !== this.#requests[index]!.maxTokens || last?.finish_reason !== 'length')
        throw new Error(`request ${index} failed without any fault: ${JSON.stringify(last)}`);
      return stored.map(({ token, text }) => ({ ...(token !== null && { token }), text }));
    });
  }

  /** Runs the requests again, all of them and then on from the first until `isOver`, while something goes wrong. */
  async run(name: string, concurrency: number, isOver: () => boolean): Promise<Outcome> {
    const answers = await this.#answerAll(name, concurrency, Number.POSITIVE_INFINITY, isOver);
    let lost = 0;
    let doubled = 0;
    let wrong = 0;
    answers.forEach((answer, index) => {
      const verdict = compare(this.#expected[index % this.#expected.length]!, answer);
      if (verdict.isLost) lost++;
      if (verdict.isWrong) wrong++;
      doubled += verdict.numDoubled;
      const { kind } = this.#clientOf(index);
      for (const problem of verdict.problems) console.log(`${idOf(name, index)} (${kind}): ${problem}`);
    });
    if (lost > 0) console.log(`${name}: ${await this.#queues()}`);
    if (this.#clients.length > 1) console.log(`${name}: ${this.#describe(answers)}`);
    return { requests: answers.length, lost, doubled, wrong };
  }

  /** How many answers of each kind there were, how many were asked for again, and how many of these in their midst. */
  #describe(answers: readonly Answered[]): string {
    return this.#clients
      .map((client) => {
        const own = answers.filter((_, index) => this.#clientOf(index) === client);
        const again = own.filter(({ received }) => received !== undefined && received.numConnections > 1);
        const resumed = again.filter(({ received }) => received !== undefined && received.numResumed > 0);
        return `${own.length} ${client.kind} (${again.length} asked again, ${resumed.length} of them in mid-answer)`;
      })
      .join(', ');
  }

  #clientOf(index: number): Client {
    return this.#clients[index % this.#clients.length]!;
  }

  /** What the queues and their consumers hold: where a lost request may be. */
  async #queues(): Promise<string> {
    const manager = await this.#bus.connection.jetstreamManager();
    const lines = [STREAMS.prompts, STREAMS.work].map(async ({ name, durableConsumer }) => {
      const { state } = await manager.streams.info(name);
      const consumer = await manager.consumers.info(name, durableConsumer);
      return JSON.stringify({ name, state, consumer });
    });
    return (await Promise.all(lines)).join('\n');
  }

  /** Notes when every request that runs now has its next token: those delays, in ms, when all of them have. */
  watch(): () => Promise<readonly number[]> {
    const watch = { startedMs: performance.now(), pending: new Set(this.#running), delaysMs: [] as number[] };
    this.#watches.add(watch);
    return async () => {
      const deadlineMs = performance.now() + RESUME_TIMEOUT_MS;
      while (watch.pending.size > 0 && !this.#isGivenUp && performance.now() < deadlineMs) await sleep(POLL_MS);
      this.#watches.delete(watch);
      return watch.delaysMs;
    };
  }

  /** Ends every client at its next step: for a run whose outcome nobody needs. */
  giveUp(): void {
    this.#givenUp.abort();
  }

  #noteToken(id: string, isLast: boolean): void {
    const nowMs = performance.now();
    for (const watch of this.#watches) if (watch.pending.delete(id)) watch.delaysMs.push(nowMs - watch.startedMs);
    if (isLast) this.#running.delete(id);
    else this.#running.add(id);
  }

  async #answerAll(name: string, concurrency: number, atMost: number, isOver: () => boolean): Promise<Answered[]> {
    const answers: Answered[] = [];
    let next = 0;
    const client = async (): Promise<void> => {
      while (!this.#isGivenUp && (next < this.#requests.length || (next < atMost && !isOver()))) {
        const index = next++;
        answers[index] = await this.#answer(idOf(name, index), index);
      }
    };
    const clients = Array.from({ length: concurrency }, async () => {
      try {
        await client();
      } catch (cause) {
        this.giveUp();
        throw cause;
      }
    });
    for (const ended of await Promise.allSettled(clients)) if (ended.status === 'rejected') throw ended.reason;
    return answers;
  }

  /** What the client has and everything that is stored of an answer, when both have its end, or when time is up. */
  async #answer(id: string, index: number): Promise<Answered> {
    const request = this.#requests[index % this.#requests.length]!;
    const deadlineMs = performance.now() + ANSWER_TIMEOUT_MS;
    let isHeard = false;
    const following = this.#stored.follow(id, ({ finish_reason }: TokenMessage) => {
      isHeard ||= finish_reason !== null;
      this.#noteToken(id, isHeard);
    });
    const signal = AbortSignal.any([this.#givenUp.signal, AbortSignal.timeout(ANSWER_TIMEOUT_MS)]);
    try {
      const received = await this.#clientOf(index).answer({ id, request, number: index, signal });
      // The end may be missed while the connection is away, and heard before it is stored, so the stream is asked for it.
      for (let waitedMs = 0; !signal.aborted; waitedMs += POLL_MS) {
        if ((isHeard || waitedMs % STREAM_POLL_MS === 0) && (await this.#stored.has(id))) break;
        await sleep(POLL_MS);
      }
      const stored = await this.#stored.read(id, deadlineMs + READ_TIMEOUT_MS, () => this.#isGivenUp);
      return { stored, received };
    } finally {
      following.unsubscribe();
      this.#running.delete(id);
    }
  }
}

const idOf = (name: string, index: number): string => `${name.replaceAll(/\W+/g, '-')}-${index}`;
