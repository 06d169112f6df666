/** A real executor process is told to end while its worker loads the model: it ends as asked, not by a crash in native code. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { ROOT_DIRECTORY } from '@lamina/cli';
import { buildModel } from '@lamina/model';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { TEST_CACHE_DIRECTORY } from '../cluster.ts';
import { HoldingProxy } from './holding-proxy.ts';
import { eventually } from './in-process.ts';

const MAIN = join(ROOT_DIRECTORY, 'services', 'dense-executor', 'dist', 'main.js');
const MODEL = join(ROOT_DIRECTORY, 'models', 'lamina-tiny');

let nats: NatsServer;
let proxy: HoldingProxy;

beforeAll(async () => {
  nats = await startNatsServer();
  proxy = await HoldingProxy.start(nats.url);
  await buildModel(MODEL, { cacheDir: TEST_CACHE_DIRECTORY, weights: 'f32' });
});
afterAll(async () => {
  await proxy.stop();
  await nats.stop();
});

// The worker loads right after it has connected.
test.each([0, 15, 40])('SIGTERM %i ms after the worker came', { timeout: 90_000 }, async (delayMs) => {
  const flags = ['--nats-url', proxy.url, '--model', MODEL, '--cache-dir', TEST_CACHE_DIRECTORY, '--weights', 'f32'];
  const child = spawn(process.execPath, [MAIN, ...flags], { stdio: ['ignore', 'ignore', 'pipe'] });
  let complaint = '';
  child.stderr.on('data', (chunk: Buffer) => {
    complaint += chunk.toString();
  });
  const ended = once(child, 'exit');
  try {
    await eventually(() => proxy.hasClient(/worker/) || undefined, 60_000);
    await new Promise((resolve) => setTimeout(resolve, delayMs));
    child.kill('SIGTERM');
    expect([...(await ended)], complaint).toEqual([0, null]);
  } finally {
    child.kill('SIGKILL');
    await ended;
  }
});
