/**
 * Speculation changes how many passes an answer takes and nothing else: greedy and seeded answers are the same with and
 * without it, also where most drafts are wrong, over several shards and small blocks.
 */
import { fileURLToPath } from 'node:url';
import { loadTokenizer } from '@lamina/model';
import type { WorkItem } from '@lamina/protocol';
import { expect, it } from 'vitest';
import { useTestBench, withCluster } from './in-process-cluster.ts';

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

const bench = useTestBench('speculation');

/** All answers, one request at a time, and how many passes and accepted drafts they took. */
async function answers(speculation: 'auto' | 'off'): Promise<{ tokens: (number | null)[][]; counters: string }> {
  const tokenizer = await loadTokenizer(MODEL);
  const flags = {
    kvManager: ['--kv-dtype', 'f32', '--spread-above-tokens', '32', '--block-size-tokens', '8'],
    shards: Array.from({ length: 3 }, () => ['--kv-budget-bytes', '16m']),
    executor: ['--model', MODEL, '--cache-dir', bench.scratch, '--speculation', speculation],
  };
  const requests = PROMPTS.flatMap((prompt, i) =>
    SAMPLINGS.map((sampling, j) => ({
      ...{ id: `${speculation}-${i}-${j}`, model: 'lamina-tiny', tokenIds: tokenizer.encode(prompt) },
      ...{ maxTokens: MAX_TOKENS, sampling },
    })),
  );
  return withCluster(bench.natsUrl, flags, async (cluster) => {
    const messages = await cluster.generate(requests, 1);
    return {
      tokens: messages.map((answer) => answer.map(({ token }) => token)),
      counters: await cluster.executor.context.registry.metrics(),
    };
  });
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
