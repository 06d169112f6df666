/**
 * Any sequence of operations under fake time keeps the books: no block in two tables, none given out while a fence on it
 * waits for a shard, no leak, used + free = total, order kept, and what is refused changes nothing; and fences always end.
 * The model is what callers know: the tables they were given, and the fences that shards confirmed.
 */
import type { BlockRef } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import fc from 'fast-check';
import { test } from 'vitest';
import { BLOCK, Fixture } from './fixture.ts';

/** vitest's expect costs more than the operations do. */
function equal(actual: unknown, expected: unknown): void {
  if (actual !== expected) throw new Error(`${String(actual)} where ${String(expected)} belongs`);
}

/** 100,000 with LAMINA_PROPERTIES=long. */
const NUM_SEQUENCES = process.env.LAMINA_PROPERTIES === 'long' ? 100_000 : 10_000;
const EXECUTORS = ['e0', 'e1'];
const SHARD_SLOTS = 3;

type Operation =
  | {
      readonly kind: 'allocate';
      readonly request: number;
      readonly executor: number;
      readonly blocks: number;
      readonly deliveryCount: number;
    }
  | {
      readonly kind: 'extend';
      readonly request: number;
      readonly executor: number;
      readonly blocks: number;
      readonly isAnswerLost: boolean;
    }
  | { readonly kind: 'trim'; readonly request: number; readonly executor: number; readonly blocks: number }
  | { readonly kind: 'free'; readonly request: number; readonly executor: number }
  | { readonly kind: 'join' | 'leave' | 'shardBeat'; readonly shard: number; readonly blocks: number }
  | { readonly kind: 'executorBeat' | 'executorLeave'; readonly executor: number }
  | { readonly kind: 'confirm'; readonly shard: number; readonly count: number }
  | { readonly kind: 'stranger'; readonly shard: number; readonly blocks: number }
  | { readonly kind: 'forgive' }
  | { readonly kind: 'wait'; readonly ms: number };

const request = fc.nat(3);
const executor = fc.nat(1);
const shard = fc.nat(SHARD_SLOTS - 1);
const blocks = fc.integer({ min: 1, max: 9 });
const operation: fc.Arbitrary<Operation> = fc.oneof(
  {
    weight: 5,
    arbitrary: fc.record({
      kind: fc.constant('allocate' as const),
      request,
      executor,
      blocks,
      deliveryCount: fc.integer({ min: 1, max: 3 }),
    }),
  },
  {
    weight: 5,
    arbitrary: fc.record({
      kind: fc.constant('extend' as const),
      request,
      executor,
      blocks,
      isAnswerLost: fc.boolean(),
    }),
  },
  { weight: 4, arbitrary: fc.record({ kind: fc.constant('trim' as const), request, executor, blocks }) },
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('free' as const), request, executor }) },
  {
    weight: 5,
    arbitrary: fc.record({ kind: fc.constantFrom('join', 'join', 'leave', 'shardBeat'), shard, blocks }),
  },
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('executorBeat' as const), executor }) },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('executorLeave' as const), executor }) },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('confirm' as const), shard, count: fc.nat(3) }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant('stranger' as const), shard, blocks }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant('forgive' as const) }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant('wait' as const), ms: fc.constantFrom(500, 2000, 4000) }) },
);

/** A table that its owner has not given up: the blocks that it has, after those that it gave back. */
interface OwnTable {
  readonly executor: number;
  readonly request: number;
  readonly deliveryCount: number;
  state: 'live' | 'shardLost' | 'takenOver';
  numFreed: number;
  readonly refs: BlockRef[];
  /** Blocks that the owner was told of, those that it gave back included. */
  numKnown: number;
}

/** Blocks of an executor that is no more. */
interface OwnFence {
  readonly refs: readonly BlockRef[];
  readonly waitingFor: Set<string>;
}

