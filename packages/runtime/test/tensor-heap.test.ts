/** That V8 knows the flags, and that they spare most full collections of a thread that passes tensors. */
import { execFileSync } from 'node:child_process';
import { expect, test } from 'vitest';
import { TENSOR_HEAP_FLAGS } from '../src/tensor-heap.ts';

/** Counts the full collections of a thread with a heap of some 16 MB through whose sockets 2,500 MiB pass. */
const CHURN = `
  const { isMainThread, Worker } = require('node:worker_threads');
  const { PerformanceObserver, constants } = require('node:perf_hooks');
  const v8 = require('node:v8');
  if (isMainThread) {
    for (const flag of process.argv.slice(1)) v8.setFlagsFromString(flag);
    new Worker(process.env.CHURN, { eval: true });
  } else {
    const live = Array.from({ length: 60_000 }, (_, i) => ({ i, text: 'x'.repeat(8) + i, list: [i, i, i] }));
    let numFull = 0;
    new PerformanceObserver((list) => {
      for (const { detail } of list.getEntries())
        if (detail.kind === constants.NODE_PERFORMANCE_GC_MAJOR) numFull++;
    }).observe({ entryTypes: ['gc'] });
    const net = require('node:net');
    const chunk = new Uint8Array(1 << 20);
    let numBytes = 0;
    const server = net.createServer((socket) => {
      let small = [];
      socket.on('data', ({ length }) => {
        small = Array.from({ length: 100 }, (_, i) => ({ i }));
        if ((numBytes += length) < 2_500 * 2 ** 20) return;
        setTimeout(() => (console.log(numFull, live.length, small.length), process.exit()), 50);
      });
    });
    server.listen(0, '127.0.0.1', () => {
      const socket = net.connect(server.address().port, '127.0.0.1');
      const fill = () => {
        while (socket.write(chunk));
      };
      socket.on('drain', fill);
      socket.on('error', () => undefined);
      fill();
    });
  }
`;

const fullCollections = (flags: readonly string[]): number =>
  Number.parseInt(
    execFileSync(process.execPath, ['-e', CHURN, ...flags], {
      encoding: 'utf8',
      env: { ...process.env, CHURN },
      timeout: 60_000,
    }),
    10,
  );

test('V8 knows every flag', () => {
  const known = execFileSync(process.execPath, ['--v8-options'], { encoding: 'utf8' });
  for (const flag of TENSOR_HEAP_FLAGS) expect(known).toContain(`  ${flag.split('=')[0]} `);
});

test('a thread that passes tensors hardly ever collects its whole heap', () => {
  const tuned = fullCollections(TENSOR_HEAP_FLAGS);
  // Fewer on a machine so busy that little passes at a time, so there is nothing to compare with.
  console.log(`full collections for 2,500 MiB: ${fullCollections([])}, with the flags ${tuned}`);
  expect(tuned).toBeLessThanOrEqual(2);
}, 120_000);
