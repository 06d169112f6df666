/**
 * The soak: mixed load for as long as is wanted, a process killed every half minute, and at the end nothing lost, nothing
 * that grew, and no event loop that stood still. `npm run soak -- [--minutes N] [--seed N] [--json FILE]`
 */
import { writeFileSync } from 'node:fs';
import { STREAMS } from '@lamina/protocol';
import { processEnvironment, type Service } from '@lamina/runtime';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { ChaosCluster } from './chaos-cluster.ts';
import { Random } from './random.ts';
import { makeRequests, sleep } from './requests.ts';
import { Noise } from './soak-noise.ts';
import { type Held, type ProcessRow, Samples } from './soak-samples.ts';
import { type Answers, Workload } from './workload.ts';

const { LAMINA_SOAK_MINUTES, LAMINA_SOAK_SEED, LAMINA_SOAK_JSON } = processEnvironment();
const minutes = Number(LAMINA_SOAK_MINUTES ?? '30');
const seed = Number(LAMINA_SOAK_SEED ?? '1');
const DURATION_MS = minutes * 60_000;
/** Heaps reach their size, and model loading is over. */
const WARM_UP_MS = Math.min(5 * 60_000, DURATION_MS / 3);
const SAMPLE_MS = 10_000;
const KILL_MS = 30_000;
const CONCURRENCY = 4;
const NUM_NOISY_CLIENTS = 3;
const TIMEOUT_MS = DURATION_MS + 300_000;

/** Over less, growth is printed and not judged. */
const MIN_JUDGED_MS = 9 * 60_000;
const MAX_GROWTH_PERCENT = 5;
/** Connections that are open at a moment differ from those at another. */
const MAX_MORE_FILES = 24;
const MAX_LOOP_DELAY_MS = 50;
/** Of the samples of a service, all of its processes together, in which the delay must be below that: its p99 is. */
const MIN_SHARE_IN_TIME = 0.99;
/** Each stream is limited to 512 MiB; files of the server have a little more than their messages. */
const MAX_STORE_MIB = Object.keys(STREAMS).length * 512 * 1.25;

/** Half of the replicas; the first of each service lives through the run. */
const VICTIMS: readonly Service[] = ['gateway', 'dense-executor', 'attention-shard'];
/** There is one, which is killed first, and may be killed again in this part of the run, so that the last one lives long enough for its memory to be judged. */
const MANAGER: Service = 'kv-manager';
const MANAGER_KILLS_MS = 0.4 * DURATION_MS;

const requests = makeRequests(40, new Random(seed));
let expected: Answers;
let tested: ChaosCluster;

beforeAll(async () => {
  console.log(`seed ${seed}, ${minutes} min`);
  const undisturbed = await ChaosCluster.start();
  const workload = await Workload.create(undisturbed.cluster.bus, requests);
  expected = await workload.learn(CONCURRENCY).finally(() => undisturbed.stop());
  tested = await ChaosCluster.start();
}, 180_000);
afterAll(() => tested.stop(), 60_000);

/** Rounds of durable requests, each judged and forgotten. */
async function answerExactly(
  isOver: () => boolean,
): Promise<Record<'requests' | 'lost' | 'doubled' | 'wrong', number>> {
  const workload = await Workload.create(tested.cluster.bus, requests, expected);
  const sum = { requests: 0, lost: 0, doubled: 0, wrong: 0 };
  for (let round = 0; round === 0 || !isOver(); round++) {
    const outcome = await workload.run(`soak ${round}`, CONCURRENCY, () => true);
    for (const name of ['requests', 'lost', 'doubled', 'wrong'] as const) sum[name] += outcome[name];
  }
  return sum;
}

async function every(periodMs: number, isOver: () => boolean, act: () => Promise<void>): Promise<void> {
  for (let nextMs = performance.now() + periodMs; ; nextMs += periodMs) {
    while (!isOver() && performance.now() < nextMs) await sleep(100);
    if (isOver()) return;
    await act();
  }
}

test(
  'a long run under load and kills',
  async () => {
    const random = new Random(seed + 1);
    const { cluster } = tested;
    const firsts = new Map(VICTIMS.map((service) => [service, cluster.processes(service)[0]]));
    const samples = new Samples(tested);
    await cluster.add('gateway');
    const startedMs = performance.now();
    const deadlineMs = startedMs + DURATION_MS;
    const isOver = (): boolean => performance.now() > deadlineMs;
    const noise = new Noise(cluster.bus, cluster.httpUrl);
    const numKills: Partial<Record<Service, number>> = {};
    const kill = async (): Promise<void> => {
      const mayBeManager = performance.now() - startedMs < MANAGER_KILLS_MS;
      const isFirst = Object.keys(numKills).length === 0;
      const service = isFirst ? MANAGER : random.pick(mayBeManager ? [...VICTIMS, MANAGER] : VICTIMS);
      const others = cluster.processes(service).filter((child) => child.isRunning && child !== firsts.get(service));
      if (service === 'gateway') noise.noteGatewayKill();
      random.pick(others).kill('SIGKILL');
      numKills[service] = 1 + (numKills[service] ?? 0);
      await sleep(random.between(0, 800));
      await cluster.add(service);
    };
    const [outcome] = await Promise.all([
      answerExactly(isOver),
      every(KILL_MS, isOver, kill),
      every(SAMPLE_MS, isOver, () => samples.take()),
      ...Array.from({ length: NUM_NOISY_CLIENTS }, (_, client) => noise.run(new Random(seed + 10 + client), isOver)),
    ]);
    const processes = samples.rows(WARM_UP_MS);
    const { storeMiB, server } = samples;
    const done = Object.fromEntries(noise.numDone);
    const { mistakes, numCutOff } = noise;
    const result = {
      seed,
      minutes,
      numKills,
      ...outcome,
      noise: done,
      numCutOff,
      mistakes,
      storeMiB,
      server,
      processes,
    };
    if (LAMINA_SOAK_JSON !== undefined) writeFileSync(LAMINA_SOAK_JSON, `${JSON.stringify(result, null, 2)}\n`);
    const { lost, doubled, wrong } = outcome;
    console.log(
      `kills: ${JSON.stringify(numKills)}; ${outcome.requests} durable requests: lost ${lost}, doubled ${doubled}, wrong ${wrong}\n` +
        `others: ${JSON.stringify(done)}, ${noise.numCutOff} cut off with their gateway and asked again\nJetStream store: ${storeMiB.first} to ${storeMiB.last} MiB; nats-server at its largest ${server?.residentMiB} MiB resident with ${server?.storeMiB} MiB stored\n${tableOf(processes)}`,
    );
    expect({ lost, doubled, wrong }).toEqual({ lost: 0, doubled: 0, wrong: 0 });
    expect(mistakes).toEqual([]);
    expect(storeMiB.last).toBeLessThan(MAX_STORE_MIB);
    expect(server?.residentMiB).toBeLessThan(server!.allowedMiB);
    await expectNothingWaits();
    expect(problemsOf(processes)).toEqual([]);
  },
  TIMEOUT_MS,
);

