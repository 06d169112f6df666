/**
 * Owns the two ends of a block: the pool of one shard's blocks, and the block table of one request.
 *
 * Invariants
 * 1. A block is free or in exactly one table: taking and giving back are checked, O(1), and allocate nothing.
 * 2. used + free = numBlocks, at every moment. Memory of a block that was never taken is never written, so what a pool has
 *    resident follows what is used, not what a shard says that it has.
 * 3. A table's order is the order of its tokens: entry i holds tokens i * blockSizeTokens and following. Entries at the
 *    start may have been given back; the rest keep their numbers.
 */
import type { BlockRef } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';

/** The blocks of one shard: those that came back, the last first, then those that were never taken, the lowest first. */
export class BlockPool {
  readonly shardId: string;
  readonly numBlocks: number;
  /** A stack of ids. */
  readonly #returned: Int32Array;
  readonly #isUsed: Uint8Array;
  #numReturned = 0;
  /** Ids below were taken once. */
  #numTouched = 0;
  #usedPeak = 0;

  constructor(shardId: string, numBlocks: number) {
    this.shardId = shardId;
    this.numBlocks = numBlocks;
    this.#returned = new Int32Array(numBlocks);
    this.#isUsed = new Uint8Array(numBlocks);
  }

  get freeBlocks(): number {
    return this.numBlocks - this.#numTouched + this.#numReturned;
  }

  get usedBlocks(): number {
    return this.#numTouched - this.#numReturned;
  }

  get usedBlocksPeak(): number {
    return this.#usedPeak;
  }

  /** Share of the pool that is used, 0 to 1; an empty pool counts as full. */
  get usedShare(): number {
    return this.numBlocks === 0 ? 1 : this.usedBlocks / this.numBlocks;
  }

  /** The caller has checked that one is free. */
  take(): number {
    if (this.freeBlocks === 0) throw new LaminaError('internal', `shard ${this.shardId} has no free block`);
    const block = this.#numReturned > 0 ? this.#returned[--this.#numReturned]! : this.#numTouched++;
    this.#isUsed[block] = 1;
    if (this.usedBlocks > this.#usedPeak) this.#usedPeak = this.usedBlocks;
    return block;
  }

  giveBack(block: number): void {
    if (this.#isUsed[block] !== 1)
      throw new LaminaError('internal', `block ${block} of shard ${this.shardId} is freed twice`);
    this.#isUsed[block] = 0;
    this.#returned[this.#numReturned++] = block;
  }
}

/** Why a table is of no use any more, or undefined while it is live. */
export type VoidReason = { readonly kind: 'shard_lost'; readonly shardId: string } | { readonly kind: 'taken_over' };

/** The blocks of one request of one executor, in token order. */
export class BlockTable {
  readonly requestId: string;
  readonly executorId: string;
  /** How often the queue had offered the request to whoever owns this table. */
  readonly deliveryCount: number;
  voidReason: VoidReason | undefined;
  #numFreed = 0;
  readonly #pools: BlockPool[] = [];
  readonly #blocks: number[] = [];
  readonly #numBlocksByPool = new Map<BlockPool, number>();

  constructor(requestId: string, executorId: string, deliveryCount: number) {
    this.requestId = requestId;
    this.executorId = executorId;
    this.deliveryCount = deliveryCount;
  }

  /** Entries, those that were given back included. */
  get numBlocks(): number {
    return this.#numFreed + this.#blocks.length;
  }

  /** Entries at the start that were given back. */
  get numFreed(): number {
    return this.#numFreed;
  }

  /** Blocks that the table has now. */
  get numHeld(): number {
    return this.#blocks.length;
  }

  /** The pool of the last block, or undefined. */
  get lastPool(): BlockPool | undefined {
    return this.#pools.at(-1);
  }

  numBlocksOn(pool: BlockPool): number {
    return this.#numBlocksByPool.get(pool) ?? 0;
  }

  /** Appends a free block of `pool`. */
  append(pool: BlockPool): void {
    this.#blocks.push(pool.take());
    this.#pools.push(pool);
    this.#numBlocksByPool.set(pool, this.numBlocksOn(pool) + 1);
  }

  /** Entries from number `start` on, which are held. */
  refs(start = 0): BlockRef[] {
    const refs: BlockRef[] = [];
    for (let i = start - this.#numFreed; i < this.#blocks.length; i++)
      refs.push({ shardId: this.#pools[i]!.shardId, block: this.#blocks[i]! });
    return refs;
  }

  /** Gives entries below number `end` back. */
  trim(end: number): void {
    const count = end - this.#numFreed;
    if (count <= 0) return;
    for (let i = 0; i < count; i++) {
      const pool = this.#pools[i]!;
      pool.giveBack(this.#blocks[i]!);
      this.#numBlocksByPool.set(pool, this.numBlocksOn(pool) - 1);
    }
    this.#blocks.splice(0, count);
    this.#pools.splice(0, count);
    this.#numFreed = end;
  }

  /** Gives every block back; blocks of a pool whose shard is gone go with it. */
  release(): void {
    for (let i = 0; i < this.#blocks.length; i++) this.#pools[i]!.giveBack(this.#blocks[i]!);
    this.#blocks.length = 0;
    this.#pools.length = 0;
    this.#numBlocksByPool.clear();
  }
}
