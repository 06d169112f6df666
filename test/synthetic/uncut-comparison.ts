/**
 * Owns comparing what a cluster answers with the uncut graph of the same model.
 *
 * Invariants
 * 1. Tokens are compared one by one, log-probabilities of every reported token of every step.
 */
import { join } from 'node:path';
import { buildModel } from '@lamina/model';
import type { TokenMessage } from '@lamina/protocol';
import { type GreedyResult, UncutReference } from '@lamina/testkit';
import { expect } from 'vitest';
import { type TestBench, withCluster } from './in-process-cluster.ts';

const NUM_SHARDS = 3;
const LOGPROB_BOUND = 1e-4;
const MAX_TOKENS = 24;
/** Shorter and longer than every window, original length and short table; 3 and 40 outgrow them on the way. */
const PROMPT_LENGTHS = [1, 3, 17, 40, 61];

const promptOf = (length: number): number[] => Array.from({ length }, (_, i) => (i * 53 + length * 7) % 256);

function logSoftmax(logits: Float32Array): Float64Array {
  const maximum = logits.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  let sum = 0;
  for (const logit of logits) sum += Math.exp(logit - maximum);
  return Float64Array.from(logits, (logit) => logit - maximum - Math.log(sum));
}

/** Expects the tokens of the uncut graph; returns the largest difference of a reported log-probability. */
export function expectTokensOf(expected: GreedyResult, answer: readonly TokenMessage[], what: string): number {
  expect(
    answer.map((message) => message.token),
    what,
  ).toEqual(expected.tokenIds);
  let worst = 0;
  for (const [at, message] of answer.entries()) {
    const logprobs = logSoftmax(expected.logits[at]!);
    for (const { token, logprob } of message.top_logprobs!) {
      worst = Math.max(worst, Math.abs(logprob - logprobs[token]!));
    }
  }
  return worst;
}

/**
 * Expects that the model that `write` writes into a folder answers over three shards, one of them with the portable
 * kernel, as its uncut graph: prompts of different lengths in one batch, every log-probability within 1e-4.
 */
export async function expectAnswersOfUncut(
  bench: TestBench,
  name: string,
  write: (dir: string) => Promise<void>,
): Promise<void> {
  const model = name.replaceAll(/\W+/g, '-');
  const dir = join(bench.scratch, model);
  const cacheDir = join(bench.scratch, 'cache');
  await write(dir);
  const reference = await UncutReference.load(await buildModel(dir, { cacheDir }));
  const prompts = PROMPT_LENGTHS.map(promptOf);
  const expected: GreedyResult[] = [];
  for (const prompt of prompts) expected.push(await reference.greedy(prompt, MAX_TOKENS, { ignoreEos: true }));
  await reference.release();
  const flags = {
    kvManager: ['--block-size-tokens', '16', '--kv-dtype', 'f32', '--spread-above-tokens', '16'],
    shards: Array.from({ length: NUM_SHARDS }, (_, i) => [
      ...['--kv-budget-bytes', '16m', '--attention-kernel', i === 0 ? 'portable' : 'native'],
    ]),
    executor: [...['--model', dir, '--cache-dir', cacheDir, '--prefill-chunk-tokens', '19', '--dense-workers', '1']],
  };
  const answers = await withCluster(bench.natsUrl, flags, (cluster) =>
    cluster.generate(
      prompts.map((tokenIds, i) => ({ id: `${model}-${i}`, model, tokenIds, maxTokens: MAX_TOKENS, logprobs: 5 })),
    ),
  );
  const worst = Math.max(
    ...answers.map((answer, i) => expectTokensOf(expected[i]!, answer, `prompt of ${PROMPT_LENGTHS[i]} tokens`)),
  );
  expect(worst).toBeLessThan(LOGPROB_BOUND);
  console.log(`${name}: worst log-probability difference ${worst.toExponential(1)}`);
}
