/**
 * Owns the blocks of executors that are no more, until nothing of theirs can be written to any of them.
 *
 * Why so. An executor stops sending when its lease is over, but bytes that it handed to its socket before may sit there
 * for as long as the network is cut, and arrive when it comes back. Only the shard that would write them can refuse them.
 *
 * Invariants
 * 1. A fenced block is given to nobody until every shard that has blocks of the fence has confirmed it, or is gone.
 * 2. A fence waits only for shards that are registered: those confirm, or are lost by their silence, so it always ends.
 * 3. Fences are not kept beyond this process: another kv-manager knows no shard, so each gives its memory up and comes
 *    again under an id, and so a subject, to which nothing was ever sent.
 */
import { type FenceNotice, LIMITS } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import type { BlockTable } from './block-table.ts';

export interface Fence extends FenceNotice {
  readonly executorId: string;
  readonly tables: readonly BlockTable[];
  /** Ids of shards that have not confirmed. */
  readonly waitingFor: Set<string>;
}

export class Fences {
  /** By number, ascending. */
  readonly #open = new Map<number, Fence>();
  readonly #onLifted: (fence: Fence) => void;
  #numRaised = 0;

  /** @param onLifted Called when the blocks of a fence have become free. */
  constructor(onLifted: (fence: Fence) => void) {
    this.#onLifted = onLifted;
  }

  get size(): number {
    return this.#open.size;
  }

  /** Keeps the blocks of `tables` aside until all of `shardIds` have confirmed. Every one of them is registered. */
  raise(executorId: string, originIds: Iterable<number>, tables: BlockTable[], shardIds: Iterable<string>): void {
    const number = ++this.#numRaised;
    const fence = { number, executorId, originIds: [...originIds], tables, waitingFor: new Set(shardIds) };
    this.#open.set(number, fence);
    this.#liftIfDone(fence);
  }

  /** What a shard is to be told: the oldest fences that wait for it. */
  noticesFor(shardId: string): FenceNotice[] {
    const notices: FenceNotice[] = [];
    for (const { number, originIds, waitingFor } of this.#open.values()) {
      if (notices.length === LIMITS.fencesOfReply) break;
      if (waitingFor.has(shardId)) notices.push({ number, originIds });
    }
    return notices;
  }

  /**
   * A shard says that fences up to a number hold. It was told of them in the order of their numbers.
   * @throws LaminaError `protocol_violation` when there was no such fence yet.
   */
  confirm(shardId: string, fencedUpTo: number): void {
    if (fencedUpTo > this.#numRaised)
      throw new LaminaError(
        'protocol_violation',
        `shard ${shardId} confirms fence ${fencedUpTo}; the last one is ${this.#numRaised}`,
      );
    for (const fence of this.#open.values()) {
      if (fence.number > fencedUpTo) return;
      if (fence.waitingFor.delete(shardId)) this.#liftIfDone(fence);
    }
  }

  /** A shard is gone, and its blocks with it. */
  removeShard(shardId: string): void {
    for (const fence of this.#open.values()) if (fence.waitingFor.delete(shardId)) this.#liftIfDone(fence);
  }

  /** Every shard is gone. */
  removeAllShards(): void {
    for (const fence of this.#open.values()) {
      fence.waitingFor.clear();
      this.#liftIfDone(fence);
    }
  }

  #liftIfDone(fence: Fence): void {
    if (fence.waitingFor.size > 0) return;
    this.#open.delete(fence.number);
    for (const table of fence.tables) table.release();
    this.#onLifted(fence);
  }
}

/** Adds the origins that a heartbeat names to those of its executor; the oldest make room. */
export function nameOrigins(known: Set<number>, named: readonly number[]): void {
  for (const originId of named) {
    known.delete(originId);
    known.add(originId);
  }
  for (const oldest of known) {
    if (known.size <= LIMITS.originsOfFence) return;
    known.delete(oldest);
  }
}
