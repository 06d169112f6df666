/**
 * Published ONNX decoders, cut and distributed over three shards: each gives the tokens of its published graph, which
 * ONNX Runtime runs whole, cache and attention included. Every service is the real one, on a connection of its own to a
 * real nats-server. (All forms, in one process: packages/testkit/test/published.test.ts.)
 *
 * Bound: every reported log-probability is within 1e-4 of the published graph's.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { TokenStream, WorkQueue } from '@lamina/bus';
import { buildModel } from '@lamina/model';
import { decodeTokens, ENDPOINTS, type TokenMessage, type WorkItem } from '@lamina/protocol';
import { type ExportForm, type ExportOptions, UncutReference, writeExport } from '@lamina/testkit';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type NatsServer, startNatsServer } from '../../packages/testkit/dist/nats-server.js';
import { startAttentionShard } from '../../services/attention-shard/dist/service.js';
import { startDenseExecutor } from '../../services/dense-executor/dist/service.js';
import { startKvManager } from '../../services/kv-manager/dist/service.js';
import { connect, eventually, startInProcess } from '../contract/in-process.ts';

const NUM_SHARDS = 3;
const LOGPROB_BOUND = 1e-4;
const MAX_TOKENS = 24;
const PROMPT_LENGTHS = [1, 3, 17, 40, 61];

interface Published {
  readonly name: string;
  readonly form: ExportForm;
  readonly options: Partial<ExportOptions>;
}

const MODELS: readonly Published[] = [
  {
    name: 'GroupQueryAttention packed, window, sinks, q4',
    form: { operator: 'gqa', packed: true, localWindow: 24, sinks: 'head' },
    options: { precision: 'q4', externalData: true },
  },
  { name: 'GroupQueryAttention, soft-cap', form: { operator: 'gqa', softcap: 5 }, options: {} },
  {
    // Of the prompts, one is long and one outgrows the short tables with its answer.
    name: 'GroupQueryAttention, tables chosen by length',
    form: { operator: 'gqa', longAbove: { tokens: 48, by: 'length' } },
    options: {},
  },
  { name: 'MultiHeadAttention', form: { operator: 'mha' }, options: { numKvHeads: 4 } },
  { name: 'written out', form: { operator: 'eager', scaling: 'sdpa', mask: 'where' }, options: { tied: true } },
  { name: 'written out, ALiBi', form: { operator: 'eager', scaling: 'mul', mask: 'add', alibi: true }, options: {} },
  { name: 'Attention, packed past', form: { operator: 'gpt2', fused: true }, options: {} },
  { name: 'ai.onnx Attention', form: { operator: 'onnx', rank: 4, mask: 'float' }, options: {} },
];

let nats: NatsServer;
let scratch: string;

beforeAll(async () => {
  scratch = mkdtempSync(join(tmpdir(), 'lamina-published-'));
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

describe('published decoders over three shards', () => {
  it.each(MODELS)(
    '$name',
    async ({ name, form, options }) => {
      const modelId = name.replaceAll(/\W+/g, '-');
      const dir = join(scratch, modelId);
      const cacheDir = join(scratch, 'cache');
      await writeExport(dir, form, options);
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
