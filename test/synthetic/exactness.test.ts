/**
 * Exactness: the distributed system equals the uncut ONNX graph, token for token, whatever the number of shards, the block
 * size, the prefill chunk, the batch, the kernel. Every service is the real one, on a connection of its own to a real nats-server.
 *
 * Bound: with fp32 KV the log-probabilities of the 20 likeliest tokens of every step are within 1e-3 of the uncut graph's
 * (logits up to a constant, which no sampling can see).
 */
import { fileURLToPath } from 'node:url';
import { buildModel, loadTokenizer } from '@lamina/model';
import { type GreedyResult, UncutReference } from '@lamina/testkit';
import { beforeAll, describe, expect, it } from 'vitest';
import { eventually } from '../contract/in-process.ts';
import { useTestBench, withCluster } from './in-process-cluster.ts';
import { expectTokensOf } from './uncut-comparison.ts';

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

const bench = useTestBench('exactness');
let prompts: number[][];
let expected: GreedyResult[];

beforeAll(async () => {
  const tokenizer = await loadTokenizer(MODEL);
  prompts = PROMPTS.map((prompt) => tokenizer.encode(prompt));
  const reference = await UncutReference.load(await buildModel(MODEL, { cacheDir: bench.scratch }));
  expected = [];
  for (const prompt of prompts) expected.push(await reference.greedy(prompt, MAX_TOKENS, { ignoreEos: true }));
  await reference.release();
}, 120_000);

let runs = 0;

describe('exactness', () => {
  it.each(SETUPS)(
    '$shards shards, blocks of $blockSize, chunks of $chunk, $concurrency at once, $kernel kernel, $kvDtype KV, $workers workers',
    async (setup) => {
      runs++;
      const flags = {
        kvManager: [
          ...['--block-size-tokens', String(setup.blockSize), '--kv-dtype', setup.kvDtype],
          ...['--spread-above-tokens', '32', '--heartbeat-interval-ms', '50'],
        ],
        shards: Array.from({ length: setup.shards }, () => [
          ...['--kv-budget-bytes', '48m', '--attention-kernel', setup.kernel],
        ]),
        executor: [
          ...['--model', MODEL, '--cache-dir', bench.scratch, '--prefill-chunk-tokens', String(setup.chunk)],
          ...['--max-batched-tokens', '600', '--dense-workers', String(setup.workers)],
          ...['--waves-per-worker', setup.workers === 1 ? '2' : '1'],
        ],
      };
      await withCluster(bench.natsUrl, flags, async (cluster) => {
        const requests = prompts.map((tokenIds, index) => ({
          ...{ id: `run${runs}-${index}`, model: 'lamina-tiny', tokenIds },
          ...{ maxTokens: MAX_TOKENS, logprobs: 20 },
        }));
        const answers = await cluster.generate(requests, setup.concurrency);
        let worst = 0;
        for (const [index, answer] of answers.entries()) {
          worst = Math.max(worst, expectTokensOf(expected[index]!, answer, `prompt ${index}`));
          expect(answer.map((message) => message.index)).toEqual(answer.map((_, at) => at));
          expect(answer.at(-1)).toMatchObject({
            finish_reason: 'length',
            usage: { prompt_tokens: prompts[index]!.length, completion_tokens: MAX_TOKENS },
          });
          for (const message of answer) expect(message.top_logprobs).toHaveLength(20);
        }
        if (setup.kvDtype === 'f32') expect(worst).toBeLessThan(LOGPROB_BOUND);
        console.log(`worst log-probability difference ${worst.toExponential(1)} (${setup.kvDtype} KV)`);
        const status = await eventually(async () => {
          const now = await cluster.kvStatus();
          return now.numRequests === 0 ? now : undefined;
        });
        expect(status.shards.every((shard) => shard.usedBlocks === 0)).toBe(true);
      });
    },
    90_000,
  );
});
