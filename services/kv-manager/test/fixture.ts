/** A kv-manager under fake time, and short ways to drive it. */
import type { BlockRef } from '@lamina/protocol';
import { type AttentionSpec, LaminaError } from '@lamina/tensor';
import { KvManager, type KvManagerOptions } from '../src/kv-manager.ts';

const SPEC: AttentionSpec = {
  numLayers: 6,
  numHeads: 4,
  numKvHeads: 2,
  headDim: 32,
  scale: 0.17677669529663687,
};
export const OTHER_SPEC: AttentionSpec = { ...SPEC, numLayers: 30 };
export const BLOCK = 16;

export class Fixture {
  nowMs = 0;
  readonly lostShards: string[] = [];
  readonly freed: number[] = [];
  readonly manager: KvManager;
  /** Blocks that the owner of a table knows of, by executor and request. */
  readonly #numKnown = new Map<string, number>();
  readonly #fencedUpTo = new Map<string, number>();

  constructor(options: Partial<KvManagerOptions> = {}) {
    this.manager = new KvManager({
      managerEpoch: 'epoch-1',
      blockSizeTokens: BLOCK,
      kvDtype: 'f16',
      spreadAboveTokens: 4 * BLOCK,
      heartbeatIntervalMs: 1000,
      heartbeatTimeoutMs: 4000,
      nowMs: () => this.nowMs,
      events: {
        onShardLost: (shardId) => this.lostShards.push(shardId),
        onCapacityFreed: (freeBlocks) => this.freed.push(freeBlocks),
        onNote: () => {},
      },
      ...options,
    });
  }

  executor(executorId: string, spec = SPEC, modelId = 'tiny', originIds = [1]) {
    return this.manager.executorHeartbeat({ executorId, modelId, spec, originIds });
  }

  /** One heartbeat; `numBlocks` null: the shard has no memory yet. `fencedUpTo`: by default what it confirmed last. */
  shard(
    shardId: string,
    numBlocks: number | null,
    fencedUpTo = this.#fencedUpTo.get(shardId) ?? 0,
    budgetBytes = 2 ** 40,
  ) {
    this.#fencedUpTo.set(shardId, fencedUpTo);
    return this.manager.shardHeartbeat({ shardId, budgetBytes, kernel: 'portable', numBlocks, fencedUpTo });
  }

  /** Both heartbeats of a shard that joins. */
  join(shardId: string, numBlocks: number): void {
    this.shard(shardId, null);
    this.shard(shardId, numBlocks);
  }

  allocate(
    requestId: string,
    numBlocks: number,
    maxBlocks = numBlocks,
    executorId = 'e1',
    deliveryCount = 1,
    vainDeliveryCount?: number,
  ): BlockRef[] {
    const refs = this.manager.allocate({
      requestId,
      executorId,
      numTokens: numBlocks * BLOCK,
      maxTokens: maxBlocks * BLOCK,
      deliveryCount,
      vainDeliveryCount,
    });
    this.#numKnown.set(`${executorId}/${requestId}`, refs.length);
    return refs;
  }

  /** `isAnswerLost`: it is done, and the owner of the table does not hear of it. */
  extend(requestId: string, numBlocks: number, executorId = 'e1', isAnswerLost = false): BlockRef[] {
    const key = `${executorId}/${requestId}`;
    const numKnown = this.#numKnown.get(key) ?? 0;
    const refs = this.manager.extend({ requestId, executorId, numBlocks: numKnown, numTokens: numBlocks * BLOCK });
    if (!isAnswerLost) this.#numKnown.set(key, numKnown + refs.length);
    return refs;
  }

  trim(requestId: string, numFreedBlocks: number, executorId = 'e1'): void {
    this.manager.trim({ requestId, executorId, numFreedBlocks });
  }

  /** Used blocks by shard. */
  used(): Record<string, number> {
    return Object.fromEntries(this.manager.status().shards.map((shard) => [shard.shardId, shard.usedBlocks]));
  }
}

/** Blocks by shard in a list of references. */
export function countByShard(blocks: readonly BlockRef[]): Record<string, number> {
  const counts: Record<string, number> = {};
  for (const { shardId } of blocks) counts[shardId] = (counts[shardId] ?? 0) + 1;
  return counts;
}

/** What `run` is refused with. @throws Error when it is not. */
export function refusal(run: () => unknown): { code: string; message: string } {
  try {
    run();
  } catch (error) {
    if (error instanceof LaminaError) return { code: error.code, message: error.message };
    throw error;
  }
  throw new Error('nothing was refused');
}

/** An executor e1 and shards s1, s2, ... of so many blocks. */
export function cluster(...numBlocks: number[]): Fixture {
  const fixture = new Fixture();
  fixture.executor('e1');
  for (const [i, blocks] of numBlocks.entries()) fixture.join(`s${i + 1}`, blocks);
  return fixture;
}
