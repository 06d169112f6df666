/**
 * SIGTERM on real processes: a rolling restart of any service under load of durable prompts loses and repeats nothing, long
 * requests of an executor go on at another without waiting for the queue's time-out, and a second signal ends at once.
 */
import type { Child } from '@lamina/cli';
import type { Service } from '@lamina/runtime';
import { afterEach, beforeAll, beforeEach, expect, test } from 'vitest';
import { ChaosCluster } from '../chaos/chaos-cluster.ts';
import { Random } from '../chaos/random.ts';
import { type ChaosRequest, makeRequests, sleep } from '../chaos/requests.ts';
import { type Answers, Workload } from '../chaos/workload.ts';

const SERVICES = ['gateway', 'dense-executor', 'attention-shard', 'kv-manager'] as const satisfies readonly Service[];
const CONCURRENCY = 8;
/** What a supervisor gives before it kills: docker compose 30 s, the launcher 8 s for an executor. */
const GRACE_MS = 8_000;

const requests = makeRequests(16, new Random(11));
/** They run for longer than an executor waits for its requests when it stops. */
const longRequests: ChaosRequest[] = requests.slice(0, 6).map((request) => ({ ...request, maxTokens: 600 }));
let expected: Answers;
let expectedLong: Answers;
let tested: ChaosCluster;

beforeAll(async () => {
  tested = await ChaosCluster.start();
  const workload = await Workload.create(tested.cluster.bus, [...requests, ...longRequests]);
  const answers = await workload.learn(CONCURRENCY).finally(() => tested.stop());
  [expected, expectedLong] = [answers.slice(0, requests.length), answers.slice(requests.length)];
}, 180_000);
beforeEach(async () => {
  tested = await ChaosCluster.start();
}, 60_000);
afterEach(async ({ task }) => {
  if (task.result?.state === 'fail') console.log(tested.logs());
  await tested.stop();
}, 60_000);

const running = (service: Service): Child[] => tested.cluster.processes(service).filter((child) => child.isRunning);

/** Milliseconds until it had ended by itself, with status 0. */
async function stop(child: Child): Promise<number> {
  const startedMs = performance.now();
  await child.stop(GRACE_MS);
  expect((await child.ended).message).toMatch(/ended with status 0$/);
  return performance.now() - startedMs;
}

test.each(SERVICES)(
  'a rolling restart of every %s loses and repeats nothing',
  async (service) => {
    const workload = await Workload.create(tested.cluster.bus, requests, expected);
    let isOver = false;
    const outcome = workload.run(`roll ${service}`, CONCURRENCY, () => isOver);
    const tookMs: number[] = [];
    let resumedMs: readonly number[] = [];
    try {
      while (workload.numRunning < CONCURRENCY / 2) await sleep(20);
      for (const old of running(service)) {
        await tested.cluster.add(service);
        const delays = workload.watch();
        tookMs.push(await stop(old));
        resumedMs = [...resumedMs, ...(await delays())];
      }
    } finally {
      isOver = true;
    }
    const { lost, doubled, wrong, requests: numRequests } = await outcome;
    const list = tookMs.map((ms) => ms.toFixed(0)).join(', ');
    const longestMs = Math.max(0, ...resumedMs).toFixed(0);
    console.log(
      `${service}: ended ${list} ms after SIGTERM; every request had its next token within ${longestMs} ms of it; ` +
        `${numRequests} requests`,
    );
    expect({ lost, doubled, wrong }).toEqual({ lost: 0, doubled: 0, wrong: 0 });
    expect(Math.max(...tookMs)).toBeLessThan(GRACE_MS);
  },
  180_000,
);

test('long requests of an executor go on at another long before the queue would offer them again', async () => {
  const workload = await Workload.create(tested.cluster.bus, longRequests, expectedLong);
  const outcome = workload.run('hand over', longRequests.length, () => true);
  while (workload.numRunning < longRequests.length) await sleep(20);
  const [old] = running('dense-executor');
  const takenUp = tested.logged('taking a request up').within(5_000);
  const stopped = stop(old!);
  const takenUpMs = await takenUp;
  const resumedMs = await workload.watch()();
  const tookMs = await stopped;
  console.log(
    `hand-over: the executor ended after ${tookMs.toFixed(0)} ms, its first request was taken up after ` +
      `${takenUpMs?.toFixed(0)} ms, and every one had its next token within ${Math.max(...resumedMs).toFixed(0)} ms of that`,
  );
  const { lost, doubled, wrong } = await outcome;
  expect({ lost, doubled, wrong }).toEqual({ lost: 0, doubled: 0, wrong: 0 });
  expect(takenUpMs).toBeLessThan(4_000);
}, 180_000);

test('a second signal ends every service at once, though it has work', async () => {
  const workload = await Workload.create(tested.cluster.bus, requests, expected);
  let isOver = false;
  const outcome = workload.run('twice', CONCURRENCY, () => isOver);
  try {
    for (const service of SERVICES) {
      while (workload.numRunning < CONCURRENCY / 2) await sleep(20);
      const [child] = running(service);
      const startedMs = performance.now();
      // Another signal, for two of a kind that come together are one; and both at once, for some have nothing to finish.
      child!.kill('SIGSTOP');
      child!.kill('SIGTERM');
      child!.kill('SIGINT');
      child!.kill('SIGCONT');
      const { message } = await child!.ended;
      const tookMs = performance.now() - startedMs;
      console.log(`${service}: ended ${tookMs.toFixed(0)} ms after the second signal`);
      expect(message).toMatch(/ended with status 130$/);
      expect(tookMs).toBeLessThan(1_000);
      await tested.cluster.add(service);
    }
  } finally {
    isOver = true;
  }
  const { lost, doubled, wrong } = await outcome;
  expect({ lost, doubled, wrong }).toEqual({ lost: 0, doubled: 0, wrong: 0 });
}, 180_000);
