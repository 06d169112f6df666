/**
 * Random sequences of events on an executor and a kv-manager, both real, with a bus between them that delays and loses:
 * requests come, are cancelled and taken over, steps end and fail, shards and the kv-manager die, time passes.
 *
 * After every event: no block is in two tables; a step that may still write names blocks of this executor only.
 * After every sequence: whatever state it left behind, a cluster that works again ends every request, with each token
 * once and one end, and every block is free.
 */
import { BLOCK_FIELDS, type BlockRef, decodeStepPlan, ENDPOINTS, EVENTS, FRAME_HEADER_BYTES } from '@lamina/protocol';
import { createLogger } from '@lamina/runtime';
import { type AttentionSpec, asLaminaError, LaminaError } from '@lamina/tensor';
import fc from 'fast-check';
import { afterAll, beforeAll, test, vi } from 'vitest';
import { KvClient, type KvClientOptions } from '../../services/dense-executor/src/kv-client.ts';
import { KvLease } from '../../services/dense-executor/src/kv-lease.ts';
import type { StepRequest } from '../../services/dense-executor/src/worker/messages.ts';
import { Bench, BLOCK, LAYOUT } from '../../services/dense-executor/test/executor-bench.ts';
import { KvManager } from '../../services/kv-manager/src/kv-manager.ts';

/** 100,000 with LAMINA_PROPERTIES=long. */
const NUM_SEQUENCES = process.env.LAMINA_PROPERTIES === 'long' ? 100_000 : 500;
const MAX_DRAIN_ROUNDS = 400;
const HEARTBEAT_MS = 1_000;
const HEARTBEAT_TIMEOUT_MS = 4_000;
const NUM_REQUESTS = 4;
const OWN = 'e1';
const RIVAL = 'e2';
const log = createLogger({ level: 'silent', service: 'dense-executor', instance: 'test' });
const { blockSizeTokens: _, kvDtype: __, ...spec } = LAYOUT;
const SPEC: AttentionSpec = spec;

type Kind =
  | 'admit'
  | 'cancel'
  | 'deliver'
  | 'reply'
  | 'lose'
  | 'loseEvent'
  | 'finish'
  | 'notFinite'
  | 'failStep'
  | 'rejectStep'
  | 'shardJoins'
  | 'shardLost'
  | 'rival'
  | 'rivalFrees'
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
  finish: 14,
  notFinite: 1,
  failStep: 2,
  rejectStep: 1,
  shardJoins: 2,
  shardLost: 1,
  rival: 2,
  rivalFrees: 1,
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

type CallBus = KvClientOptions['bus'];

/** Carries calls in order; the test says when each arrives, when its answer does, and what is lost. */
class LossyBus implements CallBus {
  readonly #serve: (subject: string, body: unknown) => unknown;
  readonly #calls: (() => void)[] = [];
  readonly #replies: (() => void)[] = [];
  readonly #handlers = new Map<string, (body: unknown) => void>();
  readonly #events: (() => void)[] = [];

  constructor(serve: (subject: string, body: unknown) => unknown) {
    this.#serve = serve;
  }

