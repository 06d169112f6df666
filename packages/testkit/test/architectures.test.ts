/**
 * Every architecture: the uncut and the staged graph give the logits of an independent float64 forward pass, for
 * sequences beyond windows and original lengths, in one prefill and token by token.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { buildModel } from '@lamina/model';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { PUBLISHED_CONFIGS } from '../src/published-configs.ts';
import { writeRandomCheckpoint } from '../src/random-checkpoint.ts';
import { ARCHITECTURE_TEST_TOKENS, RANDOM_MODELS } from '../src/random-models.ts';
import { UncutReference } from '../src/reference.ts';
import { loadPlain, maxDifference } from '../src/reference-plain.ts';
import { StagedReference } from '../src/reference-staged.ts';

/** Bound on |graph - float64| of a logit, relative to the largest logit of its row. */
const RELATIVE_BOUND = 2e-5;
const SHORT_TOKENS = 20;

const TOKENS = Array.from({ length: ARCHITECTURE_TEST_TOKENS }, (_, i) => (i * 37 + 11) % 256);

let scratch = '';
beforeAll(async () => {
  scratch = await mkdtemp(join(tmpdir(), 'lamina-architectures-'));
});
afterAll(async () => {
  await rm(scratch, { recursive: true, force: true });
});

/** Largest difference of two lists of rows, each relative to its row. */
function worstOf(rows: readonly Float32Array[], expected: readonly Float64Array[]): number {
  expect(rows).toHaveLength(expected.length);
  return Math.max(
    ...expected.map((row, i) => maxDifference(rows[i]!, row) / Math.max(...row.map((value) => Math.abs(value)))),
  );
}

describe.each(Object.entries({ ...RANDOM_MODELS, ...PUBLISHED_CONFIGS }))('%s', (name, options) => {
  it('gives the logits of a float64 forward pass, uncut and staged', async () => {
    const dir = join(scratch, name.replaceAll(/\W+/g, '-'));
    await writeRandomCheckpoint(dir, options);
    const built = await buildModel(dir, { cacheDir: join(scratch, 'cache') });
    const uncut = await UncutReference.load(built);
    const staged = await StagedReference.load(built);
    const plainLogits = await loadPlain(dir);
    let worst = 0;
    for (const tokenIds of [TOKENS, TOKENS.slice(0, SHORT_TOKENS)]) {
      const expected = plainLogits(tokenIds);
      expect(Math.max(...expected[0]!)).toBeGreaterThan(0.1);
      const sequence = staged.newSequence(tokenIds.length);
      const first = await staged.runWave([{ sequence, tokenIds: tokenIds.slice(0, 13) }]);
      const rows = [...first, ...(await staged.runWave([{ sequence, tokenIds: tokenIds.slice(13, -1) }]))];
      rows.push(...(await staged.runWave([{ sequence, tokenIds: tokenIds.slice(-1) }])));
      const differences = [worstOf(await uncut.logits(tokenIds), expected), worstOf(rows, expected)];
      for (const difference of differences) expect(difference).toBeLessThan(RELATIVE_BOUND);
      worst = Math.max(worst, ...differences);
    }
    // Through the KV cache of the uncut graph; a longrope sequence outgrows its short table on the way.
    const prompt = TOKENS.slice(0, SHORT_TOKENS);
    const { tokenIds, logits } = await uncut.greedy(prompt, 12, { ignoreEos: true });
    const sequences = logits.map((_, i) => [...prompt, ...tokenIds.slice(0, i)]);
    const whole = plainLogits(sequences.at(-1)!).slice(SHORT_TOKENS - 1);
    // A row depends on what follows it only where the rotation does on the length: then every length has a pass of its own.
    const isOfLength = maxDifference(plainLogits(prompt).at(-1)!, whole[0]!) > 0;
    const expected = isOfLength ? sequences.map((sequence) => plainLogits(sequence).at(-1)!) : whole;
    expect(worstOf(logits, expected)).toBeLessThan(RELATIVE_BOUND);
    await Promise.all([uncut.release(), staged.release()]);
    console.log(`${name}: ${worst.toExponential(1)}`);
  });
});
