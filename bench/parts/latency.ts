/** Owns the rows of latency: what a prompt that is prefilled beside them costs requests that decode. */
import type { Context } from '../context.ts';
import { shapeOf } from '../models.ts';
import { LaminaPeer, type LiveRequest } from '../peers/lamina.ts';
import { promptOf } from '../peers/peer.ts';
import { sleep } from '../processes.ts';
import { measuredTogether, type Row, type RowName } from '../rows.ts';
import { type Pair, quantile } from '../statistics.ts';

const MODEL = 'smollm2-135m';
const NUM_REQUESTS = 8;
const CONTEXT_TOKENS = 128;

/** Milliseconds between tokens that arrived in [fromMs, toMs]. */
function gaps(requests: readonly LiveRequest[], fromMs: number, toMs: number): number[] {
  return requests.flatMap(({ timesMs }) =>
    timesMs.flatMap((timeMs, i) => {
      const before = timesMs[i - 1];
      return before === undefined || before < fromMs || timeMs > toMs ? [] : [timeMs - before];
    }),
  );
}

export async function latency(context: Context): Promise<Row[]> {
  const promptTokens = context.isQuick ? 1000 : 4000;
  const name = (q: string, mustReach: number | null): RowName => ({
    part: 'latency',
    name: `inter-token ${q} of ${NUM_REQUESTS} requests beside a prompt of ${promptTokens}`,
    unit: 'ms',
    peerName: 'p50 without it',
    mustReach,
    bound: 'at most',
  });
  const ours = new LaminaPeer();
  try {
    return await measuredTogether([name('p50', null), name('p99', 4)], async () => {
      const { threads, directory } = context;
      const workload = { model: MODEL, numRequests: NUM_REQUESTS, contextTokens: CONTEXT_TOKENS, threads, directory };
      const checks = [(await ours.open({ ...workload, maxNewTokens: 7000 })).held];
      ours.resume();
      const runs: [Pair[], Pair[]] = [[], []];
      const { vocabSize } = shapeOf(MODEL).shape;
      for (let round = 0; round < Math.min(context.rounds, 3); round++) {
        await sleep(500);
        const quietFromMs = performance.now();
        await sleep(context.isQuick ? 2000 : 5000);
        const quiet = quantile(gaps(ours.live, quietFromMs, performance.now()), 0.5);
        const besideFromMs = performance.now();
        const prompt = ours.submit(promptOf(1000 + round, promptTokens, vocabSize), 2);
        await ours.until(() => prompt.timesMs.length > 0);
        const beside = gaps(ours.live, besideFromMs, prompt.timesMs[0]!);
        runs[0].push({ ours: quantile(beside, 0.5), peer: quiet });
        runs[1].push({ ours: quantile(beside, 0.99), peer: quiet });
        checks.push(`${beside.length} tokens came while ${promptTokens} were prefilled`);
        await ours.until(() => prompt.timesMs.length > 1);
        prompt.unsubscribe();
      }
      return runs.map((pairs) => ({ runs: pairs, checks }));
    });
  } finally {
    await ours.dispose();
  }
}
