/**
 * Owns the load of a chaos run: requests that are submitted durably, followed to their end, and compared with the same
 * requests' undisturbed answers.
 *
 * Invariants
 * 1. A client trusts only what the server confirmed: it submits again under the same id until it has a PubAck, and reads
 *    the answer from the stream, so what it misses while nats-server is away is still there.
 * 2. A client asks again for what could not be read just now, as long as it waits for the answer at all.
 * 3. A run leaves no client behind: when one fails, or the run is given up, the others end too before it settles.
 * 4. A token is counted by what is stored: an index twice is doubled, a missing one or a missing end is lost.
 */
import { type Bus, ensureStreams, type Subscription, TokenStream } from '@lamina/bus';
import { decodeTokens, STREAMS, SUBJECTS, type TokenMessage } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import type { Random } from './random.ts';

export interface ChaosRequest {
  readonly prompt: string;
  readonly maxTokens: number;
  readonly temperature: number;
  readonly seed: number;
}

/** Tokens of each request. */
export type Answers = readonly (readonly (number | null)[])[];

/** What became of the requests of one scenario, compared with the undisturbed answers. */
export interface Outcome {
  readonly requests: number;
  readonly lost: number;
  readonly doubled: number;
  readonly wrong: number;
}

const POLL_MS = 50;
const STREAM_POLL_MS = 2_000;
const RETRY_MS = 100;
const READ_ATTEMPT_MS = 5_000;
/** After the time of the answer itself. */
const READ_TIMEOUT_MS = 15_000;
/** An answer that takes longer counts as lost. */
const ANSWER_TIMEOUT_MS = 120_000;
const RESUME_TIMEOUT_MS = 30_000;

const OPENINGS = ['Once upon a time', 'Tom and Sam', 'The little goat', 'One day a bird', 'Lily had a red ball'];
const MIDDLES = [' went to the park', ' saw a big dog', ' was very sad', ' wanted to fly', ' found a box'];

/** Half of the requests greedy, half seeded; prompts of some 5 to 120 tokens. */
export function makeRequests(count: number, random: Random): ChaosRequest[] {
  return Array.from({ length: count }, (_, index) => ({
    prompt: `${random.pick(OPENINGS)}${random.pick(MIDDLES).repeat(random.between(1, 12))}, number ${index}.`,
    maxTokens: random.between(60, 140),
    temperature: index % 2 === 0 ? 0 : 0.8,
    seed: random.between(1, 1_000_000),
  }));
}

export class Workload {
  readonly #bus: Bus;
  readonly #stream: TokenStream;
  readonly #requests: readonly ChaosRequest[];
  /** Requests that have a token and no end yet. */
  readonly #running = new Set<string>();
  /** Waits for the next token of every request that runs at a moment. */
  readonly #watches = new Set<{ startedMs: number; pending: Set<string>; delaysMs: number[] }>();
  readonly #expected: Answers;
  #isGivenUp = false;

  private constructor(bus: Bus, requests: readonly ChaosRequest[], expected: Answers) {
    this.#bus = bus;
    this.#requests = requests;
    this.#expected = expected;
    this.#stream = new TokenStream(bus, () => undefined);
  }

  /**
   * @param bus An ordinary client's connection.
   * @param expected What `learn` returned, on whatever cluster.
   */
  static async create(bus: Bus, requests: readonly ChaosRequest[], expected: Answers = []): Promise<Workload> {
    await ensureStreams(bus);
    return new Workload(bus, requests, expected);
  }

  get numRunning(): number {
    return this.#running.size;
  }

