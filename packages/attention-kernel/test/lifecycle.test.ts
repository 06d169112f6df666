/** Owns the proof of what surrounds the arithmetic: handles, order, isolation, the event loop, the process's exit. */
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { blockBytes, LaminaError } from '@lamina/tensor';
import { describe, expect, test } from 'vitest';
import { createKernel } from '../src/create-kernel.ts';
import { loadNativeAddon } from '../src/native-addon.ts';
import {
  ALL_KINDS,
  attend,
  emptyPlan,
  makeKernel,
  makeLayout,
  NATIVE_VARIANTS,
  outBytes,
  Random,
  toBytes,
  toFloats,
} from './support.ts';

const layout = makeLayout({ numLayers: 2, blockSizeTokens: 16, kvDtype: 'f32' });
const { numHeads, numKvHeads, headDim } = layout;

/** As many queries, that see one token each, as the event loop does not wait for. */
const NUM_LONG_QUERIES = 40_000;

/** One token appended to block 0 at position 0 and one query that sees it: o = v, lse = q.k * scale. */
function oneToken(v: number) {
  const plan = emptyPlan({
    numQueryRows: 1,
    numKvRows: 1,
    segments: Int32Array.from([0, 1, 0, 0, 1]),
    blocks: Int32Array.from([0, 0, 1]),
    kvSlots: Int32Array.from([0]),
  });
  const kv = new Float32Array(numKvHeads * headDim);
  const qkv = toBytes([new Float32Array(numHeads * headDim).fill(1), kv.fill(0.5), kv.slice().fill(v)]);
  return { plan, qkv, out: new Uint8Array(outBytes(layout, 1)) };
}

