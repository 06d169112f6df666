/**
 * Owns asking running services what they do, over NATS. What comes back is schema-checked.
 */
import type { Bus } from '@lamina/bus';
import { ENDPOINTS, SERVICE_NAMES } from '@lamina/protocol';
import { z } from 'zod';

const STATUS_TIMEOUT_MS = 1_000;

const gatewayStatsSchema = z.object({ httpPort: z.int() });
const shardStatsSchema = z.object({ tokensAttended: z.number() });

/** The HTTP port of the gateway process `pid`, or undefined while it does not say. */
export async function portOf(bus: Bus, pid: number | undefined, waitMs: number): Promise<number | undefined> {
  const instances = await bus.serviceStats(SERVICE_NAMES.gateway, waitMs);
  const own = instances.find(({ metadata }) => metadata.pid === String(pid));
  return gatewayStatsSchema.safeParse(own?.data).data?.httpPort;
}

export interface ShardReport {
  readonly shardId: string;
  readonly kernel: string;
  readonly numBlocks: number;
  readonly usedBlocksPeak: number;
  /** KV tokens seen by its queries, summed over layers. */
  readonly tokensAttended: number;
}

/** Every shard: its blocks as the kv-manager counts them, its work as it says itself. */
export async function readShards(bus: Bus, waitMs: number): Promise<ShardReport[]> {
  const [instances, { shards }] = await Promise.all([
    bus.serviceStats(SERVICE_NAMES['attention-shard'], waitMs),
    bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: STATUS_TIMEOUT_MS }),
  ]);
  const work = new Map(
    instances.map(({ metadata, data }) => [metadata.instance, shardStatsSchema.safeParse(data).data?.tokensAttended]),
  );
  return shards.map(({ shardId, kernel, numBlocks, usedBlocksPeak }) => ({
    shardId,
    kernel,
    numBlocks,
    usedBlocksPeak,
    tokensAttended: work.get(shardId) ?? 0,
  }));
}
