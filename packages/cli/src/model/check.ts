/**
 * Owns `lamina model check`: a cluster of real processes against the uncut graph, for one model on this machine.
 *
 * Invariants
 * 1. KV is float32 and every block may lie on another shard, so that what is compared is the cut and nothing else.
 * 2. The uncut graph runs before the cluster is started: both never hold the weights at once.
 * 3. Both sides are told the same weights, whatever the environment of the services says.
 * 4. Exit status 0 if every token is equal, ties apart, and no log-probability is further away than rounding explains; 1
 *    if not.
 */
import {
  buildModel,
  type DecoderInspection,
  inspectDecoder,
  loadTokenizer,
  type ModelDescription,
  type WeightsChoice,
} from '@lamina/model';
import { SETTINGS } from '@lamina/runtime';
import { type GreedyResult, UncutReference } from '@lamina/testkit';
import type { Cluster, ServiceSettings } from '../cluster.ts';
import { generate } from '../demo.ts';
import { clusterOptionsOf } from '../options.ts';
import { table } from '../table.ts';
import { withCluster } from '../with-cluster.ts';
import { type Comparison, comparePrompt, type DistributedToken, LOGPROB_TOLERANCE } from './compare.ts';
import { cacheDirOf, type Environment, findWeights, modelNameOf } from './find-model.ts';
import { showBytes } from './progress.ts';

export interface CheckFlags {
  readonly weights?: string;
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
  const { dir, ...choice } = await findWeights(modelNameOf(name, environment), flags.weights, environment);
  const { form, activations } = await inspectDecoder(dir, choice);
  const prompts = await answerUncut(dir, choice, cacheDirOf(environment), flags.maxTokens);
  const clusterFlags = { ...flags, model: dir, denseExecutors: 1 };
  const { natsUrl: _, ...options } = await clusterOptionsOf(clusterFlags, PORTS, withoutServer(environment));
  process.stderr.write(`starting ${flags.attentionShards} attention shards\n`);
  const settings = { ...options.settings, ...settingsOf(form), kvDtype: 'f32', spreadAboveTokens: '0' };
  const tolerance = LOGPROB_TOLERANCE[activations];
  return withCluster({ ...options, settings }, async (cluster) => {
    const comparisons: Comparison[] = [];
    for (const { text, tokenIds, expected } of prompts) {
      comparisons.push(
        comparePrompt(text, tokenIds.length, expected, await answer(cluster, tokenIds, flags.maxTokens), tolerance),
      );
    }
    const context = { attentionShards: flags.attentionShards, form, activations };
    process.stdout.write(`${describeCheck(comparisons, context)}\n`);
    return comparisons.every((comparison) => isEqual(comparison, tolerance)) ? 0 : 1;
  });
}

/** A check starts a server of its own, whatever server the environment names. */
function withoutServer(environment: Environment): Environment {
  return { ...environment, [SETTINGS.natsUrl.env]: undefined };
}

/** What makes every service take the weights that the uncut graph has. */
function settingsOf(form: DecoderInspection['form']): ServiceSettings {
  return form.kind === 'onnx' ? { onnxVariant: form.variant } : { onnxVariant: 'auto', weights: form.weights };
}

async function answerUncut(
  dir: string,
  choice: WeightsChoice,
  cacheDir: string,
  maxTokens: number,
): Promise<CheckedPrompt[]> {
  const shown = showBytes(process.stderr, 'building');
  const built = await buildModel(dir, { ...choice, cacheDir, onProgress: shown.update }).finally(shown.done);
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

function isEqual({ difference, worstLogprobDifference: worst }: Comparison, tolerance: number): boolean {
  return (difference === null || difference.isTie) && worst <= tolerance;
}

export interface CheckContext extends Pick<DecoderInspection, 'form' | 'activations'> {
  readonly attentionShards: number;
}

export function describeCheck(comparisons: readonly Comparison[], context: CheckContext): string {
  const { attentionShards, form, activations } = context;
  const rows = comparisons.map(({ text, promptTokens, comparedTokens, worstLogprobDifference, difference }) => [
    JSON.stringify(text.length > 40 ? `${text.slice(0, 37)}...` : text),
    String(promptTokens),
    String(comparedTokens),
    worstLogprobDifference.toExponential(1),
    difference === null
      ? 'none'
      : `at ${difference.index}: ${difference.actual ?? 'the answer ended'}, not ${difference.expected}${difference.isTie ? ' (a tie)' : ''}`,
  ]);
  const tolerance = LOGPROB_TOLERANCE[activations];
  const worst = Math.max(...comparisons.map(({ worstLogprobDifference }) => worstLogprobDifference));
  const tokens = comparisons.reduce((sum, { comparedTokens }) => sum + comparedTokens, 0);
  const wrong = comparisons.filter((comparison) => !isEqual(comparison, tolerance)).length;
  const verdict = wrong === 0 ? 'equal' : `DIFFERENT in ${wrong} of ${comparisons.length} prompts`;
  const uncut = form.kind === 'onnx' ? form.graph : `${form.weights} weights`;
  return [
    table([['prompt', 'tokens', 'compared', 'worst difference', 'first differing token'], ...rows], [1, 2, 3]),
    '',
    `${verdict}: ${tokens} tokens on ${attentionShards} attention shards against the uncut graph (${uncut}), fp32 KV`,
    `log-probabilities differ by ${worst.toExponential(1)} at most; ${ROUNDING[activations]} explains ${tolerance}`,
  ].join('\n');
}

const ROUNDING: Readonly<Record<DecoderInspection['activations'], string>> = {
  float32: 'float32',
  float16: 'half precision',
  int8: 'rounding activations to 8 bits',
};