describe.each(ALL_KINDS)('%s', (kind) => {
  test('done comes once each, in the order of the attends, also of brief ones behind long ones', async () => {
    const kernel = makeKernel(kind, layout, 4, 2);
    const order: number[] = [];
    const outs: Uint8Array[] = [];
    const numLong = NUM_LONG_QUERIES;
    const long = emptyPlan({
      numQueryRows: numLong,
      segments: Int32Array.of(0, numLong, 0, 0, 1),
      blocks: Int32Array.of(1, 0, 1),
    });
    const longQuery = toBytes([new Float32Array(numLong * numHeads * headDim)]);
    let numAtOnce = 0;
    await new Promise<void>((resolve) => {
      for (let i = 0; i < 200; i++) {
        const isLong = i % 50 === 10;
        const { plan, qkv, out } = oneToken(i);
        const step = kernel.beginStep(isLong ? long : plan);
        outs.push(out);
        const target = isLong ? new Uint8Array(outBytes(layout, numLong)) : out;
        kernel.attend(step, i % 2, isLong ? longQuery : qkv, target, (error) => {
          expect(error).toBeNull();
          order.push(i);
          if (isLong) new DataView(out.buffer).setFloat32(0, i, true);
          if (order.length === 200) resolve();
        });
        // The attend in flight keeps what it needs.
        kernel.endStep(step);
      }
      numAtOnce = order.length;
    });
    // Those before the first long one, at least, where the event loop may wait for them.
    if (kind === 'portable') expect(numAtOnce).toBe(0);
    else expect([numAtOnce >= 10, numAtOnce < 200]).toEqual([true, true]);
    expect(order).toEqual(Array.from({ length: 200 }, (_, i) => i));
    outs.forEach((out, i) => {
      expect(toFloats(out)[0]).toBe(i);
      if (i % 50 === 10) return;
      expect(toFloats(out)[numHeads * headDim]).toBeCloseTo(headDim * 0.5 * layout.scale, 5);
    });
    await kernel.close();
  });

  test('a query that sees no key gets o = 0 and lse = -Infinity', async () => {
    const kernel = makeKernel(kind, layout, 4);
    // Row 0: no blocks. Row 1: a block that lies after it. Row 2: no segment. Row 3: an empty block.
    const plan = emptyPlan({
      numQueryRows: 4,
      segments: Int32Array.from([0, 1, 5, 0, 0, 1, 1, 5, 0, 1, 3, 1, 20, 1, 1]),
      blocks: Int32Array.from([0, 16, 3, 1, 0, 0]),
    });
    const out = new Uint8Array(outBytes(layout, 4)).fill(0x7f);
    await attend(kernel, kernel.beginStep(plan), 0, toBytes([new Float32Array(4 * numHeads * headDim).fill(1)]), out);
    const got = toFloats(out);
    expect(got.subarray(0, 4 * numHeads * headDim).every((value) => value === 0)).toBe(true);
    expect(got.subarray(4 * numHeads * headDim).every((value) => value === Number.NEGATIVE_INFINITY)).toBe(true);
    await kernel.close();
  });

  test('what an earlier request left in a block (even NaN) does not reach a later one', async () => {
    const kernel = makeKernel(kind, layout, 1);
    const poison = emptyPlan({ numKvRows: 16, kvSlots: Int32Array.from({ length: 16 }, (_, i) => i) });
    const nan = new Float32Array(2 * 16 * numKvHeads * headDim).fill(Number.NaN);
    await attend(kernel, kernel.beginStep(poison), 0, toBytes([nan]), new Uint8Array(0));
    const { plan, qkv, out } = oneToken(3);
    await attend(kernel, kernel.beginStep(plan), 0, qkv, out);
    expect([...toFloats(out).subarray(0, headDim)]).toEqual(new Array<number>(headDim).fill(3));
    await kernel.close();
  });

  test('a NaN in a key makes the output NaN, not silently something else', async () => {
    const kernel = makeKernel(kind, layout, 1);
    const { plan, out } = oneToken(1);
    const kv = new Float32Array(numKvHeads * headDim).fill(1);
    const q = new Float32Array(numHeads * headDim).fill(1);
    await attend(kernel, kernel.beginStep(plan), 0, toBytes([q, kv.slice().fill(Number.NaN), kv]), out);
    expect(toFloats(out)[0]).toBeNaN();
    await kernel.close();
  });

  test('layers and blocks are separate', async () => {
    const kernel = makeKernel(kind, layout, 4);
    const { plan, qkv, out } = oneToken(7);
    await attend(kernel, kernel.beginStep(plan), 0, qkv, out);
    const reader = emptyPlan({ numQueryRows: 1, segments: plan.segments, blocks: plan.blocks });
    const q = qkv.subarray(0, numHeads * headDim * 4);
    await attend(kernel, kernel.beginStep(reader), 1, q, out);
    expect(toFloats(out)[0]).toBe(0);
    await attend(kernel, kernel.beginStep(reader), 0, q, out);
    expect(toFloats(out)[0]).toBe(7);
    await kernel.close();
  });

  test('wrong lengths, layers and handles throw at once', async () => {
    const kernel = makeKernel(kind, layout, 4);
    const other = makeKernel(kind, layout, 4);
    const { plan, qkv, out } = oneToken(1);
    const step = kernel.beginStep(plan);
    const done = () => expect.unreachable();
    expect(() => kernel.attend(step, 2, qkv, out, done)).toThrow(/layer 2/);
    expect(() => kernel.attend(step, -1, qkv, out, done)).toThrow(LaminaError);
    expect(() => kernel.attend(step, 0, qkv.subarray(1), out, done)).toThrow(/qkv has/);
    expect(() => kernel.attend(step, 0, qkv, new Uint8Array(out.length + 1), done)).toThrow(/out has/);
    expect(() => kernel.attend({ plan }, 0, qkv, out, done)).toThrow(/another attention kernel/);
    expect(() => other.attend(step, 0, qkv, out, done)).toThrow(/another attention kernel/);
    expect(() => kernel.beginStep({ ...plan, kvSlots: Int32Array.from([64]) })).toThrow(/kvSlots\[0\]/);
    kernel.endStep(step);
    expect(() => kernel.attend(step, 0, qkv, out, done)).toThrow(/step has ended/);
    expect(() => kernel.endStep(step)).toThrow(/already ended/);
    await kernel.close();
    await other.close();
  });

  test('close waits for what is in flight, then everything throws', async () => {
    const kernel = makeKernel(kind, layout, 4, 2);
    const { plan, qkv, out } = oneToken(5);
    const step = kernel.beginStep(plan);
    let finished = 0;
    const numQueryRows = NUM_LONG_QUERIES;
    const many = emptyPlan({ numQueryRows, segments: Int32Array.of(0, numQueryRows, 0, 0, 1), blocks: plan.blocks });
    const queries = toBytes([new Float32Array(numQueryRows * numHeads * headDim)]);
    const manyOut = new Uint8Array(outBytes(layout, numQueryRows));
    kernel.attend(kernel.beginStep(many), 0, queries, manyOut, () => finished++);
    for (let i = 0; i < 19; i++) kernel.attend(step, 0, qkv, out, () => finished++);
    expect(finished).toBe(0);
    const closing = kernel.close();
    expect(() => kernel.attend(step, 0, qkv, out, () => {})).toThrow(/closed/);
    await closing;
    expect(finished).toBe(20);
    expect(() => kernel.beginStep(plan)).toThrow(/closed/);
    kernel.endStep(step);
    await kernel.close();
  });
});

