/**
 * Soft-cap, windows per layer and ALiBi: every combination of them, on every variant, equals the float64 oracle over
 * scenarios of prefill and decode with scattered blocks and holes.
 *
 * Bound: |v| <= 1 and scores up to about 30; a soft-cap of 20 leaves 20 * 1e-7 * a few in a score.
 */
import type { KvLayout } from '@lamina/tensor';
import { describe, expect, test } from 'vitest';
import { makeScenario, playScenario, type ScenarioOptions } from './scenario.ts';
import { ALL_KINDS, attend, emptyPlan, makeKernel, makeLayout, outBytes, toBytes, toFloats } from './support.ts';

const MAX_ERROR = 3e-5;

const SOFTCAPS = [undefined, 20];
/** Of three layers: all the same, none, mixed with full attention, smaller than a block. */
const WINDOWS = [undefined, [50, 50, 50], [0, 24, 100], [1, 3, 17]];
const ALIBIS = [false, true];

interface Case extends ScenarioOptions {
  readonly numThreads: number;
}

function cases(): Case[] {
  const all: Case[] = [];
  let seed = 1;
  for (const softcap of SOFTCAPS)
    for (const windowTokens of WINDOWS)
      for (const hasAlibi of ALIBIS)
        for (const kvDtype of ['f16', 'f32'] as const) {
          const numKvHeads = 1 + (seed % 2);
          const numHeads = numKvHeads * [1, 3, 4, 8][seed % 4]!;
          const layout: KvLayout = makeLayout({
            numLayers: 3,
            numKvHeads,
            numHeads,
            headDim: [32, 64, 80][seed % 3]!,
            scale: 0.5,
            blockSizeTokens: seed % 2 === 0 ? 16 : 32,
            kvDtype,
            softcap,
            windowTokens,
            alibiSlopes: hasAlibi ? Array.from({ length: numHeads }, (_, head) => 2 ** -(head + 1)) : undefined,
          });
          all.push({
            seed,
            layout,
            numBlocks: 40,
            numSteps: 6,
            maxChunkTokens: 60,
            numRequests: 3,
            holes: seed % 3 === 0 ? 0.4 : 0.1,
            amplitude: 3,
            numThreads: 1 + (seed % 2),
          });
          seed++;
        }
  return all;
}

const made = new Map<string, ReturnType<typeof makeScenario>>();
function scenarioOf(options: Case): ReturnType<typeof makeScenario> {
  const key = JSON.stringify(options);
  const known = made.get(key) ?? makeScenario(options);
  made.set(key, known);
  return known;
}

describe.each(ALL_KINDS)('%s', (kind) => {
  test.each(cases())(
    'softcap $layout.softcap, windows $layout.windowTokens, ALiBi $layout.alibiSlopes, $layout.kvDtype',
    async (options) => {
      const kernel = makeKernel(kind, options.layout, options.numBlocks, options.numThreads);
      const { output, lse } = await playScenario(kernel, scenarioOf(options));
      await kernel.close();
      expect(output).toBeLessThan(MAX_ERROR);
      expect(lse).toBeLessThan(MAX_ERROR);
    },
  );

  test('a window over a long context that is split over threads', async () => {
    const layout = makeLayout({ numLayers: 2, numHeads: 3, numKvHeads: 1, windowTokens: [700, 0], kvDtype: 'f16' });
    const options: Case = {
      seed: 9,
      layout,
      numBlocks: 256,
      numSteps: 4,
      maxChunkTokens: 900,
      numRequests: 1,
      holes: 0.3,
      amplitude: 1,
      numThreads: 3,
    };
    const kernel = makeKernel(kind, layout, options.numBlocks, options.numThreads);
    const { output, lse } = await playScenario(kernel, scenarioOf(options));
    await kernel.close();
    expect(output).toBeLessThan(MAX_ERROR);
    expect(lse).toBeLessThan(MAX_ERROR);
  }, 60_000);

  test('soft-capped scores: small ones keep their digits, large ones reach the cap and no more', async () => {
    const softcap = 50;
    const layout = makeLayout({ numHeads: 1, numKvHeads: 1, headDim: 16, scale: 1, softcap });
    const kernel = makeKernel(kind, layout, 1);
    const plan = emptyPlan({
      numQueryRows: 1,
      numKvRows: 1,
      segments: Int32Array.of(0, 1, 0, 0, 1),
      blocks: Int32Array.of(0, 0, 1),
      kvSlots: Int32Array.of(0),
    });
    const out = new Uint8Array(outBytes(layout, 1));
    const q = new Float32Array(16);
    const k = new Float32Array(16);
    k[0] = 1;
    for (const score of [1e-20, 1e-4, -0.3, 2, -30, 49, 120, -400, 1e6, -1e6]) {
      q[0] = score;
      await attend(kernel, kernel.beginStep(plan), 0, toBytes([q, k, k]), out);
      // The log-sum-exp of one key is its score.
      const want = softcap * Math.tanh(Math.fround(score) / softcap);
      const got = toFloats(out)[16]!;
      expect(Math.abs(got - want)).toBeLessThanOrEqual(1e-6 * Math.abs(want));
    }
    q[0] = Number.NaN;
    await attend(kernel, kernel.beginStep(plan), 0, toBytes([q, k, k]), out);
    expect(toFloats(out)[0]).toBeNaN();
    await kernel.close();
  });

  test('blocks wholly outside the window are not read: what they hold, even NaN, does not matter', async () => {
    const layout = makeLayout({ numHeads: 2, numKvHeads: 1, windowTokens: [16] });
    const kernel = makeKernel(kind, layout, 3, 2);
    const rowFloats = layout.headDim;
    const poison = emptyPlan({ numKvRows: 32, kvSlots: Int32Array.from({ length: 32 }, (_, i) => i) });
    const nan = new Float32Array(2 * 32 * rowFloats).fill(Number.NaN);
    await attend(kernel, kernel.beginStep(poison), 0, toBytes([nan]), new Uint8Array(0));
    const decode = emptyPlan({
      numQueryRows: 1,
      numKvRows: 16,
      segments: Int32Array.of(0, 1, 47, 0, 3),
      blocks: Int32Array.of(0, 0, 16, 1, 16, 16, 2, 32, 16),
      kvSlots: Int32Array.from({ length: 16 }, (_, i) => 32 + i),
    });
    const ones = new Float32Array(16 * rowFloats).fill(1);
    const out = new Uint8Array(outBytes(layout, 1));
    const q = new Float32Array(2 * rowFloats).fill(1);
    await attend(kernel, kernel.beginStep(decode), 0, toBytes([q, ones, ones]), out);
    for (const value of toFloats(out).subarray(0, 2 * rowFloats)) expect(value).toBeCloseTo(1, 5);
    await kernel.close();
  });
});
