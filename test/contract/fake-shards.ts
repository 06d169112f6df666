/**
 * Owns shards as a kv-manager sees them: they join, send heartbeats, refuse fenced origins, and are lost.
 *
 * Invariants
 * 1. What a shard hears in one heartbeat it confirms in the next.
 */
import type { KvManager } from '../../services/kv-manager/src/kv-manager.ts';

interface Shard {
  readonly numBlocks: number;
  readonly fencedOrigins: Set<number>;
  fencedUpTo: number;
}

const BEAT = { budgetBytes: 2 ** 40, kernel: 'portable' };

export class FakeShards {
  readonly #shards = new Map<string, Shard>();
  #numJoined = 0;

  get ids(): readonly string[] {
    return [...this.#shards.keys()];
  }

  get mostBlocks(): number {
    return Math.max(0, ...[...this.#shards.values()].map(({ numBlocks }) => numBlocks));
  }

  has(shardId: string): boolean {
    return this.#shards.has(shardId);
  }

  /** Whether something of this origin that comes now would be written. */
  takes(shardId: string, originId: number): boolean {
    return this.#shards.get(shardId)?.fencedOrigins.has(originId) === false;
  }

  /** Nothing happens while the kv-manager has no layout. */
  join(manager: KvManager, numBlocks: number): void {
    const shardId = `s${this.#numJoined++}`;
    const { layout } = manager.shardHeartbeat({ ...BEAT, shardId, numBlocks: null, fencedUpTo: 0 });
    if (layout === null) return;
    manager.shardHeartbeat({ ...BEAT, shardId, numBlocks, fencedUpTo: 0 });
    this.#shards.set(shardId, { numBlocks, fencedOrigins: new Set(), fencedUpTo: 0 });
  }

  lose(shardId: string): void {
    this.#shards.delete(shardId);
  }

  clear(): void {
    this.#shards.clear();
  }

  /** One heartbeat of each. `isListening`: they do what the answer says. */
  beat(manager: KvManager, isListening: boolean, onConfirmed: (shardId: string, fencedUpTo: number) => void): void {
    for (const [shardId, shard] of this.#shards) {
      const { numBlocks, fencedUpTo, fencedOrigins } = shard;
      const { fences } = manager.shardHeartbeat({ ...BEAT, shardId, numBlocks, fencedUpTo });
      onConfirmed(shardId, fencedUpTo);
      if (!isListening) continue;
      for (const { originIds } of fences) for (const originId of originIds) fencedOrigins.add(originId);
      shard.fencedUpTo = fences.at(-1)?.number ?? fencedUpTo;
    }
  }
}
