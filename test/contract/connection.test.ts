/** Connections to a nats-server that is not there, has no JetStream, or comes back. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { Bus, ensureStreams, TokenStream, WorkQueue } from '@lamina/bus';
import { decodeTokens, ENDPOINTS, EVENTS } from '@lamina/protocol';
import { natsServerOf, processEnvironment } from '@lamina/runtime';
import { startNatsServer } from '@lamina/testkit/nats-server';
import { describe, expect, test } from 'vitest';
import { announce, LEASE_MS, numQueued, TIMEOUT, token, workItem } from './bus-bench.ts';
import { connect, eventually } from './in-process.ts';
import { store } from './store-answer.ts';

async function freePort(): Promise<number> {
  const holder = createServer().listen(0, '127.0.0.1');
  await once(holder, 'listening');
  const { port } = Object(holder.address());
  holder.close();
  await once(holder, 'close');
  return Number(port);
}

test.each(['SIGKILL', 'SIGSTOP'] as const)(
  'a connection closes soon after its server had %s',
  async (signal) => {
    const silent = await startNatsServer();
    const bus = await connect(silent.url);
    bus.subscribe('anything', () => undefined);
    process.kill(silent.pid!, signal);
    const startedMs = performance.now();
    await bus.close();
    expect([bus.isClosed, performance.now() - startedMs < 4_000]).toEqual([true, true]);
    // A server that does not listen to SIGTERM ends too.
    await silent.stop();
  },
  20_000,
);

const BUS = new URL('../../packages/bus/dist/index.js', import.meta.url).href;
/** A thread with a connection, whose event loop then stands still for `workerData.stillMs`; says what its connection saw. */
const STILL_THREAD = `
  const { parentPort, workerData } = require('node:worker_threads');
  const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
  import(workerData.bus).then(async ({ Bus }) => {
    const options = { url: workerData.url, name: 'still', connectTimeoutMs: 5_000 };
    const bus = await Bus.connect(options, { onError: () => undefined });
    const seen = [];
    bus.onStatus((type) => seen.push(type));
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, workerData.stillMs);
    await sleep(1_000);
    await bus.flush();
    parentPort.postMessage(seen);
    await bus.close();
  });`;

describe.concurrent('a connection', () => {
  test('to a server that stands still is given up after 10 to 15 s, and made again', { timeout: 40_000 }, async () => {
    const silent = await startNatsServer();
    const bus = await connect(silent.url);
    const changes: string[] = [];
    bus.onStatus((type) => changes.push(type));
    const seen = (type: string): Promise<unknown> =>
      eventually(() => (changes.includes(type) ? true : undefined), 25_000);
    process.kill(silent.pid!, 'SIGSTOP');
    const startedMs = performance.now();
    await seen('disconnect');
    const noticedMs = performance.now() - startedMs;
    process.kill(silent.pid!, 'SIGCONT');
    await seen('reconnect');
    await bus.flush();
    await bus.close();
    await silent.stop();
    expect(noticedMs).toBeGreaterThan(9_900);
    expect(noticedMs).toBeLessThan(16_000);
  });

  test('of a thread that stands still for longer is kept', { timeout: 40_000 }, async () => {
    const server = await startNatsServer();
    const workerData = { url: server.url, bus: BUS, stillMs: 17_000 };
    const worker = new Worker(STILL_THREAD, { eval: true, workerData });
    const [seen] = await once(worker, 'message');
    await once(worker, 'exit');
    await server.stop();
    // It pinged, and was answered.
    expect(seen).toContain('pingTimer');
    expect(seen).not.toContain('disconnect');
  });
});

describe('a server', () => {
  test('without JetStream it is nats_unreachable, with what to do', async () => {
    const port = await freePort();
    const plain = spawn(natsServerOf(processEnvironment()), ['-a', '127.0.0.1', '-p', String(port)], {
      stdio: 'ignore',
    });
    const exited = once(plain, 'exit');
    const bus = await connect(`nats://127.0.0.1:${port}`);
    await expect(ensureStreams(bus)).rejects.toMatchObject({
      code: 'nats_unreachable',
      message: expect.stringContaining('start it with -js'),
    });
    await bus.close();
    plain.kill();
    await exited;
  });
  test('that is not there is nats_unreachable, after the time given and not before', async () => {
    const port = await freePort();
    const startMs = performance.now();
    const urls = [`nats://u:s3cret@127.0.0.1:${port}`, 'nats://u:s3c@ret@no-such-host.invalid:4222'];
    for (const url of urls) {
      const failed = Bus.connect({ url, name: 'test', connectTimeoutMs: 500 }, { onError: () => {} });
      await expect(failed).rejects.toMatchObject({
        code: 'nats_unreachable',
        message: expect.stringMatching(/no nats-server answers at nats:\/\/\*\*\*@(?!.*ret@)/),
      });
    }
    expect(performance.now() - startMs).toBeGreaterThan(1000);
  });

  test('that starts again on its port and store is found again, with its streams, leases and subscriptions', async () => {
    const storeDir = mkdtempSync(join(tmpdir(), 'lamina-store-'));
    try {
      const first = await startNatsServer({ storeDir });
      const bus = await connect(first.url);
      const changes: string[] = [];
      bus.onStatus((type) => changes.push(type));
      await ensureStreams(bus);
      await announce(bus);
      bus.service.serve(ENDPOINTS.free, () => ({}));
      const events: number[] = [];
      bus.onEvent(EVENTS.capacityFreed, ({ freeBlocks }) => events.push(freeBlocks));
      const queue = new WorkQueue(bus);
      const tokens = new TokenStream(bus, () => undefined);
      await queue.submit(workItem('kept-1'));
      await queue.submit(workItem('kept-2'));
      const held = await queue.lease(LEASE_MS, () => undefined);
      await store(tokens, [token('kept-1', 0)]);

      await first.stop();
      await eventually(() => (changes.includes('disconnect') ? true : undefined));
      const second = await startNatsServer({ storeDir, port: first.port });
      await eventually(() => (changes.includes('reconnect') ? true : undefined));

      bus.publishEvent(EVENTS.capacityFreed, { freeBlocks: 7 });
      await eventually(() => events[0]);
      expect(events).toEqual([7]);
      expect(await bus.request(ENDPOINTS.free, { requestId: 'a', executorId: 'e' }, TIMEOUT)).toEqual({});
      expect([await numQueued(bus), (await tokens.endOf('kept-1'))?.isComplete]).toEqual([2, false]);
      held!.complete();
      const next = await queue.lease(5000, () => undefined);
      expect([next?.item.id, next?.deliveryCount]).toEqual(['kept-2', 1]);
      next!.complete();
      await eventually(async () => ((await numQueued(bus)) === 0 ? true : undefined));
      const { lastSequence } = await tokens.stored('kept-1');
      expect(await tokens.append([token('kept-1', 0)], 'json', 0)).toBe(lastSequence);
      expect(await store(tokens, [token('kept-1', 1, 'stop')])).toBeGreaterThan(lastSequence);
      const seen: number[] = [];
      await tokens.replay('kept-1', (data) => seen.push(...decodeTokens(data).map(({ index }) => index)));
      await eventually(() => (seen.includes(1) ? true : undefined));
      expect(seen).toEqual([0, 1]);
      await bus.close();
      await second.stop();
    } finally {
      rmSync(storeDir, { recursive: true, force: true });
    }
  });
});
