/**
 * Exactness: the distributed system equals the uncut ONNX graph, token for token, whatever the number of shards, the block
 * size, the prefill chunk, the batch, the kernel. Every service is the real one, on a connection of its own to a real nats-server.
 *
 * Bound: with fp32 KV the log-probabilities of the 20 likeliest tokens of every step are within 1e-3 of the uncut graph's
 * (logits up to a constant, which no sampling can see).
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { TokenStream, WorkQueue } from '@lamina/bus';
import { buildModel, loadTokenizer } from '@lamina/model';
import { decodeTokens, type TokenMessage, type WorkItem } from '@lamina/protocol';
import { UncutReference } from '@lamina/testkit';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type NatsServer, startNatsServer } from '../../packages/testkit/dist/nats-server.js';
import { startAttentionShard } from '../../services/attention-shard/dist/service.js';
import { startDenseExecutor } from '../../services/dense-executor/dist/service.js';
import { startKvManager } from '../../services/kv-manager/dist/service.js';
import { connect, eventually, startInProcess } from '../contract/in-process.ts';

const MODEL = fileURLToPath(new URL('../../models/lamina-tiny', import.meta.url));
const LOGPROB_BOUND = 1e-3;
const MAX_TOKENS = 40;

const PROMPTS: readonly string[] = [
  'O',
  'Once upon a time',
  'Once upon a time, there was a little girl named Lily.',
  'Tom and Sam went to the park. They saw a big dog.',
  'The cat was sad because',
  'One day, a small bird wanted to fly to the moon, but its wings were too short. It asked the wise old owl for help.',
  '"Can I have some cake?" asked Ben. His mom smiled and said,',
  'Zürich, 東京 and a 😀: words that the stories never had.',
  '1 2 3 4 5 6 7 8 9',
  'There was a boat on the lake. The boat was red. The lake was blue. A boy sat in the boat and looked at the fish. '.repeat(
    2,
  ),
  'Mia had a box. In the box there was another box. '.repeat(8),
  'Every morning the farmer got up, fed the hens, milked the cow, and sang a song about the sun. '.repeat(9),
  'A long, long story about a king who could not sleep. '.repeat(25),
  'The rain fell all day, and the ducks were happy.',
  'Grandma told us a secret: under the old tree',
  'No! No! No! said the little goat. '.repeat(5),
];

interface Setup {
  readonly shards: number;
  readonly blockSize: 16 | 64;
  readonly chunk: 7 | 512;
  readonly concurrency: number;
  readonly kernel: 'native' | 'portable';
  readonly kvDtype: 'f32' | 'f16';
  readonly workers: number;
}

/** Every number of shards meets both block sizes, chunks, kernels and dtypes; batches go from 1 to 16. */
const SETUPS: readonly Setup[] = [
  { shards: 1, blockSize: 16, chunk: 7, concurrency: 1, kernel: 'native', kvDtype: 'f32', workers: 1 },
  { shards: 1, blockSize: 64, chunk: 512, concurrency: 16, kernel: 'portable', kvDtype: 'f16', workers: 2 },
  { shards: 1, blockSize: 16, chunk: 512, concurrency: 5, kernel: 'portable', kvDtype: 'f32', workers: 1 },
  { shards: 2, blockSize: 16, chunk: 512, concurrency: 16, kernel: 'native', kvDtype: 'f32', workers: 2 },
  { shards: 2, blockSize: 64, chunk: 7, concurrency: 4, kernel: 'portable', kvDtype: 'f32', workers: 1 },
  { shards: 2, blockSize: 64, chunk: 512, concurrency: 1, kernel: 'native', kvDtype: 'f16', workers: 1 },
  { shards: 3, blockSize: 64, chunk: 7, concurrency: 16, kernel: 'native', kvDtype: 'f16', workers: 1 },
  { shards: 3, blockSize: 16, chunk: 512, concurrency: 3, kernel: 'portable', kvDtype: 'f16', workers: 2 },
  { shards: 3, blockSize: 16, chunk: 7, concurrency: 8, kernel: 'native', kvDtype: 'f32', workers: 2 },
  { shards: 5, blockSize: 16, chunk: 7, concurrency: 16, kernel: 'portable', kvDtype: 'f32', workers: 1 },
  { shards: 5, blockSize: 64, chunk: 512, concurrency: 8, kernel: 'native', kvDtype: 'f32', workers: 2 },
  { shards: 5, blockSize: 16, chunk: 512, concurrency: 1, kernel: 'native', kvDtype: 'f16', workers: 1 },
];

let nats: NatsServer;
let cacheDir: string;
let prompts: number[][];
let expected: { tokenIds: number[]; logits: Float32Array[] }[];

beforeAll(async () => {
  cacheDir = mkdtempSync(join(tmpdir(), 'lamina-exactness-'));
  nats = await startNatsServer();
  const tokenizer = await loadTokenizer(MODEL);
  prompts = PROMPTS.map((prompt) => tokenizer.encode(prompt));
  const reference = await UncutReference.load(await buildModel(MODEL, { cacheDir }));
  expected = [];
  for (const prompt of prompts) expected.push(await reference.greedy(prompt, MAX_TOKENS, { ignoreEos: true }));
  await reference.release();
}, 120_000);

