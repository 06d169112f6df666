/**
 * The promise under faults: a prompt that was accepted is answered completely, each token once and in order, equal to the
 * undisturbed answer, whatever process dies, stands still or is cut off, at any moment. Real processes, a real nats-server;
 * moments and victims come from a seed that is printed.
 */
import { spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, statfsSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Service } from '@lamina/runtime';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { ChaosCluster, type ChaosClusterOptions } from './chaos-cluster.ts';
import { canPartition, IsolatedShard } from './isolated-shard.ts';
import { readOptions } from './options.ts';
import { Random } from './random.ts';
import { percentiles, Report } from './report.ts';
import { type Harm, TensorProxy } from './tensor-proxy.ts';
import { makeRequests, sleep, Workload } from './workload.ts';

const { isLong, seed, jsonPath } = readOptions();
const NUM_REQUESTS = isLong ? 200 : 24;
const NUM_KILLS = isLong ? 20 : 3;
const NUM_STALLS = isLong ? 10 : 1;
const CONCURRENCY = 8;
const STALL_MS = 10_000;
const TIMEOUT_MS = isLong ? 3_600_000 : 300_000;

const requests = makeRequests(NUM_REQUESTS, new Random(seed));
const report = new Report(seed, jsonPath);
let expected: readonly (readonly (number | null)[])[];
let tested: ChaosCluster;
const cleanUp: (() => Promise<void> | void)[] = [];

beforeAll(async () => {
  console.log(`seed ${seed}, ${NUM_REQUESTS} requests, ${isLong ? 'long' : 'short'} form`);
  tested = await ChaosCluster.start();
  const workload = await Workload.create(tested.cluster.bus, requests);
  expected = await workload.learn(CONCURRENCY);
  await tested.stop();
}, TIMEOUT_MS);

afterEach(async ({ task }) => {
  if (task.result?.state === 'fail') console.log(tested.logs());
  await tested.stop();
  for (const each of cleanUp.splice(0).reverse()) await each();
});

afterAll(() => report.finish());

/** One fault: makes it, makes it good, and says after how many ms the cluster noticed it, if that can be seen. */
type Fault = (random: Random) => Promise<number | undefined>;

/** Runs the load while `fault` happens `count` times at random moments, and judges every answer. */
async function underFaults(name: string, count: number, fault: Fault): Promise<void> {
  const random = new Random(seed ^ [...name].reduce((hash, char) => Math.imul(hash, 31) + char.charCodeAt(0), 7));
  const workload = await Workload.create(tested.cluster.bus, requests, expected);
  const detectedMs: number[] = [];
  const resumedMs: number[] = [];
  let numFaults = 0;
  let isOver = false;
  const running = workload.run(name, CONCURRENCY, () => isOver);
  try {
    while (numFaults < count) {
      await sleep(random.between(100, 1_200));
      for (let waitedMs = 0; workload.numRunning < CONCURRENCY / 2 && waitedMs < 10_000; waitedMs += 20)
        await sleep(20);
      const delays = workload.watch();
      numFaults++;
      const noticedMs = await fault(random);
      if (noticedMs !== undefined) detectedMs.push(noticedMs);
      resumedMs.push(...(await delays()));
    }
  } finally {
    isOver = true;
  }
  const outcome = await running;
  const detectMs = percentiles(detectedMs);
  const resumeMs = percentiles(resumedMs);
  report.add({ fault: name, ...outcome, faults: numFaults, detectMs, resumeMs });
  const { lost, doubled, wrong } = outcome;
  expect({ lost, doubled, wrong }).toEqual({ lost: 0, doubled: 0, wrong: 0 });
}

async function start(options?: ChaosClusterOptions): Promise<void> {
  tested = await ChaosCluster.start(options);
}

/** Kills one process of a service, and starts another a moment later. */
function killing(service: Service, notice: () => Promise<number | undefined>): Fault {
  return async (random) => {
    const noticed = notice();
    tested.victim(service, random).kill('SIGKILL');
    await sleep(random.between(0, 800));
    await tested.cluster.add(service);
    return noticed;
  };
}

const unseen = (): Promise<undefined> => Promise.resolve(undefined);