  /** Runs all requests undisturbed: their tokens are the truth. */
  async learn(concurrency: number): Promise<Answers> {
    const answers = await this.#answerAll('calm', concurrency, this.#requests.length, () => true);
    return answers.map((answer, index) => {
      const last = answer.at(-1);
      if (answer.length !== this.#requests[index]!.maxTokens || last?.finish_reason !== 'length')
        throw new Error(`request ${index} failed without any fault: ${JSON.stringify(last)}`);
      return answer.map(({ token }) => token);
    });
  }

  /** Runs the requests again, all of them and then on from the first until `isOver`, while something goes wrong. */
  async run(name: string, concurrency: number, isOver: () => boolean): Promise<Outcome> {
    const answers = await this.#answerAll(name, concurrency, Number.POSITIVE_INFINITY, isOver);
    let lost = 0;
    let doubled = 0;
    let wrong = 0;
    answers.forEach((answer, index) => {
      const expected = this.#expected[index % this.#expected.length]!;
      const byIndex = new Map<number, number | null>();
      for (const { index: at, token } of answer) {
        if (byIndex.has(at)) doubled++;
        else byIndex.set(at, token);
      }
      if ([...byIndex].some(([at, token]) => token !== null && token !== expected[at])) wrong++;
      if (byIndex.size === expected.length && answer.at(-1)?.finish_reason === 'length') return;
      lost++;
      console.log(`${name}-${index} has ${byIndex.size} of ${expected.length} tokens; its last`, answer.at(-1));
    });
    if (lost > 0) console.log(`${name}: ${await this.#queues()}`);
    return { requests: answers.length, lost, doubled, wrong };
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
    this.#isGivenUp = true;
  }

  #noteToken(id: string, isLast: boolean): void {
    const nowMs = performance.now();
    for (const watch of this.#watches) if (watch.pending.delete(id)) watch.delaysMs.push(nowMs - watch.startedMs);
    if (isLast) this.#running.delete(id);
    else this.#running.add(id);
  }

  async #answerAll(
    name: string,
    concurrency: number,
    atMost: number,
    isOver: () => boolean,
  ): Promise<TokenMessage[][]> {
    const answers: TokenMessage[][] = [];
    let next = 0;
    const client = async (): Promise<void> => {
      while (!this.#isGivenUp && (next < this.#requests.length || (next < atMost && !isOver()))) {
        const index = next++;
        answers[index] = await this.#answer(
          `${name.replaceAll(/\W+/g, '-')}-${index}`,
          this.#requests[index % this.#requests.length]!,
        );
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

  /** Everything that is stored of an answer when its end is, or when time is up. */
  async #answer(id: string, request: ChaosRequest): Promise<TokenMessage[]> {
    const { prompt, maxTokens, temperature, seed } = request;
    const body = JSON.stringify({ id, prompt, max_tokens: maxTokens, temperature, seed, ignore_eos: true });
    const data = new TextEncoder().encode(body);
    const deadlineMs = performance.now() + ANSWER_TIMEOUT_MS;
    let isEnded = false;
    const following = this.#stream.follow(id, (message) => {
      for (const { finish_reason } of decodeTokens(message.data)) {
        isEnded ||= finish_reason !== null;
        this.#noteToken(id, isEnded);
      }
    });
    const isWaiting = (): boolean => !this.#isGivenUp && performance.now() < deadlineMs;
    try {
      while (isWaiting() && !(await this.#submitted(id, data))) await sleep(RETRY_MS);
      // What is heard live may miss a message while the connection is away, so now and then the stream is asked.
      for (let waitedMs = POLL_MS; !isEnded && isWaiting(); waitedMs += POLL_MS) {
        await sleep(POLL_MS);
        if (waitedMs % STREAM_POLL_MS === 0) isEnded = await this.#isStored(id);
      }
      return await this.#read(id, deadlineMs + READ_TIMEOUT_MS);
    } finally {
      following.unsubscribe();
      this.#running.delete(id);
    }
  }

  async #isStored(id: string): Promise<boolean> {
    const end = await this.#stream.endOf(id).catch(() => undefined);
    return end?.isComplete === true;
  }

  /** What is stored, read again until it can be: the server may be away at this moment. */
  async #read(id: string, deadlineMs: number): Promise<TokenMessage[]> {
    for (;;) {
      try {
        return await this.#stored(id);
      } catch (cause) {
        const mayRetry = cause instanceof LaminaError && cause.retryable && performance.now() < deadlineMs;
        if (this.#isGivenUp) return [];
        if (!mayRetry) throw cause;
        await sleep(RETRY_MS);
      }
    }
  }

  /** All that is stored of an answer, tokens that were stored twice included. */
  async #stored(id: string): Promise<TokenMessage[]> {
    const end = await this.#stream.endOf(id);
    const tokens: TokenMessage[] = [];
    if (end === undefined) return tokens;
    const unreadable = (cause?: unknown): LaminaError =>
      new LaminaError('unavailable', `the answer of ${id} cannot be read`, { cause });
    let timer: NodeJS.Timeout | undefined;
    let replay: Promise<Subscription> | undefined;
    try {
      await new Promise<void>((resolve, reject) => {
        timer = setTimeout(() => reject(unreadable()), READ_ATTEMPT_MS);
        const take = (message: Uint8Array, _isFinal: boolean, sequence: number): void => {
          if (sequence <= end.sequence) tokens.push(...decodeTokens(message));
          if (sequence >= end.sequence) resolve();
        };
        replay = this.#stream.replay(id, take);
        replay.catch((cause: unknown) => reject(unreadable(cause)));
      });
    } finally {
      clearTimeout(timer);
      // It may begin only now.
      void replay?.then(
        (subscription) => subscription.unsubscribe(),
        () => undefined,
      );
    }
    return tokens;
  }

  async #submitted(id: string, data: Uint8Array): Promise<boolean> {
    try {
      await this.#bus.connection.jetstream().publish(SUBJECTS.prompts, data, { msgID: id, timeout: 2_000 });
      return true;
    } catch {
      return false;
    }
  }
}

export const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));
