/**
 * The promise under faults: a prompt that was accepted is answered completely, each token once and in order, equal to the
 * undisturbed answer, whatever process dies, stands still or is cut off, at any moment. Real processes, a real nats-server;
 * moments and victims come from a seed that is printed.
 */
import { afterAll, afterEach, beforeAll, expect, test } from 'vitest';
import { Clusters } from './clusters.ts';
import { judge, randomOf } from './judge.ts';
import { readOptions } from './options.ts';
import { Random } from './random.ts';
import { Report } from './report.ts';
import { makeRequests } from './requests.ts';
import { SCENARIOS } from './scenarios.ts';
import { type Answers, Workload } from './workload.ts';

const { isLong, seed, jsonPath } = readOptions();
const NUM_REQUESTS = isLong ? 200 : 24;
const CONCURRENCY = 8;
const TIMEOUT_MS = isLong ? 3_600_000 : 300_000;

const requests = makeRequests(NUM_REQUESTS, new Random(seed));
const report = new Report({ seed, form: isLong ? 'long' : 'short', jsonPath });
const clusters = new Clusters();
let expected: Answers;

beforeAll(async () => {
  console.log(`seed ${seed}, ${NUM_REQUESTS} requests, ${isLong ? 'long' : 'short'} form`);
  const { cluster } = await clusters.get('plain');
  expected = await (await Workload.create(cluster.bus, requests)).learn(CONCURRENCY);
}, TIMEOUT_MS);

afterEach(async ({ task }) => {
  if (task.result?.state !== 'fail') return;
  console.log(clusters.logs());
  await clusters.stop();
});

afterAll(async () => {
  await clusters.stop();
  report.finish();
});

for (const { name, numFaults, cuts, cluster, isPossible, prepare } of SCENARIOS) {
  const count = numFaults[isLong ? 1 : 0];
  test.skipIf(!isPossible || count === 0)(
    name,
    async () => {
      const tested = await clusters.get(cluster);
      const fault = await prepare(tested, randomOf({ name: `prepare ${name}`, seed }), isLong);
      try {
        const load = { requests, expected, concurrency: CONCURRENCY };
        const row = await judge(tested, load, { name, seed, numFaults: count, cuts, fault });
        report.add(row);
        const { lost, doubled, wrong } = row;
        expect({ lost, doubled, wrong }).toEqual({ lost: 0, doubled: 0, wrong: 0 });
        // Nobody ended who was not killed.
        expect(tested.incomplete()).toEqual([]);
        expect(fault.problems?.() ?? []).toEqual([]);
      } finally {
        await fault.cleanUp?.();
      }
    },
    TIMEOUT_MS,
  );
}