/** The queues are empty when their clients have stopped, and what is kept is limited by age and size. */
async function expectNothingWaits(): Promise<void> {
  const manager = await tested.cluster.bus.connection.jetstreamManager();
  for (const { name } of Object.values(STREAMS)) {
    const { config } = await manager.streams.info(name);
    expect(config.max_bytes, name).toBeGreaterThan(0);
  }
  for (const { name } of [STREAMS.prompts, STREAMS.work]) {
    const untilMs = performance.now() + 60_000;
    while ((await manager.streams.info(name)).state.messages > 0 && performance.now() < untilMs) await sleep(200);
    expect((await manager.streams.info(name)).state.messages, name).toBe(0);
  }
}

function problemsOf(processes: readonly ProcessRow[]): string[] {
  const isLongEnough = (held: Held | undefined): held is Held => held !== undefined && held.spanMs >= MIN_JUDGED_MS;
  const isJudged = processes.some(({ held }) => isLongEnough(held));
  if (!isJudged) console.log(`memory is judged over ${MIN_JUDGED_MS / 60_000} min of collections; no process has them`);
  const mustBeJudged = DURATION_MS - WARM_UP_MS > MIN_JUDGED_MS + 60_000;
  const unjudged = mustBeJudged && !isJudged ? ['no process collected its heaps: `npm run soak` starts them so'] : [];
  const found = processes.flatMap(({ name, held, numFiles }) => {
    const problems: string[] = [];
    if (isLongEnough(held) && held.growthPercent > MAX_GROWTH_PERCENT)
      problems.push(`${name} grew by ${held.growthPercent.toFixed(1)} %`);
    if (numFiles.last - numFiles.first > MAX_MORE_FILES) problems.push(`${name} has ${numFiles.last} files open`);
    return problems;
  });
  return [...unjudged, ...found, ...lateLoops(processes)];
}

/** A killed process and the one in its place count together. */
function lateLoops(processes: readonly ProcessRow[]): string[] {
  return ['gateway', 'kv-manager', 'dense-executor', 'attention-shard'].flatMap((service) => {
    const mine = processes.filter(({ name }) => name.startsWith(service));
    const sumOf = (key: 'numSamples' | 'numLate'): number => mine.reduce((sum, { loop }) => sum + loop[key], 0);
    const [numSamples, numLate] = [sumOf('numSamples'), sumOf('numLate')];
    const windows = mine.flatMap(({ loopDelaysMs }) => loopDelaysMs);
    const numLateWindows = windows.filter((delayMs) => delayMs >= MAX_LOOP_DELAY_MS).length;
    const found = `${service}: event-loop delay over ${MAX_LOOP_DELAY_MS} ms in ${numLate} of ${numSamples} samples`;
    console.log(`${found}, its p99 in ${numLateWindows} of ${windows.length} windows of 10 s`);
    return numSamples > 0 && numLate <= (1 - MIN_SHARE_IN_TIME) * numSamples ? [] : [found];
  });
}

function tableOf(processes: readonly ProcessRow[]): string {
  const rows = processes.map(({ name, numSamples, residentMiB, held, numFiles, loopDelaysMs }) => {
    const delays =
      loopDelaysMs.length === 0
        ? '-'
        : [loopDelaysMs[Math.floor(loopDelaysMs.length / 2)]!, loopDelaysMs.at(-1)!]
            .map((delayMs) => delayMs.toFixed(1))
            .join(' / ');
    const memory = `${residentMiB.first} to ${residentMiB.last}`;
    const collected = held === undefined ? '-' : `${held.firstMiB} to ${held.lastMiB}`;
    const growth = held === undefined ? '-' : held.growthPercent.toFixed(1);
    return `| ${[name, numSamples, memory, collected, growth, `${numFiles.first} to ${numFiles.last}`, delays].join(' | ')} |`;
  });
  return [
    '| process | samples | resident MiB | after a full collection | growth of that % | open files | event-loop delay p99 of 10 s, ms: median / worst |',
    '|---|---|---|---|---|---|---|',
    ...rows,
  ].join('\n');
}