describe('createKernel', () => {
  test.each([
    ['headDim', { headDim: 12 }],
    ['headDim', { headDim: 264 }],
    ['blockSizeTokens', { blockSizeTokens: 12 }],
    ['numHeads', { numHeads: 3 }],
    ['numLayers', { numLayers: 0 }],
    ['softcap', { softcap: 0 }],
    ['windowTokens', { windowTokens: [1] }],
    ['windowTokens', { windowTokens: [1, -1] }],
    ['alibiSlopes', { alibiSlopes: [1] }],
    ['alibiSlopes', { alibiSlopes: [1, 1, 1, Number.NaN] }],
  ])('refuses a bad %s', (name, changes) => {
    const options = { layout: { ...layout, ...changes }, numBlocks: 1, numThreads: 1, kind: 'auto' } as const;
    expect(() => createKernel(options)).toThrow(name);
  });

  test.each(['portable', ...(NATIVE_VARIANTS.length > 0 ? (['native'] as const) : [])] as const)(
    '%s: memory that cannot be had is a clear error',
    (kind) => {
      const huge = makeLayout({ numLayers: 64, numHeads: 64, numKvHeads: 64, headDim: 256, blockSizeTokens: 128 });
      const numBlocks = Math.floor(2 ** 46 / blockBytes(huge));
      expect(() => createKernel({ layout: huge, numBlocks, numThreads: 1, kind })).toThrow(/KV blocks \(\d+ bytes\)/);
    },
  );

  test('auto is native wherever the addon loads, and says why where it does not', async () => {
    const { kernel, fallbackReason } = createKernel({ layout, numBlocks: 1, numThreads: 1, kind: 'auto' });
    if (loadNativeAddon().addon !== null) {
      expect(kernel.name).toMatch(/^native-/);
      expect(fallbackReason).toBeNull();
    } else {
      expect(kernel.name).toBe('portable');
      expect(fallbackReason).not.toBeNull();
    }
    await kernel.close();
  });
});