afterAll(async () => {
  await nats.stop();
  rmSync(cacheDir, { recursive: true, force: true });
});

function logSoftmax(logits: Float32Array): Float64Array {
  const maximum = logits.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  let sum = 0;
  for (const logit of logits) sum += Math.exp(logit - maximum);
  return Float64Array.from(logits, (logit) => logit - maximum - Math.log(sum));
}

let runs = 0;

function workItem(index: number): WorkItem {
  return {
    id: `run${runs}-${index}`,
    model: 'lamina-tiny',
    tokenIds: prompts[index]!,
    maxTokens: MAX_TOKENS,
    sampling: { temperature: 0, topP: 1, topK: 0, minP: 0, seed: 0 },
    stop: [],
    logprobs: 20,
    ignoreEos: true,
    priority: 0,
    deadlineAtMs: null,
    encoding: 'json',
    submittedAtMs: Date.now(),
  };
}

/** Runs all prompts, `concurrency` at a time, through the work queue. */
async function generateAll(concurrency: number): Promise<TokenMessage[][]> {
  const bus = await connect(nats.url);
  const queue = new WorkQueue(bus);
  const tokens = new TokenStream(bus, () => {});
  const answers: TokenMessage[][] = prompts.map(() => []);
  let next = 0;
  const client = async (): Promise<void> => {
    for (let index = next++; index < prompts.length; index = next++) {
      const item = workItem(index);
      const done = new Promise<void>((resolve) => {
        tokens.follow(item.id, (message) => {
          answers[index]!.push(...decodeTokens(message.data));
          if (answers[index]!.at(-1)?.finish_reason !== null) resolve();
        });
      });
      await queue.submit(item);
      await done;
    }
  };
  await Promise.all(Array.from({ length: concurrency }, client));
  await bus.close();
  return answers;
}

describe('exactness', () => {
  it.each(SETUPS)(
    '$shards shards, blocks of $blockSize, chunks of $chunk, $concurrency at once, $kernel kernel, $kvDtype KV, $workers workers',
    async (setup) => {
      runs++;
      const manager = await startInProcess('kv-manager', startKvManager, nats.url, [
        '--block-size-tokens',
        String(setup.blockSize),
        '--kv-dtype',
        setup.kvDtype,
        '--spread-above-tokens',
        '32',
        '--heartbeat-interval-ms',
        '50',
      ]);
      const shards = await Promise.all(
        Array.from({ length: setup.shards }, () =>
          startInProcess('attention-shard', startAttentionShard, nats.url, [
            '--kv-budget-bytes',
            '48m',
            '--attention-kernel',
            setup.kernel,
          ]),
        ),
      );
      const executor = await startInProcess('dense-executor', startDenseExecutor, nats.url, [
        ...[
          '--model',
          MODEL,
          '--cache-dir',
          cacheDir,
          '--prefill-chunk-tokens',
          String(setup.chunk),
          '--max-batched-tokens',
          '600',
        ],
        ...['--dense-workers', String(setup.workers), '--waves-per-worker', setup.workers === 1 ? '2' : '1'],
      ]);
      try {
        const { bus } = manager.context;
        const { ENDPOINTS } = await import('@lamina/protocol');
        await eventually(async () => {
          const status = await bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 1000 });
          return status.shards.filter((shard) => shard.numBlocks > 0).length === setup.shards ? true : undefined;
        });
        const answers = await generateAll(setup.concurrency);
        let worst = 0;
        answers.forEach((answer, index) => {
          expect(
            answer.map((message) => message.token),
            `prompt ${index}`,
          ).toEqual(expected[index]!.tokenIds);
          expect(answer.map((message) => message.index)).toEqual(answer.map((_, at) => at));
          expect(answer.at(-1)).toMatchObject({
            finish_reason: 'length',
            usage: { prompt_tokens: prompts[index]!.length, completion_tokens: MAX_TOKENS },
          });
          answer.forEach((message, at) => {
            const reference = logSoftmax(expected[index]!.logits[at]!);
            expect(message.top_logprobs).toHaveLength(20);
            for (const { token, logprob } of message.top_logprobs!)
              worst = Math.max(worst, Math.abs(logprob - reference[token]!));
          });
        });
        if (setup.kvDtype === 'f32') expect(worst).toBeLessThan(LOGPROB_BOUND);
        console.log(`worst log-probability difference ${worst.toExponential(1)} (${setup.kvDtype} KV)`);
        const status = await eventually(async () => {
          const now = await bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 1000 });
          return now.numRequests === 0 ? now : undefined;
        });
        expect(status.shards.every((shard) => shard.usedBlocks === 0)).toBe(true);
      } finally {
        await executor.stop();
        await Promise.all(shards.map((shard) => shard.stop()));
        await manager.stop();
      }
    },
    90_000,
  );
});
