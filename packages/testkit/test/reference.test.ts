/** The uncut graph equals an independent float64 forward pass; the staged graph equals the uncut one. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { buildModel, IncrementalDetokenizer, loadTokenizer } from '@lamina/model';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { writeRandomCheckpoint } from '../src/random-checkpoint.ts';
import type { RandomCheckpointOptions } from '../src/random-options.ts';
import { UncutReference } from '../src/reference.ts';
import { maxDifference, plainLogits } from '../src/reference-plain.ts';
import { StagedReference } from '../src/reference-staged.ts';

const TINY = fileURLToPath(new URL('../../../models/lamina-tiny', import.meta.url));
const STORY = 'Once upon a time, there was a little girl named Lily.';

/**
 * Bound on |float32 graph - float64| of a logit. Logits here are of order 1 to 20; float32 rounding over a few layers of
 * a few hundred products leaves about 1e-5 of that.
 */
const FLOAT32_BOUND = 5e-5;
/** Bound on |staged - uncut| of a logit: the same float32 weights, other orders of summation. */
const STAGED_BOUND = 1e-4;

let scratch = '';
beforeAll(async () => {
  scratch = await mkdtemp(join(tmpdir(), 'lamina-reference-'));
});
afterAll(async () => {
  await rm(scratch, { recursive: true, force: true });
});

const VARIANTS: Readonly<Record<string, Partial<RandomCheckpointOptions>>> = {
  'F32, tied, GQA group 2': {},
  'F16, untied, GQA group 4': { dtype: 'F16', tied: false, numHeads: 4, numKvHeads: 1 },
  'BF16, GQA group 1, both biases': { dtype: 'BF16', numKvHeads: 4, attentionBias: true, mlpBias: true },
  'F32, one layer, wide heads': { numLayers: 1, headDim: 32, attentionBias: true },
  'F16, five layers, other theta, MLP bias': { dtype: 'F16', numLayers: 5, ropeTheta: 500_000, mlpBias: true },
};

const TOKENS = Array.from({ length: 24 }, (_, i) => (i * 37 + 11) % 256);

describe.each(Object.entries(VARIANTS))('random checkpoint: %s', (name, options) => {
  it('gives the logits of a float64 forward pass, uncut and staged', async () => {
    const dir = join(scratch, name.replaceAll(/\W+/g, '-'));
    await writeRandomCheckpoint(dir, options);
    const built = await buildModel(dir, { cacheDir: join(scratch, 'cache') });
    const expected = await plainLogits(dir, TOKENS);
    const uncut = await UncutReference.load(built);
    const staged = await StagedReference.load(built);
    const uncutRows = await uncut.logits(TOKENS);
    const stagedRows = await staged.runWave([{ sequence: staged.newSequence(), tokenIds: TOKENS }]);
    await Promise.all([uncut.release(), staged.release()]);
    for (const [i, row] of expected.entries()) {
      expect(maxDifference(uncutRows[i]!, row)).toBeLessThan(FLOAT32_BOUND);
      expect(maxDifference(stagedRows[i]!, row)).toBeLessThan(FLOAT32_BOUND);
    }
    expect(Math.max(...expected[0]!)).toBeGreaterThan(0.1);
  });
});

