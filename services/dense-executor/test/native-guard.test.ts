/** An exit waits for workers that compute, and lets none begin. */
import { once } from 'node:events';
import { Worker } from 'node:worker_threads';
import { expect, test } from 'vitest';
import { keepWorkersOut, NativeGuard, nativeGuardMemory, workerEnded } from '../src/worker/native-guard.ts';

const GUARD = new URL('../dist/worker/native-guard.js', import.meta.url).href;
/** Goes in for `insideMs` again and again; counts in `counts` how often it has come out. */
const WORKER = `
  const { workerData } = require('node:worker_threads');
  import(${JSON.stringify(GUARD)}).then(({ NativeGuard }) => {
    const guard = new NativeGuard(workerData.memory, 0);
    const counts = new Int32Array(workerData.counts);
    for (;;) {
      guard[workerData.enter]();
      counts[1] = 1;
      const endMs = performance.now() + workerData.insideMs;
      while (performance.now() < endMs);
      counts[1] = 0;
      counts[0]++;
      guard.leave();
    }
  });`;

test('an exit finds a worker outside, and it stays there', async () => {
  const memory = nativeGuardMemory(1);
  const counts = new SharedArrayBuffer(8);
  const worker = new Worker(WORKER, { eval: true, workerData: { memory, counts, insideMs: 50, enter: 'enter' } });
  const seen = new Int32Array(counts);
  while (Atomics.load(seen, 0) < 2) await new Promise((resolve) => setTimeout(resolve, 5));
  keepWorkersOut(memory, 5_000);
  const numDone = Atomics.load(seen, 0);
  expect(Atomics.load(seen, 1)).toBe(0);
  await new Promise((resolve) => setTimeout(resolve, 150));
  expect([Atomics.load(seen, 0), Atomics.load(seen, 1)]).toEqual([numDone, 0]);
  const ended = once(worker, 'exit');
  await worker.terminate();
  await ended;
});

test('an exit does not wait for ever, nor for a worker that is idle', () => {
  const memory = nativeGuardMemory(2);
  const guard = new NativeGuard(memory, 1);
  guard.enter();
  guard.enter();
  guard.leave();
  const startedMs = performance.now();
  keepWorkersOut(memory, 100);
  expect(performance.now() - startedMs).toBeGreaterThanOrEqual(95);
  guard.leave();
  keepWorkersOut(memory, 60_000);
  expect(performance.now() - startedMs).toBeLessThan(10_000);
});

test('an exit does not wait for a worker whose thread ended while it loaded', () => {
  const memory = nativeGuardMemory(1);
  new NativeGuard(memory, 0).enterLoading();
  workerEnded(memory, 0);
  const startedMs = performance.now();
  keepWorkersOut(memory, 60_000);
  expect(performance.now() - startedMs).toBeLessThan(10_000);
});

test('an exit waits for a load longer than for a layer, and lets none begin after it', async () => {
  const memory = nativeGuardMemory(1);
  const counts = new SharedArrayBuffer(8);
  const worker = new Worker(WORKER, {
    eval: true,
    workerData: { memory, counts, insideMs: 300, enter: 'enterLoading' },
  });
  const seen = new Int32Array(counts);
  while (Atomics.load(seen, 0) + Atomics.load(seen, 1) < 1) await new Promise((resolve) => setTimeout(resolve, 5));
  keepWorkersOut(memory, 10);
  const numDone = Atomics.load(seen, 0);
  expect(Atomics.load(seen, 1)).toBe(0);
  await new Promise((resolve) => setTimeout(resolve, 350));
  expect([Atomics.load(seen, 0), Atomics.load(seen, 1)]).toEqual([numDone, 0]);
  await worker.terminate();
});
