/**
 * Owns `npm run bench -- regress`: ratios of what was measured in the same run, with bounds that must hold on any machine.
 * For CI: under 3 minutes, no peers, exit status 1 when a bound is broken.
 *
 * Invariants
 * 1. No bound is a time: each is a share of something that was measured beside it.
 * 2. A bound that is broken is measured once more before it counts: machines of CI are not quiet.
 */
import { contextOf } from './context.ts';
import { readMetrics, type StepCosts, stepCosts } from './metrics.ts';
import { readKernelFigures } from './parts/kernel.ts';
import { LaminaPeer } from './peers/lamina.ts';
import { cpuSecondsOf, sleep } from './processes.ts';

interface Bound {
  readonly name: string;
  readonly value: number;
  readonly atLeast?: number;
  readonly atMost?: number;
}

const MODEL = 'smollm2-135m';
const IDLE_SECONDS = 3;

async function kernelBounds(): Promise<Bound[]> {
  const cases = [1, 4, 8].map((group) => ({ headDim: 64, group, threads: 1 }));
  const figures = await readKernelFigures(cases, { mib: 128, rounds: 5 });
  return figures.map(({ decode, bareRead }, i) => ({
    name: `kernel, group ${cases[i]!.group}: KV bytes/s over a bare read`,
    value: decode / bareRead,
    atLeast: [0.5, 0.4, 0.25][i]!,
  }));
}

function stepBounds({ ms }: StepCosts): Bound[] {
  const share = (value: number): number => value / ms.total;
  return [
    { name: 'dense stages, share of a decode step', value: share(ms.dense), atLeast: 0.3 },
    { name: 'codec, share of a decode step', value: share(ms.codec), atMost: 0.1 },
    {
      name: 'state machines and scheduling, share of a decode step',
      value: share(ms.machine + ms.schedule),
      atMost: 0.1,
    },
  ];
}

async function clusterBounds(say: (line: string) => void): Promise<Bound[]> {
  const { directory, threads, window } = contextOf(true, say);
  const ours = new LaminaPeer();
  try {
    const workload = { model: MODEL, numRequests: 8, contextTokens: 128, maxNewTokens: 2000, threads, directory };
    await ours.open(workload);
    const { cluster } = ours;
    ours.resume();
    const before = await readMetrics(cluster.httpUrl);
    const rate = await ours.window({ ...window, minSteps: 24, maxSeconds: 5 });
    ours.resume();
    const costs = stepCosts(before, await readMetrics(cluster.httpUrl));
    say(
      `  8 x 128: ${rate.toFixed(1)} tok/s, dense ${costs.ms.dense.toFixed(1)} of ${costs.ms.total.toFixed(1)} ms a step`,
    );
    await ours.close();
    const processes = (['gateway', 'dense-executor', 'attention-shard', 'kv-manager', 'nats-server'] as const).flatMap(
      (kind) => cluster.processes(kind),
    );
    const cpuSeconds = async (): Promise<number> => {
      const each = await Promise.all(processes.map(({ pid }) => cpuSecondsOf(pid)));
      return each.reduce((sum, seconds) => sum + seconds, 0);
    };
    await sleep(1000);
    const idleFrom = await cpuSeconds();
    await sleep(IDLE_SECONDS * 1000);
    const idle = ((await cpuSeconds()) - idleFrom) / IDLE_SECONDS;
    return [...stepBounds(costs), { name: 'an idle cluster, share of one core', value: idle, atMost: 0.05 }];
  } finally {
    await ours.dispose();
  }
}

const isBroken = ({ value, atLeast = Number.NEGATIVE_INFINITY, atMost = Number.POSITIVE_INFINITY }: Bound): boolean =>
  !(value >= atLeast && value <= atMost);

export async function regress(say: (line: string) => void): Promise<number> {
  let numBroken = 0;
  for (const measure of [kernelBounds, () => clusterBounds(say)]) {
    let bounds = await measure();
    if (bounds.some(isBroken)) {
      say('  a bound is broken: measuring once more');
      bounds = await measure();
    }
    for (const bound of bounds) {
      const limit = bound.atLeast === undefined ? `at most ${bound.atMost}` : `at least ${bound.atLeast}`;
      const verdict = isBroken(bound) ? 'BROKEN' : 'ok';
      process.stdout.write(`${verdict}: ${bound.name}: ${bound.value.toFixed(3)}, ${limit}\n`);
      if (isBroken(bound)) numBroken++;
    }
  }
  return numBroken === 0 ? 0 : 1;
}
