/**
 * Owns the proof that every kernel computes attention: all variants against a float64 oracle over seeded scenarios.
 *
 * Bounds: |v| <= 1, so output differences are absolute. float32 sums of ~100 terms leave ~1e-6; scores of +-80 carry
 * 80 * 2^-24 * a few of absolute error into the exponent.
 */
import type { KvLayout } from '@lamina/tensor';
import { describe, expect, test } from 'vitest';
import { makeScenario, playScenario, type ScenarioOptions } from './scenario.ts';
import { ALL_KINDS, lanesOf, makeKernel, makeLayout, NATIVE_VARIANTS } from './support.ts';

const MAX_ERROR = 1e-5;
const MAX_ERROR_LARGE_SCORES = 2e-4;

interface Case extends ScenarioOptions {
  readonly numThreads: number;
}

/** Every value of every dimension appears; the combinations vary with the seed. */
function cases(): Case[] {
  const dims = [32, 64, 80, 128];
  const groups = [1, 2, 4, 7, 8];
  const all: Case[] = [];
  let seed = 1;
  for (const headDim of dims) {
    for (const group of groups) {
      for (const blockSizeTokens of [16, 64]) {
        const numKvHeads = 1 + (seed % 3);
        const layout: KvLayout = makeLayout({
          numLayers: 1 + (seed % 2),
          numKvHeads,
          numHeads: numKvHeads * group,
          headDim,
          scale: headDim ** -0.5,
          blockSizeTokens,
          kvDtype: (seed >> 1) % 2 === 0 ? 'f16' : 'f32',
        });
        all.push({
          seed,
          layout,
          numBlocks: 24,
          numSteps: 4,
          maxChunkTokens: seed % 4 === 0 ? 90 : 20,
          numRequests: 3,
          holes: seed % 3 === 0 ? 0.5 : 0.1,
          amplitude: 1,
          numThreads: 1 + (seed % 3),
        });
        seed++;
      }
    }
  }
  return all;
}

const ODD_LAYOUTS: readonly Partial<KvLayout>[] = [
  { headDim: 8, blockSizeTokens: 8, numKvHeads: 1, numHeads: 1 },
  { headDim: 24, blockSizeTokens: 24, numKvHeads: 3, numHeads: 9 },
  { headDim: 256, blockSizeTokens: 32, numKvHeads: 1, numHeads: 16 },
  { headDim: 48, blockSizeTokens: 128, numKvHeads: 2, numHeads: 10 },
  { headDim: 64, blockSizeTokens: 200, numKvHeads: 1, numHeads: 40 },
  { headDim: 40, blockSizeTokens: 80, numKvHeads: 1, numHeads: 71 },
];

/** The oracle is slow: each scenario is made once and played on every kernel. */
const made = new Map<string, ReturnType<typeof makeScenario>>();
function scenarioOf(options: Case): ReturnType<typeof makeScenario> {
  const key = JSON.stringify(options);
  const known = made.get(key) ?? makeScenario(options);
  made.set(key, known);
  return known;
}

async function differences(kind: (typeof ALL_KINDS)[number], options: Case) {
  const kernel = makeKernel(kind, options.layout, options.numBlocks, options.numThreads);
  const result = await playScenario(kernel, scenarioOf(options));
  await kernel.close();
  return result;
}

describe.each(ALL_KINDS)('%s equals the float64 oracle', (kind) => {
  test.each(cases())(
    'head_dim $layout.headDim, $layout.numHeads/$layout.numKvHeads heads, block $layout.blockSizeTokens, $layout.kvDtype, $numThreads threads',
    async (options) => {
      const { output, lse } = await differences(kind, options);
      expect(output).toBeLessThan(MAX_ERROR);
      expect(lse).toBeLessThan(MAX_ERROR);
    },
  );

  test.each(
    ODD_LAYOUTS.filter((odd) => odd.headDim! % lanesOf(kind) === 0 && odd.blockSizeTokens! % lanesOf(kind) === 0),
  )('odd shapes: head_dim $headDim, block $blockSizeTokens, $numHeads/$numKvHeads heads', async (odd) => {
    for (const kvDtype of ['f16', 'f32'] as const) {
      const layout = makeLayout({ ...odd, kvDtype });
      const options: Case = {
        seed: 77,
        layout,
        numBlocks: 40,
        numSteps: 4,
        maxChunkTokens: 70,
        numRequests: 2,
        holes: 0.2,
        amplitude: 1,
        numThreads: 2,
      };
      const { output, lse } = await differences(kind, options);
      expect(output).toBeLessThan(MAX_ERROR);
      expect(lse).toBeLessThan(MAX_ERROR);
    }
  });

  test('scores of +-80 and more neither overflow nor lose the small ones', async () => {
    const layout = makeLayout({ headDim: 64, scale: 1, kvDtype: 'f32' });
    const options: Case = {
      seed: 5,
      layout,
      numBlocks: 24,
      numSteps: 4,
      maxChunkTokens: 40,
      numRequests: 2,
      holes: 0,
      amplitude: 18,
      numThreads: 2,
    };
    const { output, lse, outputs } = await differences(kind, options);
    const numRows = outputs[0]!.length / (layout.numHeads * (layout.headDim + 1));
    expect(Math.max(...outputs[0]!.subarray(numRows * layout.numHeads * layout.headDim))).toBeGreaterThan(80);
    expect(output).toBeLessThan(MAX_ERROR_LARGE_SCORES);
    expect(lse).toBeLessThan(MAX_ERROR);
  });

  test('a long context split over threads is merged exactly', async () => {
    const layout = makeLayout({ headDim: 64, numHeads: 3, numKvHeads: 1, kvDtype: 'f16' });
    const options: Case = {
      seed: 9,
      layout,
      numBlocks: 512,
      numSteps: 5,
      maxChunkTokens: 1100,
      numRequests: 1,
      holes: 0.3,
      amplitude: 1,
      numThreads: 3,
    };
    const steps = scenarioOf(options);
    const kernel = makeKernel(kind, layout, options.numBlocks, options.numThreads);
    const { output, lse } = await playScenario(kernel, steps);
    await kernel.close();
    expect(output).toBeLessThan(MAX_ERROR);
    expect(lse).toBeLessThan(MAX_ERROR);
  }, 60_000);
});

describe.each(NATIVE_VARIANTS)('%s equals portable', (kind) => {
  test.each([1, 2, 3])('seed %i, but for outputs between two float16 values', async (seed) => {
    const layout = makeLayout({ numHeads: 8, numKvHeads: 2, kvDtype: 'f16' });
    const options: Case = {
      seed,
      layout,
      numBlocks: 32,
      numSteps: 5,
      maxChunkTokens: 30,
      numRequests: 4,
      holes: 0.3,
      amplitude: 2,
      numThreads: 2,
    };
    const native = await differences(kind, options);
    const portable = await differences('portable', options);
    native.outputs.forEach((values, i) => {
      const other = portable.outputs[i]!;
      let worst = 0;
      const numOutputs = (values.length / (layout.headDim + 1)) * layout.headDim;
      values.forEach((value, j) => {
        if (value === other[j]!) return;
        const rounding = j < numOutputs ? Math.abs(value) * 2 ** -10 + 2 ** -24 : 0;
        worst = Math.max(worst, Math.abs(value - other[j]!) - rounding);
      });
      expect(worst).toBeLessThan(MAX_ERROR);
    });
  });
});
