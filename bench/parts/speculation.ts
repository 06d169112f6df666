/**
 * Owns the rows of speculation: one request, with and without drafts.
 *
 * Invariants
 * 1. The texts follow from rules and are what they are whatever comes out: the sentence with which the model's card says
 *    what it can do, over and over; a phrase of random tokens, over and over; random tokens. Trained on stories of 256
 *    tokens the model does not copy: after the phrase its answer is another text, which repeats itself as greedy answers
 *    of small models do. So the rows say how many tokens that repeat the answer has, not how well the prompt is repeated.
 * 2. Whole answers are compared, and must have the same tokens.
 */
import { join } from 'node:path';
import { ROOT_DIRECTORY } from '@lamina/cli';
import { loadTokenizer } from '@lamina/model';
import type { Context } from '../context.ts';
import { readMetrics } from '../metrics.ts';
import { LaminaPeer } from '../peers/lamina.ts';
import { promptOf } from '../peers/peer.ts';
import { measuredTogether, type Row } from '../rows.ts';
import { type Pair, randomIntegers } from '../statistics.ts';

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

/** Steps of all answers of `peer`, and what became of their drafts. */
async function countsOf(peer: LaminaPeer): Promise<string> {
  const metrics = await readMetrics(peer.cluster.httpUrl);
  const of = (what: string): number => metrics.get(`lamina_${what}_total`) ?? 0;
  return `${of('generated_tokens')} tokens in ${of('steps')} steps, ${of('drafted_tokens')} drafted, ${of('accepted_tokens')} accepted`;
}

/** Tokens per second of a whole answer after its first token, and the answer. */
async function answerOf(peer: LaminaPeer, prompt: readonly number[]): Promise<{ rate: number; tokens: number[] }> {
  const { timesMs, tokens, unsubscribe } = peer.submit(prompt, MAX_NEW_TOKENS);
  await peer.until(() => timesMs.length === MAX_NEW_TOKENS);
  unsubscribe();
  return { rate: (1000 * (MAX_NEW_TOKENS - 1)) / (timesMs.at(-1)! - timesMs[0]!), tokens };
}

async function rowOf(context: Context, { name, tokens: prompt, mustReach }: Text): Promise<Row[]> {
  const rowName = {
    ...{ part: 'speculation', name: `lamina-tiny 1 x ${CONTEXT_TOKENS}, ${name}`, unit: 'tok/s' },
    ...{ peerName: 'without', mustReach },
  };
  return measuredTogether([rowName], async () => {
    const peerOf = (value: string): LaminaPeer =>
      new LaminaPeer({ modelDir: MODEL_DIRECTORY, settings: { weights: 'f32', speculation: value } });
    const [ours, without] = [peerOf('auto'), peerOf('off')];
    try {
      for (const peer of [ours, without]) {
        await peer.start('lamina-tiny', context.directory);
        // The first answer is slower.
        await answerOf(peer, prompt);
      }
      const runs: Pair[] = [];
      for (let round = 1; round <= context.rounds; round++) {
        const [drafted, plain] = [await answerOf(ours, prompt), await answerOf(without, prompt)];
        if (drafted.tokens.some((token, i) => token !== plain.tokens[i])) throw new Error('drafts changed the answer');
        runs.push({ ours: drafted.rate, peer: plain.rate });
        context.say(`  round ${round}: ${drafted.rate.toFixed(1)}, without ${plain.rate.toFixed(1)} tok/s`);
      }
      const counts = await countsOf(ours);
      context.say(`  ${counts}`);
      return [{ runs, checks: [counts] }];
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
