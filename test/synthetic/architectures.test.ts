/**
 * Architectures: a small random model of each, distributed over three shards, gives the tokens of its uncut graph, for
 * prompts of different lengths in one batch, beyond windows and original lengths. Every service is the real one, on a
 * connection of its own to a real nats-server. (That the uncut graph is right is packages/testkit/test/architectures.test.ts.)
 *
 * Bound: every reported log-probability is within 1e-4 of the uncut graph's.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { TokenStream, WorkQueue } from '@lamina/bus';
import { buildModel } from '@lamina/model';
import { decodeTokens, ENDPOINTS, type TokenMessage, type WorkItem } from '@lamina/protocol';
import { RANDOM_MODELS, UncutReference, writeRandomCheckpoint } from '@lamina/testkit';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type NatsServer, startNatsServer } from '../../packages/testkit/dist/nats-server.js';
import { startAttentionShard } from '../../services/attention-shard/dist/service.js';
import { startDenseExecutor } from '../../services/dense-executor/dist/service.js';
import { startKvManager } from '../../services/kv-manager/dist/service.js';
import { connect, eventually, startInProcess } from '../contract/in-process.ts';

const NUM_SHARDS = 3;
const LOGPROB_BOUND = 1e-4;
const MAX_TOKENS = 24;
/** Shorter and longer than every window and original length; 3 outgrows them on the way. */
const PROMPT_LENGTHS = [1, 3, 17, 40, 61];

/** One model of each family, with what distinguishes it. */
const MODELS = [
  ...['llama, rope llama3', 'llama, rope yarn', 'mistral, window', 'qwen2, window in late layers', 'qwen3'],
  ...['smollm3, no_rope_layers, window in them', 'phi3, longrope, partial rotary', 'gemma2', 'gemma3_text', 'olmo2'],
  ...['gpt2'],
];

let nats: NatsServer;
let scratch: string;

beforeAll(async () => {
  scratch = mkdtempSync(join(tmpdir(), 'lamina-families-'));
  nats = await startNatsServer();
});

afterAll(async () => {
  await nats.stop();
  rmSync(scratch, { recursive: true, force: true });
});

function promptOf(length: number): number[] {
  return Array.from({ length }, (_, i) => (i * 53 + length * 7) % 256);
}

function logSoftmax(logits: Float32Array): Float64Array {
  const maximum = logits.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  let sum = 0;
  for (const logit of logits) sum += Math.exp(logit - maximum);
  return Float64Array.from(logits, (logit) => logit - maximum - Math.log(sum));
}

function workItem(model: string, index: number): WorkItem {
  return {
    id: `${model}-${index}`,
    model,
    tokenIds: promptOf(PROMPT_LENGTHS[index]!),
    maxTokens: MAX_TOKENS,
    sampling: { temperature: 0, topP: 1, topK: 0, minP: 0, seed: 0 },
    stop: [],
    logprobs: 5,
    ignoreEos: true,
    priority: 0,
    deadlineAtMs: null,
    encoding: 'json',
    submittedAtMs: Date.now(),
  };
}

/** All prompts at once, through the work queue. */
async function generateAll(model: string): Promise<TokenMessage[][]> {
  const bus = await connect(nats.url);
  const queue = new WorkQueue(bus);
  const tokens = new TokenStream(bus, () => {});
  const answers = await Promise.all(
    PROMPT_LENGTHS.map(async (_, index) => {
      const item = workItem(model, index);
      const answer: TokenMessage[] = [];
      const done = new Promise<void>((resolve) => {
        tokens.follow(item.id, (message) => {
          answer.push(...decodeTokens(message.data));
          if (answer.at(-1)?.finish_reason !== null) resolve();
        });
      });
      await queue.submit(item);
      await done;
      return answer;
    }),
  );
  await bus.close();
  return answers;
}

describe('architectures over three shards', () => {
  it.each(MODELS)(
    '%s',
    async (name) => {
      const modelId = name.replaceAll(/\W+/g, '-');
      const dir = join(scratch, modelId);
      const cacheDir = join(scratch, 'cache');
      await writeRandomCheckpoint(dir, { contextLength: 128, ...RANDOM_MODELS[name] });
      const reference = await UncutReference.load(await buildModel(dir, { cacheDir }));
      const expected = [];
      for (const length of PROMPT_LENGTHS) {
        expected.push(await reference.greedy(promptOf(length), MAX_TOKENS, { ignoreEos: true }));
      }
      await reference.release();
      const kvFlags = ['--block-size-tokens', '16', '--kv-dtype', 'f32', '--spread-above-tokens', '16'];
      const manager = await startInProcess('kv-manager', startKvManager, nats.url, kvFlags);
      const shards = await Promise.all(
        Array.from({ length: NUM_SHARDS }, (_, i) =>
          startInProcess('attention-shard', startAttentionShard, nats.url, [
            ...['--kv-budget-bytes', '16m', '--attention-kernel', i === 0 ? 'portable' : 'native'],
          ]),
        ),
      );
      const executor = await startInProcess('dense-executor', startDenseExecutor, nats.url, [
        ...['--model', dir, '--cache-dir', cacheDir, '--prefill-chunk-tokens', '19', '--dense-workers', '1'],
      ]);
      try {
        const { bus } = manager.context;
        await eventually(async () => {
          const status = await bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 1000 });
          return status.shards.filter((shard) => shard.numBlocks > 0).length === NUM_SHARDS ? true : undefined;
        });
        const answers = await generateAll(modelId);
        let worst = 0;
        for (const [index, answer] of answers.entries()) {
          expect(
            answer.map((message) => message.token),
            `prompt of ${PROMPT_LENGTHS[index]} tokens`,
          ).toEqual(expected[index]!.tokenIds);
          for (const [at, message] of answer.entries()) {
            const logprobs = logSoftmax(expected[index]!.logits[at]!);
            for (const { token, logprob } of message.top_logprobs!) {
              worst = Math.max(worst, Math.abs(logprob - logprobs[token]!));
            }
          }
        }
        expect(worst).toBeLessThan(LOGPROB_BOUND);
        console.log(`${name}: worst log-probability difference ${worst.toExponential(1)}`);
      } finally {
        await executor.stop();
        await Promise.all(shards.map((shard) => shard.stop()));
        await manager.stop();
      }
    },
    60_000,
  );
});
