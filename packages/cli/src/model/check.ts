/**
 * Owns `lamina model check`: a cluster of real processes against the uncut graph, for one model on this machine.
 *
 * Invariants
 * 1. KV is float32 and every block may lie on another shard, so that what is compared is the cut and nothing else.
 * 2. The uncut graph runs before the cluster is started: both never hold the weights at once.
 * 3. Exit status 0 if every token is equal, ties apart; 1 if not.
 */
import { buildModel, loadTokenizer, type ModelDescription } from '@lamina/model';
import { SETTINGS } from '@lamina/runtime';
import { type GreedyResult, UncutReference } from '@lamina/testkit';
import type { Cluster } from '../cluster.ts';
import { generate } from '../demo.ts';
import { clusterOptionsOf } from '../options.ts';
import { table } from '../table.ts';
import { withCluster } from '../with-cluster.ts';
import { type Comparison, comparePrompt, type DistributedToken } from './compare.ts';
import { cacheDirOf, type Environment, findModel, modelNameOf } from './find-model.ts';
import { showBytes } from './progress.ts';

export interface CheckFlags {
  readonly attentionShards: number;
  readonly maxTokens: number;
  readonly verbose?: true;
}

const TOP_LOGPROBS = 20;
const PORTS = { natsPort: 0, httpPort: 0 };

const PROMPTS: readonly string[] = [
  'Once upon a time, there was a little girl named Lily.',
  'def fibonacci(n):\n    """Return the n-th number."""\n',
  'Zürich, 東京 and a 😀: 3.14159 is not 22/7.',
  'The king could not sleep. He got up, lit a candle, and counted the stars over the old tower. '.repeat(12),
];

interface CheckedPrompt {
  readonly text: string;
  readonly tokenIds: readonly number[];
  readonly expected: GreedyResult;
}

export async function runCheck(name: string | undefined, flags: CheckFlags, environment: Environment): Promise<number> {
  const dir = await findModel(modelNameOf(name, environment), environment);
  const prompts = await answerUncut(dir, cacheDirOf(environment), flags.maxTokens);
  const clusterFlags = { ...flags, model: dir, denseExecutors: 1 };
  const { natsUrl: _, ...options } = await clusterOptionsOf(clusterFlags, PORTS, withoutServer(environment));
  process.stderr.write(`starting ${flags.attentionShards} attention shards\n`);
  const settings = { ...options.settings, kvDtype: 'f32', spreadAboveTokens: '0' };
  return withCluster({ ...options, settings }, async (cluster) => {
    const comparisons: Comparison[] = [];
    for (const { text, tokenIds, expected } of prompts) {
      comparisons.push(
        comparePrompt(text, tokenIds.length, expected, await answer(cluster, tokenIds, flags.maxTokens)),
      );
    }
    process.stdout.write(`${describeCheck(comparisons, flags.attentionShards)}\n`);
    return comparisons.every(({ difference }) => difference === null || difference.isTie) ? 0 : 1;
  });
}

/** A check starts a server of its own, whatever server the environment names. */
function withoutServer(environment: Environment): Environment {
  return { ...environment, [SETTINGS.natsUrl.env]: undefined };
}

async function answerUncut(dir: string, cacheDir: string, maxTokens: number): Promise<CheckedPrompt[]> {
  const shown = showBytes(process.stderr, 'building');
  const built = await buildModel(dir, { cacheDir, onProgress: shown.update }).finally(shown.done);
  const tokenizer = await loadTokenizer(dir);
  process.stderr.write(`${built.description.modelId}: running the uncut graph\n`);
  const reference = await UncutReference.load(built);
  try {
    const prompts: CheckedPrompt[] = [];
    for (const text of PROMPTS) {
      const tokenIds = fitted(tokenizer.encode(text), built.description, maxTokens);
      prompts.push({ text, tokenIds, expected: await reference.greedy(tokenIds, maxTokens, { ignoreEos: true }) });
    }
    return prompts;
  } finally {
    await reference.release();
  }
}

/** As much of a prompt as leaves room for the answer. */
function fitted(tokenIds: readonly number[], { contextLength }: ModelDescription, maxTokens: number): number[] {
  return tokenIds.slice(0, Math.max(1, contextLength - maxTokens));
}

async function answer(cluster: Cluster, tokenIds: readonly number[], maxTokens: number): Promise<DistributedToken[]> {
  const tokens: DistributedToken[] = [];
  const body = {
    token_ids: tokenIds,
    max_tokens: maxTokens,
    temperature: 0,
    logprobs: TOP_LOGPROBS,
    ignore_eos: true,
  };
  await generate(cluster.bus, body, ({ token, logprob, top_logprobs: top }) => {
    if (token !== null) tokens.push({ token, logprob: logprob ?? Number.NaN, top: top ?? [] });
  });
  return tokens;
}

export function describeCheck(comparisons: readonly Comparison[], attentionShards: number): string {
  const rows = comparisons.map(({ text, promptTokens, comparedTokens, worstLogprobDifference, difference }) => [
    JSON.stringify(text.length > 40 ? `${text.slice(0, 37)}...` : text),
    String(promptTokens),
    String(comparedTokens),
    worstLogprobDifference.toExponential(1),
    difference === null
      ? 'none'
      : `at ${difference.index}: ${difference.actual}, not ${difference.expected}${difference.isTie ? ' (a tie)' : ''}`,
  ]);
  const worst = Math.max(...comparisons.map(({ worstLogprobDifference }) => worstLogprobDifference));
  const tokens = comparisons.reduce((sum, { comparedTokens }) => sum + comparedTokens, 0);
  const wrong = comparisons.filter(({ difference }) => difference !== null && !difference.isTie).length;
  const verdict = wrong === 0 ? 'equal' : `DIFFERENT in ${wrong} of ${comparisons.length} prompts`;
  return [
    table([['prompt', 'tokens', 'compared', 'worst difference', 'first differing token'], ...rows], [1, 2, 3]),
    '',
    `${verdict}: ${tokens} tokens on ${attentionShards} attention shards against the uncut graph, fp32 KV; log-probabilities differ by ${worst.toExponential(1)} at most`,
  ].join('\n');
}
