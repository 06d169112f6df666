/** Joining the metrics of several processes, over a real nats-server; the event-loop delay. */
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { Bus } from '@lamina/bus';
import { packMessage, SUBJECTS } from '@lamina/protocol';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { type NatsServer, startNatsServer } from '../../testkit/src/nats-server.ts';
import { answerMetrics, Counter, collectMetrics, createRegistry, Gauge, Histogram } from '../src/metrics.ts';

const WAIT_MS = 300;
let nats: NatsServer;
const buses: Bus[] = [];
const failures: unknown[] = [];

const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

async function connect(): Promise<Bus> {
  const bus = await Bus.connect({ url: nats.url, name: 'test', connectTimeoutMs: 5000 }, { onError: () => {} });
  buses.push(bus);
  return bus;
}

/** A process with one counter, one histogram and one gauge of the same names as every other. */
async function startInstance(service: string, instance: string, count: number): Promise<void> {
  const bus = await connect();
  const registry = createRegistry(service, instance);
  const registers = [registry];
  new Counter({ name: 'requests_total', help: 'h', labelNames: ['kind'], registers }).inc({ kind: 'a' }, count);
  new Histogram({ name: 'seconds', help: 'h', buckets: [1, 2], registers }).observe(count);
  new Gauge({ name: 'level', help: 'h', registers }).set(count === 1 ? Number.NaN : count);
  await bus.service.announce({ name: 'x', version: '0.1.0', description: '', metadata: {}, stats: () => null });
  answerMetrics(bus, registry, (cause) => failures.push(cause));
  await bus.flush();
}

beforeAll(async () => {
  nats = await startNatsServer();
  await startInstance('kv-manager', 'k1', 1);
  await startInstance('gateway', 'g1', 2);
  await startInstance('gateway', 'g2', 4);
});
afterAll(async () => {
  await Promise.all(buses.map((bus) => bus.close()));
  await nats.stop();
});

const EXPECTED = [
  'requests_total{kind="a",service="kv-manager",instance="k1"} 1',
  'requests_total{kind="a",service="gateway",instance="g1"} 2',
  'requests_total{kind="a",service="gateway",instance="g2"} 4',
  'level{service="kv-manager",instance="k1"} Nan',
  'level{service="gateway",instance="g2"} 4',
  'seconds_bucket{le="1",service="kv-manager",instance="k1"} 1',
  'seconds_bucket{le="1",service="gateway",instance="g1"} 0',
  'seconds_bucket{le="2",service="gateway",instance="g1"} 1',
  'seconds_sum{service="gateway",instance="g2"} 4',
];

test('series of the same name stay apart, by service and instance, under one head', async () => {
  const text = await collectMetrics(await connect(), WAIT_MS);
  const lines = text.split('\n');
  expect(lines).toEqual(expect.arrayContaining(EXPECTED));
  expect(lines.filter((line) => line.startsWith('requests_total'))).toHaveLength(3);
  expect(lines.filter((line) => line === '# TYPE requests_total counter')).toHaveLength(1);
  expect(failures).toEqual([]);
});

test('an answer that is none hides nobody', async () => {
  const stranger = await connect();
  const metric = { name: 'm', help: 'h', type: 'gauge', aggregator: 'sum', values: [{ value: 1, labels: {} }] };
  const answers = [
    Buffer.from('hello'),
    new Uint8Array(0),
    Buffer.of(0xc1),
    packMessage(null),
    packMessage([null]),
    packMessage([{ name: 'x', values: 5 }]),
    packMessage([{ ...metric, aggregator: 'nothing' }]),
    packMessage([{ ...metric, values: [null] }]),
    packMessage([{ ...metric, name: 5 }]),
    packMessage([{ ...metric, values: [{ value: 'x', labels: null }] }]),
    packMessage([{ ...metric, name: 'fine' }]),
  ];
  const subscription = stranger.subscribe(SUBJECTS.metrics, ({ reply }) => {
    if (reply !== undefined) for (const answer of answers) stranger.publish(reply, answer);
  });
  await stranger.flush();
  const lines = (await collectMetrics(await connect(), WAIT_MS)).split('\n');
  subscription.unsubscribe();
  expect(lines).toEqual(expect.arrayContaining([...EXPECTED, 'fine 1']));
});

