/**
 * A real executor process is told to end while its worker loads ONNX Runtime, or the model: it ends as asked, not by a crash in
 * native code.
 */
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

/** An executor whose stderr is kept, told to end once `isReached`; what it then said, with how it ended. */
async function ended(
  natsUrl: string,
  nodeFlags: readonly string[],
  isReached: (text: string) => boolean,
  delayMs = 0,
): Promise<{ readonly text: string; readonly end: readonly unknown[] }> {
  const flags = ['--nats-url', natsUrl, '--model', MODEL, '--cache-dir', TEST_CACHE_DIRECTORY, '--weights', 'f32'];
  const child = spawn(process.execPath, [...nodeFlags, MAIN, ...flags], { stdio: ['ignore', 'ignore', 'pipe'] });
  let text = '';
  child.stderr.on('data', (chunk: Buffer) => {
    text += chunk.toString();
  });
  const closed = once(child, 'close');
  try {
    await eventually(() => isReached(text) || undefined, 60_000);
    await new Promise((resolve) => setTimeout(resolve, delayMs));
    child.kill('SIGTERM');
    return { end: await closed, text };
  } finally {
    child.kill('SIGKILL');
    await closed;
  }
}

// The worker loads right after it has connected.
test.each([0, 15, 40])('SIGTERM %i ms after the worker came', { timeout: 90_000 }, async (delayMs) => {
  const { end, text } = await ended(proxy.url, [], () => proxy.hasClient(/worker/), delayMs);
  expect(end, text).toEqual([0, null]);
});

/** Has a worker thread take 500 ms longer to load the library, and say when it begins and has ended. */
const SLOW_LIBRARY = `
  import { spawnSync } from 'node:child_process';
  import { writeSync } from 'node:fs';
  import { isMainThread } from 'node:worker_threads';
  const load = process.dlopen;
  if (!isMainThread) process.dlopen = (module, file, ...flags) => {
    const isOurs = file.endsWith('onnxruntime_binding.node');
    if (isOurs) writeSync(2, 'library begins\\n');
    if (isOurs) spawnSync('sleep', ['0.5']);
    load.call(process, module, file, ...flags);
    if (isOurs) writeSync(2, 'library loaded\\n');
  };`;

test('SIGTERM while the worker loads the library of ONNX Runtime', { timeout: 90_000 }, async () => {
  const preload = ['--import', `data:text/javascript,${encodeURIComponent(SLOW_LIBRARY)}`];
  const { end, text } = await ended(nats.url, preload, (said) => said.includes('library begins'));
  expect(end, text).toEqual([0, null]);
  // A process that does not wait for it ends the thread inside: by luck before the library, or it aborts.
  expect(text).toContain('library loaded');
});