describe('killed with -9', () => {
  test.each<[Service, () => Promise<number | undefined>]>([
    ['attention-shard', () => tested.shardLost()],
    ['dense-executor', () => tested.logged('taking a request up')],
    ['kv-manager', () => tested.logged('no kv-manager answers')],
    ['gateway', unseen],
  ])(
    '%s',
    async (service, notice) => {
      await start();
      await underFaults(`kill ${service}`, NUM_KILLS, killing(service, notice));
    },
    TIMEOUT_MS,
  );

  test(
    'nats-server',
    async () => {
      await start();
      await underFaults('kill nats-server', NUM_KILLS, async (random) => {
        const noticed = tested.disconnected();
        await tested.killNats();
        await sleep(random.between(0, 1_500));
        await tested.startNats();
        return noticed;
      });
    },
    TIMEOUT_MS,
  );

  test(
    'kv-manager and dense-executor together',
    async () => {
      await start();
      await underFaults('kill kv-manager and dense-executor', isLong ? 10 : 1, async (random) => {
        const noticed = tested.logged('no kv-manager answers');
        tested.victim('kv-manager', random).kill('SIGKILL');
        tested.victim('dense-executor', random).kill('SIGKILL');
        await sleep(random.between(0, 800));
        await Promise.all([tested.cluster.add('kv-manager'), tested.cluster.add('dense-executor')]);
        return noticed;
      });
    },
    TIMEOUT_MS,
  );

  test(
    'everything, nats-server too',
    async () => {
      await start();
      await underFaults('kill everything', isLong ? 5 : 1, async (random) => {
        await tested.killAll();
        await sleep(random.between(0, 500));
        await tested.startAll();
        return undefined;
      });
    },
    TIMEOUT_MS,
  );

  test(
    'the last attention-shard',
    async () => {
      await start();
      await underFaults('kill every attention-shard', isLong ? 5 : 1, async (random) => {
        const noticed = tested.shardLost();
        for (const shard of tested.cluster.processes('attention-shard')) if (shard.isRunning) shard.kill('SIGKILL');
        await sleep(random.between(500, 2_000));
        for (let count = 0; count < 3; count++) await tested.cluster.add('attention-shard');
        return noticed;
      });
    },
    TIMEOUT_MS,
  );
});

describe('standing still for 10 s', () => {
  test.each<[Service, () => Promise<number | undefined>]>([
    ['attention-shard', () => tested.shardLost()],
    ['dense-executor', () => tested.logged('taking a request up')],
    ['kv-manager', () => tested.logged('no kv-manager answers')],
    ['gateway', unseen],
  ])(
    '%s',
    async (service, notice) => {
      await start();
      await underFaults(`stop ${service}`, NUM_STALLS, async (random) => {
        const noticed = notice();
        const victim = tested.victim(service, random);
        victim.kill('SIGSTOP');
        await sleep(STALL_MS);
        victim.kill('SIGCONT');
        return noticed;
      });
    },
    TIMEOUT_MS,
  );
});

test.skipIf(!canPartition())(
  'an attention-shard that is cut off for 10 s in a network namespace of its own',
  async () => {
    await start();
    const shard = await IsolatedShard.start(tested.cluster, tested.natsPort);
    cleanUp.push(() => shard.stop());
    await underFaults('partition of an attention-shard', NUM_STALLS, async () => {
      const noticed = tested.shardLost();
      shard.cut();
      await sleep(STALL_MS);
      shard.heal();
      return noticed;
    });
  },
  TIMEOUT_MS,
);

test.each<[string, readonly Harm[]]>([
  ['delayed, duplicated and reordered', ['delay', 'duplicate', 'reorder']],
  ['corrupted', ['corrupt']],
])(
  'messages of the tensor plane are %s',
  async (name, harms) => {
    await start({ settings: { tensorChecksum: 'all' } });
    const random = new Random(seed + harms.length);
    const proxy = await TensorProxy.start({ serverPort: tested.natsPort, random, harms, rate: 0.002 });
    cleanUp.push(() => proxy.stop());
    for (const shard of tested.cluster.processes('attention-shard').slice(1)) await shard.stop(5_000);
    for (let count = 0; count < 2; count++) await tested.cluster.add('attention-shard', { natsUrl: proxy.url });
    await underFaults(`tensors ${name}`, 1, async () => {
      proxy.isHarming = true;
      await sleep(isLong ? 60_000 : 10_000);
      proxy.isHarming = false;
      return undefined;
    });
    console.log(`harmed: ${JSON.stringify(proxy.numHarmed)}`);
    for (const harm of harms) expect(proxy.numHarmed[harm]).toBeGreaterThan(0);
    // Crashes: nobody ended.
    for (const service of ['kv-manager', 'dense-executor', 'gateway'] as const)
      for (const child of tested.cluster.processes(service)) expect(child.isRunning).toBe(true);
    expect(tested.cluster.processes('attention-shard').filter((child) => child.isRunning)).toHaveLength(3);
  },
  TIMEOUT_MS,
);

test.skipIf(!canMount())(
  'the disk of JetStream is full for a while',
  async () => {
    const mount = mkdtempSync(join(tmpdir(), 'lamina-disk-'));
    spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=96m', 'tmpfs', mount]);
    cleanUp.push(() => {
      spawnSync('umount', ['-l', mount]);
      rmSync(mount, { recursive: true, force: true });
    });
    await start({ storeDir: join(mount, 'store') });
    await underFaults('disk full', NUM_STALLS, async () => {
      const fill = join(mount, 'fill');
      const { bavail, bsize } = statfsSync(mount);
      writeFileSync(fill, Buffer.alloc(Math.max(0, bavail * bsize - 4_096)));
      await sleep(5_000);
      rmSync(fill);
      // nats-server gives JetStream up on a full disk, and takes it on again only when it is started again.
      await tested.killNats();
      await tested.startNats();
      return undefined;
    });
  },
  TIMEOUT_MS,
);

/** Whether this process may mount a file system of its own. */
function canMount(): boolean {
  const probe = mkdtempSync(join(tmpdir(), 'lamina-mount-'));
  mkdirSync(probe, { recursive: true });
  const isMounted = spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', probe]).status === 0;
  if (isMounted) spawnSync('umount', ['-l', probe]);
  rmSync(probe, { recursive: true, force: true });
  return isMounted;
}
