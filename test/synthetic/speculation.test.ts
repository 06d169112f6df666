/**
 * Speculation changes how many passes an answer takes and nothing else: greedy and seeded answers are the same with and
 * without it, also where most drafts are wrong, over several shards and small blocks.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { TokenStream, WorkQueue } from '@lamina/bus';
import { loadTokenizer } from '@lamina/model';
import { decodeTokens, type WorkItem } from '@lamina/protocol';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { type NatsServer, startNatsServer } from '../../packages/testkit/dist/nats-server.js';
import { startAttentionShard } from '../../services/attention-shard/dist/service.js';
import { startDenseExecutor } from '../../services/dense-executor/dist/service.js';
import { startKvManager } from '../../services/kv-manager/dist/service.js';
import { connect, startInProcess } from '../contract/in-process.ts';

const MODEL = fileURLToPath(new URL('../../models/lamina-tiny', import.meta.url));
const MAX_TOKENS = 96;

const PROMPTS = [
  'Mia had a box. In the box there was another box. '.repeat(6),
  'No! No! No! said the little goat. '.repeat(5),
  'Once upon a time, there was a little girl named Lily.',
  '1 2 3 4 5 6 7 8 9 1 2 3 4 5 6 7 8 9 1 2 3',
];
const SAMPLINGS: readonly WorkItem['sampling'][] = [
  { temperature: 0, topP: 1, topK: 0, minP: 0, seed: 0 },
  { temperature: 0.7, topP: 0.9, topK: 0, minP: 0, seed: 7 },
  { temperature: 1, topP: 1, topK: 20, minP: 0.02, seed: 123_456_789 },
];

let nats: NatsServer;
let cacheDir: string;

beforeAll(async () => {
  cacheDir = mkdtempSync(join(tmpdir(), 'lamina-speculation-'));
  nats = await startNatsServer();
});

afterAll(async () => {
  await nats.stop();
  rmSync(cacheDir, { recursive: true, force: true });
});

/** All answers, one request at a time, and how many passes and accepted drafts they took. */
async function answers(speculation: 'auto' | 'off'): Promise<{ tokens: (number | null)[][]; counters: string }> {
  const tokenizer = await loadTokenizer(MODEL);
  const flags = ['--kv-dtype', 'f32', '--spread-above-tokens', '32', '--block-size-tokens', '8'];
  const manager = await startInProcess('kv-manager', startKvManager, nats.url, flags);
  const shards = await Promise.all(
    [1, 2, 3].map(() => startInProcess('attention-shard', startAttentionShard, nats.url, ['--kv-budget-bytes', '16m'])),
  );
  const executor = await startInProcess('dense-executor', startDenseExecutor, nats.url, [
    ...['--model', MODEL, '--cache-dir', cacheDir, '--speculation', speculation],
  ]);
  const bus = await connect(nats.url);
  const queue = new WorkQueue(bus);
  const stream = new TokenStream(bus, () => {});
  const tokens: (number | null)[][] = [];
  try {
    for (const prompt of PROMPTS) {
      for (const sampling of SAMPLINGS) {
        const id = `${speculation}-${tokens.length}`;
        const answer: (number | null)[] = [];
        const done = new Promise<void>((resolve) => {
          stream.follow(id, (message) => {
            for (const { token, finish_reason } of decodeTokens(message.data)) {
              answer.push(token);
              if (finish_reason !== null) resolve();
            }
          });
        });
        await queue.submit({
          id,
          model: 'lamina-tiny',
          tokenIds: tokenizer.encode(prompt),
          maxTokens: MAX_TOKENS,
          sampling,
          stop: [],
          logprobs: null,
          ignoreEos: true,
          priority: 0,
          deadlineAtMs: null,
          encoding: 'json',
          submittedAtMs: Date.now(),
        });
        await done;
        tokens.push(answer);
      }
    }
    return { tokens, counters: await executor.context.registry.metrics() };
  } finally {
    await bus.close();
    await executor.stop();
    await Promise.all(shards.map((shard) => shard.stop()));
    await manager.stop();
  }
}

const counter = (counters: string, name: string): number =>
  Number(new RegExp(`^${name} (\\d+)$`, 'm').exec(counters)?.[1]);

it('gives the same tokens with and without drafts, in fewer passes', async () => {
  const without = await answers('off');
  const withDrafts = await answers('auto');
  expect(withDrafts.tokens).toEqual(without.tokens);
  expect(without.tokens.every((answer) => answer.length === MAX_TOKENS)).toBe(true);
  const drafted = counter(withDrafts.counters, 'lamina_drafted_tokens_total');
  const accepted = counter(withDrafts.counters, 'lamina_accepted_tokens_total');
  expect(counter(without.counters, 'lamina_drafted_tokens_total')).toBe(0);
  // Both kinds of draft were there: else this proves little.
  expect(accepted).toBeGreaterThan(100);
  expect(drafted - accepted).toBeGreaterThan(100);
  const passes = (counters: string): number => counter(counters, 'lamina_steps_total');
  expect(passes(withDrafts.counters)).toBe(passes(without.counters) - accepted);
  console.log(
    `passes ${passes(without.counters)} -> ${passes(withDrafts.counters)}; drafted ${drafted}, accepted ${accepted}`,
  );
}, 90_000);
