/**
 * Owns the rows of overhead: of one decode step, the CPU time that is neither dense layers nor waiting, by cause, and the
 * step's own timings.
 *
 * Invariants
 * 1. A share is of all CPU time of the executor process in the same seconds, ONNX Runtime's threads included. The profiler
 *    runs in other seconds of the same requests: it says how the time of each thread is divided.
 */
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Context } from '../context.ts';
import { readMetrics, STEP_PARTS, stepCosts } from '../metrics.ts';
import { LaminaPeer } from '../peers/lamina.ts';
import { cpuSecondsOf, sleep } from '../processes.ts';
import { CAUSES, type Cause, causesOf, type ThreadProfile } from '../profile.ts';
import { measuredTogether, type Row, type RowName } from '../rows.ts';
import type { Pair } from '../statistics.ts';

const LIMIT = 0.03;
const TOGETHER_LIMIT = 0.1;
const COUNTED: readonly Cause[] = ['machine', 'codec', 'nats', 'schedule'];
const HOOK = new URL('../profile-hook.js', import.meta.url).href;
const WRITE_TIMEOUT_MS = 20_000;

interface Round {
  readonly cpuMs: Readonly<Record<Cause, number>>;
  /** Of the whole process. */
  readonly totalCpuMs: number;
  readonly stepMs: Readonly<Record<(typeof STEP_PARTS)[number], number>>;
}

/** Profiles of all threads, when as many are written as threads are profiled and none is written any more. */
async function readProfiles(directory: string, number: number): Promise<ThreadProfile[]> {
  const deadlineMs = performance.now() + WRITE_TIMEOUT_MS;
  const filesNow = async (): Promise<string[]> =>
    (await readdir(directory)).filter((file) => file.startsWith(`${number}-`));
  let files = await filesNow();
  // The main thread and one worker at least.
  while (files.length < 2 && performance.now() < deadlineMs) {
    await sleep(200);
    files = await filesNow();
  }
  if (files.length < 2) throw new Error('the executor wrote no profiles');
  await sleep(1000);
  const texts = await Promise.all((await filesNow()).map((file) => readFile(join(directory, file), 'utf8')));
  return texts.map((text) => JSON.parse(text));
}

async function measureRound(ours: LaminaPeer, directory: string, number: number, seconds: number): Promise<Round> {
  const { cluster } = ours;
  const [executor] = cluster.processes('dense-executor');
  executor?.kill('SIGUSR2');
  const [metricsBefore, cpuBefore] = [await readMetrics(cluster.httpUrl), await cpuSecondsOf(executor?.pid)];
  await sleep(seconds * 1000);
  const [metricsAfter, cpuAfter] = [await readMetrics(cluster.httpUrl), await cpuSecondsOf(executor?.pid)];
  executor?.kill('SIGUSR2');
  await sleep(seconds * 1000);
  executor?.kill('SIGUSR2');
  const causes = (await readProfiles(directory, number)).map(causesOf);
  const { numSteps, ms } = stepCosts(metricsBefore, metricsAfter);
  const totalCpuMs = (1000 * (cpuAfter - cpuBefore)) / numSteps;
  const sum = (cause: Cause): number => causes.reduce((total, each) => total + each[cause], 0) / numSteps;
  return {
    cpuMs: {
      machine: sum('machine'),
      codec: sum('codec'),
      nats: sum('nats'),
      schedule: sum('schedule'),
      dense: sum('dense'),
      sample: sum('sample'),
      answer: sum('answer'),
      other: sum('other'),
      native: sum('native'),
    },
    totalCpuMs,
    stepMs: ms,
  };
}

export async function overhead(context: Context): Promise<Row[]> {
  const [numRequests, contextTokens] = context.isQuick ? [4, 128] : [16, 512];
  const row = (what: string, peerName: string, mustReach: number | null): RowName => {
    const name = `${what}, smollm2-135m ${numRequests} x ${contextTokens}`;
    return { part: 'overhead', name, unit: 'ms a step', peerName, mustReach, bound: 'at most' };
  };
  const ofCpu = 'CPU time of the executor';
  const names = [
    ...CAUSES.map((cause) => row(`CPU: ${cause}`, ofCpu, COUNTED.includes(cause) ? LIMIT : null)),
    row(`CPU: ${COUNTED.join(' + ')}`, ofCpu, TOGETHER_LIMIT),
    ...STEP_PARTS.filter((part) => part !== 'total').map((part) => row(`time: ${part}`, 'the whole step', null)),
  ];
  const directory = await mkdtemp(join(tmpdir(), 'lamina-profile-'));
  const ours = new LaminaPeer({ environment: { NODE_OPTIONS: `--import ${HOOK}`, BENCH_PROFILE_DIR: directory } });
  try {
    return await measuredTogether(names, async () => {
      const { threads } = context;
      const workload = { model: 'smollm2-135m', numRequests, contextTokens, threads, directory: context.directory };
      const checks = [(await ours.open({ ...workload, maxNewTokens: 4000 })).held];
      ours.resume();
      await sleep(1000);
      const rounds: Round[] = [];
      for (let number = 1; number <= Math.min(context.rounds, 3); number++) {
        rounds.push(await measureRound(ours, directory, number, context.isQuick ? 2 : 6));
      }
      const cpu = (of: (round: Round) => number): Pair[] =>
        rounds.map((round) => ({ ours: of(round), peer: round.totalCpuMs }));
      const together = ({ cpuMs }: Round): number => COUNTED.reduce((total, cause) => total + cpuMs[cause], 0);
      const pairs = [
        ...CAUSES.map((cause) => cpu(({ cpuMs }) => cpuMs[cause])),
        cpu(together),
        ...STEP_PARTS.filter((part) => part !== 'total').map((part) =>
          rounds.map(({ stepMs }): Pair => ({ ours: stepMs[part], peer: stepMs.total })),
        ),
      ];
      return pairs.map((runs) => ({ runs, checks }));
    });
  } finally {
    await ours.dispose();
    await rm(directory, { recursive: true, force: true });
  }
}
