/**
 * Any sequence of operations under fake time keeps the books: no block in two tables, no leak, used + free = total,
 * order kept, and what is refused changes nothing. The model is what callers know: the tables they were given.
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

const NUM_SEQUENCES = 20_000;
const EXECUTORS = ['e0', 'e1'];
const SHARD_SLOTS = 3;

type Operation =
  | { readonly kind: 'allocate'; readonly request: number; readonly executor: number; readonly blocks: number }
  | { readonly kind: 'extend'; readonly request: number; readonly executor: number; readonly blocks: number }
  | { readonly kind: 'free'; readonly request: number; readonly executor: number }
  | { readonly kind: 'join' | 'leave' | 'shardBeat'; readonly shard: number; readonly blocks: number }
  | { readonly kind: 'executorBeat'; readonly executor: number }
  | { readonly kind: 'wait'; readonly ms: number };

const request = fc.nat(3);
const executor = fc.nat(1);
const shard = fc.nat(SHARD_SLOTS - 1);
const blocks = fc.integer({ min: 1, max: 9 });
const operation: fc.Arbitrary<Operation> = fc.oneof(
  { weight: 5, arbitrary: fc.record({ kind: fc.constant('allocate' as const), request, executor, blocks }) },
  { weight: 5, arbitrary: fc.record({ kind: fc.constant('extend' as const), request, executor, blocks }) },
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('free' as const), request, executor }) },
  {
    weight: 5,
    arbitrary: fc.record({ kind: fc.constantFrom('join', 'join', 'leave', 'shardBeat'), shard, blocks }),
  },
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('executorBeat' as const), executor }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant('wait' as const), ms: fc.constantFrom(500, 2000, 4000) }) },
);

/** Runs operations on a kv-manager and on the callers' view of it, and compares after each. */
class Run {
  readonly fixture = new Fixture({ spreadAboveTokens: 2 * BLOCK });
  /** By executor and request: what its owner was given, live or void. */
  readonly #tables = new Map<string, BlockRef[]>();
  /** Size by shard id. A shard that left never comes again under the same id. */
  readonly #sizes = new Map<string, number>();
  readonly #ids = Array.from({ length: SHARD_SLOTS }, (_, i) => `s${i}-0`);
  #numIds = 0;

  apply(operation: Operation): void {
    const before = operation.kind === 'extend' ? this.#snapshot() : '';
    try {
      this.#apply(operation);
    } catch (error) {
      if (!(error instanceof LaminaError) || error.code === 'internal' || error.code === 'protocol_violation')
        throw error;
      if (operation.kind === 'allocate') {
        // Invariant 1: the one thing that a refused allocate changes is the caller's own former table.
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
        const id = key(operation.executor, operation.request);
        const refs = fixture.allocate(name(operation.request), operation.blocks, 12, EXECUTORS[operation.executor]);
        equal(refs.length, operation.blocks);
        this.#tables.set(id, refs);
        return;
      }
      case 'extend': {
        const table = this.#tables.get(key(operation.executor, operation.request));
        const refs = fixture.extend(name(operation.request), operation.blocks, EXECUTORS[operation.executor]);
        equal(refs.length, Math.max(0, operation.blocks - table!.length));
        table!.push(...refs);
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
        fixture.manager.shardLeave(this.#ids[operation.shard]!);
        this.#renameLostShards();
        return;
      case 'shardBeat': {
        const id = this.#ids[operation.shard]!;
        const size = this.#sizes.get(id);
        if (size !== undefined) equal(fixture.shard(id, size).known, true);
        return;
      }
      case 'executorBeat':
        fixture.executor(EXECUTORS[operation.executor]!);
        return;
      case 'wait':
        fixture.nowMs += operation.ms;
        fixture.manager.tick();
        this.#renameLostShards();
        for (const id of [...this.#tables.keys()]) if (!this.#isRegistered(Number(id[0]))) this.#tables.delete(id);
    }
  }

  #isRegistered(executor: number): boolean {
    return this.fixture.manager.status().executors.some((entry) => entry.executorId === EXECUTORS[executor]);
  }

  #renameLostShards(): void {
    for (const shardId of this.fixture.lostShards.splice(0)) {
      this.#sizes.delete(shardId);
      this.#ids[Number(shardId[1])] = `s${shardId[1]}-${++this.#numIds}`;
    }
  }

  #snapshot(): string {
    return JSON.stringify(this.fixture.manager.status());
  }

  #check(): void {
    const { manager } = this.fixture;
    const owners = new Map<string, string>();
    for (const [owner, refs] of this.#tables)
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
    // As many as the tables name: none leaked, none given out twice.
    equal(used, owners.size);
    equal(manager.pools.length, this.#sizes.size);
    if (manager.numRequests > this.#tables.size) throw new Error('a table that nobody has');
  }

  /** When everyone has let go, everything is free. */
  finish(): void {
    for (const [executor, executorId] of EXECUTORS.entries())
      for (let request = 0; request < 4; request++) {
        this.fixture.manager.free(name(request), executorId);
        this.#tables.delete(key(executor, request));
      }
    this.#check();
    equal(this.fixture.manager.numRequests, 0);
  }
}

function key(executor: number, request: number): string {
  return `${executor}/${request}`;
}

function name(request: number): string {
  return `r${request}`;
}

test(`${NUM_SEQUENCES} random sequences of operations keep the books`, { timeout: 120_000 }, () => {
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
