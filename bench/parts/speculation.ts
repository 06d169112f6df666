/** Owns the row of speculation: one request on text that repeats, with and without drafts. */
import { join } from 'node:path';
import { ROOT_DIRECTORY } from '@lamina/cli';
import { compareDecode } from '../alternate.ts';
import type { Context } from '../context.ts';
import { LaminaPeer } from '../peers/lamina.ts';
import { measuredTogether, type Row } from '../rows.ts';
import { randomIntegers } from '../statistics.ts';

const CONTEXT_TOKENS = 512;
/** lamina-tiny's context is 1,024. */
const MAX_NEW_TOKENS = 500;
const PERIOD_TOKENS = 32;
const VOCABULARY = 1024;

export async function speculation(context: Context): Promise<Row[]> {
  const name = {
    part: 'speculation',
    name: `lamina-tiny 1 x ${CONTEXT_TOKENS}, text that repeats`,
    unit: 'tok/s',
    peerName: 'without',
    mustReach: 1.5,
  };
  return measuredTogether([name], async () => {
    const phrase = randomIntegers(3, PERIOD_TOKENS, VOCABULARY - 300).map((token) => token + 256);
    const prompt = Array.from({ length: CONTEXT_TOKENS }, (_, i) => phrase[i % PERIOD_TOKENS]!);
    const modelDir = join(ROOT_DIRECTORY, 'models', 'lamina-tiny');
    const peerOf = (value: string): LaminaPeer =>
      new LaminaPeer({ modelDir, prompts: [prompt], settings: { weights: 'f32', speculation: value } });
    const [ours, without] = [peerOf('auto'), peerOf('off')];
    try {
      const { threads, directory } = context;
      // Started before either has work: a paused cluster must not wait for the other's start.
      for (const peer of [ours, without]) await peer.start('lamina-tiny', directory);
      const workload = { model: 'lamina-tiny', numRequests: 1, contextTokens: CONTEXT_TOKENS, threads, directory };
      const short = { ...context, rounds: Math.min(context.rounds, 3), window: { minSteps: 40, maxSeconds: 4 } };
      return await compareDecode(short, ours, [without], { ...workload, maxNewTokens: MAX_NEW_TOKENS });
    } finally {
      await ours.dispose();
      await without.dispose();
    }
  });
}