  request: CallBus['request'] = (endpoint, body, { timeoutMs }) =>
    new Promise((resolve, reject) => {
      // A call that was given up is still on its way.
      setTimeout(() => reject(new LaminaError('unavailable', 'no answer in time')), timeoutMs);
      this.#calls.push(() => {
        try {
          const reply = endpoint.reply.parse(this.#serve(endpoint.subject, endpoint.request.parse(body)));
          this.#replies.push(() => resolve(reply));
        } catch (cause) {
          if (!(cause instanceof LaminaError)) throw cause;
          this.#replies.push(() => reject(cause));
        }
      });
    });

  onEvent: CallBus['onEvent'] = (subject, handler) => {
    this.#handlers.set(subject.subject, (body) => handler(subject.body.parse(body)));
    return { unsubscribe: () => undefined, drain: () => Promise.resolve() };
  };

  publish(subject: string, body: unknown): void {
    this.#events.push(() => this.#handlers.get(subject)?.(body));
  }

  deliver(count: number): void {
    for (const call of this.#calls.splice(0, count)) call();
  }

  reply(count: number): void {
    for (const deliver of [...this.#events.splice(0, count), ...this.#replies.splice(0, count)]) deliver();
  }

  lose(isReply: boolean): void {
    if (isReply) this.#replies.shift();
    else this.#calls.shift();
  }

  loseEvent(): void {
    this.#events.shift();
  }
}

interface Table {
  refs: BlockRef[];
  numFreed: number;
}

class Cluster {
  readonly bench: Bench;
  readonly bus = new LossyBus((subject, body) => this.#serve(subject, body));
  readonly #lease = new KvLease();
  readonly #client: KvClient;
  #numManagers = 0;
  #manager = this.#startManager();
  /** What the kv-manager gave and was not told to take back, by executor and request. */
  readonly #tables = new Map<string, Table>();
  /** Blocks by shard id. */
  readonly #shards = new Map<string, number>();
  #numShards = 0;
  #numRequests = 0;
  readonly #admitted = new Map<string, number>();
  readonly #takenOver = new Set<string>();
  readonly #blocksOf = new WeakMap<StepRequest, readonly string[]>();

  constructor() {
    const tables = () => this.bench.executor.tables;
    this.#client = new KvClient(
      {
        bus: this.bus,
        executorId: OWN,
        modelId: 'tiny',
        spec: SPEC,
        requestTimeoutMs: 1_500,
        lease: this.#lease,
        log,
        fail: (cause) => {
          throw cause;
        },
      },
      {
        onTablesVoid: (layout) => tables().onTablesVoid(layout),
        onRequestsVoid: (ids) => tables().onRequestsVoid(ids),
        onRequestsTakenOver: (ids) => tables().onRequestsTakenOver(ids),
        onShardLost: (shardId) => tables().onShardLost(shardId),
        onCapacityFreed: (numFreeBlocks) => tables().onCapacityFreed(numFreeBlocks),
        onLeaseRenewed: () => tables().onLeaseRenewed(),
      },
    );
    this.bench = new Bench(this.#client);
  }

  async start(): Promise<void> {
    const registered = this.#client.register();
    this.bus.deliver(1);
    this.bus.reply(1);
    await registered;
    this.#join(8);
  }

  #startManager(): KvManager {
    return new KvManager({
      managerEpoch: `epoch-${this.#numManagers++}`,
      blockSizeTokens: BLOCK,
      kvDtype: LAYOUT.kvDtype,
      spreadAboveTokens: 2 * BLOCK,
      heartbeatIntervalMs: HEARTBEAT_MS,
      heartbeatTimeoutMs: HEARTBEAT_TIMEOUT_MS,
      nowMs: () => performance.now(),
      events: {
        onShardLost: (shardId) => {
          this.#shards.delete(shardId);
          this.bus.publish(EVENTS.shardLost.subject, { shardId });
        },
        onCapacityFreed: (freeBlocks) => this.bus.publish(EVENTS.capacityFreed.subject, { freeBlocks }),
        onNote: () => undefined,
      },
    });
  }

  #join(numBlocks: number): void {
    const shardId = `s${this.#numShards++}`;
    const beat = { shardId, budgetBytes: 1, kernel: 'portable' };
    if (this.#manager.shardHeartbeat({ ...beat, numBlocks: null }).layout === null) return;
    this.#manager.shardHeartbeat({ ...beat, numBlocks });
    this.#shards.set(shardId, numBlocks);
  }

  #serve(subject: string, body: unknown): unknown {
    const manager = this.#manager;
    const managerEpoch = manager.status().managerEpoch;
    switch (subject) {
      case ENDPOINTS.executorHeartbeat.subject:
        return manager.executorHeartbeat(ENDPOINTS.executorHeartbeat.request.parse(body));
      case ENDPOINTS.allocate.subject:
        return { managerEpoch, blocks: this.#allocate(ENDPOINTS.allocate.request.parse(body)) };
      case ENDPOINTS.extend.subject:
        return { managerEpoch, blocks: this.#extend(ENDPOINTS.extend.request.parse(body)) };
      case ENDPOINTS.free.subject: {
        const { requestId, executorId } = ENDPOINTS.free.request.parse(body);
        manager.free(requestId, executorId);
        this.#tables.delete(`${executorId}/${requestId}`);
        return {};
      }
      case ENDPOINTS.suspectShard.subject: {
        const { shardId } = ENDPOINTS.suspectShard.request.parse(body);
        return { isLost: !manager.hasShard(shardId) };
      }
      default:
        throw new Error(`${subject} is not served`);
    }
  }

  #allocate(body: Parameters<KvManager['allocate']>[0]): BlockRef[] {
    const key = `${body.executorId}/${body.requestId}`;
    if (this.#manager.status().executors.some(({ executorId }) => executorId === body.executorId))
      this.#tables.delete(key);
    const refs = this.#manager.allocate(body);
    this.#tables.set(key, { refs, numFreed: 0 });
    return refs;
  }

  #extend(body: Parameters<KvManager['extend']>[0]): BlockRef[] {
    const refs = this.#manager.extend(body);
    const table = this.#tables.get(`${body.executorId}/${body.requestId}`);
    if (table === undefined) throw new Error('a table was extended that is not there');
    table.refs = [...table.refs.slice(0, body.numBlocks - table.numFreed), ...refs];
    return refs;
  }

  apply({ kind, request, size }: Event): void {
    const { bench, bus } = this;
    const wave = size % 2;
    switch (kind) {
      case 'admit': {
        if (this.#admitted.size >= NUM_REQUESTS) return;
        const id = `r${this.#numRequests++}`;
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
      case 'finish':
        this.#finish(wave);
        return;
      case 'notFinite':
        this.#finish(wave, -1);
        return;
      case 'failStep':
        this.#failStep(wave, 'shard_lost');
        return;
      case 'rejectStep':
        this.#failStep(wave, 'unavailable');
        return;
      case 'shardJoins':
        if (this.#shards.size < 3) this.#join(size);
        return;
      case 'shardLost': {
        const lost = [...this.#shards.keys()][request];
        if (lost !== undefined) this.#manager.removeShard(lost, 'shard lost');
        return;
      }
      case 'rival':
        this.#takeOver(`r${request}`);
        return;
      case 'rivalFrees':
        this.#freeRival();
        return;
      case 'wait':
        this.#pass(100 * size);
        return;
      case 'stall':
        this.#pass(HEARTBEAT_TIMEOUT_MS + 1_000);
        return;
      case 'managerDies':
        this.#manager = this.#startManager();
        // The shards hear that it does not know them: they give their memory up and come again under other ids.
        this.#tables.clear();
        this.#shards.clear();
    }
  }

  /** A worker that may write ends its step; else it fails it. */
  #finish(wave: number, token = 100): void {
    const step = this.bench.steps.get(wave);
    if (step === undefined) return;
    if (!this.#lease.allows(step.leaseTerm)) this.bench.failStep(wave, 'unavailable', []);
    else if (step.shards.some(({ shardId }) => !this.#shards.has(shardId))) this.#failStep(wave, 'unavailable');
    else
      this.bench.finish(
        wave,
        Array.from(step.sampledRows, () => token),
      );
  }

  #failStep(wave: number, code: 'shard_lost' | 'unavailable'): void {
    const shardId = this.bench.steps.get(wave)?.shards[0]?.shardId;
    if (shardId !== undefined) this.bench.failStep(wave, code, [shardId]);
  }

  #takeOver(requestId: string): void {
    if (!this.#admitted.has(requestId)) return;
    try {
      this.#manager.executorHeartbeat({ executorId: RIVAL, modelId: 'tiny', spec: SPEC });
      this.#allocate({ requestId, executorId: RIVAL, numTokens: 20, maxTokens: 20, deliveryCount: 2 });
      this.#takenOver.add(requestId);
    } catch (cause) {
      if (asLaminaError(cause).code === 'internal') throw cause;
    }
  }

  #freeRival(): void {
    for (const key of [...this.#tables.keys()]) {
      const [executorId, requestId] = key.split('/');
      if (executorId !== RIVAL || requestId === undefined) continue;
      this.#manager.free(requestId, RIVAL);
      this.#tables.delete(key);
    }
  }

  #pass(ms: number): void {
    vi.advanceTimersByTime(ms);
    for (const [shardId, numBlocks] of this.#shards)
      this.#manager.shardHeartbeat({ shardId, budgetBytes: 1, kernel: 'portable', numBlocks });
    this.#manager.tick();
    const alive = new Set(this.#manager.status().executors.map(({ executorId }) => executorId));
    for (const key of [...this.#tables.keys()]) if (!alive.has(key.split('/')[0]!)) this.#tables.delete(key);
  }

  #blocksNamed(step: StepRequest): readonly string[] {
    let named = this.#blocksOf.get(step);
    if (named === undefined) {
      named = step.shards.flatMap(({ shardId, plan }) => {
        const { blocks } = decodeStepPlan(plan.subarray(FRAME_HEADER_BYTES));
        return Array.from({ length: blocks.length / BLOCK_FIELDS }, (_, i) => `${shardId}/${blocks[i * BLOCK_FIELDS]}`);
      });
      this.#blocksOf.set(step, named);
    }
    return named;
  }

  check(): void {
    const owners = new Map<string, string>();
    let numUsed = 0;
    for (const [key, { refs }] of this.#tables)
      for (const { shardId, block } of refs) {
        if (!this.#shards.has(shardId)) continue;
        const address = `${shardId}/${block}`;
        if (owners.has(address)) throw new Error(`${address} is of ${owners.get(address)} and of ${key}`);
        owners.set(address, key);
        numUsed++;
      }
    const usedBlocks = this.#manager.pools.reduce((sum, pool) => sum + pool.usedBlocks, 0);
    if (usedBlocks !== numUsed) throw new Error(`${usedBlocks} blocks are used, and ${numUsed} are in tables`);
    for (const step of this.bench.steps.values()) {
      if (!this.#lease.allows(step.leaseTerm)) continue;
      const named = this.#blocksNamed(step);
      if (new Set(named).size !== named.length) throw new Error(`a step names a block twice: ${named.join()}`);
      for (const address of named) {
        if (!this.#shards.has(address.split('/')[0]!)) continue;
        const owner = owners.get(address);
        if (owner?.startsWith(OWN) !== true) throw new Error(`a step may write to ${address}, which is of ${owner}`);
      }
    }
  }

  /** Everything works again: every request ends and every block is freed. */
  async drain(): Promise<void> {
    const { bench, bus } = this;
    this.#freeRival();
    for (let round = 0; bench.executor.requests.size > 0 || round < 3; round++) {
      if (round > MAX_DRAIN_ROUNDS) throw new Error(`stuck: ${this.#describe()}`);
      bus.deliver(Number.POSITIVE_INFINITY);
      bus.reply(Number.POSITIVE_INFINITY);
      await settle();
      this.check();
      for (const wave of [0, 1]) this.#finish(wave);
      this.check();
      if (bench.steps.size === 0) this.#pass(300);
      const room = Math.max(0, ...this.#shards.values());
      if (room < 12) this.#join(12);
    }
    for (let round = 0; round < 6; round++) {
      this.#pass(500);
      bus.deliver(Number.POSITIVE_INFINITY);
      bus.reply(Number.POSITIVE_INFINITY);
      await settle();
    }
    this.check();
    const leaked = this.#manager.pools.reduce((sum, pool) => sum + pool.usedBlocks, 0);
    if (leaked > 0) throw new Error(`${leaked} blocks are leaked: ${[...this.#tables.keys()].join()}`);
    this.#checkAnswers();
    void this.#client.stop();
  }

  #checkAnswers(): void {
    for (const [id, maxTokens] of this.#admitted) {
      const messages = this.bench.messages.filter((message) => message.id === id);
      for (const [at, { index }] of messages.entries())
        if (index !== at) throw new Error(`token ${at} of ${id} is ${index}`);
      const ends = messages.filter((message) => message.finish_reason !== null);
      const isHandedOver = ends.length === 0 && this.#takenOver.has(id) && !this.bench.completed.includes(id);
      if (isHandedOver) continue;
      if (ends.length !== 1 || messages.at(-1) !== ends[0]) throw new Error(`${id} has ${ends.length} ends`);
      if (ends[0]?.finish_reason === 'length' && messages.length !== maxTokens)
        throw new Error(`${id} has ${messages.length} tokens of ${maxTokens}`);
      if (this.bench.completed.filter((completed) => completed === id).length !== 1)
        throw new Error(`${id} was not completed once`);
    }
  }

  #describe(): string {
    const requests = [...this.bench.executor.requests.all()].map((request) => {
      const { id, phase, numTableBlocks, isStarved, isExtending, isHeldBack, isInStep, isReleasePending } = request;
      return { id, phase, numTableBlocks, isStarved, isExtending, isHeldBack, isInStep, isReleasePending };
    });
    return JSON.stringify({ requests, status: this.#manager.status().shards, steps: this.bench.steps.size });
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
    fc.asyncProperty(fc.array(event, { minLength: 5, maxLength: 60 }), async (events) => {
      const cluster = new Cluster();
      await cluster.start();
      for (const next of events) {
        cluster.apply(next);
        await settle();
        cluster.check();
      }
      await cluster.drain();
      vi.clearAllTimers();
    }),
    { numRuns: NUM_SEQUENCES },
  );
});
