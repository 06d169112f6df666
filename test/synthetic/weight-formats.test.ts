/**
 * Weight formats: the distributed system gives the greedy tokens of the uncut graph of the same weights, in place and
 * quantized. Every service is the real one, on a connection of its own to a real nats-server.
 *
 * Where weights are quantized, products round activations to 8 bits, and a difference in the last bit of a float32 becomes
 * one of a rounding step in later layers: tokens may part where two logits of the uncut graph are closer than NEAR_TIE.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { TokenStream, WorkQueue } from '@lamina/bus';
import { buildModel, loadTokenizer } from '@lamina/model';
import { decodeTokens, ENDPOINTS } from '@lamina/protocol';
import { UncutReference } from '@lamina/testkit';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type NatsServer, startNatsServer } from '../../packages/testkit/dist/nats-server.js';
import { startAttentionShard } from '../../services/attention-shard/dist/service.js';
import { startDenseExecutor } from '../../services/dense-executor/dist/service.js';
import { startKvManager } from '../../services/kv-manager/dist/service.js';
import { connect, eventually, startInProcess } from '../contract/in-process.ts';

const MODEL = fileURLToPath(new URL('../../models/lamina-tiny', import.meta.url));
const NUM_SHARDS = 2;
const MAX_TOKENS = 32;
const NEAR_TIE = { checkpoint: 0, int8: 0.3, int4: 0.3 } as const;
const PROMPTS = [
  'Once upon a time, there was a little girl named Lily.',
  'Tom and Sam went to the park. They saw a big dog.',
  'The cat was sad because',
  'One day, a small bird wanted to fly to the moon, but its wings were too short.',
  'Every morning the farmer got up, fed the hens, milked the cow, and sang a song about the sun. '.repeat(4),
];

let nats: NatsServer;
let cacheDir: string;

beforeAll(async () => {
  cacheDir = mkdtempSync(join(tmpdir(), 'lamina-weights-'));
  nats = await startNatsServer();
});

afterAll(async () => {
  await nats.stop();
  rmSync(cacheDir, { recursive: true, force: true });
});

/** All prompts at once, through the work queue. */
async function generateAll(prefix: string, prompts: readonly number[][]): Promise<number[][]> {
  const bus = await connect(nats.url);
  const queue = new WorkQueue(bus);
  const tokens = new TokenStream(bus, () => {});
  const answers = await Promise.all(
    prompts.map(async (tokenIds, index) => {
      const id = `${prefix}-${index}`;
      const answer: number[] = [];
      const done = new Promise<void>((resolve) => {
        tokens.follow(id, (message) => {
          for (const { token, finish_reason } of decodeTokens(message.data)) {
            if (token !== null && token !== undefined) answer.push(token);
            if (finish_reason !== null) resolve();
          }
        });
      });
      await queue.submit({
        id,
        model: 'lamina-tiny',
        tokenIds,
        maxTokens: MAX_TOKENS,
        sampling: { temperature: 0, topP: 1, topK: 0, minP: 0, seed: 0 },
        stop: [],
        logprobs: 0,
        ignoreEos: true,
        priority: 0,
        deadlineAtMs: null,
        encoding: 'json',
        submittedAtMs: Date.now(),
      });
      await done;
      return answer;
    }),
  );
  await bus.close();
  return answers;
}

describe('lamina-tiny over two shards', () => {
  it.each(['checkpoint', 'int8', 'int4'] as const)(
    'gives the tokens of its uncut graph with weights %s',
    async (weights) => {
      const tokenizer = await loadTokenizer(MODEL);
      const prompts = PROMPTS.map((prompt) => tokenizer.encode(prompt));
      const reference = await UncutReference.load(await buildModel(MODEL, { cacheDir, weights }));
      const kvFlags = ['--block-size-tokens', '16', '--kv-dtype', 'f32', '--spread-above-tokens', '16'];
      const manager = await startInProcess('kv-manager', startKvManager, nats.url, kvFlags);
      const shards = await Promise.all(
        Array.from({ length: NUM_SHARDS }, () =>
          startInProcess('attention-shard', startAttentionShard, nats.url, ['--kv-budget-bytes', '16m']),
        ),
      );
      const executor = await startInProcess('dense-executor', startDenseExecutor, nats.url, [
        ...['--model', MODEL, '--cache-dir', cacheDir, '--weights', weights, '--dense-workers', '1'],
      ]);
      try {
        const { bus } = manager.context;
        await eventually(async () => {
          const status = await bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 1000 });
          return status.shards.filter((shard) => shard.numBlocks > 0).length === NUM_SHARDS ? true : undefined;
        });
        const answers = await generateAll(weights, prompts);
        let equal = 0;
        for (const [i, answer] of answers.entries()) {
          const expected = await reference.greedy(prompts[i]!, MAX_TOKENS, { ignoreEos: true });
          const parted = expected.tokenIds.findIndex((tokenId, at) => answer[at] !== tokenId);
          expect(answer).toHaveLength(MAX_TOKENS);
          if (parted === -1) {
            equal += 1;
            continue;
          }
          const logits = expected.logits[parted]!;
          expect(logits[expected.tokenIds[parted]!]! - logits[answer[parted]!]!).toBeLessThan(NEAR_TIE[weights]);
        }
        console.log(`${weights}: ${equal} of ${answers.length} answers are equal to their last token`);
        expect(equal).toBeGreaterThanOrEqual(weights === 'checkpoint' ? PROMPTS.length : PROMPTS.length - 2);
      } finally {
        await executor.stop();
        await Promise.all(shards.map((shard) => shard.stop()));
        await manager.stop();
        await reference.release();
      }
    },
  );
});
