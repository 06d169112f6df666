/**
 * Owns the rows of speculation: one request, with and without drafts.
 *
 * Invariants
 * 1. The texts follow from rules and are what they are whatever comes out: the sentence with which the model's card says
 *    what it can do, over and over; a phrase of random tokens, over and over; random tokens. Trained on stories of 256
 *    tokens the model does not copy: after the phrase its answer is another text, which repeats itself as greedy answers
 *    of small models do. So the rows say how many tokens that repeat the answer has, not how well the prompt is repeated.
 */
import { join } from 'node:path';
import { ROOT_DIRECTORY } from '@lamina/cli';
import { loadTokenizer } from '@lamina/model';
import { compareDecode } from '../alternate.ts';
import type { Context } from '../context.ts';
import { readMetrics } from '../metrics.ts';
import { LaminaPeer } from '../peers/lamina.ts';
import { promptOf } from '../peers/peer.ts';
import { measuredTogether, type Row } from '../rows.ts';
import { randomIntegers } from '../statistics.ts';

const MODEL_DIRECTORY = join(ROOT_DIRECTORY, 'models', 'lamina-tiny');
/** Of the model's card, with the blank that follows it. */
const SENTENCE = 'Once upon a time, there was a little girl named Lily. ';
const CONTEXT_TOKENS = 512;
/** lamina-tiny's context is 1,024. */
const MAX_NEW_TOKENS = 500;
const PERIOD_TOKENS = 32;
const VOCABULARY = 1024;

interface Text {
  readonly name: string;
  readonly tokens: readonly number[];
  readonly mustReach: number | null;
}

function repeated(phrase: readonly number[]): number[] {
  return Array.from({ length: CONTEXT_TOKENS }, (_, i) => phrase[i % phrase.length]!);
}

async function texts(): Promise<Text[]> {
  const tokenizer = await loadTokenizer(MODEL_DIRECTORY);
  const phrase = randomIntegers(3, PERIOD_TOKENS, VOCABULARY - 300).map((token) => token + 256);
  return [
    { name: 'text that repeats', tokens: repeated(tokenizer.encode(SENTENCE)), mustReach: 1.5 },
    { name: 'random phrase that repeats', tokens: repeated(phrase), mustReach: 1.5 },
    { name: 'random tokens', tokens: promptOf(0, CONTEXT_TOKENS, VOCABULARY), mustReach: 1 },
  ];
}

/** Steps of the request of `peer`, and what became of its drafts. */
async function countsOf(peer: LaminaPeer): Promise<string> {
  const metrics = await readMetrics(peer.cluster.httpUrl);
  const of = (what: string): number => metrics.get(`lamina_${what}_total`) ?? 0;
  return `${of('generated_tokens')} tokens in ${of('steps')} steps, ${of('drafted_tokens')} drafted, ${of('accepted_tokens')} accepted`;
}

async function rowOf(context: Context, { name, tokens, mustReach }: Text): Promise<Row[]> {
  const rowName = {
    ...{ part: 'speculation', name: `lamina-tiny 1 x ${CONTEXT_TOKENS}, ${name}`, unit: 'tok/s' },
    ...{ peerName: 'without', mustReach },
  };
  return measuredTogether([rowName], async () => {
    const peerOf = (value: string): LaminaPeer =>
      new LaminaPeer({
        ...{ modelDir: MODEL_DIRECTORY, prompts: [tokens] },
        settings: { weights: 'f32', speculation: value },
      });
    const [ours, without] = [peerOf('auto'), peerOf('off')];
    try {
      const { threads, directory } = context;
      // Started before either has work: a paused cluster must not wait for the other's start.
      for (const peer of [ours, without]) await peer.start('lamina-tiny', directory);
      const workload = { model: 'lamina-tiny', numRequests: 1, contextTokens: CONTEXT_TOKENS, threads, directory };
      // Most of the answer: drafts begin to be right when it begins to repeat itself.
      const short = { ...context, rounds: Math.min(context.rounds, 3), window: { minSteps: 100, maxSeconds: 4 } };
      const results = await compareDecode(short, ours, [without], { ...workload, maxNewTokens: MAX_NEW_TOKENS });
      const counts = await countsOf(ours);
      context.say(`  ${counts}`);
      return results.map((result) =>
        result instanceof Error ? result : { ...result, checks: [...(result.checks ?? []), counts] },
      );
    } finally {
      await ours.dispose();
      await without.dispose();
    }
  });
}

export async function speculation(context: Context): Promise<Row[]> {
  const rows: Row[] = [];
  for (const text of await texts()) rows.push(...(await rowOf(context, text)));
  return rows;
}
