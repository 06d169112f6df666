/**
 * Owns clusters inside a test: real services on a real nats-server, each on a connection of its own, and the requests
 * that go through their work queue.
 *
 * Invariants
 * 1. A cluster is given only when every shard has blocks.
 * 2. A request has the fields of `GREEDY` but for what its test changes.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { TokenStream, WorkQueue } from '@lamina/bus';
import { decodeTokens, ENDPOINTS, type KvStatus, type TokenMessage, type WorkItem } from '@lamina/protocol';
import { afterAll, beforeAll } from 'vitest';
import { type NatsServer, startNatsServer } from '../../packages/testkit/dist/nats-server.js';
import { startAttentionShard } from '../../services/attention-shard/dist/service.js';
import { startDenseExecutor } from '../../services/dense-executor/dist/service.js';
import { startKvManager } from '../../services/kv-manager/dist/service.js';
import { connect, eventually, type InProcessService, startInProcess } from '../contract/in-process.ts';

/** A nats-server and an empty folder for the tests of one file; both are there from its first `beforeAll` on. */
export interface TestBench {
  readonly natsUrl: string;
  /** Goes with the file. */
  readonly scratch: string;
}

export function useTestBench(name: string): TestBench {
  let nats: NatsServer;
  let scratch: string;
  beforeAll(async () => {
    scratch = mkdtempSync(join(tmpdir(), `lamina-${name}-`));
    nats = await startNatsServer();
  });
  afterAll(async () => {
    await nats.stop();
    rmSync(scratch, { recursive: true, force: true });
  });
  return {
    get natsUrl() {
      return nats.url;
    },
    get scratch() {
      return scratch;
    },
  };
}

/** Command-line flags of the services; one entry of `shards` a shard. */
export interface ClusterFlags {
  readonly kvManager: readonly string[];
  readonly shards: readonly (readonly string[])[];
  readonly executor: readonly string[];
}

export interface InProcessCluster {
  readonly executor: InProcessService;
  kvStatus(): Promise<KvStatus>;
  /** Submits all requests, `concurrency` (default: all) at a time; one list of messages a request, in their order. */
  generate(requests: readonly Request[], concurrency?: number): Promise<TokenMessage[][]>;
}

/** What a test says of a request. */
export type Request = Pick<WorkItem, 'id' | 'model' | 'tokenIds' | 'maxTokens'> & Partial<WorkItem>;

const GREEDY = {
  sampling: { temperature: 0, topP: 1, topK: 0, minP: 0, seed: 0 },
  stop: [],
  logprobs: null,
  ignoreEos: true,
  priority: 0,
  deadlineAtMs: null,
  encoding: 'json',
} as const satisfies Partial<WorkItem>;

/** Runs `use` over a cluster and ends it. */
export async function withCluster<T>(
  natsUrl: string,
  flags: ClusterFlags,
  use: (cluster: InProcessCluster) => Promise<T>,
): Promise<T> {
  const manager = await startInProcess('kv-manager', startKvManager, natsUrl, flags.kvManager);
  const shards = await Promise.all(
    flags.shards.map((shard) => startInProcess('attention-shard', startAttentionShard, natsUrl, shard)),
  );
  const executor = await startInProcess('dense-executor', startDenseExecutor, natsUrl, flags.executor);
  const kvStatus = (): Promise<KvStatus> => manager.context.bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 1000 });
  try {
    await eventually(async () => {
      const status = await kvStatus();
      return status.shards.filter((shard) => shard.numBlocks > 0).length === shards.length ? true : undefined;
    });
    return await use({
      executor,
      kvStatus,
      generate: (requests, concurrency = requests.length) => generate(natsUrl, requests, concurrency),
    });
  } finally {
    await executor.stop();
    await Promise.all(shards.map((shard) => shard.stop()));
    await manager.stop();
  }
}

async function generate(natsUrl: string, requests: readonly Request[], concurrency: number): Promise<TokenMessage[][]> {
  const bus = await connect(natsUrl);
  const queue = new WorkQueue(bus);
  const stream = new TokenStream(bus, () => {});
  const answers: TokenMessage[][] = requests.map(() => []);
  const waiting = requests.entries();
  const client = async (): Promise<void> => {
    for (const [index, request] of waiting) {
      const done = new Promise<void>((resolve) => {
        stream.follow(request.id, ({ data }) => {
          answers[index]?.push(...decodeTokens(data));
          if (answers[index]?.at(-1)?.finish_reason !== null) resolve();
        });
      });
      await queue.submit({ ...GREEDY, ...request, submittedAtMs: Date.now() });
      await done;
    }
  };
  try {
    await Promise.all(Array.from({ length: concurrency }, client));
  } finally {
    await bus.close();
  }
  return answers;
}