/** Runs operations on a kv-manager and on the callers' view of it, and compares after each. */
class Run {
  readonly fixture = new Fixture({ spreadAboveTokens: 2 * BLOCK });
  /** By executor and request: live or void. */
  readonly #tables = new Map<string, OwnTable>();
  /** By origin id: every registration has one of its own. */
  readonly #fences = new Map<number, OwnFence>();
  readonly #originIds = EXECUTORS.map((_, executor) => executor);
  #numOrigins = EXECUTORS.length;
  /** Size by shard id. A shard that left never comes again under the same id. */
  readonly #sizes = new Map<string, number>();
  readonly #ids = Array.from({ length: SHARD_SLOTS }, (_, i) => `s${i}-0`);
  #numIds = 0;

  apply(operation: Operation): void {
    const before = operation.kind === 'extend' || operation.kind === 'trim' ? this.#snapshot() : '';
    try {
      this.#apply(operation);
    } catch (error) {
      if (!(error instanceof LaminaError) || error.code === 'internal' || error.code === 'protocol_violation')
        throw error;
      if (operation.kind === 'allocate') {
        // Invariant 1: the one thing that a refused allocate changes is the caller's own former table.
        if (error.code === 'duplicate_id') this.#checkTakenOver(operation);
        if (error.code !== 'unavailable' || this.#isRegistered(operation.executor))
          this.#tables.delete(key(operation.executor, operation.request));
      } else if (this.#snapshot() !== before) throw new Error(`a refused ${operation.kind} changed something`);
    }
    this.#check();
  }

  #apply(operation: Operation): void {
    const { fixture } = this;
    switch (operation.kind) {
      case 'allocate': {
        const { request, executor, blocks, deliveryCount } = operation;
        const refs = fixture.allocate(name(request), blocks, 12, EXECUTORS[executor], deliveryCount);
        equal(refs.length, blocks);
        const other = this.#tables.get(key(1 - executor, request));
        if (other?.state === 'live') {
          if (other.deliveryCount > deliveryCount) throw new Error('taken over by who was offered it earlier');
          other.state = 'takenOver';
        }
        const counts = { deliveryCount, numFreed: 0, numKnown: blocks };
        this.#tables.set(key(executor, request), { executor, request, state: 'live', refs, ...counts });
        return;
      }
      case 'extend': {
        const table = this.#tables.get(key(operation.executor, operation.request));
        const { request, executor, blocks, isAnswerLost } = operation;
        const refs = fixture.extend(name(request), blocks, EXECUTORS[executor], isAnswerLost);
        equal(table?.state, 'live');
        const { numFreed, numKnown, refs: held } = table!;
        const numBlocks = Math.max(numFreed + held.length, blocks);
        equal(refs.length, numBlocks - numKnown);
        // What the owner was not told of before comes again, the same blocks in the same places.
        const unheard = held.slice(numKnown - numFreed);
        for (const [i, { shardId, block }] of unheard.entries())
          equal(`${refs[i]!.shardId}/${refs[i]!.block}`, `${shardId}/${block}`);
        held.push(...refs.slice(unheard.length));
        if (!isAnswerLost) table!.numKnown = numBlocks;
        return;
      }
      case 'trim': {
        const table = this.#tables.get(key(operation.executor, operation.request));
        // Nobody gives back what it was not told of.
        const end = table === undefined ? operation.blocks : Math.min(operation.blocks, table.numKnown);
        fixture.trim(name(operation.request), end, EXECUTORS[operation.executor]);
        if (table === undefined || end <= table.numFreed) return;
        table.refs.splice(0, end - table.numFreed);
        table.numFreed = end;
        return;
      }
      case 'free':
        fixture.manager.free(name(operation.request), EXECUTORS[operation.executor]!);
        this.#tables.delete(key(operation.executor, operation.request));
        return;
      case 'join': {
        const id = this.#ids[operation.shard]!;
        if (this.#sizes.has(id)) return;
        fixture.join(id, operation.blocks);
        this.#sizes.set(id, operation.blocks);
        return;
      }
      case 'leave':
        fixture.manager.removeShard(this.#ids[operation.shard]!, 'shard left');
        this.#renameLostShards();
        return;
      case 'shardBeat': {
        const id = this.#ids[operation.shard]!;
        const size = this.#sizes.get(id);
        if (size === undefined) return;
        const { known, fences } = fixture.shard(id, size);
        equal(known, true);
        equal(
          fences
            .flatMap(({ originIds }) => originIds)
            .sort()
            .join(),
          this.#fencesOf(id).sort().join(),
        );
        return;
      }
      case 'confirm':
        this.#confirm(this.#ids[operation.shard]!, operation.count);
        return;
      case 'executorBeat':
        this.#beat(operation.executor);
        return;
      case 'executorLeave':
        fixture.manager.executorLeave(EXECUTORS[operation.executor]!);
        this.#fenceUnregistered();
        return;
      case 'stranger': {
        // A shard with memory that this kv-manager did not give out: whatever it holds is nobody's.
        const before = this.#snapshot();
        equal(fixture.shard(`stranger-${operation.shard}`, operation.blocks).known, false);
        equal(this.#snapshot(), before);
        return;
      }
      case 'forgive':
        fixture.manager.forgiveSilence();
        return;
      case 'wait':
        fixture.nowMs += operation.ms;
        fixture.manager.tick();
        this.#fenceUnregistered();
        this.#renameLostShards();
    }
  }

  /** An executor that is no more leaves its tables to a fence, which waits for the shards that they are on. */
  #fenceUnregistered(): void {
    for (const executor of EXECUTORS.keys()) {
      if (this.#isRegistered(executor)) continue;
      const tables = [...this.#tables.values()].filter((table) => table.executor === executor);
      for (const table of tables) this.#tables.delete(key(executor, table.request));
      const refs = tables.flatMap((table) => table.refs);
      const waitingFor = new Set(refs.map(({ shardId }) => shardId).filter((shardId) => this.#sizes.has(shardId)));
      if (waitingFor.size > 0) this.#fences.set(this.#originIds[executor]!, { refs, waitingFor });
      this.#originIds[executor] = this.#numOrigins++;
    }
  }

  /** Origins of the fences that wait for a shard. */
  #fencesOf(shardId: string): number[] {
    return [...this.#fences].filter(([, { waitingFor }]) => waitingFor.has(shardId)).map(([originId]) => originId);
  }

  /** A shard hears of its fences, and confirms the first `count` of them. */
  #confirm(shardId: string, count: number): void {
    const size = this.#sizes.get(shardId);
    if (size === undefined) return;
    const confirmed = this.fixture.shard(shardId, size).fences.slice(0, count);
    if (confirmed.length === 0) return;
    this.fixture.shard(shardId, size, confirmed.at(-1)!.number);
    for (const originId of confirmed.flatMap(({ originIds }) => originIds)) {
      equal(this.#fences.get(originId)?.waitingFor.delete(shardId), true);
      if (this.#fences.get(originId)?.waitingFor.size === 0) this.#fences.delete(originId);
    }
  }

  /** A heartbeat tells an executor which of its tables are void, and why. */
  #beat(executor: number): void {
    const reply = this.fixture.executor(EXECUTORS[executor]!, undefined, undefined, [this.#originIds[executor]!]);
    const inState = (state: OwnTable['state']): string =>
      [...this.#tables.values()]
        .filter((table) => table.executor === executor && table.state === state)
        .map((table) => name(table.request))
        .sort()
        .join();
    equal([...reply.voidRequestIds].sort().join(), inState('shardLost'));
    equal([...reply.takenOverRequestIds].sort().join(), inState('takenOver'));
  }

  #checkTakenOver({ request, executor, deliveryCount }: Extract<Operation, { kind: 'allocate' }>): void {
    const other = this.#tables.get(key(1 - executor, request));
    if (other?.state !== 'live' || other.deliveryCount <= deliveryCount) throw new Error('nobody has taken it over');
  }

  #isRegistered(executor: number): boolean {
    return this.fixture.manager.status().executors.some((entry) => entry.executorId === EXECUTORS[executor]);
  }

  #renameLostShards(): void {
    for (const shardId of this.fixture.lostShards.splice(0)) {
      this.#sizes.delete(shardId);
      for (const [originId, { waitingFor }] of this.#fences)
        if (waitingFor.delete(shardId) && waitingFor.size === 0) this.#fences.delete(originId);
      for (const table of this.#tables.values())
        if (table.state === 'live' && table.refs.some((ref) => ref.shardId === shardId)) table.state = 'shardLost';
      this.#ids[Number(shardId[1])] = `s${shardId[1]}-${++this.#numIds}`;
    }
  }

  #snapshot(): string {
    return JSON.stringify(this.fixture.manager.status());
  }

  #check(): void {
    const { manager } = this.fixture;
    const owners = new Map<string, string>();
    const fenced = [...this.#fences].map(([originId, fence]) => [`the fence of ${originId}`, fence] as const);
    for (const [owner, { refs }] of [...this.#tables, ...fenced])
      for (const { shardId, block } of refs) {
        const size = this.#sizes.get(shardId);
        if (size === undefined) continue;
        const address = `${shardId}/${block}`;
        if (block < 0 || block >= size || owners.has(address))
          throw new Error(`${address} of ${owner} is also of ${owners.get(address)}`);
        owners.set(address, owner);
      }
    let used = 0;
    for (const pool of manager.pools) {
      used += pool.usedBlocks;
      equal(pool.usedBlocks + pool.freeBlocks, this.#sizes.get(pool.shardId));
    }
    // As many as tables and fences name: none leaked, none given out twice.
    equal(used, owners.size);
    equal(manager.numFences, this.#fences.size);
    equal(manager.pools.length, this.#sizes.size);
    const live = [...this.#tables.values()].filter(({ state }) => state === 'live');
    equal(manager.numRequests, live.length);
    equal(new Set(live.map((table) => table.request)).size, live.length);
  }

  /** When everyone has let go and every shard has confirmed, everything is free, and a request that needs all of it gets it: nothing is stuck. */
  finish(): void {
    for (const [executor, executorId] of EXECUTORS.entries())
      for (let request = 0; request < 4; request++) {
        this.fixture.manager.free(name(request), executorId);
        this.#tables.delete(key(executor, request));
      }
    for (const shardId of this.#sizes.keys()) this.#confirm(shardId, Number.POSITIVE_INFINITY);
    this.#check();
    const { manager } = this.fixture;
    equal(manager.numRequests, 0);
    equal(manager.numFences, 0);
    let numBlocks = 0;
    for (const size of this.#sizes.values()) numBlocks += size;
    if (numBlocks === 0) return;
    this.#beat(0);
    equal(this.fixture.allocate('all', numBlocks, numBlocks, EXECUTORS[0]).length, numBlocks);
    manager.free('all', EXECUTORS[0]!);
    this.#check();
  }
}

function key(executor: number, request: number): string {
  return `${executor}/${request}`;
}

function name(request: number): string {
  return `r${request}`;
}

test(`${NUM_SEQUENCES} random sequences of operations keep the books`, { timeout: 600_000 }, () => {
  fc.assert(
    fc.property(fc.array(operation, { minLength: 5, maxLength: 40 }), (operations) => {
      const run = new Run();
      run.apply({ kind: 'executorBeat', executor: 0 });
      run.apply({ kind: 'join', shard: 0, blocks: 8 });
      for (const next of operations) run.apply(next);
      run.finish();
    }),
    { numRuns: NUM_SEQUENCES },
  );
});
