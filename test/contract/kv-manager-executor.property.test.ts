/**
 * Random sequences of events on an executor and a kv-manager, both real, with a bus between them that delays and loses:
 * requests come, are cancelled and taken over, steps end and fail, layers are held up in a socket, shards and the
 * kv-manager die, time passes.
 *
 * After every event: no block is in two tables, or in one and behind a fence; a step that may still write names blocks of
 * this executor only, and no shard refuses it; a layer that comes late is written to nobody else's block.
 * After every sequence: whatever state it left behind, a cluster that works again ends every request, with each token
 * once and one end, no fence is left, and every block is free.
 */
import fc from 'fast-check';
import { afterAll, beforeAll, test, vi } from 'vitest';
import { Cluster } from './kv-cluster.ts';

/** 100,000 with LAMINA_PROPERTIES=long. */
const NUM_SEQUENCES = process.env.LAMINA_PROPERTIES === 'long' ? 100_000 : 500;
const MAX_DRAIN_ROUNDS = 400;
const NUM_REQUESTS = 4;

type Kind =
  | 'admit'
  | 'cancel'
  | 'deliver'
  | 'reply'
  | 'lose'
  | 'loseEvent'
  | 'send'
  | 'finish'
  | 'notFinite'
  | 'failStep'
  | 'rejectStep'
  | 'shardJoins'
  | 'shardLost'
  | 'rival'
  | 'rivalFrees'
  | 'rivalLeaves'
  | 'wait'
  | 'stall'
  | 'managerDies';
/** What `request`, `size` mean depends on the kind. */
interface Event {
  readonly kind: Kind;
  readonly request: number;
  readonly size: number;
}

const WEIGHTS: Readonly<Record<Kind, number>> = {
  admit: 6,
  cancel: 1,
  deliver: 10,
  reply: 10,
  lose: 2,
  loseEvent: 1,
  send: 5,
  finish: 14,
  notFinite: 1,
  failStep: 2,
  rejectStep: 1,
  shardJoins: 2,
  shardLost: 1,
  rival: 2,
  rivalFrees: 1,
  rivalLeaves: 1,
  wait: 4,
  stall: 1,
  managerDies: 1,
};
const KINDS = (Object.keys(WEIGHTS) as Kind[]).flatMap((kind) => Array.from({ length: WEIGHTS[kind] }, () => kind));
const event: fc.Arbitrary<Event> = fc.record({
  kind: fc.constantFrom(...KINDS),
  request: fc.nat(NUM_REQUESTS - 1),
  size: fc.integer({ min: 1, max: 7 }),
});

/** A step begins, hands a layer to its socket, and is cut off with it: chance alone seldom gets that far. */
const heldUp: fc.Arbitrary<readonly Event[]> = fc
  .tuple(event, event)
  .map(([{ request, size }, { size: sendSize }]): readonly Event[] =>
    (['admit', 'deliver', 'reply', 'send', 'stall'] as const).map((kind) => ({
      kind,
      request,
      size: kind === 'send' ? sendSize : kind === 'admit' ? size : 7,
    })),
  );
const sequence = fc.oneof(
  { weight: 3, arbitrary: fc.array(event, { minLength: 5, maxLength: 60 }) },
  {
    weight: 1,
    arbitrary: fc
      .tuple(fc.array(event, { maxLength: 5 }), heldUp, fc.array(event, { maxLength: 40 }))
      .map(([before, held, after]) => [...before, ...held, ...after]),
  },
);

/** One sequence: what was asked of the cluster, and what the answers must be. */
class Run {
  readonly #cluster = new Cluster();
  /** Tokens asked for, by request. */
  readonly #admitted = new Map<string, number>();

  async start(): Promise<void> {
    await this.#cluster.start();
  }

  async apply(event: Event): Promise<void> {
    this.#apply(event);
    await settle();
    this.#cluster.check();
  }

