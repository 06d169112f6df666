/** Connections to a nats-server that is not there, has no JetStream, or comes back. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Bus, ensureStreams, TokenStream, WorkQueue } from '@lamina/bus';
import { decodeTokens, ENDPOINTS, EVENTS } from '@lamina/protocol';
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

describe('a server', () => {
  test('without JetStream it is nats_unreachable, with what to do', async () => {
    const port = await freePort();
    const plain = spawn('nats-server', ['-a', '127.0.0.1', '-p', String(port)], { stdio: 'ignore' });
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
      bus.serve(ENDPOINTS.free, () => ({}));
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
