/**
 * Owns the row of overlap: two staggered waves against one wave of the same requests, with attention as long as the dense
 * stages.
 *
 * Invariants
 * 1. The shard is throttled by the bytes it answers, so a wave of half the requests is answered in half the time, and it
 *    is one device that two waves share. With one wave the best is dense + attention, with two the longer of them.
 * 2. That attention takes as long as the dense stages is measured in one wave, from /metrics, and said in the checks.
 */
import type { Context } from '../context.ts';
import { readMetrics, stepCosts } from '../metrics.ts';
import { shapeOf } from '../models.ts';
import type { Workload } from '../peers/peer.ts';
import { measuredTogether, type Row } from '../rows.ts';
import type { Pair } from '../statistics.ts';
import { ThrottledLamina } from '../throttled-lamina.ts';

const MODEL = 'smollm2-135m';
/**
 * What overlaps is to be seen, not what two waves cost: products in f32 of so many rows take time in proportion to them, and
 * dense stages on one thread leave a core to all that stands for other machines.
 */
const SETTINGS = {
  denseWorkers: '1',
  intraOpThreads: '1',
  weights: 'f32',
  maxRunningRequests: '128',
  maxOpenRequests: '256',
  maxOpenPerClient: '256',
} as const;
const NUM_REQUESTS = 128;
/** Short, because attention takes as long as the throttle says: its prompts are soon computed. */
const CONTEXT_TOKENS = 32;
const FLOAT_BYTES = 4;
const CALIBRATIONS = 3;

/** Milliseconds of dense stages and of waiting for attention of one step. */
async function costsOf({ peer }: ThrottledLamina, context: Context): Promise<{ dense: number; wait: number }> {
  const { httpUrl } = peer.cluster;
  // A paused gateway answers nothing.
  peer.resume();
  const before = await readMetrics(httpUrl);
  await peer.window(context.window);
  peer.resume();
  const { ms } = stepCosts(before, await readMetrics(httpUrl));
  peer.pause();
  return ms;
}

/** Nanoseconds per byte at which the shard's answers take as long as the dense stages; what came of it in words. */
async function calibrate(one: ThrottledLamina, { numRequests }: Workload, context: Context): Promise<[number, string]> {
  const { numLayers, numHeads, headDim } = shapeOf(MODEL).shape;
  const answerBytes = numLayers * numRequests * numHeads * (headDim + 1) * FLOAT_BYTES;
  let nanosecondsPerByte = 0;
  let costs = await costsOf(one, context);
  for (let i = 0; i < CALIBRATIONS; i++) {
    nanosecondsPerByte = Math.max(0, nanosecondsPerByte + ((costs.dense - costs.wait) * 1e6) / answerBytes);
    one.throttle(nanosecondsPerByte);
    costs = await costsOf(one, context);
  }
  const shown = `one wave: dense ${costs.dense.toFixed(1)} ms, attention ${costs.wait.toFixed(1)} ms a step`;
  if (Math.abs(costs.wait / costs.dense - 1) > 0.25) throw new Error(`attention is not as long as dense: ${shown}`);
  return [nanosecondsPerByte, shown];
}

/** Prompts are computed with the throttle open: they are not what is measured. */
async function rateOf(
  cluster: ThrottledLamina,
  workload: Workload,
  nanosecondsPerByte: number,
  { window }: Context,
): Promise<number> {
  cluster.throttle(0);
  await cluster.peer.open(workload);
  cluster.throttle(nanosecondsPerByte);
  try {
    return await cluster.peer.window(window);
  } finally {
    await cluster.peer.close();
  }
}

export async function overlap(context: Context): Promise<Row[]> {
  const name = {
    part: 'overlap',
    name: `two waves, ${MODEL} ${NUM_REQUESTS} x ${CONTEXT_TOKENS}, f32, one dense thread, shard throttled to the dense stages`,
    unit: 'tok/s',
    peerName: 'one wave',
    mustReach: 1.6,
  };
  const { threads, directory } = context;
  const requests = { numRequests: NUM_REQUESTS, contextTokens: CONTEXT_TOKENS, maxNewTokens: 2000 };
  const workload = { model: MODEL, ...requests, threads, directory };
  return measuredTogether([name], async () => {
    const clusters: ThrottledLamina[] = [];
    const startWaves = async (wavesPerWorker: string): Promise<ThrottledLamina> => {
      const cluster = await ThrottledLamina.start(MODEL, directory, { ...SETTINGS, wavesPerWorker });
      clusters.push(cluster);
      return cluster;
    };
    try {
      const [two, one] = [await startWaves('2'), await startWaves('1')];
      const checks = [(await one.peer.open(workload)).held];
      const [nanosecondsPerByte, shown] = await calibrate(one, workload, context);
      checks.push(shown);
      await one.peer.close();
      const runs: Pair[] = [];
      for (let round = 0; round < Math.min(context.rounds, 3); round++) {
        const pair = {
          ours: await rateOf(two, workload, nanosecondsPerByte, context),
          peer: await rateOf(one, workload, nanosecondsPerByte, context),
        };
        context.say(`  round ${round + 1}: two waves ${pair.ours.toFixed(1)}, one ${pair.peer.toFixed(1)} tok/s`);
        runs.push(pair);
      }
      return [{ runs, checks }];
    } finally {
      for (const cluster of clusters) await cluster.stop();
    }
  });
}
