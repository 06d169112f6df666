/** A kv-manager under fake time, and short ways to drive it. */
import type { BlockRef } from '@lamina/protocol';
import type { AttentionSpec } from '@lamina/tensor';
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

  executor(executorId: string, spec = SPEC, modelId = 'tiny') {
    return this.manager.executorHeartbeat({ executorId, modelId, spec });
  }

  /** One heartbeat; `numBlocks` null: the shard has no memory yet. */
  shard(shardId: string, numBlocks: number | null) {
    return this.manager.shardHeartbeat({ shardId, budgetBytes: 1024, kernel: 'portable', numBlocks });
  }

  /** Both heartbeats of a shard that joins. */
  join(shardId: string, numBlocks: number): void {
    this.shard(shardId, null);
    this.shard(shardId, numBlocks);
  }

  allocate(requestId: string, numBlocks: number, maxBlocks = numBlocks, executorId = 'e1'): BlockRef[] {
    return this.manager.allocate({
      requestId,
      executorId,
      numTokens: numBlocks * BLOCK,
      maxTokens: maxBlocks * BLOCK,
    });
  }

  extend(requestId: string, numBlocks: number, executorId = 'e1'): BlockRef[] {
    return this.manager.extend({ requestId, executorId, numTokens: numBlocks * BLOCK });
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
