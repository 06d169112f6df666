/**
 * Owns the pools of the shards that are ready: how much fits, and who is told when room appears.
 *
 * Invariants
 * 1. After a refusal, the next moment at which blocks are free is announced, once.
 */
import { LaminaError } from '@lamina/tensor';
import type { BlockPool, BlockTable } from './block-table.ts';
import { placeBlocks } from './placement.ts';

export interface CapacityOptions {
  readonly blockSizeTokens: number;
  readonly spreadAboveTokens: number;
  readonly onCapacityFreed: (freeBlocks: number) => void;
}

export class Capacity {
  readonly #options: CapacityOptions;
  /** In the order in which shards became ready. */
  #pools: BlockPool[] = [];
  #hasRefused = false;

  constructor(options: CapacityOptions) {
    this.#options = options;
  }

  get pools(): readonly BlockPool[] {
    return this.#pools;
  }

  get freeBlocks(): number {
    let free = 0;
    for (const pool of this.#pools) free += pool.freeBlocks;
    return free;
  }

  add(pool: BlockPool): void {
    this.#pools.push(pool);
    this.announce();
  }

  remove(pool: BlockPool): void {
    this.#pools = this.#pools.filter((other) => other !== pool);
  }

  clear(): void {
    this.#pools = [];
  }

  /** Call after blocks became free. */
  announce(): void {
    if (!this.#hasRefused) return;
    const { freeBlocks } = this;
    if (freeBlocks === 0) return;
    this.#hasRefused = false;
    this.#options.onCapacityFreed(freeBlocks);
  }

  blocksFor(numTokens: number): number {
    return Math.ceil(numTokens / this.#options.blockSizeTokens);
  }

  /** Appends blocks to `table`; `checkFree` has passed. */
  place(table: BlockTable, numBlocks: number): void {
    placeBlocks(table, numBlocks, this.#pools, this.blocksFor(this.#options.spreadAboveTokens));
  }

  /** @throws LaminaError when the cluster, were it empty, could not hold this many tokens. */
  checkTotal(numTokens: number): void {
    if (this.#pools.length === 0) {
      this.#hasRefused = true;
      throw new LaminaError('unavailable', 'no attention shard is ready; start one, or wait for it');
    }
    let total = 0;
    for (const pool of this.#pools) total += pool.numBlocks;
    if (this.blocksFor(numTokens) <= total) return;
    const shards = this.#pools.length === 1 ? '1 attention shard holds' : `${this.#pools.length} attention shards hold`;
    throw new LaminaError(
      'kv_capacity_exceeded',
      `the request needs KV for ${numTokens} tokens and the ${shards} ${total * this.#options.blockSizeTokens}; ` +
        'start more shards, give them more memory, or ask for fewer tokens',
    );
  }

  /** @throws LaminaError `overloaded` when this many blocks are not free now. */
  checkFree(numBlocks: number): void {
    const free = this.freeBlocks;
    if (numBlocks <= free) return;
    this.#hasRefused = true;
    throw new LaminaError('overloaded', `the KV cache is full: ${numBlocks} blocks are needed, ${free} are free`);
  }
}