  #apply({ kind, request, size }: Event): void {
    const cluster = this.#cluster;
    const { bench, bus } = cluster;
    const wave = size % 2;
    switch (kind) {
      case 'admit': {
        if (this.#admitted.size >= NUM_REQUESTS) return;
        const id = `r${this.#admitted.size}`;
        const maxTokens = 4 * size;
        this.#admitted.set(id, maxTokens);
        const deadline = request === 0 ? { deadlineAtMs: Date.now() + 1_000 * size } : {};
        bench.admit({ id, numPromptTokens: 1 + 9 * size, maxTokens, ...deadline });
        return;
      }
      case 'cancel':
        bench.executor.cancel(`r${request}`);
        return;
      case 'deliver':
        bus.deliver(size);
        return;
      case 'reply':
        bus.reply(size);
        return;
      case 'lose':
        bus.lose(size > 3);
        return;
      case 'loseEvent':
        bus.loseEvent();
        return;
      case 'send':
        cluster.send(wave);
        return;
      case 'finish':
        cluster.finish(wave);
        return;
      case 'notFinite':
        cluster.finish(wave, -1);
        return;
      case 'failStep':
        cluster.failStep(wave, 'shard_lost');
        return;
      case 'rejectStep':
        cluster.failStep(wave, 'unavailable');
        return;
      case 'shardJoins':
        if (cluster.numShards < 3) cluster.join(size);
        return;
      case 'shardLost':
        cluster.loseShard(request);
        return;
      case 'rival':
        if (this.#admitted.has(`r${request}`)) cluster.rivalTakesOver(`r${request}`);
        return;
      case 'rivalFrees':
        cluster.rivalFrees();
        return;
      case 'rivalLeaves':
        cluster.rivalLeaves();
        return;
      case 'wait':
        cluster.pass(100 * size, size % 2 === 0);
        return;
      case 'stall':
        cluster.cutOff();
        return;
      case 'managerDies':
        cluster.managerDies();
    }
  }

  /** Everything works again: every request ends, every fence is lifted and every block is freed. */
  async drain(): Promise<void> {
    const cluster = this.#cluster;
    const { bench, bus } = cluster;
    cluster.rivalFrees();
    for (let round = 0; bench.executor.requests.size > 0 || round < 3; round++) {
      if (round > MAX_DRAIN_ROUNDS) throw new Error(`stuck: ${cluster.describe()}`);
      bus.deliver(Number.POSITIVE_INFINITY);
      bus.reply(Number.POSITIVE_INFINITY);
      await settle();
      cluster.check();
      for (const wave of [0, 1]) cluster.finish(wave);
      cluster.check();
      if (bench.steps.size === 0) cluster.pass(300);
      if (cluster.mostBlocksOfShard < 12) cluster.join(12);
    }
    for (let round = 0; round < 6; round++) {
      cluster.pass(500);
      bus.deliver(Number.POSITIVE_INFINITY);
      bus.reply(Number.POSITIVE_INFINITY);
      await settle();
    }
    cluster.check();
    if (cluster.numUsedBlocks > 0) throw new Error(`${cluster.numUsedBlocks} blocks are leaked`);
    this.#checkAnswers();
    cluster.stop();
  }

  #checkAnswers(): void {
    const { bench } = this.#cluster;
    for (const [id, maxTokens] of this.#admitted) {
      const messages = bench.messages.filter((message) => message.id === id);
      for (const [at, { index }] of messages.entries())
        if (index !== at) throw new Error(`token ${at} of ${id} is ${index}`);
      const ends = messages.filter((message) => message.finish_reason !== null);
      const isHandedOver = ends.length === 0 && this.#cluster.isTakenOver(id) && !bench.completed.includes(id);
      if (isHandedOver) continue;
      if (ends.length !== 1 || messages.at(-1) !== ends[0]) throw new Error(`${id} has ${ends.length} ends`);
      if (ends[0]?.finish_reason === 'length' && messages.length !== maxTokens)
        throw new Error(`${id} has ${messages.length} tokens of ${maxTokens}`);
      if (bench.completed.filter((completed) => completed === id).length !== 1)
        throw new Error(`${id} was not completed once`);
    }
  }
}

/** Lets promises and what follows from them run. */
async function settle(): Promise<void> {
  for (let turn = 0; turn < 2; turn++) await new Promise((resolve) => setImmediate(resolve));
}

beforeAll(() => {
  const toFake = [
    'setTimeout',
    'clearTimeout',
    'setInterval',
    'clearInterval',
    'hrtime',
    'performance',
    'Date',
  ] as const;
  vi.useFakeTimers({ toFake: [...toFake] });
});
afterAll(() => void vi.useRealTimers());

test(`${NUM_SEQUENCES} random sequences of events leave nothing behind`, { timeout: 3_600_000 }, async () => {
  await fc.assert(
    fc.asyncProperty(sequence, async (events) => {
      const run = new Run();
      await run.start();
      for (const next of events) await run.apply(next);
      await run.drain();
      vi.clearAllTimers();
    }),
    { numRuns: NUM_SEQUENCES },
  );
});
