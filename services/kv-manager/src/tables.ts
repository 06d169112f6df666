/**
 * Owns the block tables of the executors that are registered: giving, growing, trimming, voiding, and who has a request.
 *
 * Invariants
 * 1. A refused operation changes nothing, save that an executor that asks for a table gives up its own former one.
 * 2. A request has at most one live table. The others are void, and keep their blocks until their owner gives them up,
 *    because a step of it may still be on its way and would write into what has a new owner.
 */
import type { BlockRef } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import { type BlockPool, BlockTable, type VoidReason } from './block-table.ts';
import type { Capacity } from './capacity.ts';

/** The tables of one executor, live and void, by request id. */
export type ExecutorTables = Map<string, BlockTable>;

export interface TableRequest {
  readonly requestId: string;
  readonly executorId: string;
  readonly numTokens: number;
}
export interface AllocateRequest extends TableRequest {
  readonly maxTokens: number;
  readonly deliveryCount: number;
  /** Of the deliveries since something of the answer was stored. */
  readonly vainDeliveryCount?: number | undefined;
}
export interface ExtendRequest extends TableRequest {
  readonly numBlocks: number;
}
export interface TrimRequest {
  readonly requestId: string;
  readonly executorId: string;
  readonly numFreedBlocks: number;
}

export class Tables {
  readonly #capacity: Capacity;
  readonly #blockSizeTokens: number;
  readonly #live = new Map<string, BlockTable>();

  constructor(capacity: Capacity, blockSizeTokens: number) {
    this.#capacity = capacity;
    this.#blockSizeTokens = blockSizeTokens;
  }

  get numLive(): number {
    return this.#live.size;
  }

  /** A new table for a request: all of its blocks, or a LaminaError and none. */
  allocate(own: ExecutorTables, request: AllocateRequest): BlockRef[] {
    const { requestId, executorId, numTokens, maxTokens, deliveryCount } = request;
    this.free(own, requestId);
    const other = this.#live.get(requestId);
    if (other !== undefined && other.deliveryCount > deliveryCount)
      throw new LaminaError('duplicate_id', `request ${requestId} was taken over by another executor`);
    if (numTokens > maxTokens)
      throw new LaminaError('invalid_request', `numTokens ${numTokens} is more than maxTokens ${maxTokens}`);
    this.#capacity.checkTotal(maxTokens);
    const numBlocks = this.#capacity.blocksFor(numTokens);
    this.#capacity.checkFree(numBlocks);
    if (other !== undefined) this.#makeVoid(other, { kind: 'taken_over' });
    const table = new BlockTable(requestId, executorId, deliveryCount);
    this.#capacity.place(table, numBlocks);
    own.set(requestId, table);
    this.#live.set(requestId, table);
    return table.refs();
  }

  /** Blocks at the end of a table, so that it has room for `numTokens`; those after the caller's `numBlocks` are returned. */
  extend(own: ExecutorTables | undefined, request: ExtendRequest): BlockRef[] {
    const { requestId, executorId, numTokens, numBlocks } = request;
    const table = own?.get(requestId);
    if (table === undefined)
      throw new LaminaError('invalid_request', `executor ${executorId} has no block table of request ${requestId}`);
    if (table.voidReason?.kind === 'shard_lost')
      throw new LaminaError('shard_lost', `request ${requestId} had KV on ${table.voidReason.shardId}, which is lost`);
    if (table.voidReason !== undefined)
      throw new LaminaError('duplicate_id', `request ${requestId} was taken over by another executor`);
    if (numBlocks > table.numBlocks || numBlocks < table.numFreed)
      throw new LaminaError(
        'invalid_request',
        `request ${requestId} has blocks ${table.numFreed} to ${table.numBlocks}, not ${numBlocks}`,
      );
    const numAdded = this.#capacity.blocksFor(numTokens) - table.numBlocks;
    if (numAdded <= 0) return table.refs(numBlocks);
    this.#capacity.checkTotal(numTokens - table.numFreed * this.#blockSizeTokens);
    this.#capacity.checkFree(numAdded);
    this.#capacity.place(table, numAdded);
    return table.refs(numBlocks);
  }

  /** Frees the first blocks of the caller's table, `numFreedBlocks` with those of earlier calls; no error without a table. */
  trim(own: ExecutorTables | undefined, { requestId, numFreedBlocks }: TrimRequest): void {
    const table = own?.get(requestId);
    if (table === undefined || numFreedBlocks <= table.numFreed) return;
    if (numFreedBlocks > table.numBlocks)
      throw new LaminaError(
        'invalid_request',
        `request ${requestId} has ${table.numBlocks} blocks, ${numFreedBlocks} cannot be freed`,
      );
    table.trim(numFreedBlocks);
    this.#capacity.announce();
  }

  /** Frees the caller's table of this id, live or void. Nobody else's, and no error when there is none. */
  free(own: ExecutorTables | undefined, requestId: string): void {
    const table = own?.get(requestId);
    if (table === undefined) return;
    own?.delete(requestId);
    this.#forget(table);
    table.release();
    this.#capacity.announce();
  }

  /** Takes every table away from an executor; their blocks stay used. */
  takeAll(own: ExecutorTables): BlockTable[] {
    const tables = [...own.values()];
    own.clear();
    for (const table of tables) this.#forget(table);
    return tables;
  }

  /** A shard is lost: makes every live table void that has blocks there. Returns how many. */
  loseShard(pool: BlockPool): number {
    let numTables = 0;
    for (const table of [...this.#live.values()]) {
      if (table.numBlocksOn(pool) === 0) continue;
      this.#makeVoid(table, { kind: 'shard_lost', shardId: pool.shardId });
      numTables++;
    }
    return numTables;
  }

  #makeVoid(table: BlockTable, reason: VoidReason): void {
    table.voidReason = reason;
    this.#live.delete(table.requestId);
  }

  #forget(table: BlockTable): void {
    if (this.#live.get(table.requestId) === table) this.#live.delete(table.requestId);
  }
}