test('nobody there is an empty page', async () => {
  const alone = await startNatsServer();
  const bus = await Bus.connect({ url: alone.url, name: 'test', connectTimeoutMs: 5000 }, { onError: () => {} });
  expect((await collectMetrics(bus, 100)).trim()).toBe('');
  await bus.close();
  await alone.stop();
});

test('an event loop that stood still is seen once, in the next scrape', async () => {
  const registry = createRegistry('gateway', 'g3');
  const worstSeconds = async (): Promise<number> =>
    Number(/^lamina_event_loop_delay_seconds\{quantile="1",.*\} (\S+)$/m.exec(await registry.metrics())?.[1]);
  await sleep(200);
  const untilMs = performance.now() + 400;
  while (performance.now() < untilMs);
  await sleep(100);
  expect(await worstSeconds()).toBeGreaterThan(0.25);
  await sleep(200);
  expect(await worstSeconds()).toBeLessThan(0.25);
});

test('late samples of the event loop are counted, and the others', async () => {
  const registry = createRegistry('gateway', 'g4');
  const counted = async (): Promise<number[]> => {
    const text = await registry.metrics();
    const of = (name: string): number =>
      Number(new RegExp(`^lamina_event_loop_${name}_total\\{.*\\} (\\S+)$`, 'm').exec(text)?.[1]);
    return [of('samples'), of('late_samples')];
  };
  const work = async (times: number, ms: number): Promise<void> => {
    for (let time = 0; time < times; time++) {
      const untilMs = performance.now() + ms;
      while (performance.now() < untilMs);
      await sleep(250);
    }
  };
  await sleep(250);
  const [before = 0, lateBefore = 0] = await counted();
  await work(3, 300);
  const [after = 0, lateAfter = 0] = await counted();
  expect(lateAfter - lateBefore).toBeGreaterThanOrEqual(2);
  expect(lateAfter - lateBefore).toBeLessThan(after - before);
  // Beside other tests some of these may be late as well.
  await work(6, 5);
  const [last = 0, lateLast = 0] = await counted();
  expect(last - after).toBeGreaterThanOrEqual(6);
  expect(lateLast - lateAfter).toBeLessThan((last - after) / 2);
});

const IDLE_THEN_AT_WORK = `
  import { readFileSync } from 'node:fs';
  const { createRegistry } = await import(process.argv[1]);
  const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
  const stall = (ms) => { const untilMs = performance.now() + ms; while (performance.now() < untilMs); };
  const sleeps = () => Number(/^voluntary_ctxt_switches:\\s*(\\d+)/m.exec(readFileSync('/proc/thread-self/status', 'utf8'))[1]);
  const registry = createRegistry('gateway', 'g');
  await sleep(4_500);
  const before = sleeps();
  await sleep(4_000);
  const numWakeUps = sleeps() - before;
  const endMs = performance.now() + 2_500;
  while (performance.now() < endMs) { stall(5); await sleep(5); }
  const firstMetrics = await registry.metrics();
  await sleep(200);
  stall(400);
  await sleep(200);
  console.log(JSON.stringify({ numWakeUps, firstMetrics, metrics: await registry.metrics() }));
`;

test.runIf(process.platform === 'linux')(
  'an idle process is hardly woken for its event-loop delay, idle time is no delay, and a stall in the work that follows is seen',
  async () => {
    const module = fileURLToPath(new URL('../dist/metrics.js', import.meta.url));
    const ran = promisify(execFile)(process.execPath, ['--input-type=module', '-e', IDLE_THEN_AT_WORK, module]);
    const { numWakeUps, firstMetrics, metrics } = JSON.parse((await ran).stdout);
    // 42 when the delay is sampled all the time.
    expect(numWakeUps).toBeLessThan(25);
    const worstOf = (text: string): number => Number(/_delay_seconds\{quantile="1",.*\} (\S+)$/m.exec(text)?.[1]);
    // It was idle for 8.5 s.
    expect(worstOf(firstMetrics)).toBeLessThan(2);
    expect(worstOf(metrics)).toBeGreaterThan(0.25);
  },
  30_000,
);
