/**
 * Owns what callers of a kv-manager know of its blocks: whose each is, and which wait behind a fence.
 *
 * Invariants
 * 1. A block is in one table, or behind one fence; `owners` throws when the kv-manager gave one out a second time.
 */
import type { BlockRef } from '@lamina/protocol';

/** The blocks of one request of one executor; another object when they were given up and others given. */
export interface Table {
  readonly executorId: string;
  readonly requestId: string;
  refs: readonly BlockRef[];
}

interface Fence {
  readonly number: number;
  readonly tables: readonly Table[];
  readonly waitingFor: Set<string>;
}

const addressOf = ({ shardId, block }: BlockRef): string => `${shardId}/${block}`;

export class BlockLedger {
  readonly #isShardAlive: (shardId: string) => boolean;
  readonly #tables = new Map<string, Table>();
  #fences: Fence[] = [];
  #numRaised = 0;

  constructor(isShardAlive: (shardId: string) => boolean) {
    this.#isShardAlive = isShardAlive;
  }

  get numFences(): number {
    return this.#fences.length;
  }

  tablesOf(executorId: string): Table[] {
    return [...this.#tables.values()].filter((table) => table.executorId === executorId);
  }

  give(executorId: string, requestId: string, refs: readonly BlockRef[]): void {
    this.#tables.set(`${executorId}/${requestId}`, { executorId, requestId, refs });
  }

  /** The caller knew of `numKnown` blocks. */
  extend(executorId: string, requestId: string, numKnown: number, refs: readonly BlockRef[]): void {
    const table = this.#tables.get(`${executorId}/${requestId}`);
    if (table === undefined) throw new Error('a table was extended that is not there');
    table.refs = [...table.refs.slice(0, numKnown), ...refs];
  }

  free(executorId: string, requestId: string): void {
    this.#tables.delete(`${executorId}/${requestId}`);
  }

  /** The kv-manager has forgotten an executor: its blocks wait for the shards that they are on. */
  fence(executorId: string): void {
    const tables = this.tablesOf(executorId);
    if (tables.length === 0) return;
    for (const { requestId } of tables) this.free(executorId, requestId);
    const shardIds = tables.flatMap(({ refs }) => refs.map(({ shardId }) => shardId));
    const waitingFor = new Set(shardIds.filter(this.#isShardAlive));
    this.#fences.push({ number: ++this.#numRaised, tables, waitingFor });
    this.#dropLifted();
  }

  confirm(shardId: string, fencedUpTo: number): void {
    for (const { number, waitingFor } of this.#fences) if (number <= fencedUpTo) waitingFor.delete(shardId);
    this.#dropLifted();
  }

  loseShard(shardId: string): void {
    this.confirm(shardId, Number.POSITIVE_INFINITY);
  }

  /** Another kv-manager: it knows of nothing, and of no shard. */
  clear(): void {
    this.#tables.clear();
    this.#fences = [];
    this.#numRaised = 0;
  }

  /** By address, on shards that are alive. */
  owners(): Map<string, Table> {
    const owners = new Map<string, Table>();
    for (const table of [...this.#tables.values(), ...this.#fences.flatMap(({ tables }) => tables)])
      for (const ref of table.refs) {
        if (!this.#isShardAlive(ref.shardId)) continue;
        const address = addressOf(ref);
        const other = owners.get(address);
        if (other !== undefined) throw new Error(`${address} is of ${nameOf(other)} and of ${nameOf(table)}`);
        owners.set(address, table);
      }
    return owners;
  }

  #dropLifted(): void {
    this.#fences = this.#fences.filter(({ waitingFor }) => waitingFor.size > 0);
  }
}

export function nameOf(table: Table | undefined): string {
  return table === undefined ? 'nobody' : `${table.executorId}/${table.requestId}`;
}