describe.runIf(NATIVE_VARIANTS.length > 0)('native threads', () => {
  test('a long attend does not block the event loop', async () => {
    const long = makeLayout({ numHeads: 32, numKvHeads: 4, headDim: 128, kvDtype: 'f16', blockSizeTokens: 64 });
    const numBlocks = 64;
    const numQueries = 3000;
    const kernel = makeKernel('auto', long, numBlocks, 1);
    const step = kernel.beginStep(
      emptyPlan({
        numQueryRows: numQueries,
        segments: Int32Array.from([0, numQueries, 64 * numBlocks, 0, numBlocks]),
        blocks: Int32Array.from(Array.from({ length: numBlocks }, (_, i) => [i, i * 64, 64]).flat()),
      }),
    );
    const qkv = toBytes([new Random(1).floats(numQueries * long.numHeads * long.headDim, 1)], 1, 'f16');
    const out = new Uint8Array(outBytes(long, numQueries));
    let lateMs = 0;
    let last = performance.now();
    const timer = setInterval(() => {
      const now = performance.now();
      lateMs = Math.max(lateMs, now - last - 5);
      last = now;
    }, 5);
    const start = performance.now();
    const finished = attend(kernel, step, 0, qkv, out);
    const submitMs = performance.now() - start;
    await finished;
    const attendMs = performance.now() - start;
    clearInterval(timer);
    await kernel.close();
    expect(attendMs).toBeGreaterThan(100);
    expect(submitMs).toBeLessThan(20);
    // Loaded machines delay timers too: far less than the attend, rather than a few milliseconds.
    expect(lateMs).toBeLessThan(attendMs / 2);
  });

  const addonPath = fileURLToPath(new URL('../build/lamina_attention.node', import.meta.url));
  /** A process of its own, on the addon alone: what it prints and how it ends. */
  async function runChild(body: string): Promise<string> {
    const script = `
      const addon = require(${JSON.stringify(addonPath)});
      let calls = 0;
      const kernel = addon.create(1, 8, 8, 128, 0.1, 0, new Int32Array(0), new Float32Array(0), 16, true, 4096, 2, '', () => calls++);
      const rows = 2048;
      const slots = Int32Array.from({ length: rows }, (_, i) => i);
      const step = addon.beginStep(kernel, 0, rows, new Int32Array(0), new Int32Array(0), slots);
      const qkv = new Uint8Array(rows * 8 * 128 * 2 * 2);
      const attend = (id) => addon.attend(kernel, step, 0, qkv, new Uint8Array(0), id);
      ${body}`;
    const { stdout } = await promisify(execFile)(process.execPath, ['-e', script], { timeout: 20_000 });
    return stdout.trim();
  }

  test('a process with an idle, unclosed kernel exits by itself', async () => {
    expect(await runChild(`attend(0); process.on('exit', () => console.log(calls));`)).toBe('1');
  });

  test('process.exit with attends in flight exits cleanly', async () => {
    expect(await runChild(`for (let i = 0; i < 50; i++) attend(i); console.log('ok'); process.exit(0);`)).toBe('ok');
  });

  test('a closed kernel leaves nothing that keeps the process alive, and refuses work', async () => {
    const body = `attend(0); setTimeout(() => {
      addon.close(kernel);
      try { attend(1); } catch (error) { console.log(calls, error.message); }
    }, 200);`;
    expect(await runChild(body)).toBe('1 the kernel is closed');
  });

  test('an idle kernel uses no processor time', async () => {
    const body = `attend(0); setTimeout(() => {
      const before = process.cpuUsage();
      setTimeout(() => { const { user, system } = process.cpuUsage(before); console.log(user + system); }, 1000);
    }, 300);`;
    expect(Number(await runChild(body))).toBeLessThan(50_000);
  });

  test('the addon itself refuses handles and buffers of the wrong kind', async () => {
    const body = `const bad = [() => addon.attend(step, step, 0, qkv, qkv, 0), () => addon.attend(kernel, {}, 0, qkv, qkv, 0),
      () => addon.attend(kernel, step, 0, qkv.subarray(1), new Uint8Array(0), 0), () => addon.attend(kernel, step, 9, qkv, new Uint8Array(0), 0),
      () => addon.create(1), () => addon.attend(kernel, step, 0, new Float32Array(4), qkv, 0)];
      console.log(bad.filter((call) => { try { call(); return false; } catch { return true; } }).length);`;
    expect(await runChild(body)).toBe('6');
  });
});
