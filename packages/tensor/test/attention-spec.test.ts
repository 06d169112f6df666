/** Equality of specs and layouts: every field counts. */
import { expect, test } from 'vitest';
import { type KvLayout, maxWindowTokens, sameAttentionSpec, sameKvLayout } from '../src/attention-spec.ts';

const LAYOUT: KvLayout = {
  numLayers: 2,
  numHeads: 2,
  numKvHeads: 1,
  headDim: 8,
  scale: 0.5,
  softcap: 30,
  windowTokens: [4, 0],
  sinkLogits: [
    [1, 2],
    [3, 4],
  ],
  alibiSlopes: [0.5, 0.25],
  blockSizeTokens: 16,
  kvDtype: 'f16',
};

test('a copy is the same, also when absent fields are undefined', () => {
  expect(sameKvLayout(LAYOUT, structuredClone(LAYOUT))).toBe(true);
  const { softcap: _, ...uncapped } = LAYOUT;
  expect(sameKvLayout(uncapped, { ...LAYOUT, softcap: undefined })).toBe(true);
});

const CHANGES: readonly Partial<KvLayout>[] = [
  { numLayers: 3 },
  { numHeads: 4 },
  { numKvHeads: 2 },
  { headDim: 16 },
  { scale: 0.25 },
  { softcap: 50 },
  { softcap: undefined },
  { windowTokens: [4, 4] },
  { windowTokens: [4] },
  { windowTokens: undefined },
  {
    sinkLogits: [
      [1, 2],
      [3, 5],
    ],
  },
  { sinkLogits: undefined },
  { alibiSlopes: [0.5, 0.5] },
  { alibiSlopes: undefined },
];

test.each(CHANGES)('%o makes another spec', (change) => {
  const other = { ...LAYOUT, ...change };
  expect(sameAttentionSpec(LAYOUT, other)).toBe(false);
  expect(sameAttentionSpec(other, LAYOUT)).toBe(false);
  expect(sameKvLayout(LAYOUT, other)).toBe(false);
});

test('block size and dtype make another layout of the same spec', () => {
  for (const change of [{ blockSizeTokens: 32 }, { kvDtype: 'f32' as const }]) {
    expect(sameKvLayout(LAYOUT, { ...LAYOUT, ...change })).toBe(false);
    expect(sameAttentionSpec(LAYOUT, { ...LAYOUT, ...change })).toBe(true);
  }
});

test('KV may be given up only when every layer has a window, and then behind the largest', () => {
  expect(maxWindowTokens(LAYOUT)).toBe(Number.POSITIVE_INFINITY);
  expect(maxWindowTokens({ ...LAYOUT, windowTokens: undefined })).toBe(Number.POSITIVE_INFINITY);
  expect(maxWindowTokens({ ...LAYOUT, windowTokens: [4, 9] })).toBe(9);
});