describe('lamina-tiny', () => {
  let uncut: UncutReference;
  let staged: StagedReference;
  let story: number[];
  beforeAll(async () => {
    const built = await buildModel(TINY, { cacheDir: join(scratch, 'cache') });
    [uncut, staged] = await Promise.all([UncutReference.load(built), StagedReference.load(built)]);
    story = (await loadTokenizer(TINY)).encode(STORY);
  });
  afterAll(async () => {
    await Promise.all([uncut.release(), staged.release()]);
  });

  it('gives the logits of a float64 forward pass', async () => {
    const tokenIds = [...story, ...story.slice(0, 8)];
    const expected = await plainLogits(TINY, tokenIds);
    const rows = await uncut.logits(tokenIds);
    for (const [i, row] of expected.entries()) expect(maxDifference(rows[i]!, row)).toBeLessThan(FLOAT32_BOUND);
  });

  it('gives the same logits step by step through the KV cache as in one prefill', async () => {
    const { tokenIds, logits } = await uncut.greedy(story, 20, { ignoreEos: true });
    const rows = await uncut.logits([...story, ...tokenIds]);
    for (const [i, row] of logits.entries()) {
      expect(maxDifference(row, rows[story.length - 1 + i]!)).toBeLessThan(STAGED_BOUND);
    }
  });

  it('tells a story', async () => {
    const tokenizer = await loadTokenizer(TINY);
    const { tokenIds } = await uncut.greedy(story, 60);
    const detokenizer = new IncrementalDetokenizer(tokenizer);
    const text = tokenIds.map((id) => detokenizer.push(id)).join('') + detokenizer.finish();
    expect(text).toMatch(/^ She loved to play/);
    expect(text).not.toContain('\uFFFD');
  });

  it('runs a flat wave of mixed prefills, chunks and decodes like each request alone', async () => {
    const prompts = [story, story.slice(0, 1), [...story, ...story.slice(3)], story.slice(2, 7)];
    const expected = await Promise.all(prompts.map((prompt) => uncut.greedy(prompt, 12, { ignoreEos: true })));
    const sequences = prompts.map(() => staged.newSequence());
    // Wave 1: prompts 0 and 1 whole, the first chunk of 2. Wave 2: decode 0 and 1, the rest of 2, all of 3.
    const first = await staged.runWave(
      [
        { sequence: sequences[0]!, tokenIds: story },
        { sequence: sequences[1]!, tokenIds: prompts[1]! },
        { sequence: sequences[2]!, tokenIds: prompts[2]!.slice(0, 9) },
      ],
      [story.length - 1, story.length],
    );
    expect(maxDifference(first[0]!, expected[0]!.logits[0]!)).toBeLessThan(STAGED_BOUND);
    expect(maxDifference(first[1]!, expected[1]!.logits[0]!)).toBeLessThan(STAGED_BOUND);
    const rest = prompts[2]!.slice(9);
    const second = await staged.runWave(
      [
        { sequence: sequences[3]!, tokenIds: prompts[3]! },
        { sequence: sequences[0]!, tokenIds: [expected[0]!.tokenIds[0]!] },
        { sequence: sequences[2]!, tokenIds: rest },
        { sequence: sequences[1]!, tokenIds: [expected[1]!.tokenIds[0]!] },
      ],
      [4, 5, 5 + rest.length, 6 + rest.length],
    );
    const order = [3, 0, 2, 1];
    const step = [0, 1, 0, 1];
    for (const [i, request] of order.entries()) {
      expect(maxDifference(second[i]!, expected[request]!.logits[step[i]!]!)).toBeLessThan(STAGED_BOUND);
    }
    // Pure decode from here on.
    const next = [2, 2, 1, 1];
    for (let round = 0; round < 8; round++) {
      const wave = sequences.map((sequence, i) => ({ sequence, tokenIds: [expected[i]!.tokenIds[next[i]! - 1]!] }));
      const rows = await staged.runWave(wave);
      for (const [i, row] of rows.entries()) {
        expect(maxDifference(row, expected[i]!.logits[next[i]!]!)).toBeLessThan(STAGED_BOUND);
        next[i]! += 1;
      }
    }
  });

  it('gives no logits for a wave that wants none', async () => {
    expect(await staged.runWave([{ sequence: staged.newSequence(), tokenIds: story }], [])).toEqual([]);
  });

  it('stops at an end-of-sequence token unless told to go on', async () => {
    const long = await uncut.greedy([0], 40, { ignoreEos: true });
    expect(long.tokenIds).toHaveLength(40);
    const { tokenIds } = await uncut.greedy(story, 400);
    const end = tokenIds.indexOf(0);
    expect(end === -1 || end === tokenIds.length - 1).toBe(true);
  });
});
