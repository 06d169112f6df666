/**
 * Weight formats: the distributed system gives the greedy tokens of the uncut graph of the same weights, in place and
 * quantized. Every service is the real one, on a connection of its own to a real nats-server.
 *
 * Where weights are quantized, products round activations to 8 bits, and a difference in the last bit of a float32 becomes
 * one of a rounding step in later layers: tokens may part where two logits of the uncut graph are closer than NEAR_TIE.
 */
import { fileURLToPath } from 'node:url';
import { buildModel, loadTokenizer } from '@lamina/model';
import { UncutReference } from '@lamina/testkit';
import { describe, expect, it } from 'vitest';
import { useTestBench, withCluster } from './in-process-cluster.ts';

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

const bench = useTestBench('weights');

describe('lamina-tiny over two shards', () => {
  it.each(['checkpoint', 'int8', 'int4'] as const)(
    'gives the tokens of its uncut graph with weights %s',
    async (weights) => {
      const tokenizer = await loadTokenizer(MODEL);
      const cacheDir = bench.scratch;
      const prompts = PROMPTS.map((prompt) => tokenizer.encode(prompt));
      const reference = await UncutReference.load(await buildModel(MODEL, { cacheDir, weights }));
      const flags = {
        kvManager: ['--block-size-tokens', '16', '--kv-dtype', 'f32', '--spread-above-tokens', '16'],
        shards: Array.from({ length: NUM_SHARDS }, () => ['--kv-budget-bytes', '16m']),
        executor: ['--model', MODEL, '--cache-dir', cacheDir, '--weights', weights, '--dense-workers', '1'],
      };
      const answers = await withCluster(bench.natsUrl, flags, (cluster) =>
        cluster.generate(
          prompts.map((tokenIds, i) => ({
            ...{ id: `${weights}-${i}`, model: 'lamina-tiny', tokenIds },
            ...{ maxTokens: MAX_TOKENS, logprobs: 0 },
          })),
        ),
      );
      let equal = 0;
      for (const [i, messages] of answers.entries()) {
        const answer = messages.map(({ token }) => token!);
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
      await reference.release();
      console.log(`${weights}: ${equal} of ${answers.length} answers are equal to their last token`);
      expect(equal).toBeGreaterThanOrEqual(weights === 'checkpoint' ? PROMPTS.length : PROMPTS.length - 2);
    },
  );
});
