/**
 * Owns clusters of real processes over lamina-tiny for the e2e tests: how they start, how a client asks them as any NATS
 * client would, and the uncut graph that their answers are compared with.
 */
import { join } from 'node:path';
import { type Cluster, ROOT_DIRECTORY, type ServiceSettings } from '@lamina/cli';
import { buildModel, loadTokenizer, type Tokenizer } from '@lamina/model';
import { decodeTokens, ENDPOINTS, type KvStatus, SUBJECTS, type TokenMessage } from '@lamina/protocol';
import { UncutReference } from '@lamina/testkit';
import { afterAll, beforeAll } from 'vitest';
import { startTestCluster, TEST_CACHE_DIRECTORY, type TestClusterOptions } from '../cluster.ts';

export const MODEL = join(ROOT_DIRECTORY, 'models', 'lamina-tiny');
export const PROMPT = 'Once upon a time, there was a little girl named Lily.';

/** The uncut graph, loaded for the tests of one file. */
export interface Uncut {
  /** Greedy tokens after `prompt`. */
  greedy(prompt: string, numTokens: number, options?: { ignoreEos?: boolean }): Promise<number[]>;
}

export function useUncut(): Uncut {
  let tokenizer: Tokenizer;
  let reference: UncutReference;
  beforeAll(async () => {
    tokenizer = await loadTokenizer(MODEL);
    reference = await UncutReference.load(await buildModel(MODEL, { cacheDir: TEST_CACHE_DIRECTORY }));
  }, 60_000);
  afterAll(() => reference.release());
  return {
    greedy: async (prompt, numTokens, options) =>
      (await reference.greedy(tokenizer.encode(prompt), numTokens, options)).tokenIds,
  };
}

export async function start(
  settings: ServiceSettings,
  options: Pick<TestClusterOptions, 'attentionShards' | 'denseExecutors' | 'onExit'> = {},
): Promise<Cluster> {
  const { cluster } = await startTestCluster({
    ...options,
    settings: {
      logLevel: 'warn',
      heartbeatIntervalMs: '100',
      heartbeatTimeoutMs: '1000',
      kvDtype: 'f32',
      ...settings,
    },
  });
  return cluster;
}

export interface Reply {
  readonly data: Uint8Array;
  readonly messages: TokenMessage[];
}

/** Sends a body as any NATS client would and returns every reply. `onToken` sees them as they come. */
export function ask(
  cluster: Cluster,
  body: string | Uint8Array,
  onToken: (message: TokenMessage) => void = () => {},
): Promise<Reply[]> {
  const data = typeof body === 'string' ? new TextEncoder().encode(body) : body;
  return new Promise((resolve, reject) => {
    const replies: Reply[] = [];
    const subscription = cluster.bus.requestStream(SUBJECTS.generate, data, (reply) => {
      if (reply === undefined) {
        reject(new Error('no gateway listens'));
        return;
      }
      const messages = decodeTokens(reply.data);
      replies.push({ data: reply.data.slice(), messages });
      messages.forEach(onToken);
      if (reply.header('Lamina-Final') === 'true') {
        subscription.unsubscribe();
        resolve(replies);
      }
    });
  });
}

export const tokensOf = (replies: readonly Reply[]): (number | null)[] =>
  replies.flatMap((reply) => reply.messages.map((message) => message.token));
export const lastOf = (replies: readonly Reply[]): TokenMessage => replies.at(-1)!.messages.at(-1)!;
export const kvStatus = (cluster: Cluster): Promise<KvStatus> =>
  cluster.bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 2_000 });

async function eventually(what: string, probe: () => Promise<boolean>, timeoutMs = 5_000): Promise<void> {
  const deadlineMs = performance.now() + timeoutMs;
  while (!(await probe())) {
    if (performance.now() > deadlineMs) throw new Error(`not within ${timeoutMs} ms: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

export const nothingLeft = (cluster: Cluster): Promise<void> =>
  eventually('all KV is free', async () => {
    const status = await kvStatus(cluster);
    return status.numRequests === 0 && status.shards.every((shard) => shard.usedBlocks === 0);
  });
